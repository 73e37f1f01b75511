"""Forecast: when a job that comes now would be finished, by what is known of the runs there
were.
"""

from __future__ import annotations

from aoti_sched.queue.job import Job
from aoti_sched.queue.lanes import Lanes
from aoti_sched.queue.selection.backlog import Backlog


class Forecast:
    """One device's.

    It is kept from the first runner on that wants to know, and until then costs nothing.
    """

    __slots__ = ("_backlog", "_busy", "_fair", "_lanes", "_shares", "kept")

    def __init__(self, lanes: Lanes, *, fair: bool) -> None:
        self._lanes = lanes
        self._fair = fair
        self.kept = False
        self._backlog = Backlog()
        self._busy = 0  # runners that have something queued,
        self._shares = 0.0  # and their shares together

    def add(self, job: Job) -> None:
        """It is queued."""
        runner = job.source.runner
        if not runner.backlog.jobs:
            self._busy += 1
            self._shares += runner.share
        self._backlog.add(job)
        runner.backlog.add(job)
        own = runner.backlog_of.get(job.tenant)
        if own is None:
            own = runner.backlog_of[job.tenant] = Backlog()
        own.add(job)

    def remove(self, job: Job) -> None:
        """It is queued no more."""
        runner = job.source.runner
        self._backlog.remove(job)
        runner.backlog.remove(job)
        own = runner.backlog_of[job.tenant]
        own.remove(job)
        if not own.jobs:
            del runner.backlog_of[job.tenant]
        if not runner.backlog.jobs:
            self._busy -= 1
            # Sums of floats drift; nobody has no share.
            self._shares = self._shares - runner.share if self._busy else 0.0

    def waiting_time(self, job: Job, now: float) -> float:
        """Seconds until a job that comes now starts, unless it can at once.

        It starts no later than when all that is queued before it is done, and no later than when
        its runner's own queue is done at the rate that the runner's share of the device gives it;
        and no sooner than its runner's slots can get through what runs there and that queue. Of its
        runner's queue that counts which its tenant has to wait for.
        """
        runner, cores = job.source.runner, self._lanes.cores
        running = running_own = 0.0
        for other in self._lanes.launched():
            width = other.source.runner.width
            rest = max(0.0, expected(other, other.size) - (now - other.started) * width)
            running += rest
            if other.source.runner is runner:
                running_own += rest
        everything = self._backlog.ahead_of(job.priority)
        own = runner.backlog.ahead_of(job.priority)
        if self._fair:  # no more of the other tenants' is before it than its own tenant has
            mine = runner.backlog_of.get(job.tenant)
            busy = len(runner.backlog_of) + (mine is None)
            of_tenant = 0.0 if mine is None else mine.within(job.priority)
            own = min(own, runner.backlog.ahead_of(job.priority - 1) + of_tenant * busy)
        capacity = min(cores, runner.slots * runner.width)
        fraction = runner.share / (self._shares + (0.0 if runner.backlog.jobs else runner.share))
        in_order = (running + everything) / cores
        by_share = own / (capacity * fraction) + running / cores
        return max(min(in_order, by_share), (own + running_own) / capacity)


def expected(job: Job, size: int) -> float:
    """Core seconds that a run of this job's runner on so many bytes will take; 0 while that is
    not known.
    """
    runner = job.source.runner
    return runner.width * runner.placing.times.mean(size)
