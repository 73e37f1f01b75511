"""How much of a runner's queue one tenant may have: others find room, and its own wait in a
line of their own.
"""

from __future__ import annotations

import pytest

from aoti_sched.errors import QueueFullError
from aoti_sched.queue.commands import Launch
from aoti_sched.queue.job import Job, JobState, Priority
from tests.unit.queue.support import add, check, device, rejected, take_lease

HIGH, NORMAL, LOW = Priority.HIGH, Priority.NORMAL, Priority.LOW
QUEUED, WAITING = JobState.QUEUED, JobState.WAITING


def scene(tenant_jobs=1, *, slots=1, jobs=None, bound=None):
    queue = device(jobs=bound)
    running = Job(add(queue, "busy"))
    queue.submit(running, 0.0)
    return queue, add(queue, slots=slots, jobs=jobs, tenant_jobs=tenant_jobs), running


def send(queue, *jobs, wait=True):
    for job in jobs:
        queue.submit(job, 0.0, wait=wait)
    return [job.state for job in jobs]


@pytest.mark.parametrize("tenant", ["a", None])
def test_a_tenant_with_too_many_is_refused_with_its_numbers(tenant):
    queue, runner, _ = scene(2)
    send(queue, Job(runner, tenant=tenant), Job(runner, tenant=tenant))
    error = rejected(queue.submit(Job(runner, tenant=tenant), 0.0))
    assert type(error) is QueueFullError
    assert "2" in str(error)
    assert "'m'" in str(error)


def test_others_find_room():
    queue, runner, _ = scene()
    jobs = [Job(runner, tenant=name) for name in ("a", "b", None)]
    assert send(queue, *jobs, wait=False) == [QUEUED] * 3


def test_at_another_runner_it_is_counted_anew():
    queue, runner, _ = scene()
    other = add(queue, "other", tenant_jobs=1)
    assert send(queue, Job(runner, tenant="a"), Job(other, tenant="a"), wait=False) == [QUEUED] * 2


def test_what_runs_is_not_counted():
    queue = device()
    runner = add(queue, tenant_jobs=1)
    states = send(queue, Job(runner, tenant="a"), Job(runner, tenant="a"), wait=False)
    assert states == [JobState.RUNNING, QUEUED]


def test_with_wait_it_stands_in_its_own_line_and_holds_up_no_other():
    queue, runner, _ = scene()
    first, second, other = Job(runner, tenant="a"), Job(runner, tenant="a"), Job(runner, tenant="b")
    assert send(queue, first, second, other) == [QUEUED, WAITING, QUEUED]
    assert send(queue, Job(runner, tenant="c"), wait=False) == [QUEUED]


@pytest.mark.parametrize("leaves", ["launch", "cancel", "expire"])
def test_the_next_in_line_comes_when_one_leaves(leaves):
    queue, runner, running = scene()
    first, second, third = (Job(runner, tenant="a", deadline=at) for at in (5.0, None, None))
    send(queue, first, second, third)
    if leaves == "launch":
        assert queue.complete(running, 1.0) == [Launch(first)]
    elif leaves == "cancel":
        queue.cancel(first, 1.0)
    else:
        queue.tick(5.0)
    assert [second.state, third.state] == [QUEUED, WAITING]


def test_a_line_is_first_in_first_out_whatever_the_class():
    queue, runner, _ = scene()
    queued, low, high = (
        Job(runner, tenant="a"),
        Job(runner, LOW, tenant="a"),
        Job(runner, HIGH, tenant="a"),
    )
    send(queue, queued, low, high)
    queue.cancel(queued, 1.0)
    assert (low.state, high.state) == (QUEUED, WAITING)


def test_who_comes_out_of_its_line_takes_its_place_by_its_age():
    queue, runner, running = scene(2)
    first, second, third = (Job(runner, tenant="a") for _ in range(3))
    later = Job(runner, tenant="b")
    send(queue, first, second, third, later)
    assert queue.complete(running, 1.0) == [Launch(first)]
    assert third.state is QUEUED
    queue.cancel(second, 1.0)
    assert queue.complete(first, 1.0) == [Launch(third)]  # it came before the later one


def test_those_at_the_gate_are_counted_too():
    queue, runner, _ = scene(2, jobs=1)
    jobs = [Job(runner, tenant="a") for _ in range(3)]
    assert send(queue, *jobs) == [QUEUED, WAITING, WAITING]
    assert len(runner.gate) == 1
    queue.cancel(jobs[0], 1.0)
    assert [job.state for job in jobs[1:]] == [QUEUED, WAITING]
    assert len(runner.gate) == 1


def test_who_comes_out_of_its_line_may_have_to_wait_at_the_gate():
    queue, runner, _ = scene(1, jobs=2)
    first, second = Job(runner, tenant="a"), Job(runner, tenant="a")
    others = [Job(runner, tenant=name) for name in ("b", "c")]
    assert send(queue, first, second, *others) == [QUEUED, WAITING, QUEUED, WAITING]
    queue.cancel(first, 1.0)
    assert [second.state, others[1].state] == [QUEUED, WAITING]  # it came first


