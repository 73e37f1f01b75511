"""Traces: what observers see of requests, runs and runners, as plain values.

Compiled, as the rules are: a recording keeps the plain values of each request and each run in
`LastRows`, and makes a `Trace` or a `Run` of them when it is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aoti_sched.events import Loaded, Run, Trace
from aoti_sched.queue.job import Fact, Job, JobState
from aoti_sched.queue.runner_state import Lease, Source

if TYPE_CHECKING:
    from aoti_sched.queue.device_queue import DeviceQueue
    from aoti_sched.queue.runner_state import RunnerState

Parts = tuple[Any, ...]
"""The values of a `Trace` or a `Run`."""

_PRIORITIES = ("HIGH", "NORMAL", "LOW")
_WORDS = tuple(state.name for state in JobState)
TRACE_FIELDS = (
    *("runner", "device", "state", "placement", "lane", "slot", "epoch", "queued", "started"),
    *("finished", "batch_size", "tag", "job", "priority", "tenant", "timeout", "lease"),
    *("min_epoch", "admitted", "launched", "ended", "rows"),
)


def name_of(queue: DeviceQueue, source: Source) -> str:
    """Return the name of a job's runner, also where the job draws from its second record."""
    if queue.turns and (turns := queue.turns.get(source.runner)) is not None:
        return turns.main.name
    return source.name


def trace_of(job: Job, queue: DeviceQueue, tag: str = "") -> Trace:
    """Return the trace of a job, as far as it is known now."""
    return made_trace(trace_parts(job, queue, tag))


def made_trace(parts: Parts) -> Trace:
    """Return the trace that `trace_parts` has given the values of."""
    return Trace(**dict(zip(TRACE_FIELDS, parts, strict=True)))


def trace_parts(job: Job, queue: DeviceQueue, tag: str) -> Parts:
    """Return the values of a job's trace, as far as they are known now."""
    state = job.state
    ended = 0.0 if state <= JobState.RUNNING or state is JobState.WITHDRAWN else job.finished
    admitted = 0.0 if state is JobState.WAITING else job.submitted
    for time, fact, _ in job.recorded:
        if fact is Fact.ADMIT:
            admitted = time
        elif fact is Fact.HOLD:
            admitted = 0.0
        elif fact is not Fact.WITHDRAW:  # the others end a job
            ended = time
    tenant, deadline = job.tenant, job.deadline
    return (
        name_of(queue, job.source),
        queue.name,
        _WORDS[state],
        "inline" if job.inline else "lane",
        job.lane,
        job.slot,
        job.epoch,
        job.submitted,
        job.started,
        job.finished if job.slot >= 0 else 0.0,
        job.batch,
        tag,
        job.id,
        _PRIORITIES[job.priority],
        "" if tenant is None else repr(tenant),
        None if deadline is None else deadline - job.submitted,
        job.is_lease_request,
        job.min_epoch,
        admitted,
        job.launched,
        ended,
        job.rows,
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
    return made_run(run_parts(job, queue, size, started, finished, now, ok))


def made_run(parts: Parts) -> Run:
    """Return the run that `run_parts` has given the values of."""
    return Run(*parts)


def run_parts(
    job: Job,
    queue: DeviceQueue,
    size: int,
    started: float,
    finished: float,
    now: float,
    ok: bool,
) -> Parts:
    """Return the values of a run, which `made_run` takes; the arguments are those of `run_of`."""
    source, tenant = job.source, job.tenant
    return (
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
