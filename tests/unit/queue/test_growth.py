"""Which jobs join a batch, by the learned times: the batch pays, and breaks no promise."""

from __future__ import annotations

import math

import pytest

from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.growth import PROMISED
from aoti_sched.queue.job import Job, JobState, Priority
from aoti_sched.queue.selection.service_time import (
    BELIEVED,
    GRAIN,
    NO_LIMIT,
    STALE,
    WINDOW,
    ServiceTimes,
)
from aoti_sched.queue.selection.urgency import RECENT
from tests.unit.queue.support import add as add_plain
from tests.unit.queue.support import device, launches

LONG = 256


def seconds_of(size):
    """Return what a run takes: a constant, and a part for each byte. Shaped as measured times."""
    return 0.005 + 0.00025 * size


def add(queue, rule, *, knows=(1, 4, 16, 64, 256, 1024, 4096), takes=seconds_of, **rest):
    runner = queue.add_runner("m", 1, Bounds(None, None), batching=rule, **rest)
    for size in knows:
        for _ in range(BELIEVED):
            runner.placing.times.learn(size, takes(size), 0.0)
    return runner


def queued(queue, jobs, now=0.0):
    """Queue jobs behind a run on the only lane, each in a turn of its own."""
    first = Job(jobs[0].source, key="k", bytes=1)
    queue.submit(first, now)
    queue.turn(now)
    for job in jobs:
        queue.submit(job, now)
        queue.turn(now)
    return first


def text(runner, length, **fields):
    return Job(runner, key="k", bytes=length, tokens=length, **fields)


def served(queue, first, now=1.0):
    """Serve all jobs, and return the batches in order."""
    found = []
    (leader,) = launches(queue.complete(first, now, started=now, finished=now + seconds_of(1)))
    while leader is not None:
        batch = list(leader.members or (leader,))
        found.append(batch)
        took = seconds_of(leader.size)
        leader = next(
            iter(launches(queue.complete(leader, now, started=now, finished=now + took))), None
        )
    return found


def lengths(batches):
    return [[job.bytes for job in batch] for batch in batches]


def test_until_a_run_has_ended_a_job_runs_alone():
    queue = device(lanes=2)
    runner = queue.add_runner("m", 2, Bounds(None, None), batching=Batching(64, 0.0, None))
    jobs = [Job(runner, key="k") for _ in range(9)]
    started = [job for job in jobs for job in launches(queue.submit(job, 0.0))]
    started += launches(queue.turn(0.0))
    assert [job.members for job in started] == [(), ()]
    (leader,) = launches(queue.complete(started[0], 1.0))
    assert len(leader.members) == 7


@pytest.mark.parametrize(("seconds", "rows"), [(math.inf, 64), (0.1, 1)])
def test_while_nothing_is_known_only_an_infinite_bound_lets_jobs_join(seconds, rows):
    queue = device()
    runner = add(queue, Batching(64, 0.0, seconds), knows=())
    jobs = [text(runner, 8) for _ in range(80)]
    first = queued(queue, jobs)
    (leader,) = launches(queue.complete(first, 1.0, ok=False))
    assert len(leader.members or (leader,)) == rows


@pytest.mark.long
@pytest.mark.parametrize(("runs", "high"), [(8, False), (2, True)])
def test_a_batch_takes_two_runs_while_a_higher_class_comes_and_eight_otherwise(runs, high):
    queue = device()
    runner = add(queue, Batching(500, 0.0, None))
    other = add_plain(queue, "other")
    first = queued(queue, [text(runner, 40) for _ in range(500)])
    if high:
        urgent = Job(other, priority=Priority.HIGH)
        queue.submit(urgent, 1.0)
        queue.cancel(urgent, 1.0)
    (leader,) = launches(queue.complete(first, 1.0, started=1.0))
    assert seconds_of(leader.size) <= runs * seconds_of(40) < seconds_of(leader.size + 40)
    assert leader.size == 40 * len(leader.members)


