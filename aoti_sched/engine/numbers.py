"""Numbers: what a runner's state has counted, as plain values for `stats()`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoti_sched.histograms import EndedRequests, Histogram
from aoti_sched.queue.job import JobState, Priority

if TYPE_CHECKING:
    from aoti_sched.queue.histogram import Histogram as Counts
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
