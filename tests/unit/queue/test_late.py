"""Deadlines order a class, and a job that can't make its own takes no lane from one that can."""

from __future__ import annotations

from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.commands import Expire, Grant, Launch, WakeAt
from aoti_sched.queue.job import Job, JobState, Priority
from aoti_sched.queue.policy import UNHURRIED
from aoti_sched.queue.selection.placement import Placement, Placing
from aoti_sched.queue.selection.sorted_jobs import SortedJobs
from tests.unit.queue.support import add, device, somewhere


def learning(queue, seconds=1.0, runs=8, slots=1):
    """A runner whose runs are known to take so long."""
    placing = Placing(
        Placement.LANE, follow_limit=1e-9
    )  # which makes it learn, and hand nothing ahead
    runner = queue.add_runner("m", slots, Bounds(None, None), placing=placing)
    for _ in range(runs):
        lesson = Job(runner)
        queue.submit(lesson, 0)
        queue.complete(lesson, 0, started=0, finished=seconds)
    return runner


def launched_in_order(queue, runner, jobs):
    """The order in which they go behind a job that has the only slot."""
    running = Job(runner)
    queue.submit(running, 0)
    for job in jobs:
        queue.submit(job, 0)
    order = []
    while queue.busy_lanes:
        (launch,) = [c for c in queue.complete(running, 0) if type(c) is Launch] or [None]
        if launch is not None:
            running = launch.job
            order.append(running)
    return order


def test_the_earliest_deadline_goes_first_and_among_equals_who_came_first():
    queue = device()
    runner = add(queue)
    late, early, twin, middle = (Job(runner, deadline=at) for at in (9, 3, 3, 5))
    assert launched_in_order(queue, runner, [late, early, twin, middle]) == [
        early,
        twin,
        middle,
        late,
    ]


def test_a_higher_class_goes_before_any_deadline():
    queue = device()
    runner = add(queue)
    hurried, high = Job(runner, deadline=1), Job(runner, priority=Priority.HIGH)
    assert launched_in_order(queue, runner, [hurried, high]) == [high, hurried]


def test_a_job_without_a_deadline_is_taken_to_be_due_some_time():
    queue = device()
    runner = add(queue)
    unhurried = Job(runner)
    sooner, later = Job(runner, deadline=UNHURRIED - 1), Job(runner, deadline=UNHURRIED + 1)
    assert launched_in_order(queue, runner, [later, unhurried, sooner]) == [
        sooner,
        unhurried,
        later,
    ]


def test_it_is_due_so_long_after_it_came():
    queue = device()
    runner = add(queue)
    running, hurried, unhurried = Job(runner), Job(runner, deadline=UNHURRIED + 1), Job(runner)
    for job, now in ((running, 0), (hurried, 0), (unhurried, 5)):
        queue.submit(job, now)
    assert queue.complete(running, 5) == [Launch(hurried)]


def test_deadlines_order_across_runners():
    queue = device()
    one, other = add(queue, "one"), add(queue, "other")
    running, late, early = Job(one), Job(one, deadline=9), Job(other, deadline=3)
    for job in (running, late, early):
        queue.submit(job, 0)
    assert queue.complete(running, 0) == [Launch(early)]


def test_what_left_a_line_out_of_order_does_not_pile_up():
    line = SortedJobs()
    runner = add(device())
    jobs = [somewhere(Job(runner), id=number, due=float(-number)) for number in range(200)]
    nodes = [line.push(job.due, job) for job in jobs]
    for node in nodes[1:-1]:
        line.remove(node)
    assert len(line.entries()) < 40
    assert line.first is jobs[-1]
    assert set(line.jobs()) == {jobs[-1], jobs[0]}


def test_the_next_of_those_out_of_order_goes_when_the_first_has_left():
    line = SortedJobs()
    runner = add(device())
    late, first, second = (
        somewhere(Job(runner), id=number, due=due) for number, due in enumerate((9.0, 1.0, 2.0))
    )
    nodes = [line.push(job.due, job) for job in (late, first, second)]
    line.remove(nodes[1])
    assert line.first is second


