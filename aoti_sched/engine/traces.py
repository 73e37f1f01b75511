"""Traces: what observers see of requests, runs and runners, as plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoti_sched.events import Loaded, Run, Trace
from aoti_sched.queue.job import Fact, Job, JobState
from aoti_sched.queue.runner_state import Lease, Source

if TYPE_CHECKING:
    from aoti_sched.queue.device_queue import DeviceQueue
    from aoti_sched.queue.runner_state import RunnerState

_PRIORITIES = ("HIGH", "NORMAL", "LOW")
_NOT_ENDED = (JobState.NEW, JobState.WAITING, JobState.QUEUED, JobState.RUNNING, JobState.WITHDRAWN)
_ENDS = {Fact.REJECT, Fact.EXPIRE, Fact.CANCEL, Fact.REVOKE, Fact.SHED}
_WORDS = {state: state.name for state in JobState}


def name_of(queue: DeviceQueue, source: Source) -> str:
    """Return the name of a job's runner, also where the job draws from its second record."""
    if queue.turns and (turns := queue.turns.get(source.runner)) is not None:
        return turns.main.name
    return source.name


def trace_of(job: Job, queue: DeviceQueue, tag: str = "") -> Trace:
    """Return the trace of a job, as far as it is known now."""
    state = job.state
    ended = 0.0 if state in _NOT_ENDED else job.finished
    admitted = 0.0 if state is JobState.WAITING else job.submitted
    for time, fact, _ in job.recorded:
        if fact is Fact.ADMIT:
            admitted = time
        elif fact is Fact.HOLD:
            admitted = 0.0
        elif fact in _ENDS:
            ended = time
    tenant, deadline = job.tenant, job.deadline
    return Trace(
        runner=name_of(queue, job.source),
        device=queue.name,
        state=_WORDS[state],
        placement="inline" if job.inline else "lane",
        lane=job.lane,
        slot=job.slot,
        epoch=job.epoch,
        queued=job.submitted,
        started=job.started,
        finished=job.finished if job.slot >= 0 else 0.0,
        batch_size=job.batch,
        tag=tag,
        job=job.id,
        priority=_PRIORITIES[job.priority],
        tenant="" if tenant is None else repr(tenant),
        timeout=None if deadline is None else deadline - job.submitted,
        lease=job.is_lease_request,
        min_epoch=job.min_epoch,
        admitted=admitted,
        launched=job.launched,
        ended=ended,
        rows=job.rows,
    )


def run_of(
    job: Job,
    queue: DeviceQueue,
    *,
    size: int,
    started: float,
    finished: float,
    now: float,
    ok: bool,
) -> Run:
    """Return the run that a job has led, before the queue hears of its end.

    Args:
        job: The job, in a batch the leader.
        queue: The queue of its device.
        size: How many requests ran as one.
        started: The lane's stamp before the run.
        finished: The lane's stamp after the run.
        now: When the end of the run was collected.
        ok: Whether the run succeeded.
    """
    source, tenant = job.source, job.tenant
    return Run(
        queue.name,
        name_of(queue, source),
        job.id,
        job.lane,
        job.slot,
        job.epoch,
        _PRIORITIES[job.priority],
        "" if tenant is None else repr(tenant),
        size,
        0 if job.inline else source.runner.width,
        # A job that is retried alone after its batch failed starts when the batch has ended.
        started if job.retrying else job.launched,
        started,
        finished,
        now,
        ok,
        isinstance(source, Lease),
    )


def loaded_of(queue: DeviceQueue, runner: RunnerState) -> Loaded:
    """Return what observers see of a runner that takes requests."""
    lanes = queue.lanes
    rule = None if runner.batch_queue is None else runner.batch_queue.rule
    return Loaded(
        queue.name,
        runner.name,
        runner.slots,
        runner.width,
        lanes.count,
        lanes.cores,
        0.0 if rule is None else rule.max_delay,
        1 if rule is None else rule.max_rows,
        None if rule is None else rule.max_seconds,
        runner.placing.choice.value,
        runner.placing.limit,
        runner.share,
        runner.predicts,
        runner.sheds,
        runner.load.bounds.jobs,
        queue.load.bounds.jobs,
        queue.policy.max_wait,
    )
