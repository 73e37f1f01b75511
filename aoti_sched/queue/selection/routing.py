"""Replicas: which of a runner's several, each on a device of its own, a request goes to."""

from __future__ import annotations

from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.job import Job
from aoti_sched.queue.runner_state import Phase, RunnerState

NEAR = 0.125
"""Predictions that differ by no more than this part are equal.

Runs differ by as much from one to the next; were a hair to decide, one of two equal devices would
get everything that comes while both are idle.
"""

Cost = tuple[bool, bool, bool, float]
"""What speaks against a replica: it takes nothing; it has no room; it gives out no slot for
now; the time, or who is there.
"""


class Rotation:
    """The replicas of one runner that take requests, with their queues, and whose turn it is."""

    __slots__ = ("_turn", "replicas")

    def __init__(self, replicas: list[tuple[DeviceQueue, RunnerState]]) -> None:
        self.replicas = replicas
        self._turn = 0

    def leave(self, runner: RunnerState) -> None:
        """This replica takes no more requests."""
        place = [one for _, one in self.replicas].index(runner)
        del self.replicas[place]
        self._turn -= place < self._turn

    def place(self, job: Job, now: float) -> None:
        """Choose the replica that a new job draws its slot from: where it would be finished first.

        Ties take turns.

        Where nothing is known of its runs at one of them, and for a lease, which may last for any
        time, that is where the least is for each slot. One that is believed to be slower, and has
        not run any for long, is tried all the same: only runs can tell.
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
            place
            for place, (*those, seconds) in enumerate(costs)
            if those == hindrances and seconds <= most
        ]
        chosen = min(best, key=lambda place: (place - self._turn) % len(replicas))
        for place, (*those, seconds) in enumerate(costs):
            if (
                known
                and those == hindrances
                and seconds > most
                and _is_tried(job, replicas[place][1], seconds, now)
            ):
                chosen = place
                break
        job.source = replicas[chosen][1]
        self._turn = (chosen + 1) % len(replicas)


def _is_tried(job: Job, runner: RunnerState, seconds: float, now: float) -> bool:
    """Whether a job goes to a replica where it would be finished in so many, later than
    elsewhere, but for its runs alone.
    """
    times = runner.placing.times
    waits = seconds > times.typical(job.bytes)
    if waits or (job.deadline is not None and now + seconds > job.deadline):
        return False
    return times.should_probe(job.bytes, now)


def _crowd(runner: RunnerState) -> float:
    """Who wants or has one of its slots, for each slot."""
    return (runner.live + len(runner.leases)) / runner.slots
