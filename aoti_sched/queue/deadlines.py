"""Deadlines: which jobs expire, and which are predicted to miss their deadline."""

from __future__ import annotations

from aoti_sched.errors import DeadlineUnreachableError
from aoti_sched.queue.commands import Command, Expire
from aoti_sched.queue.counting import count_end
from aoti_sched.queue.ending import SLICE
from aoti_sched.queue.job import Fact, Job, JobState
from aoti_sched.queue.selection.choice import can_start
from aoti_sched.queue.slices import Slices


class ExpiringJobs(Slices):
    """Expires jobs, and predicts when a job would be finished."""

    def when_finished(self, job: Job, now: float) -> float:
        """Estimate the seconds until a job submitted now would be finished. Changes nothing."""
        runner = job.source.runner
        idle = not self.load.jobs and can_start(runner)
        at_once = idle and self._selector.has_place(runner, inline=runner.placing.inline(job.bytes))
        waits = 0.0 if at_once else self._forecast.waiting_time(job, now)
        return runner.placing.times.typical(job.bytes) + waits

    def _unreachable(self, job: Job, now: float) -> DeadlineUnreachableError | None:
        """Return an error if the job is predicted to miss its deadline.

        Now and then such a job is admitted anyway, to correct a wrong estimate.
        """
        runner, deadline = job.source.runner, job.deadline
        times = runner.placing.times
        if (
            deadline is None
            or deadline <= now
            or job.is_lease_request
            or job.source is not runner
            or not times.knows(job.bytes)
        ):
            return None
        takes = self.when_finished(job, now)
        if now + takes <= deadline:
            return None
        if times.should_probe(job.bytes, now):
            job.probing = True
            return None
        return DeadlineUnreachableError(
            runner.name, takes, deadline - now if job.timeout is None else job.timeout
        )

    def _is_late(self, job: Job, deadline: float, now: float, commands: list[Command]) -> bool:
        """Return whether a job that is to start expires instead, and expire it then.

        A job expires when its deadline has passed, or is predicted to pass during the run.
        Now and then such a job is launched anyway, to correct a wrong estimate.
        """
        if deadline <= now:  # this fact came before its tick
            self._expire(job, now, commands)
            return True
        if not self._would_be_late(job, deadline, now):
            return False
        times = job.source.runner.placing.times
        if times.should_probe(job.bytes, now):
            job.probing = True
            return False
        self._expire(job, now, commands, self._takes(job))
        return True

    def _would_be_late(self, job: Job, deadline: float, now: float) -> bool:
        """Return whether a run that starts now is predicted to end after the deadline."""
        if not self.policy.expire_late or job.is_lease_request or job.probing:
            return False
        return now + self._takes(job) > deadline

    def _takes(self, job: Job) -> float:
        """Estimate the seconds of a job's run.

        Returns:
            The median where no other job is queued. Otherwise a high quantile, or 0.0 while too
            little is known.
        """
        times = job.source.runner.placing.times
        if self.load.jobs <= (job.state is JobState.QUEUED):
            return times.typical(job.bytes)
        return times.bound(job.bytes) if times.knows(job.bytes) else 0.0

    def _expire(
        self, job: Job, now: float, commands: list[Command], takes: float | None = None
    ) -> None:
        if job.state is JobState.RUNNING:
            job.happens_at(Fact.EXPIRE, now)
            self.timers.ended(job)
        else:
            self._leave_queue(job, Fact.EXPIRE, now)
        runner = job.source.runner
        runner.counters.expired += 1
        count_end(job, now)
        commands.append(Expire(job, takes))
        self._see_what_is_over(runner, now, commands)

    def _expire_some(self, now: float, commands: list[Command]) -> None:
        for _ in range(SLICE):
            job = self.timers.due(now)
            if job is None:
                return
            self._expire(job, now, commands)
        if self.timers.due(now) is not None:
            self._ask_to_go_on(commands)
