"""Check: what is true of a `DeviceQueue` after every fact."""

# ruff: noqa: SLF001 -- the invariants are about what is inside

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from aoti_sched.queue.holding import Stay
from aoti_sched.queue.job import Job, JobState, Priority
from aoti_sched.queue.runner_state import Phase
from aoti_sched.queue.selection import accounts as fair
from aoti_sched.queue.selection.choice import can_start, is_behind, most_ahead
from aoti_sched.queue.selection.placement import LOOP, MOST_AHEAD, Placement
from aoti_sched.queue.timers import is_over

if TYPE_CHECKING:
    from aoti_sched.queue.admission.load import Load
    from aoti_sched.queue.batching import BatchQueue
    from aoti_sched.queue.device_queue import DeviceQueue
    from aoti_sched.queue.runner_state import RunnerState, Source


def check(queue: DeviceQueue) -> None:
    """Check all invariants of a device's queue.

    Raises:
        AssertionError: An invariant is broken. The message names it.
    """

    def must(truth: bool, sentence: str) -> None:
        if not truth:
            raise AssertionError(f"{queue.name}: {sentence}")

    busy = [lane for lane in queue.lanes.running if lane != LOOP]
    must(
        sorted([*queue.lanes.free, *busy]) == list(range(queue.lanes.count)),
        "each lane is free or runs one job",
    )
    must(
        all(
            job.lane == lane and job.inline == (lane == LOOP)
            for lane, job in queue.lanes.running.items()
        ),
        "a job's lane and inline fields say where the job runs",
    )
    must(
        queue._turn_asked
        or (
            LOOP not in queue.lanes.running
            and queue.lanes.inline_left == queue.lanes.inline_budget
            and not queue._gathering
        ),
        "a turn with inline runs, or with jobs that may share a run, has a next turn",
    )
    on_cores = sum(
        job.source.runner.width for lane, job in queue.lanes.running.items() if lane != LOOP
    )
    must(
        queue.lanes.free_cores == queue.lanes.cores - on_cores >= 0,
        "each run on a lane has its cores",
    )
    _check_lanes(queue, must)
    queued_jobs = queued_bytes = 0
    must(
        all(0 < len(ahead) <= MOST_AHEAD for ahead in queue.lanes.handed_ahead.values()),
        "no more jobs are handed ahead to a lane than it takes",
    )
    for runner in queue.runners.values():
        on_lanes = [job for job in queue.lanes.running.values() if job.source.runner is runner]
        held = [lease.slot for lease in runner.leases.values()]
        own = [job.slot for job in on_lanes if job.source is runner]
        must(
            sorted([*runner.free, *held, *own]) == list(range(runner.slots)),
            "free + leased = all slots",
        )
        for lease in runner.leases.values():
            runs = [job for job in on_lanes if job.source is lease]
            must(len(runs) + len(lease.free) == 1, "a lease runs at most one job at a time")
            must(not lease.released or lease.live > 0, "a released lease with no jobs is retired")
        sources: list[Source] = [runner, *runner.leases.values()]
        queued = [job for source in sources for job in source.queue.jobs()]
        gate = [job for source in sources for job in source.gate.jobs()]
        in_line = [job for line in runner.tenant_lines.values() for job in line.values()]
        must(runner.lined == len(in_line), "jobs in tenants' lines are counted")
        must(all(job.state is JobState.QUEUED for job in queued), "each job in a queue is QUEUED")
        must(all(job.state is JobState.WAITING for job in gate), "each job at a gate is WAITING")
        must(runner.load.jobs == len(queued), "a runner's load counts its queued jobs")
        must(
            runner.load.bytes == sum(job.bytes for job in queued),
            "a runner's load counts its bytes",
        )
        for lease in runner.leases.values():
            jobs = lease.queue.jobs()
            must(lease.load.jobs == len(jobs), "a lease's load counts its queued jobs")
            must(
                lease.load.bytes == sum(job.bytes for job in jobs),
                "a lease's load counts its bytes",
            )
            must(lease.load.within_bounds(), "no bound of a lease is exceeded")
            must(
                not _has_room(lease) or lease.halted > 0 or queue._goes_on,
                "no job waits at a lease's gate when the lease has room",
            )
            must(not lease.closed, "a held lease is never closed")
        _check_tenants(runner, must)
        _check_histograms(runner, must)
        awaiting = list(runner.awaiting.within(0, math.inf))
        must(
            all(job.state is JobState.WAITING for job in awaiting),
            "each job that awaits an epoch is WAITING",
        )
        ending = {
            job.id
            for one in queue._endings
            if one.runner is runner
            for job in one.some(sys.maxsize)
        }
        moving = runner.epoch if runner in queue._moving else 0
        must(
            all(
                job.min_epoch > runner.published or job.min_epoch <= moving or job.id in ending
                for job in awaiting
            ),
            "no job awaits an epoch that has been published",
        )
        must(
            all(
                job.min_epoch <= job.source.epoch or job.id in ending
                for job in (*queued, *gate, *in_line)
            ),
            "each queued job can have its epoch",
        )
        bound = [j for j in (*queued, *gate, *in_line) if j.names_epoch and j.source is runner]
        must(
            sorted(job.id for job in runner.epoch_bound.within(0, math.inf))
            == sorted(job.id for job in bound),
            "each queued job that asks for an epoch is listed under the epoch",
        )
        must(
            all(job.epoch == job.source.epoch for job in on_lanes), "nothing runs on another epoch"
        )
        must(1 <= runner.epoch <= runner.published, "the present epoch was published")
        must(
            not runner.reached or (runner.closed and runner.home),
            "a reached barrier is closed, and every slot is free",
        )
        following = [
            job
            for ahead in queue.lanes.handed_ahead.values()
            for job in ahead
            if job.source.runner is runner
        ]
        for job in following:
            first = queue.lanes.running.get(job.lane)
            must(
                first is not None
                and (first.source, first.slot, first.epoch) == (job.source, job.slot, job.epoch),
                "a job handed ahead has the source, slot and epoch of the job on its lane",
            )
        for source in sources:
            open_lanes = source.open_for_next
            must(
                all(
                    queue.lanes.running[lane].source is source
                    and queue.lanes.waiting_on(lane) < MOST_AHEAD
                    and not any(job.retrying for job in queue.lanes.handed_ahead.get(lane, ()))
                    for lane in open_lanes
                )
                and len({*open_lanes}) == len(open_lanes),
                "a lane that is open for a source's next job runs one of its jobs and takes more",
            )
        if runner.batch_queue is not None:
            _check_batches(queue, runner, queued, must)
        must(
            runner.reached or runner.halted > 0 or not (runner.closed and runner.home),
            "a barrier that can be reached is reached",
        )
        turns = queue.turns.get(runner)
        must(
            runner.aside == (turns is not None and (runner is turns.other or turns.turning)),
            "a runner is aside exactly while the other record serves, or is about to",
        )
        must(
            turns is None or runner is turns.serving or (runner.closed and runner.reached),
            "a record that does not serve starts nothing",
        )
        must(
            turns is None
            or turns.turning
            or not turns.serving.home
            or (len(turns.serving.queue) > 0 and not turns.held)
            or not turns.gives_way(-math.inf),
            "a record that has nothing to do gives way to one that has jobs",
        )
        halting = sum(ending.runner is runner for ending in queue._endings)
        must(
            runner.halted == halting,
            "a runner is halted as often as endings of its jobs are under way",
        )
        must(
            sum(s.live for s in sources)
            == len(queued)
            + len(gate)
            + len(in_line)
            + len(awaiting)
            + sum(map(_live, [*on_lanes, *following])),
            "each live job is at a gate, in a queue or on a lane",
        )
        must(runner.load.within_bounds(*_lease_loads(runner)), "no bound of a runner is exceeded")
        if _has_room(runner) and not runner.halted and not queue._goes_on:
            at_gate = queue.room.gates.best()
            waits = None if at_gate is None else at_gate.gate.head()
            blocked = waits is not None and queue.load.refusal(waits.bytes) is not None
            must(blocked, "no job waits at a gate when there is room")
        must((runner.phase is not Phase.DRAINED) or runner.idle, "a drained runner is idle")
        must(
            runner.phase not in (Phase.DRAINING, Phase.TERMINATED) or not runner.idle,
            "a runner that is leaving and idle is drained",
        )
        for source in sources:
            head = source.queue.head()
            if head is not None and can_start(source) and not queue._goes_on:
                must(
                    not _has_place(queue, source, head),
                    "no job waits while a slot and a place to run are free",
                )
        _check_accounts(queue, runner, queued, must)
        queued_jobs += len(queued)
        queued_bytes += sum(job.bytes for job in queued)
    must(
        queue.load.jobs == queued_jobs and queue.load.bytes == queued_bytes,
        "the device's load is its runners'",
    )
    leases = [load for runner in queue.runners.values() for load in _lease_loads(runner)]
    must(queue.load.within_bounds(*leases), "no bound of the device is exceeded")
    must(
        queue._goes_on or not (queue._endings or queue._moving),
        "endings and moves that are under way are continued in the next turn",
    )
    _check_memory(queue, must)
    must(
        sum(not is_over(entry[2]) for entry in queue.timers.deadlines.entries())
        == queue.timers.deadlines.alive,
        "live deadlines are counted",
    )
    hurried = [
        job
        for runner in queue.runners.values()
        for source in (runner, *runner.leases.values())
        for job in source.queue.jobs()
        if job.deadline is not None
    ]
    must(
        not queue._urgency.kept
        or [starts.alive for starts in queue._urgency._classes]
        == [sum(job.priority == priority for job in hurried) for priority in Priority],
        "each queued job with a deadline is reckoned with in batches",
    )


