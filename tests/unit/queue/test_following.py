"""A lane that runs a short job may be given the next one of the same source before it is done."""

from __future__ import annotations

import itertools

import pytest

from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.commands import BarrierReached, Expire, Grant
from aoti_sched.queue.job import Job, JobState, Priority
from aoti_sched.queue.selection.placement import Placing
from tests.unit.queue.support import add, device, launched, launches, take_lease, teach

SHORT = 0.125


def short_runner(queue, name="m", slots=1, ahead_limit=0.0):
    """A runner whose runs are known to be short."""
    placing = Placing(follow_limit=1.0, ahead_limit=ahead_limit)
    runner = queue.add_runner(name, slots, Bounds(None, None), placing=placing)
    for _ in range(8):
        (job,) = launched(queue.submit(Job(runner), 0.0))
        assert launched(queue.complete(job, 0.0, started=0.0, finished=SHORT)) == []
    return runner


def test_the_next_of_the_same_source_follows_on_its_lane_and_slot():
    queue = device()
    runner = short_runner(queue)
    first, second, third = Job(runner), Job(runner), Job(runner)
    assert launched(queue.submit(first, 1.0)) == [first]
    assert launched(queue.submit(second, 1.0)) == [second]
    assert (second.lane, second.slot, second.state) == (first.lane, first.slot, JobState.RUNNING)
    assert launched(queue.submit(third, 1.0)) == []  # a lane holds two
    assert launched(queue.complete(first, 1.0, started=1.0, finished=1.0 + SHORT)) == [third]
    assert launched(queue.complete(second, 2.0)) == []
    assert queue.busy_lanes == 1
    queue.complete(third, 3.0)
    assert queue.busy_lanes == 0
    assert runner.home


@pytest.mark.parametrize(("limit", "most"), [(0.0, 1), (2.9, 2), (3.0, 3), (6.9, 6), (100.0, 7)])
def test_several_follow_as_long_as_they_take_no_longer_than_the_limit_together(limit, most):
    queue = device()
    runner = short_runner(queue, ahead_limit=limit * SHORT)
    jobs = [Job(runner) for _ in range(9)]
    taken = [one for job in jobs for one in launched(queue.submit(job, 1.0))]
    assert taken == jobs[: 1 + most]
    assert {(job.lane, job.slot) for job in taken} == {(0, 0)}
    for number, job in enumerate(jobs):  # each that ends lets one more follow
        assert queue.lanes.running[0] is job
        now = 2.0 + number
        expected = jobs[number + 1 + most : number + 2 + most]
        assert launched(queue.complete(job, now, started=now - SHORT, finished=now)) == expected
    assert queue.busy_lanes == 0
    assert runner.home


def test_the_lane_with_the_fewest_behind_it_is_handed_the_next():
    queue = device(lanes=2)
    runner = short_runner(queue, slots=2, ahead_limit=1.0)
    jobs = [Job(runner) for _ in range(7)]
    for job in jobs:
        queue.submit(job, 1.0)
    assert [job.lane for job in jobs] == [0, 1, 1, 0, 1, 0, 1]
    queue.complete(jobs[0], 2.0, started=1.0, finished=1.0 + SHORT)
    queue.complete(jobs[3], 2.0, started=1.0, finished=1.0 + SHORT)
    later = [Job(runner) for _ in range(5)]
    for job in later:
        queue.submit(job, 2.0)
    assert [job.lane for job in later] == [0, 0, 0, 0, 1]


def test_a_longer_job_does_not_follow_as_many():
    queue = device()
    placing = Placing(follow_limit=1.0, ahead_limit=4 * SHORT)
    runner = queue.add_runner("m", 1, Bounds(None, None), placing=placing)
    for size, seconds in ((8, SHORT), (800, 3 * SHORT)):
        for _ in range(8):
            (job,) = launched(queue.submit(Job(runner, bytes=size), 0.0))
            queue.complete(job, 0.0, started=0.0, finished=seconds)
    first, second, long, short = (Job(runner, bytes=size) for size in (8, 8, 800, 8))
    for job in (first, second):
        assert launched(queue.submit(job, 1.0)) == [job]
    assert launched(queue.submit(long, 1.0)) == []
    assert launched(queue.submit(short, 1.0)) == []  # it does not overtake
    assert launched(queue.complete(first, 2.0, started=1.0, finished=1.0 + SHORT)) == [long]
    assert queue.lanes.handed_ahead == {0: [long]}