def test_a_short_leader_makes_a_batch_of_as_long_as_the_usual_runs_take():
    queue = device()
    runner = add(queue, Batching(500, 0.0, None))
    other = add_plain(queue, "other")
    short, long = [text(runner, 4) for _ in range(101)], [text(runner, 190) for _ in range(100)]
    first = queued(queue, [*short, *long])
    urgent = Job(other, priority=Priority.HIGH)
    queue.submit(urgent, 1.0)
    queue.cancel(urgent, 1.0)
    (leader,) = launches(queue.complete(first, 1.0, started=1.0))
    assert {job.bytes for job in leader.members} == {4}
    mean = sum(job.bytes for job in [*short[1:], *long]) // 200
    allowed = PROMISED * seconds_of(mean)
    assert 2 * seconds_of(4) < seconds_of(leader.size) <= allowed < seconds_of(leader.size + 4)


@pytest.mark.long
def test_a_class_that_has_stopped_coming_is_not_reckoned_with():
    queue = device()
    runner = add(queue, Batching(500, 0.0, None))
    urgent = text(runner, 40, priority=Priority.HIGH)
    queue.submit(urgent, 0.0)
    queue.complete(urgent, 0.0, started=0.0, finished=seconds_of(40))
    queue.turn(0.0)
    first = queued(queue, [text(runner, 40) for _ in range(500)], RECENT)
    (leader,) = launches(queue.complete(first, RECENT, started=RECENT))
    assert seconds_of(leader.size) > 7 * seconds_of(40)


@pytest.mark.long
def test_a_batch_of_a_millisecond_disturbs_no_caller():
    queue = device()
    runner = add(queue, Batching(500, 0.0, None), takes=lambda size: 1e-6 * size)
    first = queued(queue, [text(runner, 1, priority=Priority.LOW) for _ in range(600)])
    (leader,) = launches(queue.complete(first, 1.0, started=1.0, finished=1.0 + 1e-6))
    assert len(leader.members) == 500


def test_max_seconds_bounds_a_batch_and_not_its_leader():
    queue = device()
    runner = add(queue, Batching(500, 0.0, 0.05))
    first = queued(queue, [text(runner, LONG), *(text(runner, 40) for _ in range(9))])
    assert lengths(served(queue, first)) == [[LONG], [40] * 4, [40] * 4, [40]]


def test_max_tokens_counts_padding():
    queue = device()
    runner = add(queue, Batching(500, 0.0, math.inf, 100))
    first = queued(queue, [text(runner, n) for n in (24, 25, 24, 24, 101, 24)])
    assert lengths(served(queue, first)) == [[24, 24, 24, 24], [25], [101]]


def test_a_key_with_enough_tokens_waits_for_no_more():
    queue = device()
    runner = add(queue, Batching(500, 9.0, math.inf, 100))
    one, two = text(runner, 50), text(runner, 50)
    assert launches(queue.submit(one, 0.0)) == []
    queue.turn(0.0)
    (leader,) = launches(queue.submit(two, 0.0))
    assert leader.members == (one, two)


def test_short_and_long_jobs_go_apart_and_never_take_longer_than_one_by_one():
    queue = device()
    runner = add(queue, Batching(64, 0.0, math.inf))
    jobs = [text(runner, 4) for _ in range(31)]
    jobs.insert(10, text(runner, LONG))
    batches = served(queue, queued(queue, jobs))
    assert lengths(batches) == [[4] * 31, [LONG]]
    together = sum(seconds_of(batch[0].size) for batch in batches)
    assert together < sum(seconds_of(job.bytes) for job in jobs)


def test_jobs_of_like_length_join_the_nearest_first():
    queue = device()
    runner = add(queue, Batching(4, 0.0, math.inf))
    first = queued(queue, [text(runner, n) for n in (20, 22, 17, 19, 21, 20)])
    assert lengths(served(queue, first)) == [[20, 20, 19, 17], [22, 21]]