def _check_lanes(queue: DeviceQueue, must: Callable[[bool, str], None]) -> None:
    """Check which slots keep which lanes, and that there are lanes enough for the slots."""
    lanes, behind = queue.lanes, {turns.behind for turns in queue.turns.values()}
    own = [runner for runner in queue.runners.values() if runner not in behind]
    kept = [lane for runner in own for lane in runner.last_lanes.values()]
    must(
        lanes._claims == [kept.count(lane) for lane in range(lanes.count)],
        "each lane knows how many slots ran there last",
    )
    must(
        lanes._slots == sum(runner.slots for runner in own),
        "the lanes know how many slots there are",
    )
    most = queue.policy.most_lanes
    must(
        most is None or lanes.count >= min(most, lanes._slots),
        "there is a lane for each slot, up to a bound",
    )


def _check_memory(queue: DeviceQueue, must: Callable[[bool, str], None]) -> None:
    memory = queue.memory
    waiting = [claim.holding for claim in memory.claims if claim.returns is not None]
    there = [one for one in memory.holdings if one.stay is not Stay.AWAY and one not in waiting]
    must(memory.used == sum(one.bytes for one in there), "resident bytes are counted")
    must(
        memory.leaving == sum(one.bytes for one in there if one.stay is Stay.LEAVING),
        "bytes that evictions will free are counted",
    )
    must(
        memory.promised == sum(claim.bytes for claim in memory.claims),
        "bytes of waiting claims are counted",
    )
    must(
        not memory.claims
        or (memory.limit is not None and memory.used + memory.claims[0].bytes > memory.limit),
        "no claim waits for memory that is free",
    )
    must(
        all(one.stay is Stay.COMING for one in waiting),
        "a runner with a waiting claim is being restored",
    )
    for runner in queue.runners.values():
        stay = runner.memory.stay
        must(runner.memory in memory.holdings, "each runner's memory is recorded")
        must(
            runner.closed or stay is Stay.HERE,
            "a runner whose constants are not resident has a closed barrier",
        )
        must(runner.home or stay in (Stay.HERE, Stay.LEAVING), "no job runs without constants")
        must(stay is Stay.HERE or not runner.leases, "a runner with held leases is not evicted")
        must(
            runner in memory.line
            or stay is not Stay.AWAY
            or not runner.load.jobs
            or runner.halted > 0,
            "an evicted runner with queued jobs is in line",
        )
    must(
        memory.wake is None or (queue._wake is not None and queue._wake <= memory.wake),
        "the device wakes for the runners in line",
    )


