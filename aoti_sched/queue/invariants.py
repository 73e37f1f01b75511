"""What is true of a `DeviceQueue` after every fact, whatever it was."""

# ruff: noqa: SLF001 -- the invariants are about what is inside

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from aoti_sched.queue.job import Job, JobState
from aoti_sched.queue.lease import Phase
from aoti_sched.queue.placement import LOOP
from aoti_sched.queue.timers import is_over

if TYPE_CHECKING:
    from aoti_sched.queue.admission import Load
    from aoti_sched.queue.batch import Company
    from aoti_sched.queue.device_queue import DeviceQueue
    from aoti_sched.queue.lease import RunnerState, Source


def check(queue: DeviceQueue) -> None:
    """Raise AssertionError, with the sentence that is not true."""

    def must(truth: bool, sentence: str) -> None:
        if not truth:
            raise AssertionError(f"{queue.name}: {sentence}")

    busy = [lane for lane in queue.lanes.running if lane != LOOP]
    must(
        sorted([*queue.lanes.free, *busy]) == list(range(queue.lanes.count)),
        "each lane is free or runs one job",
    )
    must(
        all(job.lane == lane and job.inline == (lane == LOOP) for lane, job in queue.lanes.running.items()),
        "a job knows its lane",
    )
    must(
        queue._turn_asked
        or (
            LOOP not in queue.lanes.running
            and queue.lanes.inline_left == queue.lanes.inline_budget
            and not queue._gathering
        ),
        "a turn with inline runs, or with jobs that may have company, has a next",
    )
    queued_jobs = queued_bytes = 0
    for runner in queue.runners.values():
        on_lanes = [job for job in queue.lanes.running.values() if job.source.runner is runner]
        held = [lease.slot for lease in runner.leases.values()]
        own = [job.slot for job in on_lanes if job.source is runner]
        must(sorted([*runner.free, *held, *own]) == list(range(runner.slots)), "free + leased = all slots")
        for lease in runner.leases.values():
            runs = [job for job in on_lanes if job.source is lease]
            must(len(runs) + len(lease.free) == 1, "a lease runs at most one job at a time")
            must(not lease.released or lease.live > 0, "a released lease with no jobs is retired")
        sources: list[Source] = [runner, *runner.leases.values()]
        queued = [job for source in sources for job in source.queue.jobs()]
        gate = [job for source in sources for job in source.gate.jobs()]
        must(all(job.state is JobState.QUEUED for job in queued), "what is in a queue is QUEUED")
        must(all(job.state is JobState.WAITING for job in gate), "what is at a gate is WAITING")
        must(runner.load.jobs == len(queued), "a runner's load counts its queued jobs")
        must(runner.load.bytes == sum(job.bytes for job in queued), "a runner's load counts its bytes")
        for lease in runner.leases.values():
            jobs = lease.queue.jobs()
            must(lease.load.jobs == len(jobs), "a lease's load counts its queued jobs")
            must(lease.load.bytes == sum(job.bytes for job in jobs), "a lease's load counts its bytes")
            must(lease.load.within_bounds(), "no bound of a lease is exceeded")
            must(
                not _has_room(lease),
                "nobody waits at a lease's gate when it has room",
            )
            must(not lease.closed, "a held lease is never closed")
        awaiting = list(runner.awaiting.values())
        must(all(job.state is JobState.WAITING for job in awaiting), "what awaits an epoch is WAITING")
        must(
            all(job.min_epoch > runner.published for job in awaiting), "nobody awaits an epoch that has been"
        )
        must(
            all(job.min_epoch <= job.source.epoch for job in (*queued, *gate)),
            "what is queued can have its epoch",
        )
        must(all(job.epoch == job.source.epoch for job in on_lanes), "nothing runs on another epoch")
        must(1 <= runner.epoch <= runner.published, "an epoch was published")
        must(
            not runner.reached or (runner.closed and runner.home),
            "a barrier is reached while it is closed and every slot is home",
        )
        following = [job for job in queue.lanes.following.values() if job.source.runner is runner]
        for job in following:
            first = queue.lanes.running.get(job.lane)
            must(
                first is not None
                and (first.source, first.slot, first.epoch) == (job.source, job.slot, job.epoch),
                "what follows on a lane has the source, slot and epoch of what runs there",
            )
        for source in sources:
            open_lanes = source.followed
            must(
                all(
                    queue.lanes.running[lane].source is source and lane not in queue.lanes.following
                    for lane in open_lanes
                ),
                "a lane that may be given a next job runs one of the source and has no next",
            )
        if runner.company is not None:
            _check_company(queue, runner, queued, must)
        must(runner.reached or not (runner.closed and runner.home), "a barrier that can be reached is")
        must(
            sum(s.live for s in sources)
            == len(queued) + len(gate) + len(awaiting) + sum(map(_live, [*on_lanes, *following])),
            "live jobs are somewhere",
        )
        must(runner.load.within_bounds(*_lease_loads(runner)), "no bound of a runner is exceeded")
        if _has_room(runner):
            first = queue._gates.best()
            blocked = first is not None and queue.load.refusal(first.bytes) is not None
            must(blocked, "nobody waits at a gate when there is room")
        must((runner.phase is not Phase.DRAINED) or runner.idle, "a drained runner is idle")
        for source in sources:
            head = source.queue.head()
            if head is not None and source.free and not source.closed:
                here = head.holds or runner.placing.inline(head.bytes)
                place = (head.holds or queue.lanes.loop_is_free()) if here else bool(queue.lanes.free)
                must(not place, "no job waits while a slot and a place to run are free")
        queued_jobs += len(queued)
        queued_bytes += sum(job.bytes for job in queued)
    must(
        queue.load.jobs == queued_jobs and queue.load.bytes == queued_bytes,
        "the device's load is its runners'",
    )
    leases = [load for runner in queue.runners.values() for load in _lease_loads(runner)]
    must(queue.load.within_bounds(*leases), "no bound of the device is exceeded")
    must(
        sum(is_over(entry[2]) for entry in queue.timers.deadlines) == queue.timers.dead,
        "dead deadlines are counted",
    )


