"""The point between two epochs: who waits there, who does not, and what becomes of those who
asked for an epoch.
"""

from __future__ import annotations

import pytest

from aoti_sched.errors import EpochError, QueueFullError, RunnerClosedError, UpdateAbortedError
from aoti_sched.queue.commands import BarrierReached, Drained, Expire, Revoke, WakeAt
from aoti_sched.queue.job import IllegalFactError, Job, JobState, Priority
from tests.unit.queue.support import add, device, launched, picture, rejected, take_lease


def kinds(commands):
    return [type(command) for command in commands]


def publish(queue, runner, epoch, now=0.0):
    assert kinds(queue.close_barrier(runner, now)) == [BarrierReached]
    return queue.open_barrier(runner, now, epoch=epoch)


def test_a_closed_barrier_holds_back_what_is_new_and_waits_for_what_runs():
    queue = device(lanes=2)
    runner = add(queue, slots=2)
    running, held = Job(runner), Job(runner)
    queue.submit(running, 0.0)
    assert queue.close_barrier(runner, 0.0) == []
    assert queue.submit(held, 0.0) == []
    assert kinds(queue.complete(running, 1.0)) == [BarrierReached]
    assert launched(queue.open_barrier(runner, 1.0, epoch=2)) == [held]
    assert (running.epoch, held.epoch, runner.epoch) == (1, 2, 2)


def test_an_idle_runners_barrier_is_reached_at_once_and_told_once():
    queue = device()
    runner = add(queue)
    assert kinds(queue.close_barrier(runner, 0.0)) == [BarrierReached]
    job = Job(runner)
    queue.submit(job, 0.0)
    assert queue.cancel(job, 0.0) == []
    assert queue.open_barrier(runner, 0.0) == []


def test_it_opens_in_the_order_of_the_queue():
    queue = device()
    runner = add(queue)
    queue.close_barrier(runner, 0.0)
    jobs = [Job(runner, priority) for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH)]
    for job in jobs:
        queue.submit(job, 0.0)
    order = launched(queue.open_barrier(runner, 0.0))
    order += launched(queue.complete(order[-1], 0.0))
    order += launched(queue.complete(order[-1], 0.0))
    assert order == jobs[::-1]


def test_held_leases_finish_their_runs_on_their_epoch():
    queue = device()
    runner = add(queue)
    lease = take_lease(queue, runner)
    assert queue.close_barrier(runner, 0.0) == []
    job = Job(lease)
    assert launched(queue.submit(job, 0.0)) == [job]
    assert queue.complete(job, 0.0) == []
    assert kinds(queue.release(lease, 0.0)) == [BarrierReached]
    queue.open_barrier(runner, 0.0, epoch=2)
    assert (lease.epoch, job.epoch) == (1, 1)
    assert take_lease(queue, runner).epoch == 2


def test_no_lease_is_granted_at_a_closed_barrier():
    queue = device()
    runner = add(queue)
    queue.close_barrier(runner, 0.0)
    assert queue.submit(Job(runner, is_lease_request=True), 0.0) == []


def test_other_runners_go_on():
    queue = device()
    runner, other = add(queue), add(queue, "other")
    queue.close_barrier(runner, 0.0)
    queue.submit(Job(runner), 0.0)
    job = Job(other)
    assert launched(queue.submit(job, 0.0)) == [job]


def test_abort_revokes_what_is_queued_or_waits_for_room_but_not_a_leases():
    queue = device()
    runner = add(queue, slots=2, jobs=1)
    lease = take_lease(queue, runner)
    of_lease, queued_of_lease = Job(lease), Job(lease)
    queue.submit(of_lease, 0.0)
    queue.submit(queued_of_lease, 0.0)
    other_runner = add(queue, "other", jobs=1)
    queued, waiting = Job(other_runner), Job(other_runner)
    queue.submit(queued, 0.0, wait=True)
    queue.submit(waiting, 0.0, wait=True)
    assert queue.close_barrier(runner, 0.0, abort=True) == []
    revoked = queue.close_barrier(other_runner, 0.0, abort=True)
    assert kinds(revoked) == [Revoke, Revoke, BarrierReached]
    assert all(type(command.error) is UpdateAbortedError for command in revoked[:2])
    assert (queued.state, waiting.state) == (JobState.REVOKED, JobState.REVOKED)
    assert queued_of_lease.state is JobState.QUEUED


def test_what_waits_at_the_barrier_expires():
    queue = device()
    runner = add(queue)
    queue.close_barrier(runner, 0.0)
    assert kinds(queue.submit(Job(runner, deadline=1.0), 0.0)) == [WakeAt]
    assert kinds(queue.tick(1.0)) == [Expire]


@pytest.mark.parametrize("end", ["drain_runner", "terminate_runner"])
def test_a_runner_is_drained_only_after_its_barrier_has_opened(end):
    queue = device()
    runner = add(queue)
    queue.close_barrier(runner, 0.0)
    assert getattr(queue, end)(runner, 0.0) == []
    assert kinds(queue.open_barrier(runner, 0.0, epoch=2)) == [Drained]


