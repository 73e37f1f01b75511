"""`max_wait`: however many better jobs there are, none waits past it, but for what runs."""

from __future__ import annotations

import itertools

import pytest

from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.commands import Expire, Grant, WakeAt
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.job import Job, Priority
from aoti_sched.queue.policy import Policy
from aoti_sched.queue.selection.placement import Placement, Placing
from tests.unit.queue.load import Load, Stream
from tests.unit.queue.support import add, device, launched, launches, take_lease, teach

HIGH, NORMAL, LOW = Priority.HIGH, Priority.NORMAL, Priority.LOW
MAX_WAIT = 2.0
RUN = 1 / 16


def saturated(lanes, *, max_wait=MAX_WAIT, follow_limit=0.0):
    """A device that HIGH requests keep busy all the time, a runner of others, and the load."""
    queue = DeviceQueue("cpu", lanes, Bounds(None, None), policy=Policy(max_wait=max_wait))
    runner = add(queue, "high", slots=lanes, placing=Placing(follow_limit=follow_limit))
    others = add(queue, "low", slots=lanes)
    return Load(queue, [Stream(lambda: Job(runner, HIGH), RUN, depth=2 * lanes + 2)]), others


def send_sometimes(load, runner, every, count):
    """A LOW request every so many seconds; gives those sent."""
    sent, once = [], Stream(None, RUN, depth=0)
    for number in range(count):
        load.run_until(number * every + RUN / 2)
        job = Job(runner, LOW)
        sent.append(job)
        load.submit(job, once)
    load.run_until(count * every + MAX_WAIT + 4 * RUN)
    return sent


def waits(jobs):
    return [job.started - job.submitted for job in jobs if job.lane >= 0]


@pytest.mark.parametrize("lanes", [1, 2])
def test_without_it_better_jobs_can_keep_out_others_for_ever(lanes):
    load, runner = saturated(lanes, max_wait=None)
    assert waits(send_sometimes(load, runner, 1.0, 20)) == []


@pytest.mark.parametrize("follow_limit", [0.0, 1.0])
@pytest.mark.parametrize("lanes", [1, 2])
def test_no_job_waits_past_it_but_for_what_runs(lanes, follow_limit):
    load, runner = saturated(lanes, follow_limit=follow_limit)
    jobs = send_sometimes(load, runner, 1.0, 20)
    assert len(waits(jobs)) == 20
    ahead = 2 if follow_limit else 1  # a lane may have been given one more, before
    assert max(waits(jobs)) <= MAX_WAIT + ahead * RUN


def test_it_does_not_turn_the_classes_upside_down():
    load, runner = saturated(1)
    jobs = send_sometimes(load, runner, 0.25, 40)
    low = [job.priority == LOW for job in load.launched]
    assert not any(one and other for one, other in itertools.pairwise(low))
    assert min(waits(jobs)) >= MAX_WAIT


# --- the rule, fact by fact -----------------------------------------------------------------------


def run_all(queue, first, now):
    """Complete what runs at that time, and return the jobs in the order of their launches."""
    order = [first]
    for job in order:
        order += launched(queue.complete(job, now))
    return order


def test_every_second_launch_is_of_the_overdue_one_that_came_first():
    queue = device(max_wait=2.0)
    runner, other = add(queue), add(queue, "other")
    first = Job(runner, HIGH)
    queue.submit(first, 0.0)
    overdue = [Job(other, LOW), Job(runner, LOW), Job(other)]
    for job in overdue:
        queue.submit(job, 0.0)
    better = [Job(runner, HIGH) for _ in range(3)]
    for job in better:
        queue.submit(job, 1.0)
    order = run_all(queue, first, 2.0)
    assert order == [first, overdue[0], better[0], overdue[1], better[1], overdue[2], better[2]]


