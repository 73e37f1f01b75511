"""Numbers: what the queue knows and has counted, as plain values for `stats()`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoti_sched.histograms import EndedRequests, Histogram
from aoti_sched.queue.job import JobState, Priority
from aoti_sched.queue.runner_state import UNHEALTHY
from aoti_sched.stats import DeviceStats, MemoryStats, Phase, RunnerStats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aoti_sched.backends.contracts import Executor
    from aoti_sched.queue.device_queue import DeviceQueue
    from aoti_sched.queue.histogram import Histogram as Counts
    from aoti_sched.queue.memory import Memory
    from aoti_sched.queue.runner_state import Counters, RunnerState

OUTCOMES = {
    JobState.DONE: "completed",
    JobState.FAILED: "failed",
    JobState.REJECTED: "rejected",
    JobState.EXPIRED: "expired",
    JobState.CANCELLED: "cancelled",
    JobState.REVOKED: "revoked",
    JobState.SHED: "shed",
}
"""What a request's outcome is called, by the state that it ended in."""


def runner_stats(queue: DeviceQueue, runner: RunnerState) -> RunnerStats:
    """Return a runner's numbers, those of its second record (`queue/weight_turns.py`) included."""
    turns = queue.turns.get(runner)
    records = [runner] if turns is None else [turns.main, turns.behind]
    serving = runner if turns is None else turns.serving
    totals = runner.counters.as_dict()
    busy = sum(one.slots - len(one.free) for one in records)
    for ahead in queue.lanes.handed_ahead.values():
        busy += sum(job.source.runner in records for job in ahead)
    totals["submitted"] -= totals["withdrawn"]
    return RunnerStats(
        name=runner.name,
        phase=Phase[runner.phase.name],
        health="failing" if runner.failures >= UNHEALTHY else "ok",
        waiting=sum(one.waits for one in records)
        + len(runner.awaiting)
        + sum(len(s.gate) for s in runner.leases.values()),
        queued=sum(one.load.jobs for one in records),
        queued_bytes=sum(one.load.bytes for one in records),
        running=busy - sum(len(lease.free) for lease in runner.leases.values()),
        held_leases=len(runner.leases),
        free_slots=len(serving.free),
        epoch=runner.epoch,
        updating=runner.closed and runner.memory.is_here and not runner.aside,
        parked=not runner.memory.is_here,
        parks=runner.memory.parked,
        memory=queue.memory.of(runner.memory),
        in_flight=in_flight(runner.counters),
        rejections=dict(runner.rejections),
        ended=ended_requests(runner),
        **totals,
    )


def device_stats(
    queue: DeviceQueue, executor: Executor, removed: Mapping[str, RunnerStats]
) -> DeviceStats:
    """Return a device's numbers.

    Args:
        queue: The device's.
        executor: The device's.
        removed: The last numbers of runners that are on the device no more, shown with the others.
    """
    return DeviceStats(
        name=queue.name,
        executor=executor.kind,
        lost=executor.lost(),
        lanes=queue.lanes.count,
        busy_lanes=queue.busy_lanes,
        cores=queue.lanes.cores,
        free_cores=queue.lanes.free_cores,
        queued=queue.load.jobs,
        queued_bytes=queue.load.bytes,
        memory=_memory_stats(queue.memory, executor.workspace()),
        runners={
            **removed,
            **{
                name: runner_stats(queue, runner)
                for name, runner in queue.runners.items()
                if runner not in queue.turns or queue.turns[runner].main is runner
            },
        },
    )


def _memory_stats(memory: Memory, workspace: int) -> MemoryStats:
    there = [one for one in memory.holdings if memory.of(one)]
    return MemoryStats(
        limit=memory.limit,
        used=memory.used,
        inactive=sum(one.inactive for one in there),
        parked=sum(one.bytes for one in memory.holdings) - sum(one.bytes for one in there),
        workspace=workspace,
    )


def ended_requests(runner: RunnerState) -> tuple[EndedRequests, ...]:
    """Return the histograms of a runner's requests."""
    found = [
        EndedRequests(
            outcome=OUTCOMES[JobState(state)],
            priority=Priority(priority).name,
            queue=plain(ended.queue),
            run=plain(ended.run),
            total=plain(ended.total),
            batch_size=plain(ended.batch_size),
        )
        for state, priority, ended in runner.histograms.each()
    ]
    return tuple(sorted(found, key=lambda one: (one.outcome, one.priority)))


def in_flight(counters: Counters) -> int:
    """Return how many requests have not ended for their callers, nor left for another replica."""
    ended = (counters.completed, counters.failed, counters.rejected, counters.expired)
    others = (counters.cancelled, counters.revoked, counters.shed, counters.withdrawn)
    return counters.submitted - sum(ended) - sum(others)


def plain(counts: Counts) -> Histogram:
    """Return a histogram as a plain value, without the empty buckets at its end."""
    last = max((index for index, count in enumerate(counts.counts) if count), default=-1)
    return Histogram(counts.least, tuple(counts.counts[: last + 1]), counts.sum, counts.max)
