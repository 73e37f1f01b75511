"""Shedding: where there is no more room, the worst that is queued makes place for what is
better.
"""

from __future__ import annotations

import pytest

from aoti_sched.errors import QueueFullError, ShedError
from aoti_sched.queue.admission.shedding import VICTIMS
from aoti_sched.queue.commands import Drained, Expire, Shed, WakeAt
from aoti_sched.queue.job import Job, JobState, Priority
from tests.unit.queue.support import add, device, rejected, take_lease

HIGH, NORMAL, LOW = Priority.HIGH, Priority.NORMAL, Priority.LOW


def busy(queue):
    """A job that keeps the lane, so that what comes next is queued."""
    job = Job(add(queue, "busy"))
    queue.submit(job, 0.0)
    assert job.state is JobState.RUNNING
    return job


def scene(jobs=2, *, bound=None, **rest):
    queue = device(jobs=bound)
    busy(queue)
    return queue, add(queue, jobs=jobs, sheds=True, **rest)


def queued(queue, *jobs):
    for job in jobs:
        queue.submit(job, 0.0)
        assert job.state is JobState.QUEUED
    return jobs


def shed(commands):
    commands = [command for command in commands if type(command) is not WakeAt]
    assert all(type(command) is Shed for command in commands), commands
    assert all(command.job.state is JobState.SHED for command in commands)
    return [command.job for command in commands]


def test_the_one_with_the_latest_deadline_makes_place():
    queue, runner = scene()
    _, last = queued(queue, Job(runner, deadline=5.0), Job(runner, deadline=9.0))
    job = Job(runner, deadline=7.0)
    assert shed(queue.submit(job, 0.0)) == [last]
    assert job.state is JobState.QUEUED
    assert (runner.counters.shed, runner.load.jobs) == (1, 2)


def test_a_newcomer_has_the_room_that_was_made_for_it_before_one_of_the_victims_tenant():
    queue, runner = scene(2, tenant_jobs=1)
    _, worst = queued(queue, Job(runner, HIGH, tenant="a"), Job(runner, LOW, tenant="b"))
    behind = Job(runner, HIGH, tenant="b")
    queue.submit(behind, 0.0, wait=True)
    newcomer = Job(runner, NORMAL, tenant="c")
    assert shed(queue.submit(newcomer, 0.0)) == [worst]
    assert (newcomer.state, behind.state) == (JobState.QUEUED, JobState.WAITING)


def test_the_error_is_that_of_a_full_queue():
    queue, runner = scene(1)
    queued(queue, Job(runner))
    (command,) = queue.submit(Job(runner, HIGH), 0.0)
    assert type(command.error) is ShedError
    assert isinstance(command.error, QueueFullError)
    assert "runner 'm'" in str(command.error)


def test_one_without_a_deadline_is_worse_than_any_with_one():
    queue, runner = scene()
    _, unhurried = queued(queue, Job(runner, deadline=900.0), Job(runner))
    assert shed(queue.submit(Job(runner, deadline=901.0), 0.0)) == [unhurried]


def test_a_lower_class_is_worse_whatever_its_deadline():
    queue, runner = scene(3)
    _, low, _ = queued(
        queue, Job(runner, NORMAL), Job(runner, LOW, deadline=1.0), Job(runner, HIGH)
    )
    assert shed(queue.submit(Job(runner, NORMAL), 0.0)) == [low]


def test_of_equals_the_newest_goes():
    queue, runner = scene(2)
    _, newer = queued(queue, Job(runner), Job(runner))
    assert shed(queue.submit(Job(runner, deadline=5.0), 0.0)) == [newer]


def test_a_newcomer_that_is_the_worst_itself_is_refused():
    queue, runner = scene()
    jobs = queued(queue, Job(runner), Job(runner))
    newcomer = Job(runner)
    error = rejected(queue.submit(newcomer, 0.0))
    assert type(error) is QueueFullError
    assert [job.state for job in jobs] == [JobState.QUEUED] * 2
    assert (runner.counters.rejected, runner.counters.shed) == (1, 0)


def test_as_many_as_it_takes_go_the_worst_first():
    queue, runner = scene(None, size=10)
    jobs = queued(queue, *(Job(runner, deadline=at, bytes=3) for at in (5.0, 8.0, 6.0)))
    assert shed(queue.submit(Job(runner, deadline=4.0, bytes=5), 0.0)) == [jobs[1], jobs[2]]
    assert runner.load.bytes == 8


def test_nobody_goes_where_that_would_not_be_enough():
    queue, runner = scene(None, size=10)
    jobs = queued(queue, Job(runner, deadline=5.0, bytes=6), Job(runner, deadline=9.0, bytes=4))
    rejected(queue.submit(Job(runner, deadline=7.0, bytes=5), 0.0))
    assert [job.state for job in jobs] == [JobState.QUEUED] * 2


def test_what_could_never_be_queued_sheds_nobody():
    queue, runner = scene(None, size=10)
    (job,) = queued(queue, Job(runner, LOW, bytes=10))
    rejected(queue.submit(Job(runner, HIGH, bytes=11), 0.0))
    assert job.state is JobState.QUEUED


def test_for_the_devices_bound_the_worst_of_all_that_shed_goes():
    queue, runner = scene(None, bound=3)
    other, loyal = add(queue, "other", sheds=True), add(queue, "loyal")
    _, worst, kept = queued(queue, Job(runner), Job(other, LOW), Job(loyal, LOW))
    assert shed(queue.submit(Job(runner), 0.0)) == [worst]
    assert kept.state is JobState.QUEUED
    assert (other.counters.shed, runner.counters.shed) == (1, 0)