def _has_place(queue: DeviceQueue, source: Source, head: Job) -> bool:
    """Return whether a place is free for a source's first job.

    Of the sources that may run on the loop or on a lane, only the first one gets a place.
    """
    lanes, runner = queue.lanes, source.runner
    placing = runner.placing
    lane = bool(lanes.free) and not _waits_for_cores(queue)
    if head.is_lease_request or not placing.inline(head.bytes):
        return head.is_lease_request or lane
    if placing.choice is not Placement.AUTO:
        return lanes.loop_is_free()
    if queue._selector._either.best() is not source:
        return False
    if not is_behind(head):
        return lanes.loop_is_free()
    return (lane and runner.width <= lanes.free_cores) or (
        lanes.loop_is_fresh() and not lanes.takes_ahead(source, most_ahead(head))
    )


def _waits_for_cores(queue: DeviceQueue) -> bool:
    """Return whether a source that contends for a lane needs more cores than are free."""
    sources = [s for runner in queue.runners.values() for s in (runner, *runner.leases.values())]
    return any(
        source.free
        and not source.closed
        and len(source.queue)
        and source.runner.width > queue.lanes.free_cores
        for source in sources
    )


def _check_histograms(runner: RunnerState, must: Callable[[bool, str], None]) -> None:
    """Check that each job that has ended is in one bucket of each histogram of its kind."""
    counters = runner.counters
    ended = {
        JobState.DONE: counters.completed,
        JobState.FAILED: counters.failed,
        JobState.REJECTED: counters.rejected,
        JobState.EXPIRED: counters.expired,
        JobState.CANCELLED: counters.cancelled,
        JobState.REVOKED: counters.revoked,
        JobState.SHED: counters.shed,
    }
    found = dict.fromkeys(ended, 0)
    for state, _, histograms in runner.histograms.each():
        count = sum(histograms.total.counts)
        must(
            sum(histograms.queue.counts) == count >= sum(histograms.run.counts),
            "each ended job is in one bucket of its histograms",
        )
        must(
            sum(histograms.run.counts) == sum(histograms.batch_size.counts),
            "each run is in one bucket of its histograms",
        )
        found[JobState(state)] += count
    must(found == ended, "the histograms have all jobs that the counters have")
    must(sum(runner.rejections.values()) == counters.rejected, "each rejected job has one reason")


