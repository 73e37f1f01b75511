"""OpenTelemetry: spans of requests and batches, made after the fact.

```
scheduler.add_observer(Tracing())
```

A request is traced where its caller's current span is recording. Its spans are made when it has
ended, with the stamps that the scheduler has taken anyway, so the way of a request is not slowed
down by them. It needs the extra `otel`, which is the API alone: the application configures an SDK.
docs/observability.md lists the spans.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any

try:
    from opentelemetry import trace as otel
    from opentelemetry.context import Context
    from opentelemetry.trace import (
        Link,
        Span,
        Status,
        StatusCode,
        format_span_id,
        format_trace_id,
        set_span_in_context,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{__name__} needs the extra otel. Run: pip install 'aoti_sched[otel]'", name=error.name
    ) from None

from aoti_sched.events import CallerObserver, Run, Trace
from aoti_sched.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

_NS = 1_000_000_000
_Key = tuple[str, str, int, float]


class Tracing(CallerObserver):
    """Makes spans of the requests whose caller's span is recording.

    A request is a span `aoti_sched.request`, a child of the caller's span, with the children
    `aoti_sched.queue` and `aoti_sched.run`. The run of a batch is a span of its own,
    `aoti_sched.batch`, that is linked to the requests, and their runs are linked to it.

    Args:
        provider: Makes the tracer; by default the global provider.
        clock: The clock of the scheduler. Only a test brings its own.
    """

    def __init__(
        self,
        provider: TracerProvider | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tracer = otel.get_tracer("aoti_sched", VERSION, provider)
        self._clock = clock
        self._batches: dict[_Key, Run] = {}
        self._spans: dict[_Key, tuple[Span, int]] = {}
        self._failure: Exception | None = None

    def caller(self) -> Span | None:
        """Return the caller's span, if it is recording."""
        if self._failure is not None:
            raise self._failure
        span = otel.get_current_span()
        return span if span.is_recording() else None

    def log_values(self, caller: Span) -> dict[str, str]:
        """Return the ids of the caller's trace and span."""
        return _ids(caller)

    def ran(self, run: Run) -> None:
        """Keep a batch until the requests of it have been seen."""
        if run.batch_size > 1:
            if not self._batches:
                asyncio.get_running_loop().call_soon(self._end_batches)
            self._batches[run.device, run.runner, run.slot, run.started] = run

    def finished_for(self, trace: Trace, caller: Span) -> None:
        """Make the spans of a request that has ended."""
        wall = self._wall()
        ended = wall(trace.ended)
        request = self._span("request", trace.queued, wall, parent=caller)
        request.set_attributes(_attributes(trace))
        if trace.state != "DONE":
            request.set_attribute("error.type", trace.state)
            request.set_status(Status(StatusCode.ERROR, trace.state))
        waits = self._span("queue", trace.queued, wall, parent=request)
        waits.end(wall(trace.started) if trace.started else ended)
        if trace.started and trace.finished:
            batch = self._batch_of(trace, wall)
            links = [] if batch is None else [Link(batch.get_span_context())]
            run = self._span("run", trace.started, wall, parent=request, links=links)
            run.end(wall(trace.finished))
            if batch is not None:
                batch.add_link(request.get_span_context())
        request.end(ended)

    def _batch_of(self, trace: Trace, wall: Callable[[float], int]) -> Span | None:
        """Return the span of the batch that a request ran in; None for one that ran alone."""
        key = (trace.device, trace.runner, trace.slot, trace.started)
        run = self._batches.get(key)
        if run is not None and key not in self._spans:
            span = self._span("batch", run.started, wall)
            span.set_attributes(_attributes(run))
            self._spans[key] = (span, wall(run.finished))
        found = self._spans.get(key)
        return None if found is None else found[0]

    def _end_batches(self) -> None:
        """End the spans of batches, whose requests have all been seen.

        The application's span processors run here, beside the scheduler's calls. What one raises is
        raised at the next submission, where the scheduler drops an observer that raises.
        """
        spans, self._spans = self._spans, {}
        self._batches.clear()
        try:
            for span, finished in spans.values():
                span.end(finished)
        except Exception as error:  # noqa: BLE001 -- a span processor is foreign code
            self._failure = error

    def _span(
        self,
        name: str,
        begin: float,
        wall: Callable[[float], int],
        *,
        parent: Span | None = None,
        links: list[Link] | None = None,
    ) -> Span:
        # Without a parent, a span is a root, whatever span the event loop happens to be in.
        context = Context() if parent is None else set_span_in_context(parent, Context())
        return self._tracer.start_span(
            f"aoti_sched.{name}", context, links=links, start_time=wall(begin)
        )

    def _wall(self) -> Callable[[float], int]:
        """Return a function from the scheduler's time to nanoseconds since the epoch."""
        offset = time.time_ns() - round(self._clock() * _NS)
        return lambda at: offset + round(at * _NS)


def add_span(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add the ids of the current span to an event: a processor for structlog.

    Events of requests have the ids of their callers already.
    """
    span = otel.get_current_span()
    if span.get_span_context().is_valid:
        for name, value in _ids(span).items():
            event.setdefault(name, value)
    return event


def _ids(span: Span) -> dict[str, str]:
    context = span.get_span_context()
    return {
        "trace_id": format_trace_id(context.trace_id),
        "span_id": format_span_id(context.span_id),
    }


def _attributes(of: Trace | Run) -> dict[str, str | int]:
    names = ["runner", "device", "priority", "job"]
    if of.started:  # a request that never ran has none of these
        names += ["epoch", "batch_size"]
    if isinstance(of, Trace):
        names += ["placement"] if of.started else []
        names += [name for name in ("tag", "tenant") if getattr(of, name)]
    return {f"aoti_sched.{name}": getattr(of, name) for name in names}
