"""Which lane a run goes to, and how many lanes there are."""

import random

import pytest

from aoti_sched.queue import invariants
from aoti_sched.queue.commands import Launch
from aoti_sched.queue.job import Job
from tests.unit.queue.support import add, device, launched, take_lease


def start(queue, source, now=0):
    """Submit a job that starts at once."""
    job = Job(source)
    assert launched(queue.submit(job, now)) == [job]
    return job


def lane_of(queue, source):
    """Return the lane of a run that starts and ends."""
    job = start(queue, source)
    queue.complete(job, 0)
    return job.lane


def test_the_lane_freed_last_is_taken_first_unless_slots_keep_their_lanes():
    lanes = {}
    for keeps in (False, True):
        queue = device(lanes=2, keeps_lanes=keeps)
        a, b = add(queue, "a"), add(queue, "b")
        on_a, on_b = start(queue, a), start(queue, b)
        queue.complete(on_b, 0)
        queue.complete(on_a, 0)
        assert (on_a.lane, on_b.lane) == (0, 1)
        lanes[keeps] = lane_of(queue, b)
    assert lanes == {False: 0, True: 1}


def test_a_slot_that_has_not_run_takes_a_lane_that_no_slot_keeps():
    queue = device(lanes=3, keeps_lanes=True)
    runners = [add(queue, name) for name in "abc"]
    assert [lane_of(queue, runner) for runner in runners] == [0, 1, 2]
    assert [lane_of(queue, runner) for runner in reversed(runners)] == [2, 1, 0]


def test_where_every_lane_is_kept_the_one_freed_last_is_taken_and_kept_from_then_on():
    queue = device(lanes=2, keeps_lanes=True)
    a, b, c = (add(queue, name) for name in "abc")
    assert [lane_of(queue, a), lane_of(queue, b), lane_of(queue, c)] == [0, 1, 1]
    on_b = start(queue, b)
    assert (on_b.lane, lane_of(queue, c)) == (1, 0)
    queue.complete(on_b, 0)
    assert lane_of(queue, c) == 0


def test_the_jobs_of_a_lease_go_to_the_lane_of_its_slot():
    queue = device(lanes=2, keeps_lanes=True)
    a, b = add(queue, "a"), add(queue, "b")
    assert [lane_of(queue, a), lane_of(queue, b)] == [0, 1]
    lease = take_lease(queue, a)
    assert lane_of(queue, lease) == 0
    queue.release(lease, 0)
    assert lane_of(queue, a) == 0


def test_a_job_that_waited_for_its_slot_goes_to_the_slots_lane():
    queue = device(lanes=3, keeps_lanes=True)
    a, b = add(queue, "a"), add(queue, "b")
    assert [lane_of(queue, a), lane_of(queue, b)] == [0, 1]
    running, queued = start(queue, a), Job(a)
    assert queue.submit(queued, 0) == []
    assert queue.complete(running, 0) == [Launch(queued)]
    assert queued.lane == 0


def test_a_removed_runner_keeps_no_lane():
    queue = device(lanes=2, keeps_lanes=True)
    a, b = add(queue, "a"), add(queue, "b")
    assert [lane_of(queue, a), lane_of(queue, b)] == [0, 1]
    queue.drain_runner(a, 0)
    queue.remove_runner(a)
    assert lane_of(queue, add(queue, "c")) == 0


@pytest.mark.parametrize("seed", range(8))
def test_with_as_many_lanes_as_slots_each_slot_stays_on_one_lane(seed):
    draw = random.Random(seed)
    queue = device(lanes=1, keeps_lanes=True, most_lanes=9)
    runners = [add(queue, str(number), slots=number) for number in (1, 2, 3)]
    met, running = set(), []
    for _ in range(200):
        if running and draw.random() < 0.5:
            commands = queue.complete(running.pop(draw.randrange(len(running))), 0)
        else:
            commands = queue.submit(Job(draw.choice(runners)), 0)
        running += launched(commands)
        met |= {(job.source.name, job.slot, job.lane) for job in running}
    assert len(met) == len({lane for _, _, lane in met}) == 6


def test_lanes_are_added_with_runners_up_to_a_bound_and_stay():
    queue = device(lanes=1, most_lanes=4)
    counts = []
    for slots in (1, 2, 3, 1):
        runner = add(queue, f"of {slots} {len(counts)}", slots=slots)
        counts.append((queue.lanes.count, queue.lanes.cores, queue.lanes.free_cores))
    assert counts == [(1, 1, 1), (3, 3, 3), (4, 4, 4), (4, 4, 4)]
    queue.drain_runner(runner, 0)
    queue.remove_runner(runner)
    assert queue.lanes.count == 4


def test_how_many_lanes_there_will_be_can_be_asked_before():
    queue = device(lanes=2, most_lanes=4)
    assert [queue.lanes.with_slots(slots) for slots in (1, 3, 9)] == [2, 3, 4]
    assert [queue.lanes.cores_with_slots(slots) for slots in (1, 3, 9)] == [2, 3, 4]
    add(queue, slots=3)
    assert [queue.lanes.with_slots(slots) for slots in (1, 3)] == [4, 4]
    assert device(lanes=2).lanes.with_slots(9) == 2


def test_a_new_lane_is_taken_when_the_others_are_busy():
    queue = device(lanes=1, most_lanes=2)
    a = add(queue, "a")
    running = start(queue, a)
    b = add(queue, "b")
    assert (running.lane, start(queue, b).lane) == (0, 1)


def test_a_removed_runners_slots_need_no_lanes():
    queue = device(lanes=1, most_lanes=9)
    a = add(queue, "a", slots=3)
    queue.drain_runner(a, 0)
    queue.remove_runner(a)
    add(queue, "b", slots=4)
    assert queue.lanes.count == 4


def test_too_few_lanes_break_an_invariant():
    queue = device(lanes=1)
    add(queue, slots=2)
    plain = queue.unchecked
    plain.policy = type(plain.policy)(most_lanes=2)
    with pytest.raises(AssertionError, match="there is a lane for each slot, up to a bound"):
        invariants.check(plain)
