"""Forecast: when a job that comes now would be finished, by what is known of the runs there were."""

from __future__ import annotations

from aoti_sched.queue.job import Job, Priority


class Backlog:
    """Device time that is queued, in core seconds, as far as it is known; by priority class."""

    __slots__ = ("_jobs", "_seconds", "jobs")

    def __init__(self) -> None:
        self.jobs = 0
        self._jobs = [0] * len(Priority)
        self._seconds = [0.0] * len(Priority)

    def add(self, job: Job) -> None:
        self.jobs += 1
        self._jobs[job.priority] += 1
        self._seconds[job.priority] += job.expected

    def remove(self, job: Job) -> None:
        priority = job.priority
        self.jobs -= 1
        self._jobs[priority] -= 1
        # Sums of floats drift; an empty backlog is none.
        self._seconds[priority] = self._seconds[priority] - job.expected if self._jobs[priority] else 0.0

    def ahead_of(self, priority: int) -> float:
        """Of this class and the higher ones."""
        return sum(self._seconds[: priority + 1])


def waiting_time(
    *,
    everything: float,
    own: float,
    running: float,
    running_own: float,
    cores: int,
    capacity: int,
    fraction: float,
) -> float:
    """Seconds until a job that is queued now starts.

    It starts no later than when all that is queued before it is done, and no later than when its runner's own queue is done
    at the rate that the runner's share of the device gives it; and no sooner than its runner's slots can get through what runs there and that queue.

    Args:
        everything: Core seconds that are queued on the device, of its class and higher ones.
        own: Those of them that are its runner's.
        running: Core seconds that what runs will still take,
        running_own: and what of it is its runner's.
        cores: Of the device.
        capacity: How many of them its runner can use at once.
        fraction: Its runner's share among those that have something queued, itself included.
    """
    in_order = (running + everything) / cores
    by_share = own / (capacity * fraction) + running / cores
    return max(min(in_order, by_share), (own + running_own) / capacity)
