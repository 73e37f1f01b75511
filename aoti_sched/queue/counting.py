"""Counting: each job that ends, and each run that is over, goes into one bucket of its runner."""

from __future__ import annotations

from aoti_sched.errors import AotiSchedError
from aoti_sched.queue.job import Job


def count_end(job: Job, now: float) -> None:
    """Count a job that ends for its caller now, not with the end of its run.

    The run of a job that was launched goes on, and is counted by `count_run` when it is over.
    """
    ended = job.source.runner.histograms.of(job.state, job.priority)
    total = now - job.submitted
    ended.total.add(total)
    ended.queue.add(job.started - job.submitted if job.slot >= 0 else total)


def count_rejection(job: Job, error: AotiSchedError, now: float) -> None:
    """Count a job that is rejected, by the kind of the error."""
    rejections, kind = job.source.runner.rejections, type(error).__name__
    rejections[kind] = rejections.get(kind, 0) + 1
    count_end(job, now)


def count_run(job: Job, started: float, finished: float, *, left: bool) -> None:
    """Count the run of a job, and the end of the job with it.

    Args:
        job: The job.
        started: When the run started.
        finished: When the run ended.
        left: Whether the job had ended for its caller before, and was counted then.
    """
    runner = job.source.runner
    ended = runner.histograms.of(job.state, job.priority)
    ended.run.add(finished - started)
    ended.batch_size.add(job.batch)
    if left:
        return
    ended.queue.add(started - job.submitted)
    ended.total.add(finished - job.submitted)
