"""Routing: which of a runner's replicas, each on a device of its own, a request goes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.job import Job
from aoti_sched.queue.runner_state import Phase, RunnerState

NEAR: Final = 0.125
"""Predictions that differ by no more than this part count as equal.

Run times vary by as much. If a smaller difference decided, one of two equal devices would get all
requests that come while both are idle.
"""

Cost = tuple[bool, bool, bool, float]
"""The reasons against a replica, the strongest first.

Three hindrances: the replica takes no new jobs, has no room, or gives out no slot at present. Then
the predicted seconds, or the jobs and leases per slot.
"""


class Rotation:
    """The replicas of one runner that take requests, with their queues.

    Ties between replicas are broken in rotation.
    """

    __slots__ = ("_next", "replicas")

    def __init__(self, replicas: list[tuple[DeviceQueue, RunnerState]]) -> None:
        self.replicas = replicas
        self._next = 0

    def leave(self, runner: RunnerState) -> None:
        """Remove a replica, which takes no more requests."""
        index = [one for _, one in self.replicas].index(runner)
        del self.replicas[index]
        self._next -= index < self._next

    def place(self, job: Job, now: float) -> None:
        """Choose the replica that a new job draws its slot from, and set the job's source.

        The job goes where it is predicted to finish first; ties are broken in rotation. When the
        run times of a replica are not known, the job goes where the fewest jobs and leases are for
        each slot. So does a lease request, since a lease may last for any time.

        A replica that is predicted to be slower, and has had no run of that size for long, is tried
        now and then: only a run can correct its prediction.
        """
        replicas = self.replicas
        if len(replicas) == 1:
            job.source = replicas[0][1]
            return
        known = not job.is_lease_request and all(
            one.placing.times.knows(job.bytes) for _, one in replicas
        )
        costs: list[Cost] = []
        for queue, runner in replicas:
            job.source = runner
            costs.append(
                (
                    runner.phase is not Phase.OPEN,
                    queue.room.full(job) is not None,
                    runner.closed or len(runner.leases) == runner.slots,
                    queue.when_finished(job, now) if known else _crowd(runner),
                )
            )
        *hindrances, least = min(costs)
        most = least * (1 + NEAR) if known else least
        best = [
            index
            for index, (*those, seconds) in enumerate(costs)
            if those == hindrances and seconds <= most
        ]
        chosen = min(best, key=lambda index: (index - self._next) % len(replicas))
        for index, (*those, seconds) in enumerate(costs):
            if (
                known
                and those == hindrances
                and seconds > most
                and _is_probed(job, replicas[index][1], seconds, now)
            ):
                chosen = index
                break
        job.source = replicas[chosen][1]
        self._next = (chosen + 1) % len(replicas)


def least_crowded(runners: Sequence[RunnerState]) -> int:
    """Return the index of the runner with the fewest jobs and leases per slot, the first on a tie.

    Jobs of sessions that are behind go there: no deadline of theirs is predicted.
    """
    return min(range(len(runners)), key=lambda index: _crowd(runners[index]))


def _is_probed(job: Job, runner: RunnerState, seconds: float, now: float) -> bool:
    """Return whether to try a replica that is predicted to be slower than others.

    A replica is tried only if it is slower by its run times alone, and not because the job would
    wait there. The job's deadline must be met there, too.

    Args:
        job: The job.
        runner: The replica.
        seconds: The predicted seconds until the job would be finished there.
        now: The present time.
    """
    times = runner.placing.times
    waits = seconds > times.typical(job.bytes)
    if waits or (job.deadline is not None and now + seconds > job.deadline):
        return False
    return times.should_probe(job.bytes, now)


def _crowd(runner: RunnerState) -> float:
    """Return the number of a replica's live jobs and leases per slot."""
    return (runner.live + len(runner.leases)) / runner.slots
