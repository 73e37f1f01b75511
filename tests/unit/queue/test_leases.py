"""Leases: a slot held for several runs in turn; granted in the order of the queue, given back
once.
"""

from __future__ import annotations

import pytest

from aoti_sched.errors import LeaseError, RunnerClosedError
from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.commands import Drained, Expire, Grant, Launch
from aoti_sched.queue.job import Job, JobState, Priority
from tests.unit.queue.support import add, device, launched, rejected, take_lease


def grants(commands):
    """The jobs whose leases were granted, in order; there is nothing else among the commands."""
    assert all(type(command) is Grant for command in commands), commands
    return [command.job for command in commands]


def test_a_free_slot_is_leased_at_once_and_takes_no_lane():
    queue = device(lanes=1)
    runner = add(queue, slots=2)
    request = Job(runner, is_lease_request=True, payload="who asked")
    (grant,) = queue.submit(request, 4)
    lease = grant.lease
    assert grant == Grant(request, lease)
    assert (lease.slot, lease.epoch, lease.holder, lease.runner) == (0, 1, "who asked", runner)
    assert (request.state, request.slot, request.lane) == (JobState.DONE, 0, -1)
    assert queue.busy_lanes == 0


def test_a_lease_carries_the_epoch_of_its_runner():
    queue = device()
    runner = queue.add_runner("m", 1, Bounds(), epoch=7)
    lease = take_lease(queue, runner)
    job = Job(lease)
    queue.submit(job, 0)
    assert (lease.epoch, job.epoch) == (7, 7)


def test_a_lease_is_granted_though_every_lane_is_busy():
    queue = device(lanes=1)
    queue.submit(Job(add(queue, "busy")), 0)
    request = Job(add(queue), is_lease_request=True)
    assert grants(queue.submit(request, 0)) == [request]


def test_runs_of_one_lease_go_one_at_a_time_on_its_slot():
    queue = device(lanes=4)
    runner = add(queue, slots=4)
    take_lease(queue, runner)
    lease = take_lease(queue, runner)
    jobs = [Job(lease) for _ in range(3)]
    assert [job for each in jobs for job in launched(queue.submit(each, 0))] == jobs[:1]
    assert queue.complete(jobs[0], 1) == [Launch(jobs[1])]
    assert queue.complete(jobs[1], 2) == [Launch(jobs[2])]
    assert {job.slot for job in jobs} == {lease.slot} == {1}


def test_a_held_slot_is_given_to_nobody_else():
    queue = device(lanes=2)
    runner = add(queue, slots=2)
    lease = take_lease(queue, runner)
    jobs = [Job(runner), Job(runner)]
    for job in jobs:
        queue.submit(job, 0)
    assert [job.state for job in jobs] == [JobState.RUNNING, JobState.QUEUED]
    assert queue.release(lease, 1) == [Launch(jobs[1])]
    assert jobs[1].slot == lease.slot


def test_leases_are_granted_in_the_order_of_the_queue():
    queue = device()
    runner = add(queue)
    lease = take_lease(queue, runner)
    requests = [
        Job(runner, priority, is_lease_request=True)
        for priority in (Priority.NORMAL, Priority.NORMAL, Priority.HIGH)
    ]
    for request in requests:
        assert queue.submit(request, 0) == []
    order = []
    while lease is not None:
        commands = queue.release(lease, 1)
        order += grants(commands)
        lease = commands[0].lease if commands else None
    assert order == [requests[2], requests[0], requests[1]]


def test_a_lease_request_and_a_run_keep_their_turn():
    queue = device()
    runner = add(queue)
    running, run, request = Job(runner), Job(runner), Job(runner, is_lease_request=True)
    for job in (running, run, request):
        queue.submit(job, 0)
    assert queue.complete(running, 1) == [Launch(run)]
    assert grants(queue.complete(run, 2)) == [request]


def test_runs_of_a_lease_compete_for_lanes_by_their_priority():
    queue = device()
    runner = add(queue, slots=3)
    lease = take_lease(queue, runner)
    running, normal, urgent = Job(runner), Job(runner), Job(lease, Priority.HIGH)
    for job in (running, normal, urgent):
        queue.submit(job, 0)
    assert queue.complete(running, 1) == [Launch(urgent)]


def test_releasing_twice_changes_nothing():
    queue = device()
    runner = add(queue, slots=2)
    lease = take_lease(queue, runner)
    assert queue.release(lease, 1) == []
    assert queue.release(lease, 2) == []
    assert sorted(runner.free) == [0, 1]