@pytest.mark.parametrize("same", [True, False])
def test_whose_epoch_came_late_is_as_old_as_it_is(same):
    """Its place in the queue counts from its epoch, its age does not."""
    queue = device(max_wait=2.0)
    busy = Job(add(queue, "busy"))
    runner, other = add(queue), add(queue, "other")
    queue.submit(busy, 0.0)
    first, second = Job(runner, LOW, min_epoch=2), Job(runner if same else other, deadline=9.0)
    queue.submit(first, 0.0)
    queue.submit(second, 1.0)
    queue.close_barrier(runner, 1.0)
    queue.open_barrier(runner, 1.0, epoch=2)
    assert first.id > second.id
    assert launched(queue.complete(busy, 5.0)) == [first]
    assert launched(queue.complete(first, 5.0)) == [second]


def test_until_then_nothing_is_overdue():
    queue = device(max_wait=2.0)
    runner = add(queue)
    first, low, high = Job(runner), Job(runner, LOW), Job(runner, HIGH)
    for job in (first, low, high):
        queue.submit(job, 0.0)
    assert launched(queue.complete(first, 1.875)) == [high]
    assert launched(queue.complete(high, 2.0)) == [low]


def test_an_overdue_job_whose_slots_are_busy_holds_up_no_other():
    queue = device(lanes=2, max_wait=2.0)
    a, b = add(queue, "a"), add(queue, "b")
    busy, other = Job(a), Job(b)
    queue.submit(busy, 0.0)
    queue.submit(other, 0.0)
    overdue, better = Job(a, LOW), Job(b, HIGH)
    queue.submit(overdue, 0.0)
    queue.submit(better, 1.0)
    assert launched(queue.complete(other, 5.0)) == [better]
    assert launched(queue.complete(busy, 6.0)) == [overdue]


def test_one_that_waits_for_a_lease_is_never_overdue():
    queue = device(max_wait=2.0)
    runner = add(queue)
    first, holds, high = Job(runner), Job(runner, LOW, is_lease_request=True), Job(runner, HIGH)
    for job in (first, holds, high):
        queue.submit(job, 0.0)
    assert launched(queue.complete(first, 9.0)) == [high]
    (command,) = queue.complete(high, 9.0)
    assert type(command) is Grant


def test_a_leases_job_can_be_overdue():
    queue = device(max_wait=2.0)
    runner, other = add(queue), add(queue, "other")
    lease = take_lease(queue, runner)
    first, held, high = Job(other), Job(lease, LOW), Job(other, HIGH)
    for job in (first, held, high):
        queue.submit(job, 0.0)
    assert launched(queue.complete(first, 2.0)) == [held]


def test_an_overdue_job_whose_deadline_has_passed_expires_and_the_next_has_the_turn():
    queue = device(max_wait=2.0)
    runner = add(queue)
    first, gone, overdue, high = (
        Job(runner),
        Job(runner, LOW, deadline=3.0),
        Job(runner, LOW),
        Job(runner, HIGH),
    )
    for job in (first, gone, overdue, high):
        queue.submit(job, 0.0)
    expired, then = queue.complete(first, 3.0)
    assert expired == Expire(gone)
    assert then.job is overdue


def test_an_overdue_short_run_has_its_turn_on_the_loop():
    queue = device(max_wait=2.0)
    quick, others = add(queue, "quick", placing=Placing(Placement.INLINE)), add(queue, "others")
    blocker, running = Job(others), Job(quick)
    queue.submit(blocker, 0.0)
    queue.submit(running, 0.0)
    overdue, better = Job(quick, LOW), Job(quick, HIGH)
    queue.submit(overdue, 0.0)
    queue.submit(better, 0.0)
    assert launches(queue.complete(running, 2.0, started=0.0, finished=0.0)) == [overdue]


def test_an_overdue_wide_run_is_waited_for_and_narrow_ones_do_not_pass_it():
    queue = device(lanes=2, max_wait=2.0)
    wide, narrow = add(queue, "wide", width=2), add(queue, "narrow", slots=2)
    running = [Job(narrow, HIGH), Job(narrow, HIGH)]
    for job in running:
        queue.submit(job, 0.0)
    overdue, better = Job(wide, LOW), Job(narrow, HIGH)
    queue.submit(overdue, 0.0)
    queue.submit(better, 1.0)
    assert launched(queue.complete(running[0], 2.0)) == []
    assert launched(queue.complete(running[1], 3.0)) == [overdue]
    assert launched(queue.complete(overdue, 4.0)) == [better]


