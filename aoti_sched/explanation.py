"""Explain: says in words why a request took so long."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoti_sched.errors import ConfigError, brief
from aoti_sched.events import Trace

if TYPE_CHECKING:
    from aoti_sched.events import Wait

_WHY = {
    "room": "for room in the queue",
    "epoch": "for its epoch to be published",
    "update": "for an update of the weights",
    "eviction": "for evicted weights to be restored",
    "slots": "for a slot",
    "leases": "for a slot",
    "lanes": "for a lane",
    "cores": "for a core",
    "batch": "for others to join its batch",
    "loop": "for the event loop",
    "lane": "between its launch and the start of its run",
    "unknown": "for a reason that was not recorded",
}
_PREFERRED = {
    "overdue": ("that was overdue", "that were overdue"),
    "class": ("of a higher class", "of a higher class"),
    "share": ("whose model was due its share", "whose model was due its share"),
    "tenant": ("of another tenant", "of other tenants"),
    "order": ("that was first in order", "that were first in order"),
}
"""Why one run, or several, were preferred."""
_UNKNOWN = (
    "the causes are known while a recording is on, and afterwards by its recording.explain(trace)"
)
_MOST = 4
"""Causes that are named; the others are added up."""
_ENDS = {
    "EXPIRED": "expired",
    "CANCELLED": "was cancelled",
    "REVOKED": "was revoked",
    "SHED": "was shed",
    "FAILED": "failed",
    "REJECTED": "was rejected",
}


def explain(trace: Trace) -> str:
    """Return in a sentence why a request took so long.

    The causes of its waiting are known if a recording was on while the request waited
    (`Scheduler.record`), and the trace was taken then, or from the recording.

    Args:
        trace: The trace of a request, as `future.trace`.

    Raises:
        ConfigError: This is no trace.
    """
    if not isinstance(trace, Trace):
        raise ConfigError(f"explain(): expected a trace, as `future.trace`, got {brief(trace)}.")
    if trace.state == "REJECTED":
        return "was rejected at once"
    before = trace.started or trace.ended
    if not before:
        return "has not started to run"
    waited = before - trace.queued
    parts = [f"waited {_time(waited)}{_causes(trace.waits, waited)}"]
    if trace.lease:
        parts.append("got a lease" if trace.state == "DONE" else "got no lease")
    elif trace.run_seconds:
        batch = f" in a batch of {trace.batch_size}" if trace.batch_size > 1 else ""
        where = " inline" if trace.placement == "inline" else ""
        parts.append(f"ran {_time(trace.run_seconds)}{where}{batch}")
    elif not trace.started:
        parts.append("did not run")
    if trace.state in _ENDS:
        parts.append(f"{_ENDS[trace.state]} after {_time(trace.ended - trace.queued)}")
    if trace.timeout and trace.ended:
        used = (trace.ended - trace.queued) / trace.timeout
        parts.append(f"used {used:.0%} of its timeout")
    return "; ".join(parts)


def _causes(waits: tuple[Wait, ...], waited: float) -> str:
    if not waits:
        return f" ({_UNKNOWN})" if waited > 0 else ""
    named = [f"{_time(wait.seconds)} {_cause(wait)}" for wait in waits[:_MOST]]
    if len(waits) > _MOST:
        rest = sum(wait.seconds for wait in waits[_MOST:])
        named.append(f"{_time(rest)} for {len(waits) - _MOST} other reasons")
    return ": " + ", ".join(named)


def _cause(wait: Wait) -> str:
    if wait.behind is None:
        return _WHY[wait.cause]
    runner, priority = wait.behind
    if wait.cause == "leases":
        leases = "a held lease" if wait.runs == 1 else f"{wait.runs} held leases"
        return f"for a slot behind {leases} of {runner!r}"
    runs = "run" if wait.runs == 1 else "runs"
    behind = f"behind {wait.runs} {priority} {runs} of {runner!r}"
    if wait.cause in _PREFERRED:
        one, several = _PREFERRED[wait.cause]
        return f"{behind} {one if wait.runs == 1 else several}"
    return f"{_WHY[wait.cause]} {behind}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