def test_a_higher_class_joins_before_a_nearer_length():
    queue = device()
    runner = add(queue, Batching(2, 0.0, math.inf))
    leader, low, high = (
        text(runner, 20, priority=Priority.HIGH),
        text(runner, 20, priority=Priority.LOW),
        text(runner, 18, priority=Priority.HIGH),
    )
    first = queued(queue, [leader, low, high])
    assert served(queue, first) == [[leader, high], [low]]


def test_jobs_of_a_lower_class_do_not_pass_a_higher_one_of_their_length_that_does_not_fit():
    queue = device()
    runner = add(queue, Batching(4, 0.0, math.inf))
    leader, large, low = (
        text(runner, 60, rows=3),
        text(runner, 40, rows=2),
        text(runner, 20, priority=Priority.LOW),
    )
    first = queued(queue, [leader, large, low])
    assert served(queue, first) == [[leader], [large, low]]


def test_the_odd_one_is_not_passed_for_long():
    """However many like jobs keep coming, the job that is first in line leads the next batch."""
    queue = device()
    runner = add(queue, Batching(4, 0.0, math.inf))
    odd = text(runner, LONG)
    first = queued(queue, [text(runner, 4), odd, *(text(runner, 4) for _ in range(40))])
    batches = served(queue, first)
    assert batches.index([odd]) == 1


def test_a_member_s_deadline_bounds_the_batch():
    """A batch is expected to end within three quarters of the time that is left."""
    queue = device()
    runner = add(queue, Batching(500, 0.0, math.inf))
    left = 4 / 3 * seconds_of(40 * 3)
    jobs = [text(runner, 40), *(text(runner, 40, deadline=1.001 + left) for _ in range(9))]
    first = queued(queue, jobs)
    (leader,) = launches(queue.complete(first, 1.0, started=1.0))
    assert len(leader.members) == 3
    assert all(job.state is not JobState.EXPIRED for job in jobs)


def test_a_member_that_would_come_too_late_in_a_batch_does_not_join_it():
    queue = device()
    runner = add(queue, Batching(500, 0.0, math.inf, None), knows=(1, 40, 1000))
    patient = [text(runner, 40, priority=Priority.HIGH) for _ in range(20)]
    hurried = text(runner, 40, deadline=1.05)
    first = queued(queue, [*patient, hurried])
    (leader,) = launches(queue.complete(first, 1.0, started=1.0))
    assert list(leader.members) == patient
    assert hurried.state is JobState.QUEUED


def test_a_member_that_may_take_too_long_by_itself_expires_and_the_next_one_joins():
    """By the median it would be in time, by the time that its run hardly exceeds it would not."""
    queue = device()
    runner = add(queue, Batching(500, 0.0, math.inf), knows=(1,))
    for seconds in (*[0.01] * 12, *[1.0] * 4):
        runner.placing.times.learn(40, seconds, 1.0)
    leader, late, other = text(runner, 40), text(runner, 40, deadline=1.3), text(runner, 40)
    leader.priority = Priority.HIGH  # so that the late job does not lead
    first = queued(queue, [leader, late, other])
    (launched,) = launches(queue.complete(first, 1.0, started=1.0))
    assert list(launched.members) == [leader, other]
    assert late.state is JobState.EXPIRED


def test_the_deadline_of_a_higher_class_that_waits_bounds_the_batch():
    queue = device(lanes=2)
    runner = add(queue, Batching(500, 0.0, math.inf))
    other = add_plain(queue, "other")
    for _ in range(8):
        other.placing.times.learn(1, 0.1, 0.0)
    queue.submit(Job(other, bytes=1), 0.0)
    jobs = [text(runner, 40, priority=Priority.LOW) for _ in range(99)]
    first = queued(queue, jobs)
    waits = Job(other, bytes=1, priority=Priority.HIGH, deadline=1.21)
    queue.submit(waits, 0.5)
    (leader,) = launches(queue.complete(first, 1.0, started=1.0))
    assert seconds_of(leader.size) <= 0.75 * 0.11 < seconds_of(leader.size + 40)