def test_a_key_that_waits_for_company_waits_no_more_when_it_is_overdue():
    queue = device(max_wait=2.0)
    runner = add(queue, batching=Batching(8, 100.0))
    job = Job(runner, key="k")
    assert WakeAt(2.0) in queue.submit(job, 0.0)
    assert launches(queue.tick(1.875)) == []
    assert launches(queue.tick(2.0)) == [job]


def test_one_that_is_held_until_the_turn_ends_has_no_turn_before():
    queue = device(max_wait=2.0)
    runner = add(queue, batching=Batching(8))
    first, gathered = Job(runner, key="k"), [Job(runner, LOW, key="k") for _ in range(2)]
    for job in (first, *gathered):
        queue.submit(job, 0.0)
    other = Job(add(queue, "other"))
    queue.submit(other, 1.0)
    assert launches(queue.complete(first, 3.0)) == [other]
    queue.turn(3.0)
    assert launches(queue.complete(other, 3.0)) == [gathered[0]]
    assert gathered[0].members == (gathered[0], gathered[1])


@pytest.mark.parametrize("first", ["inline", "lane"])
def test_of_those_on_the_loop_and_those_on_lanes_the_one_that_came_first_has_the_turn(first):
    queue = device(max_wait=2.0)
    quick, other = add(queue, "quick", placing=Placing(Placement.AUTO, 0.5)), add(queue, "other")
    teach(queue, quick, 0.125)
    blocker = Job(
        quick, bytes=100
    )  # on the only lane, in the only slot of what else would go inline
    queue.submit(blocker, 0.0)
    on_loop, on_lane = Job(quick, LOW), Job(other, LOW)
    older, younger = (on_loop, on_lane) if first == "inline" else (on_lane, on_loop)
    queue.submit(older, 0.0)
    queue.submit(younger, 1.0)
    assert launches(queue.complete(blocker, 5.0)) == [older, younger]
    assert on_loop.inline
    assert not on_lane.inline


def test_it_takes_riders_along():
    queue = device(max_wait=2.0)
    runner = add(queue, batching=Batching(8))
    first = Job(runner)
    queue.submit(first, 0.0)
    overdue, rider, high = Job(runner, LOW, key="k"), Job(runner, LOW, key="k"), Job(runner, HIGH)
    queue.submit(overdue, 0.0)
    queue.submit(rider, 1.0)
    queue.submit(high, 1.0)
    queue.turn(1.0)
    assert launches(queue.complete(first, 2.0)) == [overdue]
    assert overdue.members == (overdue, rider)


def test_reruns_leave_the_turns_as_they_are():
    queue = device(max_wait=2.0)
    runner = add(queue, batching=Batching(8))
    first = Job(runner)
    queue.submit(first, 0.0)
    batch = [Job(runner, HIGH, key="k") for _ in range(2)]
    for job in batch:
        queue.submit(job, 0.0)
    queue.turn(0.0)
    assert launches(queue.complete(first, 1.0)) == [batch[0]]  # a regular turn
    overdue, high = Job(runner, LOW), Job(runner, HIGH)
    queue.submit(overdue, 1.0)
    queue.submit(high, 1.0)
    assert launches(queue.complete(batch[0], 3.0, ok=False)) == [batch[0]]
    assert launches(queue.complete(batch[0], 3.0)) == [batch[1]]
    assert launches(queue.complete(batch[1], 3.0)) == [overdue]


def test_late_jobs_expire_though_they_are_overdue():
    queue = device(max_wait=2.0)
    runner = add(queue)
    teach(queue, runner, 1.0)
    first, late, high = Job(runner), Job(runner, LOW, deadline=3.5), Job(runner, HIGH)
    for job in (first, late, high):
        queue.submit(job, 0.0)
    expired, then = queue.complete(first, 3.0, ok=False)
    assert expired == Expire(late, 1.0)
    assert then.job is high


