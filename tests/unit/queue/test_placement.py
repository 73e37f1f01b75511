"""Where a launch runs: on a lane, or on the loop's own thread within the budget of a turn."""

from __future__ import annotations

import pytest

from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.commands import Expire, Grant, Launch, NextTurn
from aoti_sched.queue.job import IllegalFactError, Job, Priority
from aoti_sched.queue.selection.placement import LOOP, Placement, Placing
from tests.unit.queue.support import CheckedQueue, add, take_lease

LIMIT, BUDGET = 0.5, 1.0
QUICK, SLOW = 0.25, 0.75


def device(lanes=1):
    return CheckedQueue("cpu", lanes, Bounds(None, None), inline_budget=BUDGET)


def runner_of(queue, choice, name="m", slots=1):
    return queue.add_runner(name, slots, Bounds(None, None), placing=Placing(choice, LIMIT))


def launches(commands):
    return [command.job for command in commands if type(command) is Launch]


def run(queue, runner, seconds, *, ok=True, size=0):
    """One run that nothing stands in the way of; says whether it went inline."""
    job = Job(runner, bytes=size)
    assert launches(queue.submit(job, 0.0)) == [job]
    queue.complete(job, 0.0, ok=ok, started=0.0, finished=seconds)
    return job.inline


def learn_quick(queue, runner):
    for _ in range(8):
        run(queue, runner, QUICK)


def test_runs_go_inline_once_they_are_known_to_be_short():
    queue = device()
    runner = runner_of(queue, Placement.AUTO)
    assert [run(queue, runner, QUICK) for _ in range(9)] == [False] * 8 + [True]
    assert runner.counters.inline == 1


def test_failed_runs_teach_nothing():
    queue = device()
    runner = runner_of(queue, Placement.AUTO)
    for _ in range(20):
        assert not run(queue, runner, QUICK, ok=False)


def test_runs_that_are_not_short_stay_on_lanes():
    queue = device()
    runner = runner_of(queue, Placement.AUTO)
    assert not any(run(queue, runner, SLOW) for _ in range(50))


def test_inputs_of_another_size_are_learned_apart():
    queue = device()
    runner = runner_of(queue, Placement.AUTO)
    learn_quick(queue, runner)
    assert not run(queue, runner, SLOW, size=1000)
    assert run(queue, runner, QUICK)


def test_a_model_that_turns_slow_goes_back_to_lanes():
    queue = device()
    runner = runner_of(queue, Placement.AUTO)
    learn_quick(queue, runner)
    places = []
    for _ in range(10):
        queue.turn(0.0)
        places.append(run(queue, runner, SLOW))
    assert places[0]
    assert not places[-1]


def test_one_run_longer_than_a_whole_turn_may_take_sends_it_back_at_once():
    queue = device()
    runner = runner_of(queue, Placement.AUTO)
    learn_quick(queue, runner)
    for _ in range(24):  # much is known
        queue.turn(0.0)
        run(queue, runner, QUICK)
    assert run(queue, runner, BUDGET + 0.125, ok=False)
    queue.turn(0.0)
    assert not run(queue, runner, QUICK)


def test_the_choice_of_a_lane_or_of_the_loop_holds():
    queue = device()
    on_lane, on_loop = (
        runner_of(queue, Placement.LANE, "lane"),
        runner_of(queue, Placement.INLINE, "loop"),
    )
    for _ in range(20):
        queue.turn(0.0)
        assert not run(queue, on_lane, QUICK)
        assert run(queue, on_loop, 3.0)


def test_the_loop_runs_one_at_a_time():
    queue = device()
    runner = runner_of(queue, Placement.INLINE, slots=2)
    first, second = Job(runner), Job(runner)
    assert launches(queue.submit(first, 0.0)) == [first]
    assert first.lane == LOOP
    assert launches(queue.submit(second, 0.0)) == []
    assert launches(queue.complete(first, 0.0)) == [second]


