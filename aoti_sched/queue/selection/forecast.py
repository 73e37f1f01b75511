"""Forecast: when a job submitted now would start, predicted from learned run times."""

from __future__ import annotations

from aoti_sched.queue.job import Job
from aoti_sched.queue.lanes import Lanes
from aoti_sched.queue.selection.backlog import Backlog


class Forecast:
    """The forecast of one device.

    Args:
        lanes: The device's lanes.
        fair: Whether runners and tenants share time.

    Attributes:
        kept: Whether queued jobs are added. The first runner that needs a forecast sets this;
            until then the forecast costs nothing.
    """

    __slots__ = ("_backlog", "_busy", "_fair", "_lanes", "_shares", "kept")

    def __init__(self, lanes: Lanes, *, fair: bool) -> None:
        self._lanes = lanes
        self._fair = fair
        self.kept = False
        self._backlog = Backlog()
        self._busy = 0  # runners that have queued jobs
        self._shares = 0.0  # the sum of their shares

    def add(self, job: Job) -> None:
        """Count a job that is queued."""
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
        """Uncount a job that has left the queue."""
        runner = job.source.runner
        self._backlog.remove(job)
        runner.backlog.remove(job)
        own = runner.backlog_of[job.tenant]
        own.remove(job)
        if not own.jobs:
            del runner.backlog_of[job.tenant]
        if not runner.backlog.jobs:
            self._busy -= 1
            # Sums of floats drift, so the sum starts anew at zero when no runner is busy.
            self._shares = self._shares - runner.share if self._busy else 0.0

    def waiting_time(self, job: Job, now: float) -> float:
        """Predict the seconds until a job submitted now starts, if it can't start at once.

        The prediction is the earlier of two times: when all jobs queued before this one are done;
        and when the runner's own queue is done at the rate of the runner's share. The prediction is
        never earlier than the runner's slots allow, by what they run and the runner's own queue.
        Of that queue, only the part that the job's tenant has to wait for counts.
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
        if self._fair:  # each other tenant has at most as much before the job as its own tenant
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
    """Return the core seconds that a run of a job's runner is expected to take.

    Args:
        job: The job.
        size: The bytes of the run's inputs.

    Returns:
        Core seconds; 0.0 while too little is known.
    """
    runner = job.source.runner
    return runner.width * runner.placing.times.mean(size)