def test_where_everything_is_overdue_it_takes_a_quarter_of_the_time():
    """Their runs are ten times as long, and of two launches one would be theirs."""
    queue = DeviceQueue("cpu", 1, Bounds(None, None), policy=Policy(max_wait=MAX_WAIT))
    high, low = add(queue, "high"), add(queue, "low")
    teach(queue, high, RUN)
    teach(queue, low, 10 * RUN)
    often = Stream(lambda: Job(high, HIGH), RUN, depth=100)
    seldom = Stream(lambda: Job(low, LOW), 10 * RUN, depth=100)
    load = Load(queue, [often, seldom])
    load.run(2000)
    assert seldom.served / (seldom.served + often.served) == pytest.approx(0.25, rel=0.05)


def test_where_lanes_are_handed_jobs_ahead_the_overdue_have_their_quarter_too():
    queue = DeviceQueue("cpu", 1, Bounds(None, None), policy=Policy(max_wait=MAX_WAIT))
    runner = add(queue, placing=Placing(follow_limit=1.0))
    teach(queue, runner, RUN)
    load = Load(queue, [Stream(lambda: Job(runner, HIGH), RUN)])
    once = Stream(None, RUN, depth=0)
    for _ in range(8):
        load.submit(Job(runner, LOW), once)
    load.run_until(MAX_WAIT + 40 * RUN)
    classes = [job.priority for job in load.launched]
    first = classes.index(LOW)
    assert MAX_WAIT <= load.launched[first].started <= MAX_WAIT + 2 * RUN
    assert classes[first : first + 32].count(LOW) == pytest.approx(8, abs=1)


def test_what_overdue_ones_have_had_is_forgotten_when_nobody_waits():
    queue = device(max_wait=MAX_WAIT)
    runner = add(queue)
    running, other, overdue = Job(runner, HIGH), Job(runner, HIGH), Job(runner, LOW)
    for job, now in ((running, 0.0), (overdue, 0.0), (other, 2.0)):
        queue.submit(job, now)
    assert launches(queue.complete(running, 3.0)) == [overdue]
    assert launches(queue.complete(overdue, 103.0)) == [
        other
    ]  # a hundred seconds of an overdue one
    queue.complete(other, 104.0)
    first = Job(runner, HIGH)
    queue.submit(first, 110.0)
    low, high = Job(runner, LOW), Job(runner, HIGH)
    queue.submit(low, 110.0)
    queue.submit(high, 110.0)
    assert launches(queue.complete(first, 113.0)) == [low]


@pytest.mark.parametrize("ok", [True, False])
def test_runs_that_teach_nothing_count_for_the_time_they_took(ok):
    queue = device(max_wait=MAX_WAIT)
    runner = add(queue, slots=1)
    order, now = [], 0.0
    running = Job(runner, HIGH)
    queue.submit(running, now)
    for _ in range(40):
        queue.submit(Job(runner, LOW), now)
        queue.submit(Job(runner, HIGH), now)
    for _ in range(40):
        now += 1.0
        (running,) = launches(queue.complete(running, now, ok=ok))
        order.append(running.priority == LOW)
    assert sum(order[4:]) == pytest.approx(9, abs=1)


@pytest.mark.parametrize("rows", [2, 4])
def test_a_batch_that_is_overdue_takes_of_their_quarter_with_all_its_members(rows):
    queue = DeviceQueue("cpu", 1, Bounds(None, None), policy=Policy(max_wait=MAX_WAIT))
    high, low = add(queue, "high"), add(queue, "low", batching=Batching(rows))
    often = Stream(lambda: Job(high, HIGH), RUN, depth=100)
    seldom = Stream(lambda: Job(low, LOW, key="k"), 10 * RUN, depth=400)
    load = Load(queue, [often, seldom])
    while load.now < 200.0:
        load.step()
        queue.turn(load.now)
    runs = [job for job in load.launched if job.finished > job.started > 20.0]
    time = sum(job.finished - job.started for job in runs)
    of_low = sum(job.finished - job.started for job in runs if job.priority == LOW)
    assert of_low / time == pytest.approx(0.25, rel=0.05)
