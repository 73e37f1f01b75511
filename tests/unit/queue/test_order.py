"""Which job goes next: priority classes, first in first out within, and runners that don't
block each other.
"""

from __future__ import annotations

import pytest

from aoti_sched.queue.commands import Launch
from aoti_sched.queue.job import IllegalFactError, Job, JobState, Priority
from aoti_sched.queue.selection.sorted_jobs import SortedJobs
from tests.unit.queue.support import CheckedQueue, add, device, launched, somewhere

HIGH, NORMAL, LOW = Priority.HIGH, Priority.NORMAL, Priority.LOW


def run_all(queue, first):
    """Complete what runs, one after the other, and return the jobs in the order of their
    launches.
    """
    order = [first]
    for job in order:
        order += launched(queue.complete(job, 1))
    return order


def test_a_job_with_a_free_slot_and_lane_is_launched_at_once():
    queue = device(lanes=2)
    runner = add(queue, slots=2)
    job = Job(runner)
    assert queue.submit(job, 3.5) == [Launch(job)]
    assert (job.state, job.lane, job.slot, job.epoch) == (JobState.RUNNING, 0, 0, 1)
    assert (job.submitted, job.started) == (3.5, 3.5)
    assert queue.busy_lanes == 1


def test_equal_jobs_go_first_in_first_out():
    queue = device()
    runner = add(queue)
    jobs = [Job(runner) for _ in range(5)]
    for job in jobs:
        queue.submit(job, 0)
    assert run_all(queue, jobs[0]) == jobs


def test_a_higher_class_goes_first_and_keeps_its_own_order():
    queue = device()
    runner = add(queue)
    classes = [NORMAL, LOW, NORMAL, HIGH, LOW, HIGH]
    jobs = [Job(runner, priority) for priority in classes]
    for job in jobs:
        queue.submit(job, 0)
    first, low, normal, high, last, second_high = jobs
    assert run_all(queue, first) == [first, high, second_high, normal, low, last]


def test_the_same_order_holds_across_runners():
    queue = device()
    a, b = add(queue, "a", slots=9), add(queue, "b", slots=9)
    jobs = [Job(a), Job(b, LOW), Job(b), Job(a), Job(b, HIGH), Job(a, HIGH)]
    for job in jobs:
        queue.submit(job, 0)
    first, low, normal, later, high, second_high = jobs
    assert run_all(queue, first) == [first, high, second_high, normal, later, low]


def test_a_runner_without_a_free_slot_holds_up_no_other():
    queue = device(lanes=2)
    a, b = add(queue, "a"), add(queue, "b")
    queue.submit(Job(a), 0)
    blocked, free = Job(a, HIGH), Job(b, LOW)
    assert queue.submit(blocked, 0) == []
    assert queue.submit(free, 0) == [Launch(free)]


def test_a_lane_that_comes_home_goes_to_the_best_job_that_has_a_slot():
    queue = device(lanes=2)
    a, b = add(queue, "a"), add(queue, "b", slots=2)
    running, other = Job(a), Job(b)
    queue.submit(running, 0)
    queue.submit(other, 0)
    no_slot, waits_for_a_lane = Job(a, HIGH), Job(b, LOW)
    queue.submit(no_slot, 0)
    queue.submit(waits_for_a_lane, 0)
    assert queue.complete(other, 1) == [Launch(waits_for_a_lane)]
    assert queue.complete(running, 1) == [Launch(no_slot)]


def test_no_more_jobs_run_than_there_are_lanes():
    queue = device(lanes=2)
    runner = add(queue, slots=5)
    jobs = [Job(runner) for _ in range(5)]
    assert [job for each in jobs for job in launched(queue.submit(each, 0))] == jobs[:2]
    assert queue.busy_lanes == 2


def test_no_more_jobs_run_than_the_runner_has_slots():
    queue = device(lanes=5)
    runner = add(queue, slots=2)
    jobs = [Job(runner) for _ in range(5)]
    assert [job for each in jobs for job in launched(queue.submit(each, 0))] == jobs[:2]


def test_the_slot_and_lane_used_last_are_used_next():
    queue = device(lanes=3)
    runner = add(queue, slots=3)
    jobs = [Job(runner) for _ in range(3)]
    for job in jobs:
        queue.submit(job, 0)
    for job in (jobs[2], jobs[0], jobs[1]):
        queue.complete(job, 1)
    following = Job(runner)
    queue.submit(following, 2)
    assert (following.lane, following.slot) == (jobs[1].lane, jobs[1].slot) == (1, 1)


def test_a_cancelled_head_lets_the_next_one_pass():
    queue = device()
    runner = add(queue)
    running, head, following = (Job(runner) for _ in range(3))
    for job in (running, head, following):
        queue.submit(job, 0)
    queue.cancel(head, 1)
    assert queue.complete(running, 2) == [Launch(following)]


def test_a_head_that_was_overtaken_and_is_head_again_still_goes():
    queue = device()
    runner = add(queue)
    running, normal, high = Job(runner), Job(runner), Job(runner, HIGH)
    for job in (running, normal, high):
        queue.submit(job, 0)
    queue.cancel(high, 1)
    assert queue.complete(running, 2) == [Launch(normal)]


def test_what_lost_its_turn_does_not_pile_up_behind_the_best():
    queue = device()
    a, b = add(queue, "a", slots=2), add(queue, "b")
    running, best = Job(a), Job(a, HIGH)
    others = [Job(add(queue, f"other {number}")) for number in range(10)]
    for job in (running, best, *others):
        queue.submit(job, 0)
    for _ in range(200):
        job = Job(b)
        queue.submit(job, 1)
        queue.cancel(job, 1)
        assert len(queue._selector._runs.entries()) < 50
    last = Job(b)
    queue.submit(last, 1)
    assert run_all(queue, running) == [running, best, *others, last]


@pytest.mark.parametrize("lanes", [0, -1])
def test_a_device_has_at_least_one_lane(lanes):
    with pytest.raises(IllegalFactError, match=f"cpu: a device has at least one lane, not {lanes}"):
        CheckedQueue("cpu", lanes)


def test_a_job_leaves_no_queue_that_it_is_not_in():
    queue = device()
    runner = add(queue)
    running, queued = Job(runner), Job(runner)
    for job in (running, queued):
        queue.submit(job, 0)
    for job, other in ((running, runner.queue), (queued, runner.gate)):
        with pytest.raises(IllegalFactError, match=f"job {job.id} is not in this queue"):
            other.remove(job)
    assert (len(runner.queue), len(runner.gate)) == (1, 0)


@pytest.mark.parametrize("early", [False, True])
def test_a_job_leaves_sorted_jobs_once(early):
    jobs, runner = SortedJobs(), add(device())
    first = jobs.push(2.0, somewhere(Job(runner), id=1))
    second = jobs.push(1.0 if early else 3.0, somewhere(Job(runner), id=2))
    assert second.early is early
    jobs.remove(second)
    with pytest.raises(IllegalFactError, match="job 2 is not among these jobs"):
        jobs.remove(second)
    assert (jobs.jobs(), jobs.first) == ([first.job], first.job)