def test_jobs_that_may_share_a_run_follow_one_by_one():
    queue = device()
    placing = Placing(follow_limit=1.0, ahead_limit=1.0)
    runner = add(queue, placing=placing, batching=Batching(8))
    teach(queue, runner, SHORT)
    first, *others = (Job(runner, key="k") for _ in range(4))
    queue.submit(first, 1.0)
    queue.turn(1.0)
    for job in others[:1]:
        queue.submit(job, 1.0)
    queue.turn(1.0)
    assert queue.lanes.handed_ahead == {0: others[:1]}
    for job in others[1:]:
        assert launches(queue.submit(job, 1.0)) == []
    queue.turn(1.0)
    queue.complete(first, 2.0, started=1.0, finished=1.0 + SHORT)
    assert [list(job.members) for job in queue.lanes.handed_ahead[0]] == [others[1:]]


@pytest.mark.parametrize("which", [1, 2, 3])
def test_one_of_several_that_its_lane_would_not_take_ends_and_the_others_run_in_order(which):
    queue = device()
    runner = short_runner(queue, ahead_limit=3 * SHORT)
    jobs = [Job(runner) for _ in range(5)]
    for job in jobs:
        queue.submit(job, 1.0)
    assert launched(queue.complete(jobs[which], 1.0, ok=False)) == jobs[4:]
    rest = [job for job in jobs if job is not jobs[which]]
    for job in rest:
        assert queue.lanes.running[0] is job
        queue.complete(job, 2.0)
    assert jobs[which].state is JobState.FAILED
    assert runner.home


def test_nothing_follows_while_too_little_is_known():
    queue = device()
    runner = queue.add_runner("m", 1, Bounds(None, None), placing=Placing(follow_limit=1.0))
    queue.submit(Job(runner), 0.0)
    assert launched(queue.submit(Job(runner), 0.0)) == []


def test_long_runs_are_not_followed():
    queue = device()
    runner = queue.add_runner("m", 1, Bounds(None, None), placing=Placing(follow_limit=1.0))
    for _ in range(8):
        (job,) = launched(queue.submit(Job(runner), 0.0))
        queue.complete(job, 0.0, started=0.0, finished=2.0)
    queue.submit(Job(runner), 0.0)
    assert launched(queue.submit(Job(runner), 0.0)) == []


def test_a_better_job_that_waits_for_a_lane_goes_first():
    queue = device(lanes=1)
    runner, other = short_runner(queue), queue.add_runner("other", 1, Bounds(None, None))
    first, waits, second = Job(runner), Job(other), Job(runner)
    queue.submit(first, 1.0)
    queue.submit(waits, 1.0)
    assert launched(queue.submit(second, 1.0)) == []
    assert launched(queue.complete(first, 2.0)) == [waits]


def test_a_worse_job_that_waits_for_a_lane_does_not_stop_it():
    queue = device(lanes=1)
    runner, other = short_runner(queue), queue.add_runner("other", 1, Bounds(None, None))
    first, waits, second = Job(runner), Job(other, Priority.LOW), Job(runner)
    queue.submit(first, 1.0)
    queue.submit(waits, 1.0)
    assert launched(queue.submit(second, 1.0)) == [second]
    assert launched(queue.complete(first, 2.0)) == []
    assert launched(queue.complete(second, 3.0)) == [waits]


def test_a_lease_is_not_granted_ahead_of_time():
    queue = device()
    runner = short_runner(queue)
    first = Job(runner)
    queue.submit(first, 1.0)
    assert queue.submit(Job(runner, is_lease_request=True), 1.0) == []
    (command,) = queue.complete(first, 2.0)
    assert type(command) is Grant


def test_a_held_leases_runs_follow_each_other_on_its_slot():
    queue = device()
    runner = short_runner(queue)
    lease = take_lease(queue, runner, 1.0)
    first, second = Job(lease), Job(lease)
    assert launched(queue.submit(first, 1.0)) == [first]
    assert launched(queue.submit(second, 1.0)) == [second]
    assert second.slot == lease.slot
    queue.release(lease, 1.0)
    queue.complete(first, 2.0)
    assert not runner.home
    queue.complete(second, 2.0)
    assert runner.home


