"""The core budget: a run takes as many cores as it has threads, and a wide one is let through."""

from __future__ import annotations

import pytest

from aoti_sched.queue.commands import Grant
from aoti_sched.queue.job import IllegalFactError, Job, Priority
from aoti_sched.queue.selection.placement import LOOP, Placement, Placing
from tests.unit.queue.support import add, device, launched, launches, take_lease, teach

HIGH, NORMAL, LOW = Priority.HIGH, Priority.NORMAL, Priority.LOW


def test_runs_share_the_cores():
    queue = device(lanes=3, cores=4)
    runner = add(queue, slots=3, width=2)
    jobs = [Job(runner) for _ in range(3)]
    assert [job for each in jobs for job in launched(queue.submit(each, 0.0))] == jobs[:2]
    assert launched(queue.complete(jobs[0], 1.0)) == [jobs[2]]


def test_there_are_as_many_cores_as_lanes_where_nothing_is_said():
    queue = device(lanes=3)
    wide, narrow = add(queue, "wide", width=2), add(queue, "narrow", slots=2)
    queue.submit(Job(wide), 0.0)
    first, second = Job(narrow), Job(narrow)
    assert launched(queue.submit(first, 0.0)) == [first]
    assert launched(queue.submit(second, 0.0)) == []


def test_more_cores_than_lanes_are_of_use_to_wide_runs():
    queue = device(lanes=2, cores=8)
    wide = add(queue, "wide", slots=3, width=4)
    jobs = [Job(wide) for _ in range(3)]
    assert [job for each in jobs for job in launched(queue.submit(each, 0.0))] == jobs[:2]


def test_a_stream_of_narrow_runs_does_not_pass_a_wide_one_that_waits_for_cores():
    queue = device(lanes=3, cores=3)
    wide, narrow = add(queue, "wide", width=3), add(queue, "narrow", slots=3)
    running = [Job(narrow), Job(narrow)]
    for job in running:
        assert launched(queue.submit(job, 0.0)) == [job]
    waits, later = Job(wide), Job(narrow)
    assert launched(queue.submit(waits, 0.0)) == []
    assert launched(queue.submit(later, 0.0)) == []  # a lane and a core are free
    assert launched(queue.complete(running[0], 1.0)) == []
    assert launched(queue.complete(running[1], 2.0)) == [waits]
    assert launched(queue.complete(waits, 3.0)) == [later]


def test_a_better_narrow_run_goes_before_a_wide_one_that_waits():
    queue = device(lanes=2)
    wide, narrow = add(queue, "wide", width=2), add(queue, "narrow", slots=2)
    queue.submit(Job(narrow), 0.0)
    queue.submit(Job(wide), 0.0)
    high = Job(narrow, HIGH)
    assert launched(queue.submit(high, 0.0)) == [high]


def test_a_wide_run_without_a_free_slot_holds_up_no_other():
    queue = device(lanes=3, cores=4)
    wide, narrow = add(queue, "wide", width=3), add(queue, "narrow", slots=2)
    queue.submit(Job(wide), 0.0)
    queue.submit(Job(wide, HIGH), 0.0)
    job = Job(narrow)
    assert launched(queue.submit(job, 0.0)) == [job]


def test_the_loop_goes_on_while_a_wide_run_waits():
    queue = device(lanes=2)
    wide, narrow = add(queue, "wide", width=2), add(queue, "narrow")
    quick = add(queue, "quick", placing=Placing(Placement.INLINE))
    queue.submit(Job(narrow), 0.0)
    queue.submit(Job(wide, HIGH), 0.0)
    job = Job(quick, LOW)
    assert launches(queue.submit(job, 0.0)) == [job]
    assert job.lane == LOOP


def test_inline_runs_take_no_cores():
    queue = device(lanes=2)
    wide, quick = (
        add(queue, "wide", width=2),
        add(queue, "quick", width=2, placing=Placing(Placement.INLINE)),
    )
    queue.submit(Job(quick), 0.0)
    job = Job(wide)
    assert launched(queue.submit(job, 0.0)) == [job]


def test_leases_are_granted_while_a_wide_run_waits_and_their_runs_need_cores():
    queue = device(lanes=2)
    wide, narrow, other = add(queue, "wide", width=2), add(queue, "narrow"), add(queue, "other")
    running = Job(narrow)
    queue.submit(running, 0.0)
    waits = Job(wide)
    queue.submit(waits, 0.0)
    (command,) = queue.submit(Job(other, LOW, is_lease_request=True), 0.0)
    assert type(command) is Grant
    held = Job(command.lease)
    assert launched(queue.submit(held, 0.0)) == []
    assert launched(queue.complete(running, 1.0)) == [waits]
    assert launched(queue.complete(waits, 2.0)) == [held]


def test_what_is_handed_ahead_takes_none():
    queue = device(lanes=2, cores=3)
    wide = add(queue, "wide", width=2, placing=Placing(follow_limit=1.0))
    narrow = add(queue, "narrow")
    teach(queue, wide, 0.125)
    first, second, other = Job(wide), Job(wide), Job(narrow)
    queue.submit(first, 0.0)
    assert launched(queue.submit(second, 0.0)) == [second]
    assert second.lane == first.lane
    assert launched(queue.submit(other, 0.0)) == [other]
    queue.complete(first, 1.0)
    third = Job(add(queue, "third"))
    assert (
        launched(queue.submit(third, 1.0)) == []
    )  # the second runs, and has the cores of the first


def test_a_lease_of_a_wide_runner_competes_for_cores_like_its_runner():
    queue = device(lanes=2)
    wide, narrow = add(queue, "wide", width=2), add(queue, "narrow", slots=2)
    lease = take_lease(queue, wide)
    running = Job(narrow)
    queue.submit(running, 0.0)
    held, later = Job(lease), Job(narrow)
    queue.submit(held, 0.0)
    assert launched(queue.submit(later, 0.0)) == []
    assert launched(queue.complete(running, 1.0)) == [held]


@pytest.mark.parametrize("width", [0, -1, 4])
def test_a_run_takes_at_least_one_core_and_no_more_than_there_are(width):
    queue = device(lanes=3)
    with pytest.raises(IllegalFactError):
        add(queue, width=width)
    assert queue.runners == {}


@pytest.mark.parametrize("cores", [0, -1])
def test_a_device_has_at_least_one_core(cores):
    with pytest.raises(IllegalFactError, match=f"cpu: a device has at least one core, not {cores}"):
        device(cores=cores)