def _check_tenants(runner: RunnerState, must: Callable[[bool, str], None]) -> None:
    most = runner.load.bounds.tenant_jobs
    counted: dict[Hashable, int] = {}
    for job in (*runner.gate.jobs(), *runner.queue.jobs()):
        if most is not None and not job.bypasses_limits:
            counted[job.tenant] = counted.get(job.tenant, 0) + 1
    must(runner.tenant_jobs == counted, "a tenant's jobs at the gate and in the queue are counted")
    must(
        most is None or max(counted.values(), default=0) <= most, "no bound of a tenant is exceeded"
    )
    for tenant, line in runner.tenant_lines.items():
        must(
            bool(line) and counted.get(tenant) == most,
            "no job waits for its tenant when there is room",
        )
        must(
            all(job.state is JobState.WAITING and job.tenant == tenant for job in line.values()),
            "each job in a tenant's line is WAITING",
        )


def _check_accounts(
    queue: DeviceQueue, runner: RunnerState, queued: list[Job], must: Callable[[bool, str], None]
) -> None:
    turns = queue.turns.get(runner)
    records = [runner] if turns is None else [turns.main, turns.behind]  # both have these accounts
    of_records = [
        job
        for record in records
        for source in (record, *record.leases.values())
        for job in source.queue.jobs()
    ]
    launched = [job for job in queue.lanes.launched() if job.source.runner in records]
    running = [job for first in launched for job in (*(first.members or (first,)), *first.to_retry)]
    for priority, account in enumerate(runner.accounts):
        of_class = [job for job in of_records if job.priority == priority]
        must(
            account.queued == len(of_class)
            and account.running == sum(job.priority == priority for job in running),
            "a runner's account counts its queued and running jobs",
        )
        must(account.balance <= 0.0, "no account owes time that was used")
        fair_class = runner.tenants[priority]
        for tenant, own in fair_class.accounts.items():
            mine = [job for job in of_class if job.source in records and job.tenant == tenant]
            runs = [
                j
                for j in running
                if j.source in records and j.tenant == tenant and j.priority == priority
            ]
            must(
                (own.queued, own.running) == (len(mine), len(runs)),
                "a tenant's account counts its queued and running jobs",
            )
            idle = tenant is not None and not (own.queued or own.running)
            must(idle == (own.rested > 0), "an idle tenant's account says that the tenant is idle")
        resting = sum(own.rested > 0 for own in fair_class.accounts.values())
        must(
            resting == fair_class._resting <= fair.DEBTORS,
            "idle tenants are counted, and are no more than are kept",
        )
        of_tenants = [
            j for j in (*of_class, *running) if j.source in records and j.priority == priority
        ]
        must(
            all(fair_class.accounts.get(job.tenant) is job.account for job in of_tenants),
            "each queued or running job is on its tenant's account",
        )
    must(
        runner.backlog.jobs == (len(queued) if queue._forecast.kept else 0),
        "each queued job is part of the forecast",
    )
    oldest = (
        [job for job in queued if not job.is_lease_request]
        if queue.policy.max_wait is not None
        else []
    )
    sources: list[Source] = [runner, *runner.leases.values()]
    must(
        sorted(job.id for source in sources for job in source.arrivals.jobs())
        == sorted(j.id for j in oldest),
        "each job that may become overdue is watched",
    )
    may_go = [j for j in queued if runner.sheds and j.source is runner and not j.is_lease_request]
    must(
        runner.worst.alive == len(may_go) == sum(worst.alive for worst in runner.worst_of.values()),
        "each job that may be shed is listed",
    )


