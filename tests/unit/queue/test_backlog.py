"""Short runs that the loop would take too long to come to go to lanes."""

from __future__ import annotations

import pytest

from aoti_sched.queue.batching import Batching
from aoti_sched.queue.job import Job, Priority
from aoti_sched.queue.selection.placement import LOOP, Placement, Placing
from tests.unit.queue.support import CheckedQueue, add, launches, teach

RUN = 0.125
BACKLOG = 4 * RUN
BUDGET = 16 * RUN


def device(lanes=2, **rest):
    return CheckedQueue("cpu", lanes, inline_budget=BUDGET, **rest)


def short_runner(queue, name="short", choice=Placement.AUTO, slots=4, **rest):
    """A runner whose runs are known to be short."""
    placing = Placing(choice, 1.0, follow_limit=1.0, ahead_limit=2 * RUN, backlog_limit=BACKLOG)
    runner = add(queue, name, slots, placing=placing, **rest)
    teach(queue, runner, RUN)
    queue.turn(0.0)
    return runner


def submit(queue, runner, count, **fields):
    """Submit jobs while the loop is at work; return them, and what was launched."""
    jobs = [Job(runner, **fields) for _ in range(count)]
    return jobs, [one for job in jobs for one in launches(queue.submit(job, 1.0))]


def spend_the_turn(queue):
    """Run something inline for as long as a turn may take."""
    runner = add(queue, "spends", placing=Placing(Placement.INLINE))
    job = Job(runner)
    assert launches(queue.submit(job, 1.0)) == [job]
    assert job.lane == LOOP
    queue.complete(job, 1.0, started=1.0 - BUDGET, finished=1.0)


def test_few_wait_for_the_loop():
    queue = device()
    runner = short_runner(queue)
    spend_the_turn(queue)
    _, launched = submit(queue, runner, 5)
    assert launched == []
    (first,) = launches(queue.turn(2.0))
    assert first.lane == LOOP


def test_many_go_to_free_lanes_and_then_behind_what_runs_there():
    queue = device()
    runner = short_runner(queue)
    spend_the_turn(queue)
    jobs, launched = submit(queue, runner, 12)
    # Five are left to the loop. Of the others, two run, and two are behind each of these.
    assert launched == jobs[:6]
    assert [job.lane for job in launched] == [0, 1, 1, 0, 1, 0]
    assert not any(job.inline for job in launched)
    assert queue.lanes.running == {0: jobs[0], 1: jobs[1]}


def test_where_the_lanes_are_full_the_loop_takes_one_each_turn():
    queue = device()
    runner = short_runner(queue)
    spend_the_turn(queue)
    jobs, launched = submit(queue, runner, 20)
    rest = jobs[len(launched) :]
    (one,) = launches(queue.turn(2.0))
    assert (one, one.lane) == (rest[0], LOOP)
    assert launches(queue.complete(one, 2.0, started=2.0 - RUN, finished=2.0)) == []
    (other,) = launches(queue.turn(3.0))
    assert (other, other.lane) == (rest[1], LOOP)


def test_when_the_loop_has_caught_up_they_wait_for_it_again():
    queue = device()
    runner = short_runner(queue)
    spend_the_turn(queue)
    jobs, launched = submit(queue, runner, 9)
    assert launched == jobs[:4]  # five are left to the loop
    assert launches(queue.complete(jobs[0], 2.0, started=1.0, finished=1.0 + RUN)) == []
    (first,) = launches(queue.turn(2.0))
    assert (first, first.lane) == (jobs[4], LOOP)


def test_what_is_to_run_inline_always_does():
    queue = device()
    runner = short_runner(queue, choice=Placement.INLINE)
    spend_the_turn(queue)
    _, launched = submit(queue, runner, 20)
    assert launched == []


def test_jobs_that_may_share_a_run_are_one_batch_for_the_loop():
    queue = device()
    runner = short_runner(queue, batching=Batching(32))
    spend_the_turn(queue)
    jobs, launched = submit(queue, runner, 20, key="k")
    assert launched == []
    (first,) = launches(queue.turn(2.0))
    assert first.lane == LOOP
    assert list(first.members) == jobs


@pytest.mark.parametrize("better", [Priority.HIGH, Priority.LOW])
def test_they_take_a_lane_in_the_order_of_all_that_wait_for_one(better):
    queue = device(lanes=1)
    runner, other = short_runner(queue), add(queue, "other")
    first, waits = Job(other), Job(other, better)
    queue.submit(first, 1.0)
    queue.submit(waits, 1.0)
    spend_the_turn(queue)
    jobs, launched = submit(queue, runner, 8)
    assert launched == []
    expected = waits if better is Priority.HIGH else jobs[0]
    assert launches(queue.complete(first, 2.0)) == [expected]


def test_a_better_short_job_that_wants_a_lane_stops_the_handing_ahead():
    queue = device(lanes=1)
    low, high = short_runner(queue, "low"), short_runner(queue, "high")
    spend_the_turn(queue)
    jobs, launched = submit(queue, low, 16, priority=Priority.LOW)
    assert launched == jobs[:3]  # one runs, and two are behind it
    better, launched = submit(queue, high, 6, priority=Priority.HIGH)
    assert launched == []
    for job in jobs[:2]:
        assert launches(queue.complete(job, 2.0, started=1.0, finished=1.0 + RUN)) == []
    assert launches(queue.complete(jobs[2], 2.0, started=1.0, finished=1.0 + RUN)) == better[:1]


def test_a_job_that_needs_more_cores_is_not_overtaken_on_a_lane():
    queue = device(cores=2)
    runner, wide = short_runner(queue), add(queue, "wide", slots=2, width=2)
    first, waits = Job(wide), Job(wide, Priority.HIGH)
    queue.submit(first, 1.0)
    queue.submit(waits, 1.0)
    spend_the_turn(queue)
    _, launched = submit(queue, runner, 8)
    assert launched == []
    (one,) = launches(queue.turn(2.0))
    assert one.lane == LOOP


def test_a_job_of_an_unknown_size_is_not_kept_from_the_loop_by_a_lane_that_would_not_take_it():
    """Larger inputs are known to be short, so it belongs on the loop; no lane is handed it."""
    queue = device(lanes=1)
    placing = Placing(
        Placement.AUTO, 1.0, follow_limit=1.0, ahead_limit=2 * RUN, backlog_limit=BACKLOG
    )
    runner = add(queue, "short", 4, placing=placing)
    teach(queue, runner, RUN, size=800)
    queue.turn(0.0)
    spend_the_turn(queue)
    known, launched = submit(queue, runner, 6, bytes=800)
    assert launched == known[:1]
    (job,), launched = submit(queue, runner, 1, bytes=8, priority=Priority.HIGH)
    assert launched == []
    assert launches(queue.turn(2.0)) == [job]
    assert job.lane == LOOP