def test_a_barrier_waits_for_what_follows():
    queue = device()
    runner = short_runner(queue)
    first, second = Job(runner), Job(runner)
    queue.submit(first, 1.0)
    queue.submit(second, 1.0)
    assert queue.close_barrier(runner, 1.0) == []
    assert launched(queue.submit(Job(runner), 1.0)) == []
    assert queue.complete(first, 2.0) == []
    (command,) = queue.complete(second, 2.0)
    assert type(command) is BarrierReached


def test_what_expires_before_it_is_handed_on_is_not():
    queue = device()
    runner = short_runner(queue)
    first, second = Job(runner), Job(runner)
    third = Job(runner, deadline=2.0)
    for job in (first, second, third):
        queue.submit(job, 1.0)
    assert launched(queue.complete(first, 2.0, started=1.0, finished=1.0 + SHORT)) == []
    assert third.state is JobState.QUEUED
    assert [type(command) for command in queue.tick(2.0)] == [Expire]
    assert launched(queue.complete(second, 3.0)) == []


@pytest.mark.parametrize("which", [0, 1])
def test_who_leaves_lets_the_lane_finish_both(which):
    queue = device()
    runner = short_runner(queue)
    jobs = [Job(runner), Job(runner)]
    for job in jobs:
        queue.submit(job, 1.0)
    queue.cancel(jobs[which], 1.0)
    for job in jobs:
        queue.complete(job, 2.0)
    assert jobs[which].state is JobState.CANCELLED
    assert jobs[1 - which].state is JobState.DONE
    assert runner.home


def test_a_job_that_its_lane_would_not_take_ends_and_another_may_follow():
    queue = device()
    runner = short_runner(queue)
    first, second, third = Job(runner), Job(runner), Job(runner)
    queue.submit(first, 1.0)
    queue.submit(second, 1.0)
    queue.submit(third, 1.0)
    assert launched(queue.complete(second, 1.0, ok=False)) == [third]
    queue.complete(first, 2.0)
    queue.complete(third, 3.0)
    assert runner.home


DELAY = 0.5


def batching_runner(queue, name, *, runs, spare_slots):
    """A runner with short runs under way, whose jobs wait for a delay and the end of a turn."""
    placing, batching = Placing(follow_limit=1.0), Batching(2, DELAY)
    runner = add(queue, name, runs + spare_slots, placing=placing, batching=batching)
    teach(queue, runner, SHORT)
    for _ in range(runs):
        assert launches(queue.submit(Job(runner), 0.0))
    return runner


@pytest.mark.parametrize("spare_slots", [0, 2], ids=["no spare slots", "spare slots"])
@pytest.mark.parametrize("arrivals", [*itertools.permutations(range(3))])
def test_at_the_end_of_a_turn_jobs_are_handed_ahead_best_first(arrivals, spare_slots):
    queue = device(lanes=3)
    two = batching_runner(queue, "two", runs=2, spare_slots=spare_slots)
    one = batching_runner(queue, "one", runs=1, spare_slots=spare_slots)
    jobs = [
        Job(two, Priority.HIGH, key="k"),
        Job(one, Priority.NORMAL, key="k"),
        Job(two, Priority.LOW, key="l"),
    ]
    queue.turn(1.0)
    for number in arrivals:
        assert launches(queue.submit(jobs[number], 1.0)) == []
    assert launches(queue.turn(1.0 + DELAY)) == jobs


@pytest.mark.parametrize("high_is_first", [False, True])
def test_the_best_job_is_handed_ahead_between_two_overdue_launches(high_is_first):
    queue = device(lanes=3, max_wait=2.0)
    one = batching_runner(queue, "one", runs=1, spare_slots=0)
    other = batching_runner(queue, "other", runs=1, spare_slots=0)
    low = add(queue, "low", slots=3)
    first, *overdue = [Job(low, Priority.LOW) for _ in range(3)]
    for job in (first, *overdue):
        queue.submit(job, 0.0)
    assert launched(queue.complete(first, 3.0)) == overdue[:1]
    jobs = [Job(one, Priority.NORMAL, key="k"), Job(other, Priority.HIGH, key="k")]
    for job in reversed(jobs) if high_is_first else jobs:
        assert launches(queue.submit(job, 3.0)) == []
    assert launches(queue.turn(3.0 + DELAY)) == jobs[1:]