def _live(job: Job) -> int:
    """Return how many jobs a launched job stands for: its batch, and the members to retry."""
    return len(job.members or (job,)) + len(job.to_retry)


def _has_room(source: Source) -> bool:
    head = source.gate.head()
    return head is not None and source.load.refusal(head.bytes) is None


def _check_batches(
    queue: DeviceQueue, runner: RunnerState, queued: list[Job], must: Callable[[bool, str], None]
) -> None:
    batches: BatchQueue = runner.batch_queue  # type: ignore[assignment]
    for job in queue.lanes.launched():
        if job.source is runner and job.members:
            must(
                job.members[0] is job and len(job.members) > 1,
                "a batch has several members and is led by the first",
            )
            must(
                all(member.key == job.key for member in job.members),
                "the members of a batch have one key",
            )
            must(
                sum(member.rows for member in job.members) <= batches.rule.max_rows,
                "a batch has at most max_rows rows",
            )
            must(
                batches.rule.max_tokens is None
                or sum(member.rows for member in job.members)
                * max(member.tokens for member in job.members)
                <= batches.rule.max_tokens,
                "a batch has at most max_tokens tokens",
            )
            must(
                all(
                    (m.lane, m.slot, m.epoch) == (job.lane, job.slot, job.epoch)
                    for m in job.members
                ),
                "the members of a batch have one lane, slot and epoch",
            )
    keyed = [
        job
        for job in queued
        if job.source is runner and job.key is not None and not job.is_lease_request
    ]
    must(
        batches.keys.keys() == {job.key for job in keyed},
        "exactly the keys that have jobs are listed",
    )
    for name, key in batches.keys.items():
        alike = [job for job in keyed if job.key == name]
        must(
            (key.jobs, key.rows, key.tokens)
            == (
                len(alike),
                sum(job.rows for job in alike),
                sum(job.rows * job.tokens for job in alike),
            ),
            "a key counts its jobs, rows and tokens",
        )
        must(
            not key.held or key.ripe or queue._turn_asked,
            "a next turn comes for each key that is held until then",
        )
        wakes = queue._wake is not None and queue._wake <= key.ripe_at
        must(
            key.ripe or key.held or wakes, "the device wakes for each key that waits for more jobs"
        )
    must(
        bool(batches.arrived) == (runner in queue._gathering),
        "a runner with new batchable jobs is listed until the turn ends",
    )


def _lease_loads(runner: RunnerState) -> list[Load]:
    return [lease.load for lease in runner.leases.values()]