def test_the_gate_is_in_order_of_class_for_those_who_come_out_of_a_line():
    queue, runner, _ = scene(1, jobs=2)
    first, second = Job(runner, tenant="a"), Job(runner, LOW, tenant="a")
    others = [Job(runner, tenant=name) for name in ("b", "c")]
    send(queue, first, second, *others)
    queue.cancel(first, 1.0)
    assert [second.state, others[1].state] == [WAITING, QUEUED]


def test_a_leases_jobs_are_not_counted():
    queue, runner, _ = scene(slots=2)
    lease = take_lease(queue, runner)
    held = [Job(lease, tenant="a") for _ in range(3)]
    assert send(queue, *held, Job(runner, tenant="a"), wait=False) == [QUEUED] * 4


def test_one_that_waits_for_a_lease_is_counted():
    queue, runner, _ = scene()
    take_lease(queue, runner)
    send(queue, Job(runner, tenant="a", is_lease_request=True))
    assert type(rejected(queue.submit(Job(runner, tenant="a"), 0.0))) is QueueFullError


def test_in_line_one_can_be_cancelled_and_can_expire():
    queue, runner, _ = scene()
    queued, cancelled, expires = Job(runner), Job(runner), Job(runner, deadline=5.0)
    send(queue, queued, cancelled, expires)
    queue.cancel(cancelled, 1.0)
    queue.tick(5.0)
    assert (cancelled.state, expires.state) == (JobState.CANCELLED, JobState.EXPIRED)
    queue.cancel(queued, 6.0)
    assert runner.live == 0


def test_termination_revokes_the_line():
    queue, runner, _ = scene()
    queued, in_line = Job(runner), Job(runner)
    send(queue, queued, in_line)
    queue.terminate_runner(runner, 1.0)
    assert (queued.state, in_line.state) == (JobState.REVOKED, JobState.REVOKED)
    assert runner.live == 0


def test_draining_finishes_the_line():
    queue, runner, running = scene()
    queued, in_line = Job(runner), Job(runner)
    send(queue, queued, in_line)
    assert queue.drain_runner(runner, 1.0) == []
    queue.complete(running, 1.0)
    queue.complete(queued, 1.0)
    assert in_line.state is JobState.RUNNING


def test_a_barrier_that_aborts_revokes_the_line():
    queue, runner, _ = scene()
    queued, in_line = Job(runner), Job(runner)
    send(queue, queued, in_line)
    queue.close_barrier(runner, 1.0, abort=True)
    assert (queued.state, in_line.state) == (JobState.REVOKED, JobState.REVOKED)


def test_those_whose_epoch_comes_stand_in_line_where_there_are_too_many():
    queue, runner, _ = scene()
    early = [Job(runner, tenant="a", min_epoch=2) for _ in range(2)]
    assert send(queue, *early) == [WAITING, WAITING]
    queue.close_barrier(runner, 1.0)
    queue.open_barrier(runner, 1.0, epoch=2)
    assert [job.state for job in early] == [QUEUED, WAITING]
    queue.cancel(early[0], 2.0)
    assert early[1].state is QUEUED


def test_a_bound_of_none_of_a_tenants_jobs_refuses_all():
    queue, runner, _ = scene(0)
    rejected(queue.submit(Job(runner, tenant="a"), 0.0, wait=True))


def test_tenants_that_are_gone_are_forgotten():
    queue = device()
    runner = add(queue)
    raw = queue.unchecked
    for number in range(1000):
        job = Job(runner, tenant=number)
        raw.submit(job, number)
        waits = Job(runner, tenant=-number - 1)
        raw.submit(waits, number)
        raw.complete(job, number, started=number, finished=number)
        raw.complete(waits, number, started=number, finished=number)
        if number % 50 == 0:  # each time would take as long as there are tenants
            check(queue)
    assert len(runner.tenants[Priority.NORMAL].accounts) < 200
    assert len(runner.queue._buckets) < 200
    assert None in runner.tenants[Priority.NORMAL].accounts


def test_a_tenant_that_has_something_queued_is_not_forgotten():
    queue, runner, _ = scene(None)
    for _ in range(2):
        for number in range(70):
            queue.submit(Job(runner, tenant=number), 0.0)  # and `check()` finds both on one account


def test_a_tenant_that_has_had_much_is_not_forgotten_by_being_away():
    queue = device()
    runner = add(queue)
    first = Job(runner, tenant="much")
    queue.submit(first, 0)
    queue.complete(first, 100)
    for number in range(200):
        job = Job(runner, tenant=number)
        queue.submit(job, 100)
        queue.complete(job, 100)
    assert "much" in runner.tenants[Priority.NORMAL].accounts


def test_what_is_exempt_is_not_counted_and_waits_in_no_line():
    queue, runner, _ = scene(slots=2)
    take_lease(queue, runner)
    take_lease(queue, runner)
    lease, other = (
        Job(runner, tenant="a", is_lease_request=True, bypasses_limits=True) for _ in range(2)
    )
    first, second = Job(runner, tenant="a"), Job(runner, tenant="a")
    assert send(queue, lease, first, second, other) == [QUEUED, QUEUED, WAITING, QUEUED]
    queue.cancel(lease, 1.0)
    assert second.state is WAITING