def test_for_its_own_bound_a_runner_sheds_none_of_another():
    queue, runner = scene(1)
    other = add(queue, "other", sheds=True)
    queued(queue, Job(runner), Job(other, LOW))
    rejected(queue.submit(Job(runner), 0.0))


def test_one_that_does_not_shed_is_refused_though_there_are_worse_ones():
    queue, runner = scene(None, bound=1)
    loyal = add(queue, "loyal")
    queued(queue, Job(runner, LOW))
    assert type(rejected(queue.submit(Job(loyal, HIGH), 0.0))) is QueueFullError


def test_for_its_tenants_bound_only_the_tenants_own_go():
    queue, runner = scene(None, tenant_jobs=1)
    own, other = queued(queue, Job(runner, tenant="a"), Job(runner, LOW, tenant="b"))
    assert shed(queue.submit(Job(runner, HIGH, tenant="a"), 0.0)) == [own]
    assert other.state is JobState.QUEUED
    rejected(queue.submit(Job(runner, HIGH, tenant="a"), 0.0))


def test_several_bounds_are_met_one_after_the_other():
    queue, runner = scene(3, size=10, tenant_jobs=2)
    jobs = queued(
        queue,
        Job(runner, tenant="a", bytes=1),
        Job(runner, tenant="a", bytes=1),
        Job(runner, LOW, tenant="b", bytes=8),
    )
    newcomer = Job(runner, HIGH, tenant="a", bytes=2)
    assert shed(queue.submit(newcomer, 0.0)) == [jobs[1], jobs[2]]


def test_one_that_waits_for_a_lease_is_not_shed():
    queue, runner = scene(1)
    lease_holder = take_lease(queue, runner)
    (holds,) = queued(queue, Job(runner, LOW, is_lease_request=True))
    rejected(queue.submit(Job(runner, HIGH), 0.0))
    assert holds.state is JobState.QUEUED
    assert lease_holder.id in runner.leases


def test_a_held_leases_jobs_are_not_shed_and_shed_nobody():
    queue, runner = scene(1, slots=2)
    lease = take_lease(queue, runner)
    (held,) = queued(queue, Job(lease, LOW))
    rejected(queue.submit(Job(runner, HIGH), 0.0))
    rejected(queue.submit(Job(lease, HIGH), 0.0))
    assert held.state is JobState.QUEUED


def test_what_runs_is_not_shed():
    queue = device()
    runner = add(queue, jobs=1, sheds=True)
    running, low = Job(runner, LOW), Job(runner, LOW)
    queue.submit(running, 0.0)
    queued(queue, low)
    assert shed(queue.submit(Job(runner), 0.0)) == [low]
    assert running.state is JobState.RUNNING


def test_nobody_passes_those_who_wait_at_a_gate():
    queue, runner = scene(None, bound=2)
    patient = add(queue, "patient")
    low, _ = queued(queue, Job(runner, LOW), Job(patient))
    waits = Job(patient)
    queue.submit(waits, 0.0, wait=True)
    assert waits.state is JobState.WAITING
    rejected(queue.submit(Job(runner, HIGH), 0.0))
    assert low.state is JobState.QUEUED


def test_a_newcomer_that_is_past_its_deadline_sheds_nobody():
    queue, runner = scene(1)
    (low,) = queued(queue, Job(runner, LOW))
    gone = Job(runner, HIGH, deadline=1.0)
    assert queue.submit(gone, 2.0) == [Expire(gone)]
    assert low.state is JobState.QUEUED


def test_who_was_shed_ends_there():
    queue, runner = scene(1)
    (low,) = queued(queue, Job(runner, LOW, deadline=5.0))
    queue.submit(Job(runner), 0.0)
    assert queue.tick(5.0) == []
    assert (runner.counters.expired, runner.live) == (0, 1)
    assert low.state is JobState.SHED


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_full_queue_settles_on_the_best(after):
    """Whatever comes in what order, the best are kept."""
    queue, runner = scene(2)
    deadlines = [9.0, 3.0, 7.0, 4.0, 8.0]
    jobs = [Job(runner, deadline=at) for at in deadlines[after:] + deadlines[:after]]
    for job in jobs:
        queue.submit(job, 0.0)
    assert sorted(job.deadline for job in jobs if job.state is JobState.QUEUED) == [3.0, 4.0]


def test_a_runner_that_leaves_is_drained_when_its_last_one_is_shed_for_anothers():
    queue = device(jobs=1)
    running = Job(add(queue, "busy"))
    leaving, other = add(queue, "leaving", sheds=True), add(queue, "other", sheds=True)
    last, newcomer = Job(leaving, LOW), Job(other, HIGH)
    queue.submit(running, 0.0)
    queue.submit(last, 0.0)
    assert queue.drain_runner(leaving, 0.0) == []
    shed, drained = queue.submit(newcomer, 0.0)
    assert shed.job is last
    assert drained == Drained(leaving)


@pytest.mark.parametrize("more", [0, 1])
def test_no_newcomer_sheds_more_than_a_few(more):
    queue = device()
    runner = add(queue, size=VICTIMS + more, sheds=True)
    queue.submit(Job(runner), 0)
    small = [Job(runner, Priority.LOW, bytes=1) for _ in range(VICTIMS + more)]
    for job in small:
        queue.submit(job, 0)
    commands = queue.submit(Job(runner, Priority.HIGH, bytes=VICTIMS + more), 1)
    if more:
        assert type(rejected(commands)) is QueueFullError
        assert all(job.state is JobState.QUEUED for job in small)
    else:
        assert [command.job for command in commands if type(command) is Shed] == small[::-1]