def _live(job: Job) -> int:
    """How many jobs one that was launched stands for."""
    return len(job.members or (job,)) + len(job.rest)


def _has_room(source: Source) -> bool:
    head = source.gate.head()
    return head is not None and source.load.refusal(head.bytes) is None


def _check_company(
    queue: DeviceQueue, runner: RunnerState, queued: list[Job], must: Callable[[bool, str], None]
) -> None:
    company: Company = runner.company  # type: ignore[assignment]
    for job in [*queue.lanes.running.values(), *queue.lanes.following.values()]:
        if job.source is runner and job.members:
            must(job.members[0] is job and len(job.members) > 1, "a batch is led by its first")
            must(all(member.key == job.key for member in job.members), "a batch is of one key")
            must(
                sum(member.rows for member in job.members) <= company.rule.max_rows,
                "a batch has not too many rows",
            )
            must(
                all((m.lane, m.slot, m.epoch) == (job.lane, job.slot, job.epoch) for m in job.members),
                "a batch runs in one place",
            )
    keyed = [job for job in queued if job.source is runner and job.key is not None and not job.holds]
    must(company.keys.keys() == {job.key for job in keyed}, "each key that has jobs is known, and no other")
    for name, key in company.keys.items():
        alike = [job for job in keyed if job.key == name]
        must((key.jobs, key.rows) == (len(alike), sum(job.rows for job in alike)), "a key counts its jobs")
        must(not key.held or key.ripe or queue._turn_asked, "what is held until the next turn has one")
        wakes = queue._wake is not None and queue._wake <= key.ripe_at
        must(key.ripe or key.held or wakes, "what waits for company is not forgotten")
    must(
        bool(company.arrived) == (runner in queue._gathering),
        "who has had jobs in this turn hears of its end",
    )


def _lease_loads(runner: RunnerState) -> list[Load]:
    return [lease.load for lease in runner.leases.values()]
