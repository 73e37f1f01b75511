"""Facts about all jobs of a runner: none does more than a slice at once, and in between
everything is as sound as after any fact.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from aoti_sched.errors import LoadError, RunnerClosedError, UpdateAbortedError
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.commands import (
    BarrierReached,
    Drained,
    Expire,
    GoOn,
    Launch,
    Park,
    Return,
    Revoke,
    WakeAt,
    Withdraw,
)
from aoti_sched.queue.ending import SLICE
from aoti_sched.queue.job import Job, JobState, Priority
from aoti_sched.queue.runner_state import Phase
from tests.unit.queue.support import add, check, device, launches, take_lease

MANY = 5 * SLICE + 3


def slices(queue, commands, now=1.0):
    """The commands of a fact, then those of each `go_on` that follows: none is longer than a
    slice and a few.
    """
    while True:
        assert len(commands) <= 2 * SLICE + 4  # jobs that expire, and jobs that are found late
        yield commands
        if not any(type(command) is GoOn for command in commands):
            return
        commands = queue.go_on(now)


def crowded(queue, runner, count=MANY):
    """Jobs of all kinds: of several classes and tenants, in the queue, waiting for room, and
    awaiting an epoch.
    """
    jobs = [
        Job(runner, number % 3, tenant=number % 7 or None, min_epoch=2 * (number % 11 == 0))
        for number in range(count)
    ]
    send(queue, jobs)
    return jobs


def send(queue, jobs):
    """Submit all, and check once: to check after each would take as long as they are many,
    squared.
    """
    commands = []
    for job in jobs:
        commands += queue.unchecked.submit(job, 0.0, wait=True)
    check(queue)
    return commands


def scene(**options):
    queue = device(lanes=2)
    runner = add(queue, slots=2, jobs=MANY // 2, tenant_jobs=MANY // 8, **options)
    running = [Job(runner), Job(runner)]
    for job in running:
        queue.submit(job, 0.0)
    return queue, runner, running


def ended(parts, kind):
    return [command.job for part in parts for command in part if type(command) is kind]


@pytest.mark.parametrize("batching", [None, Batching(4, 9.0)], ids=["plain", "batching"])
def test_terminating_a_crowded_runner_goes_in_slices_and_starts_nothing_in_between(batching):
    queue, runner, running = scene(batching=batching)
    other = add(queue, "other")
    waits = Job(other)
    queue.submit(waits, 0.0)
    jobs = crowded(queue, runner)
    keyed = [Job(runner, key="k") for _ in range(20)] if batching else []
    for job in keyed:
        queue.submit(job, 0.0, wait=True)
    jobs += keyed
    parts = slices(queue, queue.terminate_runner(runner, 1.0))
    seen = [next(parts)]
    assert runner.phase is Phase.TERMINATED
    assert launches(queue.complete(running.pop(), 1.0)) == [waits]
    late = Job(runner)
    assert type(queue.submit(late, 1.0)[0]).__name__ == "Reject"
    queue.cancel(jobs[-1], 1.0)
    seen += [next(parts)]
    assert queue.complete(running.pop(), 1.0) == []
    seen += list(parts)
    assert Counter(ended(seen, Revoke)) == Counter(jobs[:-1])
    assert not ended(seen, Launch)
    assert seen[-1][-1] == Drained(runner)
    assert not any(Drained(runner) in part for part in seen[:-1])
    assert len(seen) > 4


def test_terminating_takes_what_held_leases_have_in_slices_too():
    queue = device(lanes=2)
    runner = add(queue, slots=2)
    lease = take_lease(queue, runner)
    jobs = [Job(lease) for _ in range(MANY)]
    send(queue, jobs)
    (running, *queued) = jobs
    parts = slices(queue, queue.terminate_runner(runner, 1.0))
    seen = [next(parts)]
    assert queue.complete(running, 1.0) == []
    seen += list(parts)
    assert ended(seen, Revoke) == queued
    assert seen[-1][-1] == Drained(runner)


def test_what_leaves_for_another_replica_leaves_in_slices_and_the_librarys_own_stays():
    queue, runner, running = scene()
    own = Job(runner, Priority.HIGH, is_lease_request=True, bypasses_limits=True)
    queue.submit(own, 0.0)
    jobs = crowded(queue, runner)
    parts = slices(queue, queue.withdraw(runner, 1.0))
    seen = [next(parts)]
    assert not launches(queue.complete(running.pop(), 1.0))
    seen += list(parts)
    assert Counter(ended(seen, Withdraw)) == Counter(jobs)
    assert own.state is JobState.DONE


def test_a_barrier_that_aborts_is_reached_after_the_last_and_what_comes_meanwhile_waits():
    queue, runner, running = scene()
    jobs = crowded(queue, runner)
    awaiting = [job for job in jobs if job.min_epoch]
    parts = slices(queue, queue.close_barrier(runner, 1.0, abort=True))
    seen = [next(parts)]
    later = Job(runner, Priority.HIGH, deadline=100.0)
    queue.submit(later, 1.0, wait=True)
    for job in running:
        assert BarrierReached(runner) not in queue.complete(job, 1.0)
    seen += list(parts)
    revoked = [command for part in seen for command in part if type(command) is Revoke]
    assert {type(command.error) for command in revoked} == {UpdateAbortedError}
    assert Counter(c.job for c in revoked) == Counter(j for j in jobs if j not in awaiting)
    assert [BarrierReached(runner) in part for part in seen] == [False] * (len(seen) - 1) + [True]
    assert later.state is JobState.QUEUED
    assert launches(queue.open_barrier(runner, 2.0, epoch=2))


def test_a_barrier_that_opens_before_all_were_aborted_aborts_them_all_the_same():
    queue, runner, _ = scene()
    jobs = [job for job in crowded(queue, runner) if not job.min_epoch]
    parts = slices(queue, queue.close_barrier(runner, 1.0, abort=True))
    seen = [next(parts)]
    assert not launches(queue.open_barrier(runner, 1.0))
    seen += list(parts)
    assert Counter(ended(seen, Revoke)) == Counter(jobs)


def test_a_runner_that_ends_twice_ends_each_job_once():
    queue, runner, running = scene()
    jobs = crowded(queue, runner)
    seen = [queue.close_barrier(runner, 1.0, abort=True), queue.drain_runner(runner, 1.0)]
    seen += [queue.terminate_runner(runner, 1.0), queue.terminate_runner(runner, 1.0)]
    while any(GoOn() in part for part in seen[-1:]) or queue._endings:
        seen.append(queue.go_on(1.0))
    for job in running:
        seen.append(queue.complete(job, 2.0))
    assert Counter(ended(seen, Revoke)) == Counter(jobs)
    assert runner.phase is Phase.DRAINED or BarrierReached(runner) in [
        c for part in seen for c in part
    ]


def test_draining_revokes_what_awaits_an_epoch_in_slices():
    queue, runner, running = scene()
    jobs = [Job(runner, min_epoch=2) for _ in range(MANY // 2)]
    send(queue, jobs)
    parts = slices(queue, queue.drain_runner(runner, 1.0))
    seen = [next(parts)]
    for job in running:
        queue.complete(job, 1.0)
    seen += list(parts)
    assert ended(seen, Revoke) == jobs
    assert {type(c.error) for part in seen for c in part if type(c) is Revoke} == {
        RunnerClosedError
    }
    assert seen[-1][-1] == Drained(runner)


def test_deadlines_that_pass_at_one_instant_expire_in_slices():
    queue, runner, _ = scene()
    jobs = [Job(runner, deadline=5.0) for _ in range(MANY // 2 - 1)]
    send(queue, jobs)
    seen = list(slices(queue, queue.tick(5.0), 5.0))
    assert ended(seen, Expire) == jobs
    assert not any(type(command) is WakeAt for part in seen[1:] for command in part)


def test_a_slice_that_is_just_full_asks_for_no_other():
    queue, runner, _ = scene()
    jobs = [Job(runner, deadline=5.0) for _ in range(SLICE)]
    send(queue, jobs)
    assert queue.tick(5.0) == [Expire(job) for job in jobs]


def test_jobs_that_are_late_when_a_lane_comes_free_expire_in_slices():
    queue, runner, running = scene()
    jobs = [Job(runner, deadline=5.0) for _ in range(MANY // 2 - 1)]
    send(queue, jobs)
    good = Job(runner)
    queue.submit(good, 0.0, wait=True)
    seen = list(slices(queue, queue.complete(running[0], 6.0), 6.0))
    assert Counter(ended(seen, Expire)) == Counter(jobs)
    assert ended(seen, Launch) == [good]


def test_what_waits_for_a_parked_runner_that_cannot_come_back_is_told_in_slices():
    queue = device(memory=10, evicts=True)
    runner, other = add(queue, "a"), add(queue, "b")
    for one in (runner, other):
        queue.pin(one)
        queue.update_use(one.memory, 0.0, constants=6, inactive=0)
    jobs = [Job(runner) for _ in range(MANY)]
    commands = send(queue, jobs)
    if Park(other) in commands:
        commands += queue.parked(other, 0.0)
    if Return(runner) in commands:
        seen = list(slices(queue, queue.returned(runner, 1.0, error="no")))
        revoked = [command for part in seen for command in part if type(command) is Revoke]
        assert [command.job for command in revoked] == jobs
        assert {type(command.error) for command in revoked} == {LoadError}


def test_gates_that_open_for_many_at_once_let_them_in_in_slices():
    queue = device()
    runner = add(queue, size=MANY)
    running, large = Job(runner), Job(runner, bytes=MANY)
    small = [Job(runner, Priority.LOW, bytes=1) for _ in range(MANY)]
    queue.submit(running, 0.0)
    queue.submit(large, 0.0)
    send(queue, small)
    commands = queue.cancel(large, 1.0)
    let_in = [runner.load.jobs]
    while GoOn() in commands:
        commands = queue.go_on(1.0)
        let_in.append(runner.load.jobs - sum(let_in))
    assert let_in == [SLICE] * 5 + [3]
    assert launches(queue.complete(running, 2.0)) == small[:1]


def test_the_gate_of_a_lease_opens_for_many_in_slices_too():
    queue = device()
    runner = add(queue, size=MANY)
    lease = take_lease(queue, runner)
    running, large = Job(lease), Job(lease, bytes=MANY)
    small = [Job(lease, Priority.LOW, bytes=1) for _ in range(MANY)]
    queue.submit(running, 0.0)
    queue.submit(large, 0.0)
    send(queue, small)
    parts = list(slices(queue, queue.cancel(large, 1.0)))
    assert len(parts) == 6
    assert all(job.state is JobState.QUEUED for job in small)


@pytest.mark.parametrize("seed", [*range(30), None])
def test_walks_in_slices_end_each_job_once(seed):
    seed = random.randrange(2**32) if seed is None else seed
    draw = random.Random(seed)
    queue = device(lanes=2, jobs=3 * SLICE)
    runners = [add(queue, name, slots=2, jobs=2 * SLICE) for name in "ab"]
    jobs, running, ends = [], [], Counter()
    now, asked = 0.0, False
    for _ in range(40):
        now += draw.choice([0.0, 1.0])
        runner = draw.choice(runners)
        fact = draw.choice(
            ["submit"] * 4
            + ["complete"] * 2
            + ["abort", "open", "cancel", "tick", "go on", "terminate"]
        )
        commands = []
        if fact == "submit":
            for _ in range(draw.choice([1, SLICE])):
                job = Job(
                    runner,
                    draw.randrange(3),
                    draw.choice([None, now + 3]),
                    tenant=draw.choice("xyz"),
                )
                jobs.append(job)
                commands += queue.unchecked.submit(job, now, wait=True)
            check(queue)
        elif fact == "complete" and running:
            commands = queue.complete(running.pop(0), now)
        elif fact == "abort" and not runner.closed and runner.phase is Phase.OPEN:
            commands = queue.close_barrier(runner, now, abort=True)
        elif fact == "open" and runner.closed:
            commands = queue.open_barrier(runner, now)
        elif fact == "cancel":
            alive = [job for job in jobs if job.state in (JobState.QUEUED, JobState.WAITING)]
            if alive:
                commands = queue.cancel(draw.choice(alive), now)
        elif fact == "tick":
            commands = queue.tick(now)
        elif fact == "terminate" and draw.random() < 0.3:
            commands = queue.terminate_runner(runner, now)
        elif fact == "go on" and asked:
            asked = False
            commands = queue.go_on(now)
        asked = asked or GoOn() in commands
        running += launches(commands)
        ends.update(c.job for c in commands if type(c) in (Revoke, Expire))
    while asked:
        commands = queue.go_on(now)
        asked = GoOn() in commands
        running += launches(commands)
        ends.update(c.job for c in commands if type(c) in (Revoke, Expire))
    assert max(ends.values(), default=1) == 1, f"seed {seed}"
    told = {JobState.REVOKED, JobState.EXPIRED}
    assert all((job in ends) == (job.state in told) for job in jobs), f"seed {seed}"
    for runner in runners:
        if runner.phase is Phase.TERMINATED:
            assert not len(runner.queue), f"seed {seed}"


def test_what_waits_for_room_is_counted_at_the_gate_and_in_lines():
    queue, runner, _ = scene()
    jobs = crowded(queue, runner)
    waiting = [job for job in jobs if job.state is JobState.WAITING and not job.min_epoch]
    assert runner.waits == len(waiting) == len(runner.waiting()) > 0


# --- epochs ---------------------------------------------------------------------------------------

HUGE = 50_000


def submit_unchecked(queue, jobs):
    for job in jobs:
        queue.unchecked.submit(job, 0.0, wait=True)


def publish(queue, runner, epoch):
    """Close the barrier of an idle runner and open it on another epoch; return what follows."""
    queue.close_barrier(runner, 1.0)
    return queue.open_barrier(runner, 1.0, epoch=epoch)


@pytest.mark.long
def test_a_publish_moves_a_slice_of_the_jobs_that_waited_for_it():
    queue = device()
    runner = add(queue)
    later = [Job(runner, min_epoch=3) for _ in range(100)]
    awaited = [Job(runner, min_epoch=2) for _ in range(HUGE)]
    submit_unchecked(queue, [*later, *awaited])
    raw = queue.unchecked
    raw.close_barrier(runner, 1.0)
    commands, left = raw.open_barrier(runner, 1.0, epoch=2), HUGE + 100
    running = launches(commands)
    while GoOn() in commands:
        assert left - len(runner.awaiting) <= SLICE
        assert len(commands) <= 3
        left = len(runner.awaiting)
        commands = raw.go_on(1.0)
        running += launches(commands)
    queue.tick(1.0)
    assert [*running, *runner.queue.jobs()] == awaited
    assert list(runner.awaiting.within(0, 9)) == later


@pytest.mark.long
def test_a_rollback_revokes_a_slice_of_the_jobs_that_asked_for_what_was():
    queue = device()
    runner = add(queue, epoch=2)
    first = Job(runner)
    queue.submit(first, 0.0)
    gone = [Job(runner, min_epoch=2) for _ in range(HUGE)]
    stays = [Job(runner, min_epoch=1) for _ in range(3)]
    submit_unchecked(queue, [*gone[: HUGE // 2], *stays, *gone[HUGE // 2 :]])
    raw = queue.unchecked
    raw.close_barrier(runner, 1.0)
    raw.complete(first, 1.0)
    commands, seen = raw.open_barrier(runner, 1.0, epoch=1), []
    while GoOn() in commands:
        assert sum(type(command) is Revoke for command in commands) <= SLICE
        assert not launches(commands)
        seen += [command.job for command in commands if type(command) is Revoke]
        commands = raw.go_on(1.0)
    seen += [command.job for command in commands if type(command) is Revoke]
    assert seen == gone
    assert launches(commands) == stays[:1]
    queue.tick(1.0)
    assert runner.queue.jobs() == stays[1:]


def half_published():
    """A runner of which one slice of jobs has moved to its new epoch, and others await a later
    one.
    """
    queue = device()
    runner = add(queue)
    jobs = [Job(runner, min_epoch=2) for _ in range(MANY)]
    later = [Job(runner, min_epoch=3) for _ in range(MANY)]
    for job in (*jobs, *later):
        queue.submit(job, 0.0)
    commands = publish(queue, runner, 2)
    assert GoOn() in commands
    assert not launches(commands)
    assert len(runner.awaiting) == 2 * MANY - SLICE
    return queue, runner, jobs, later


def go_on(queue, commands):
    """The commands of a fact, then those of each `go_on`, the first of which was asked for
    before.
    """
    return [commands, *slices(queue, queue.go_on(1.0))]


def test_terminating_in_between_ends_what_has_moved_and_what_has_not():
    queue, runner, jobs, later = half_published()
    parts = go_on(queue, queue.terminate_runner(runner, 1.0))
    assert Counter(ended(parts, Revoke)) == Counter([*jobs, *later])
    assert not ended(parts, Launch)
    assert parts[-1] == [*parts[-1][:-1], Drained(runner)]


def test_draining_in_between_serves_those_whose_epoch_has_come():
    queue, runner, jobs, later = half_published()
    parts = go_on(queue, queue.drain_runner(runner, 1.0))
    assert Counter(ended(parts, Revoke)) == Counter(later)
    assert len(runner.awaiting) == 0
    assert Counter([*ended(parts, Launch), *runner.queue.jobs()]) == Counter(jobs)


def test_an_abort_in_between_ends_those_whose_epoch_has_come():
    queue, runner, jobs, later = half_published()
    parts = go_on(queue, queue.close_barrier(runner, 1.0, abort=True))
    assert Counter(ended(parts, Revoke)) == Counter(jobs)
    assert list(runner.awaiting.within(0, 9)) == later
    assert sum(BarrierReached(runner) in part for part in parts) == 1


def test_a_rollback_in_between_ends_those_that_wait_for_what_was():
    queue, runner, jobs, later = half_published()
    parts = go_on(queue, publish(queue, runner, 1))
    assert Counter(ended(parts, Revoke)) == Counter(jobs)
    assert list(runner.awaiting.within(0, 9)) == later
    assert runner.epoch == 1


def test_jobs_that_wait_for_room_and_asked_for_what_was_are_revoked_too():
    queue = device()
    runner = add(queue, jobs=2, epoch=2)
    jobs = [Job(runner, min_epoch=2) for _ in range(6)]
    for job in jobs:
        queue.submit(job, 0.0, wait=True)
    queue.cancel(jobs[5], 0.0)
    queue.close_barrier(runner, 1.0)
    queue.complete(jobs[0], 1.0)
    assert ended([queue.open_barrier(runner, 1.0, epoch=1)], Revoke) == jobs[1:5]


def test_a_runner_knows_how_many_jobs_a_withdrawal_takes_out():
    queue, runner, _ = scene()
    queue.submit(Job(runner, Priority.HIGH, is_lease_request=True, bypasses_limits=True), 0.0)
    crowded(queue, runner)
    expected = runner.withdrawable
    parts = slices(queue, queue.withdraw(runner, 1.0))
    assert len(ended(parts, Withdraw)) == expected == MANY
    assert runner.withdrawable == 0