def test_deadlines_that_were_queued_before_the_first_batching_runner_count_too():
    queue = device(lanes=2)
    other = add_plain(queue, "other")
    queue.submit(Job(other), 0.0)
    queue.submit(Job(other, priority=Priority.HIGH, deadline=1.1), 0.0)
    queue.submit(Job(other, priority=Priority.HIGH), 0.0)
    runner = add(queue, Batching(500, 0.0, math.inf))
    first = queued(queue, [text(runner, 40, priority=Priority.LOW) for _ in range(99)])
    (leader,) = launches(queue.complete(first, 1.0, started=1.0))
    assert seconds_of(leader.size) <= 0.075 < seconds_of(leader.size + 40)


# --- the curve ------------------------------------------------------------------------------------


U = 128
"""Grains: the unit of the times below, so that 8,192 of them are a millisecond."""


def curve(*points):
    times = ServiceTimes()
    for size, seconds in points:
        for _ in range(BELIEVED):
            times.learn(size, seconds * U * GRAIN, 0.0)
    return times


def test_nothing_is_estimated_from_nothing():
    assert ServiceTimes().estimate(5) == 0


def test_between_and_beyond_the_points_times_are_estimated():
    times = curve((4, 1000), (16, 4000), (64, 5000))
    assert [times.estimate(size) // U for size in (4, 10, 16, 40, 64, 128)] == [
        1000,
        2500,
        4000,
        4500,
        5000,
        10000,
    ]


def test_below_the_smallest_size_a_run_takes_less_but_not_less_per_byte():
    assert curve((8, 1000)).estimate(2) == 250 * U
    assert curve((8, 1000), (16, 1200)).estimate(4) == 900 * U
    assert curve((8, 1000), (16, 9000)).estimate(4) == 500 * U
    assert curve((8, 1000), (16, 500)).estimate(4) == 1000 * U  # a smaller run takes no longer


def test_a_point_moves_with_its_runs():
    times = ServiceTimes()
    for _ in range(WINDOW):
        times.learn(4, 100 * GRAIN, 0.0)
    for _ in range(WINDOW):
        times.learn(6, 60 * GRAIN, 0.0)
    assert (times.estimate(6), times.estimate(3)) == (60, 30)


def test_a_run_grows_up_to_its_limit():
    times = curve((4, 1000), (16, 1600), (64, 4000))
    assert times.largest(4, 999 * U, 0.0) == 4
    assert times.largest(4, 1300 * U, 0.0) == 10
    assert times.largest(4, 2800 * U, 0.0) == 40
    assert times.largest(4, 8000 * U, 0.0) == 128
    assert times.largest(32, 8000 * U, 0.0) == 128


def test_a_run_grows_while_bytes_per_second_rise():
    """Within one part in eight, times per byte count as equal."""
    assert curve((4, 1000), (16, 2000), (64, 16000)).largest(4, NO_LIMIT, 0.0) == 31
    assert curve((4, 1000), (16, 2000), (64, 9000)).largest(4, 18000 * U, 0.0) == 128
    assert curve((4, 100), (31, 20000)).largest(16, NO_LIMIT, 0.0) == 16


def test_an_old_time_that_hinders_is_disregarded():
    times = curve((4, 1000), (16, 2000), (64, 32000))
    assert times.largest(4, 8000 * U, STALE - 1) == 25
    assert times.largest(4, 8000 * U, STALE) == 64
    slow = curve((4, 1 / GRAIN / U), (16, 8 / GRAIN / U))
    assert slow.largest(4, int(2.0 / GRAIN), 799.0) == 5
    assert slow.largest(4, int(2.0 / GRAIN), 800.0) == 8


def test_one_slow_run_hinders_no_growth():
    times = curve((4, 1000))
    for _ in range(BELIEVED - 1):
        times.learn(16, 32000 * U * GRAIN, 0.0)
    assert times.largest(4, 8000 * U, 0.0) == 32
    times.learn(16, 32000 * U * GRAIN, 0.0)
    assert times.largest(4, 8000 * U, 0.0) == 6