def test_a_job_that_can_not_make_its_deadline_is_not_started():
    queue = device()
    runner = learning(queue)
    job = Job(runner, deadline=0.5)
    assert queue.submit(job, 0) == [Expire(job, 1.0)]
    assert (job.state, queue.busy_lanes) == (JobState.EXPIRED, 0)
    assert runner.counters.expired == 1


def test_one_that_just_makes_it_is():
    queue = device()
    job = Job(learning(queue), deadline=1.0)
    assert queue.submit(job, 0) == [Launch(job), WakeAt(1.0)]


def test_a_lease_is_no_run_and_is_granted_until_its_deadline():
    queue = device()
    job = Job(learning(queue), deadline=0.5, is_lease_request=True)
    assert [type(command) for command in queue.submit(job, 0)] == [Grant]


def test_while_too_little_is_known_nobody_is_given_up():
    queue = device()
    job = Job(learning(queue, runs=7), deadline=0.5)
    assert queue.submit(job, 0) == [Launch(job), WakeAt(0.5)]


def test_a_lane_goes_to_the_next_that_can_make_it():
    queue = device()
    runner = learning(queue)
    running, late, good = Job(runner), Job(runner, deadline=1.5), Job(runner, deadline=3)
    for job in (running, late, good):
        queue.submit(job, 0)
    assert queue.complete(running, 1) == [Expire(late, 1.0), Launch(good)]


def test_one_is_tried_when_none_ran_for_long_since_what_is_believed_may_be_wrong():
    queue = device()
    runner = learning(queue)
    tried = []
    for now in range(20):
        job = Job(runner, deadline=now + 0.5)
        queue.submit(job, now)
        tried.append(job.state is JobState.RUNNING)
        if job.state is JobState.RUNNING:
            queue.complete(job, now, ok=False)  # which teaches nothing
    assert [now for now in range(20) if tried[now]] == [8, 16]  # eight times as long as a run


def test_a_run_that_teaches_makes_a_try_needless():
    queue = device()
    runner = learning(queue)
    lesson = Job(runner)
    queue.submit(lesson, 7)
    queue.complete(lesson, 7, started=6, finished=7)
    job = Job(runner, deadline=8.5)
    queue.submit(job, 8)
    assert job.state is JobState.EXPIRED


def test_a_job_must_be_likely_in_time_where_others_wait_and_half_likely_where_none_does():
    queue = device()
    runner = learning(queue)
    for seconds in (2.0, 2.0, 2.0):  # of eleven runs
        lesson = Job(runner)
        queue.submit(lesson, 0)
        queue.complete(lesson, 0, started=0, finished=seconds)
    running, alone = Job(runner), Job(runner, deadline=1.5)
    queue.submit(running, 0)
    queue.submit(alone, 0)
    assert queue.complete(running, 0, ok=False) == [Launch(alone)]
    first, other = Job(runner, deadline=1.5), Job(runner)
    queue.submit(first, 0)
    queue.submit(other, 0)
    assert queue.complete(alone, 0, ok=False) == [Expire(first, 2.0), Launch(other)]


def test_a_job_that_would_be_late_is_not_handed_ahead():
    queue = device()
    placing = Placing(Placement.LANE, follow_limit=2.0)
    runner = queue.add_runner("m", 1, Bounds(None, None), placing=placing)
    for _ in range(8):
        lesson = Job(runner)
        queue.submit(lesson, 0)
        queue.complete(lesson, 0, started=0, finished=1)
    queue.submit(Job(runner), 0)
    late, gone = Job(runner, deadline=0.5), Job(runner, deadline=0.25)
    queue.submit(late, 0)
    queue.submit(gone, 0)
    assert queue.lanes.handed_ahead == {}
    assert late.state is gone.state is JobState.QUEUED