def test_a_turn_is_asked_for_once_and_gives_the_budget_back():
    queue = device()
    runner = runner_of(queue, Placement.INLINE)
    job = Job(runner)
    assert [type(command) for command in queue.submit(job, 0.0)] == [Launch, NextTurn]
    queue.complete(job, 0.0, started=0.0, finished=BUDGET)
    waits, more = Job(runner), Job(runner)
    assert queue.submit(waits, 0.0) == []  # the turn is used up
    assert queue.submit(more, 0.0) == []
    assert [type(command) for command in queue.turn(1.0)] == [Launch, NextTurn]
    assert launches(queue.complete(waits, 1.0, started=1.0, finished=1.0 + QUICK)) == [more]
    queue.complete(more, 1.0, started=1.0, finished=1.0 + QUICK)
    assert queue.turn(2.0) == []


def test_a_turn_that_comes_while_something_runs_inline_asks_for_another():
    queue = device()
    runner = runner_of(queue, Placement.INLINE)
    job = Job(runner)
    queue.submit(job, 0.0)
    assert [type(command) for command in queue.turn(1.0)] == [NextTurn]
    queue.complete(job, 1.0)


def test_lanes_go_on_when_the_turn_is_used_up():
    queue = device()
    runner, other = runner_of(queue, Placement.INLINE), add(queue, "other")
    run(queue, runner, BUDGET)
    queue.submit(Job(runner), 0.0)
    job = Job(other)
    assert launches(queue.submit(job, 0.0)) == [job]


def test_the_loop_goes_on_when_the_lanes_are_busy():
    queue = device()
    runner, other = runner_of(queue, Placement.INLINE), add(queue, "other", slots=2)
    queue.submit(Job(other), 0.0)
    queue.submit(Job(other), 0.0)  # waits for the lane, and came first
    job = Job(runner)
    assert launches(queue.submit(job, 0.0)) == [job]


def test_a_short_run_does_not_overtake_its_own_runners_queue():
    queue = device()
    runner = runner_of(queue, Placement.AUTO, slots=2)
    learn_quick(queue, runner)
    other = add(queue, "other")
    queue.submit(Job(other), 0.0)  # on the only lane
    large, small = Job(runner, bytes=1000), Job(runner)
    assert queue.submit(large, 0.0) == []
    assert queue.submit(small, 0.0) == []


def test_the_best_goes_first_wherever_it_runs():
    queue = device()
    runner, other = runner_of(queue, Placement.INLINE), add(queue, "other")
    blocker, inline = Job(other), Job(runner)
    queue.submit(blocker, 0.0)
    queue.submit(inline, 0.0)
    low, high = Job(other, Priority.LOW), Job(runner, Priority.HIGH)
    queue.submit(low, 0.0)
    queue.submit(high, 0.0)
    assert launches(queue.complete(inline, 0.0)) == [high]
    assert launches(queue.complete(blocker, 0.0)) == [low]


def test_a_lease_is_granted_while_lanes_and_loop_are_busy():
    queue = device()
    runner, other = runner_of(queue, Placement.INLINE, slots=2), add(queue, "other", slots=2)
    queue.submit(Job(other), 0.0)
    queue.submit(Job(runner), 0.0)
    for source in (runner, other):
        (command,) = queue.submit(Job(source, is_lease_request=True), 0.0)
        assert type(command) is Grant


def test_a_held_leases_runs_go_where_its_runners_do():
    queue = device()
    runner = runner_of(queue, Placement.AUTO)
    learn_quick(queue, runner)
    lease = take_lease(queue, runner)
    assert run(queue, lease, QUICK)


def test_what_waits_for_the_next_turn_can_expire():
    queue = device()
    runner = runner_of(queue, Placement.INLINE)
    run(queue, runner, BUDGET)
    queue.submit(Job(runner, deadline=1.0), 0.0)
    assert [type(command) for command in queue.turn(1.0)] == [Expire]


def test_what_was_learned_moves_those_who_wait():
    queue = device()
    runner = runner_of(queue, Placement.AUTO, slots=2)
    learn_quick(queue, runner)
    first, second = Job(runner), Job(runner)
    queue.submit(first, 0.0)
    assert queue.submit(second, 0.0) == []  # waits for the loop
    assert launches(queue.complete(first, 0.0, started=0.0, finished=9.0)) == [second]
    assert not second.inline


def test_a_job_that_is_not_the_loops_cant_complete_there():
    queue = device()
    runner = runner_of(queue, Placement.INLINE)
    job, queued = Job(runner), Job(runner)
    queue.submit(job, 0.0)
    queue.submit(queued, 0.0)
    with pytest.raises(IllegalFactError, match="QUEUED and not on a lane"):
        queue.complete(queued, 0.0)