def test_a_released_lease_finishes_what_it_accepted_before_its_slot_goes_home():
    queue = device(lanes=2)
    runner = add(queue)
    lease = take_lease(queue, runner)
    running, accepted, next_in_line = Job(lease), Job(lease), Job(runner)
    for job in (running, accepted, next_in_line):
        queue.submit(job, 0)
    assert queue.release(lease, 1) == []
    assert queue.complete(running, 2) == [Launch(accepted)]
    assert queue.complete(accepted, 3) == [Launch(next_in_line)]
    assert runner.leases == {}


def test_a_released_lease_says_so_to_its_user():
    queue = device()
    lease = take_lease(queue, add(queue))
    queue.release(lease, 1)
    error = rejected(queue.submit(Job(lease), 2))
    assert type(error) is LeaseError
    assert (
        str(error)
        == "lease 1 of runner 'm' (slot 0) was released; take a new one with runner.lease()"
    )


@pytest.mark.parametrize("ends", ["cancel", "expire"])
def test_a_released_lease_whose_last_job_leaves_the_queue_goes_home(ends):
    queue = device()
    runner = add(queue, slots=2)
    lease = take_lease(queue, runner)
    queue.submit(Job(runner), 0)
    last, waiting = Job(lease, deadline=5), Job(runner, is_lease_request=True)
    queue.submit(last, 0)
    queue.submit(waiting, 0)
    queue.release(lease, 1)
    if ends == "cancel":
        assert grants(queue.cancel(last, 2)) == [waiting]
    else:
        expire, grant = queue.tick(5)
        assert (expire, grant.job) == (Expire(last), waiting)
    assert list(runner.leases) == [2]


def test_a_cancelled_lease_request_is_never_granted():
    queue = device()
    runner = add(queue)
    lease = take_lease(queue, runner)
    cancelled, following = Job(runner, is_lease_request=True), Job(runner, is_lease_request=True)
    queue.submit(cancelled, 0)
    queue.submit(following, 0)
    assert queue.cancel(cancelled, 1) == []
    assert grants(queue.release(lease, 2)) == [following]


def test_a_lease_request_can_expire():
    queue = device()
    runner = add(queue)
    lease = take_lease(queue, runner)
    request = Job(runner, is_lease_request=True, deadline=5)
    queue.submit(request, 0)
    assert queue.tick(5) == [Expire(request)]
    assert queue.release(lease, 6) == []


def test_a_draining_runner_waits_for_its_held_leases():
    queue = device()
    runner = add(queue)
    lease = take_lease(queue, runner)
    assert queue.drain_runner(runner, 1) == []
    job = Job(lease)
    assert queue.submit(job, 2) == [Launch(job)]
    assert queue.complete(job, 3) == []
    assert queue.release(lease, 4) == [Drained(runner)]


def test_a_draining_runner_still_grants_the_leases_it_accepted():
    queue = device()
    runner = add(queue)
    lease = take_lease(queue, runner)
    request = Job(runner, is_lease_request=True)
    queue.submit(request, 0)
    queue.drain_runner(runner, 1)
    (grant,) = queue.release(lease, 2)
    assert grant.job is request
    assert queue.release(grant.lease, 3) == [Drained(runner)]


def test_terminating_takes_idle_leases_back_at_once():
    queue = device()
    runner = add(queue, slots=2)
    leases = [take_lease(queue, runner) for _ in range(2)]
    assert queue.terminate_runner(runner, 1) == [Drained(runner)]
    assert all(lease.released for lease in leases)
    assert sorted(runner.free) == [0, 1]


def test_terminating_lets_the_run_of_a_lease_finish():
    queue = device()
    runner = add(queue)
    lease = take_lease(queue, runner)
    running = Job(lease)
    queue.submit(running, 0)
    assert queue.terminate_runner(runner, 1) == []
    error = rejected(queue.submit(Job(lease), 2))
    assert type(error) is RunnerClosedError
    assert str(error) == "runner 'm' is terminated; its leases are gone"
    assert queue.release(lease, 3) == []
    assert queue.complete(running, 4) == [Drained(runner)]
    assert running.state is JobState.DONE


def test_a_lease_of_a_removed_runner_says_so():
    queue = device()
    runner = add(queue)
    lease = take_lease(queue, runner)
    queue.drain_runner(runner, 1)
    queue.release(lease, 2)
    queue.remove_runner(runner)
    error = rejected(queue.submit(Job(lease), 3))
    assert str(error) == "runner 'm' is drained; its leases are gone"
    assert queue.release(lease, 4) == []
