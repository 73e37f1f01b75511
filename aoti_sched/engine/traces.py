"""Traces: what observers see of requests, runs and runners, as plain values.

Compiled, as the rules are, since a recording asks for each request and each run. Their values are
passed by position: by name, msgspec takes ten times as long.

Where this file is compiled, a recording keeps a `KeptRequest` and a `KeptRun`, and has a trace and
a run made of them when it is read. Their numbers are not Python objects, so these two take about
half of the memory and of the instructions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aoti_sched.engine.compiling import mypyc_attr
from aoti_sched.events import Loaded, Run, Trace
from aoti_sched.queue.job import Fact, Job, JobState
from aoti_sched.queue.runner_state import Lease, Source

if TYPE_CHECKING:
    from aoti_sched.engine.request import Callers
    from aoti_sched.queue.device_queue import DeviceQueue
    from aoti_sched.queue.runner_state import RunnerState

# Compiled, a `Final` is read without a search for its name.
_PRIORITIES: Final = ("HIGH", "NORMAL", "LOW")
_STATES: Final = tuple(state.name for state in JobState)
_WAITING: Final = JobState.WAITING
_RUNNING: Final = JobState.RUNNING
_WITHDRAWN: Final = JobState.WITHDRAWN
_TRACE: Final = Trace
_RUN: Final = Run


def tag_of(future: object) -> str:
    """Return what the caller named a request; "" for a request, or anything else, without a tag."""
    tag: str = getattr(future, "_tag", "")
    return tag


def callers_of(future: object) -> Callers:
    """Return what observers have kept of the caller of a request."""
    callers: Callers = getattr(future, "_callers", ())
    return callers


def name_of(queue: DeviceQueue, source: Source) -> str:
    """Return the name of a job's runner, also where the job draws from its second record."""
    if queue.turns and (turns := queue.turns.get(source.runner)) is not None:
        return turns.main.name
    return source.name


def _admitted_and_ended(job: Job) -> tuple[float, float]:
    """Return when a job was admitted and when it ended for its caller; 0.0 for not yet."""
    state = job.state
    ended = 0.0 if state <= _RUNNING or state is _WITHDRAWN else job.finished
    admitted = 0.0 if state is _WAITING else job.submitted
    for time, fact, _ in job.recorded:
        if fact is Fact.ADMIT:
            admitted = time
        elif fact is Fact.HOLD:
            admitted = 0.0
        elif fact is not Fact.WITHDRAW:  # the others end a job
            ended = time
    return admitted, ended


def trace_of(job: Job, queue: DeviceQueue, tag: str = "") -> Trace:
    """Return the trace of a job, as far as it is known now."""
    admitted, ended = _admitted_and_ended(job)
    tenant, deadline = job.tenant, job.deadline
    return _TRACE(
        name_of(queue, job.source),
        queue.name,
        _STATES[job.state],
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
        (),
        job.rows,
    )


@mypyc_attr(acyclic=True)
class KeptRequest:
    """A finished request as a recording keeps it. `trace` returns what `trace_of` returns of it.

    Compiled, the garbage collector does not track it.

    Args:
        job: The job.
        queue: The queue of its device.
        tag: What the caller named the request.
    """

    __slots__ = (
        "admitted",
        "batch",
        "deadline",
        "device",
        "ended",
        "epoch",
        "finished",
        "inline",
        "is_lease_request",
        "job",
        "lane",
        "launched",
        "min_epoch",
        "priority",
        "queued",
        "rows",
        "runner",
        "slot",
        "started",
        "state",
        "tag",
        "tenant",
    )

    def __init__(self, job: Job, queue: DeviceQueue, tag: str) -> None:
        tenant = job.tenant
        self.admitted, self.ended = _admitted_and_ended(job)
        self.runner = name_of(queue, job.source)
        self.device = queue.name
        self.state = _STATES[job.state]
        self.inline = job.inline
        self.lane = job.lane
        self.slot = job.slot
        self.epoch = job.epoch
        self.queued = job.submitted
        self.started = job.started
        self.finished = job.finished if job.slot >= 0 else 0.0
        self.batch = job.batch
        self.tag = tag
        self.job = job.id
        self.priority = job.priority
        self.tenant = "" if tenant is None else repr(tenant)
        self.deadline = job.deadline
        self.is_lease_request = job.is_lease_request
        self.min_epoch = job.min_epoch
        self.launched = job.launched
        self.rows = job.rows

    def trace(self) -> Trace:
        """Return the trace."""
        deadline = self.deadline
        return _TRACE(
            self.runner,
            self.device,
            self.state,
            "inline" if self.inline else "lane",
            self.lane,
            self.slot,
            self.epoch,
            self.queued,
            self.started,
            self.finished,
            self.batch,
            self.tag,
            self.job,
            _PRIORITIES[self.priority],
            self.tenant,
            None if deadline is None else deadline - self.queued,
            self.is_lease_request,
            self.min_epoch,
            self.admitted,
            self.launched,
            self.ended,
            (),
            self.rows,
        )


def run_of(
    job: Job,
    queue: DeviceQueue,
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
    return _RUN(
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
        job.overdue,
    )


@mypyc_attr(acyclic=True)
class KeptRun:
    """A run as a recording keeps it, made from the arguments of `run_of`. See `KeptRequest`."""

    __slots__ = (
        "collected",
        "cores",
        "device",
        "epoch",
        "finished",
        "held",
        "job",
        "lane",
        "launched",
        "ok",
        "overdue",
        "priority",
        "runner",
        "size",
        "slot",
        "started",
        "tenant",
    )

    def __init__(
        self,
        job: Job,
        queue: DeviceQueue,
        size: int,
        started: float,
        finished: float,
        now: float,
        ok: bool,
    ) -> None:
        source, tenant = job.source, job.tenant
        self.device = queue.name
        self.runner = name_of(queue, source)
        self.job = job.id
        self.lane = job.lane
        self.slot = job.slot
        self.epoch = job.epoch
        self.priority = job.priority
        self.tenant = "" if tenant is None else repr(tenant)
        self.size = size
        self.cores = 0 if job.inline else source.runner.width
        self.launched = started if job.retrying else job.launched
        self.started = started
        self.finished = finished
        self.collected = now
        self.ok = ok
        self.held = isinstance(source, Lease)
        self.overdue = job.overdue

    def run(self) -> Run:
        """Return the run."""
        return _RUN(
            self.device,
            self.runner,
            self.job,
            self.lane,
            self.slot,
            self.epoch,
            _PRIORITIES[self.priority],
            self.tenant,
            self.size,
            self.cores,
            self.launched,
            self.started,
            self.finished,
            self.collected,
            self.ok,
            self.held,
            self.overdue,
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