def test_a_request_for_an_epoch_to_come_waits_for_it():
    queue = device(lanes=2)
    runner = add(queue, slots=2)
    job, now = Job(runner, min_epoch=2), Job(runner, min_epoch=1)
    assert queue.submit(job, 0.0) == []
    assert launched(queue.submit(now, 0.0)) == [now]
    queue.complete(now, 0.0)
    assert launched(publish(queue, runner, 2)) == [job]


def test_it_takes_its_turn_from_when_its_epoch_came():
    queue = device()
    runner = add(queue)
    early, late = Job(runner, min_epoch=2), Job(runner)
    queue.submit(early, 0.0)
    queue.close_barrier(runner, 0.0)
    queue.submit(late, 0.0)
    assert launched(queue.open_barrier(runner, 0.0, epoch=2)) == [late]
    assert launched(queue.complete(late, 0.0)) == [early]


def test_a_later_epoch_than_the_one_that_came_is_still_waited_for():
    queue = device()
    runner = add(queue)
    job = Job(runner, min_epoch=3)
    queue.submit(job, 0.0)
    assert publish(queue, runner, 2) == []
    assert launched(publish(queue, runner, 3)) == [job]


def test_an_epoch_that_was_rolled_back_is_refused():
    queue = device()
    runner = add(queue)
    publish(queue, runner, 2)
    publish(queue, runner, 1)
    error = rejected(queue.submit(Job(runner, min_epoch=2), 0.0))
    assert type(error) is EpochError
    assert "epoch 2 was rolled back, epoch 1 serves" in str(error)
    publish(queue, runner, 3)  # a number is never used twice
    assert runner.published == 3


def test_what_is_queued_for_an_epoch_is_told_when_that_is_rolled_back():
    queue = device()
    runner = add(queue, jobs=1)
    publish(queue, runner, 2)
    queue.close_barrier(runner, 0.0)
    queued, waiting, whatever = Job(runner, min_epoch=2), Job(runner, min_epoch=2), Job(runner)
    for job in (queued, waiting, whatever):
        queue.submit(job, 0.0, wait=True)
    commands = queue.open_barrier(runner, 0.0, epoch=1)
    assert [command.job for command in commands] == [queued, waiting, whatever]
    assert kinds(commands)[:2] == [Revoke, Revoke]
    assert all(type(command.error) is EpochError for command in commands[:2])


def test_a_lease_stays_on_its_epoch():
    queue = device()
    lease = take_lease(queue, add(queue))
    error = rejected(queue.submit(Job(lease, min_epoch=2), 0.0))
    assert type(error) is EpochError
    assert "a lease that was granted at epoch 1 stays there" in str(error)


def test_those_who_wait_for_an_epoch_are_bounded():
    queue = device()
    runner = add(queue, jobs=2)
    for _ in range(2):
        assert queue.submit(Job(runner, min_epoch=2), 0.0) == []
    error = rejected(queue.submit(Job(runner, min_epoch=2), 0.0, wait=True))
    assert type(error) is QueueFullError
    assert "2 requests wait for an epoch, the bound is 2" in str(error)


def test_they_can_leave_and_expire():
    queue = device()
    runner = add(queue)
    leaves, expires = Job(runner, min_epoch=2), Job(runner, min_epoch=2, deadline=1.0)
    queue.submit(leaves, 0.0)
    queue.submit(expires, 0.0)
    queue.cancel(leaves, 0.0)
    assert kinds(queue.tick(1.0)) == [Expire]
    assert publish(queue, runner, 2) == []


@pytest.mark.parametrize("end", ["drain_runner", "terminate_runner"])
def test_they_are_told_when_the_runner_goes(end):
    queue = device()
    runner = add(queue)
    queue.submit(Job(runner, min_epoch=2), 0.0)
    revoked, drained = getattr(queue, end)(runner, 0.0)
    assert type(revoked.error) is RunnerClosedError
    assert type(drained) is Drained


def close(queue, runner):
    queue.close_barrier(runner, 0.0)


def open_to(epoch):
    return lambda queue, runner: queue.open_barrier(runner, 0.0, epoch=epoch)


@pytest.mark.parametrize(
    ("closed", "busy", "fact", "sentence"),
    [
        (True, False, close, "its barrier is closed already"),
        (False, False, open_to(None), "its barrier is open"),
        (True, True, open_to(2), "slots are out, its epoch can't change"),
        (True, False, open_to(0), "epoch 0 does not follow on 1"),
        (True, False, open_to(3), "epoch 3 does not follow on 1"),
    ],
)
def test_what_can_not_happen_changes_nothing(closed, busy, fact, sentence):
    queue = device()
    runner = add(queue)
    if busy:
        queue.submit(Job(runner), 0.0)
    if closed:
        queue.close_barrier(runner, 0.0)
    before = picture(queue)
    with pytest.raises(IllegalFactError, match=sentence):
        fact(queue, runner)
    assert picture(queue) == before


def test_a_drained_runner_has_no_barrier():
    queue = device()
    runner = add(queue)
    queue.drain_runner(runner, 0.0)
    with pytest.raises(IllegalFactError, match="it is drained"):
        queue.close_barrier(runner, 0.0)
