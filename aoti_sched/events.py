"""What happens inside, for applications: events for the log, and observers.

An `Observer` gets plain values: what a request, a run, an update and a change of memory were like.

An application's log processors and handlers can neither fail nor block a step of this package.

- An event of an event loop's thread is logged by a later callback of the loop.
- An event of another thread is logged at once.
- An error of a processor or a handler is dropped. The first one goes to `sys.unraisablehook`.
- KeyboardInterrupt and SystemExit on a loop's thread leave the loop, as from any callback.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from asyncio import _get_running_loop  # the public one raises
from collections.abc import Mapping
from typing import Any

import msgspec

from aoti_sched.foreign import said

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class EventLog:
    """Passes events to structlog where the application has configured it, else to `logging`.

    No call raises. An event that neither would show is dropped before any text is made.

    Args:
        name: The logger's name, for both.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._logger = logging.getLogger(name)
        self._complained = False

    def debug(self, event: str, /, **values: Any) -> None:
        """Log an event that only a search for a fault needs."""
        self._log_soon("debug", event, values)

    def info(self, event: str, /, **values: Any) -> None:
        """Log an event of normal operation."""
        self._log_soon("info", event, values)

    def warning(self, event: str, /, **values: Any) -> None:
        """Log an event that someone should look at, after which all goes on."""
        self._log_soon("warning", event, values)

    def error(self, event: str, /, **values: Any) -> None:
        """Log an error. A value `error` may be an exception, whose text is made later."""
        self._log_soon("error", event, values)

    def _log_soon(self, level: str, event: str, values: dict[str, Any]) -> None:
        if not (self._logger.isEnabledFor(_LEVELS[level]) or _structlog() is not None):
            return
        loop = _get_running_loop()
        if loop is not None:
            loop.call_soon(self._emit, level, event, values, True)
        else:
            self._emit(level, event, values, False)

    def _emit(self, level: str, event: str, values: dict[str, Any], on_loop: bool) -> None:
        try:
            if isinstance(values.get("error"), BaseException):
                values["error"] = said(values["error"])
            if "event" in values:  # an observer's: the event itself has that name
                values["event_"] = values.pop("event")
            structlog = _structlog()
            if structlog is not None:
                getattr(structlog.get_logger(self._name), level)(event, **values)
            else:
                self._emit_record(_LEVELS[level], event, values)
        except BaseException as error:
            if on_loop and isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            self._complain(error)

    def _emit_record(self, level: int, event: str, values: dict[str, Any]) -> None:
        """Log a record with the event's values as attributes, and in its text."""
        exc_info = values.pop("exc_info", None)
        text = "".join(f" {name}={value!r}" for name, value in values.items())
        extra = {f"{name}_" if name in _OF_RECORDS else name: v for name, v in values.items()}
        # The text may have percent signs, so it is no format.
        self._logger.log(
            level, "%s", event + text, exc_info=exc_info, extra={**extra, "event": event}
        )

    def _complain(self, error: BaseException) -> None:
        """Report the first error to `sys.unraisablehook`."""
        if self._complained:
            return
        self._complained = True
        with contextlib.suppress(BaseException):  # a text or a traceback may be foreign, too
            lost = LostEventError(
                "an event of aoti_sched was lost, and later losses are not reported: a log "
                f"processor or handler raised {type(error).__name__}: {said(error)}"
            ).with_traceback(error.__traceback__)
            _Unraisable(lost)


def _structlog() -> Any:
    """Return structlog where the application has configured it; else None.

    An application that has done so has imported it. Importing it here would take more time than all
    of this package.
    """
    structlog = sys.modules.get("structlog")
    return structlog if structlog is not None and structlog.is_configured() else None


_OF_RECORDS = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "event"})
"""Names that `logging` keeps for itself; a value of such a name gets an underscore."""


class LostEventError(RuntimeError):
    """The error that `sys.unraisablehook` gets when an event is lost."""


class _Unraisable:
    """Raises an error in `__del__`, so that the interpreter passes it to `sys.unraisablehook`.

    The default hook accepts only arguments that the interpreter made.
    """

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __del__(self) -> None:
        raise self._error


log = EventLog("aoti_sched")
"""The log of this package, by the name `aoti_sched`.

Where neither structlog nor `logging` is configured, warnings go to stderr, and other events are
dropped. docs/logging.md lists the events.
"""


# --- observers ------------------------------------------------------------------------------------


class Wait(msgspec.Struct, frozen=True, gc=False):
    """A part of the time that a request waited.

    Attributes:
        cause: One of the names that docs/observability.md explains, such as "slots" or "class".
        seconds: How long.
        behind: Whose runs or leases were waited for, as (runner, priority); None where the wait was
            for nothing of the kind.
        runs: How many runs or leases those were.
    """

    cause: str
    seconds: float
    behind: tuple[str, str] | None = None
    runs: int = 0


class Trace(msgspec.Struct, frozen=True, gc=False):
    """Where and when a request ran. Times are seconds on the scheduler's clock (`time.monotonic`).

    Attributes:
        runner: The runner's name.
        device: The device that the request was queued on.
        state: The state of the request, as a word.
        placement: "lane", or "inline" for a run on the event loop's own thread.
        lane: The lane of the run; -1 before the run, and for an inline run.
        slot: The slot of the run; -1 before the run.
        epoch: The epoch of the weights that the request ran on.
        queued: When the request was submitted.
        started: The lane's stamp before the run; 0.0 for a request that has not run.
        finished: The lane's stamp after the run; 0.0 for a request that has not run.
        batch_size: How many requests ran as one.
        tag: What `options(tag=)` named the request.
        job: The request's number on its device.
        priority: "HIGH", "NORMAL" or "LOW".
        tenant: What `options(tenant=)` named, as text; "" without a tenant.
        timeout: Seconds from the submission to the deadline; None without a deadline.
        lease: Whether the request asked for a lease, and not for a run.
        min_epoch: The request ran on the weights of this epoch or a later one.
        admitted: When the request was queued, after it may have waited for room or for an epoch;
            0.0 while it waits for that.
        launched: When the request got its slot and lane; 0.0 before.
        ended: When the request ended for its caller; 0.0 before.
        waits: Why the request waited. The parts add up to the time from `queued` to `started`, or
            to `ended` without a run. Empty unless a recording was on.
        rows: Rows of the request, where requests are batched.
    """

    runner: str
    device: str
    state: str
    placement: str
    lane: int
    slot: int
    epoch: int
    queued: float
    started: float
    finished: float
    batch_size: int = 1
    tag: str = ""
    job: int = -1
    priority: str = "NORMAL"
    tenant: str = ""
    timeout: float | None = None
    lease: bool = False
    min_epoch: int = 0
    admitted: float = 0.0
    launched: float = 0.0
    ended: float = 0.0
    waits: tuple[Wait, ...] = ()
    rows: int = 1

    @property
    def queue_seconds(self) -> float:
        """Seconds from submission to the start of the run, or to the end without a run.

        0.0 before that.
        """
        return max(0.0, (self.started or self.ended or self.queued) - self.queued)

    @property
    def run_seconds(self) -> float:
        """Seconds of the run itself; 0.0 before its end."""
        return max(0.0, self.finished - self.started) if self.started and self.finished else 0.0


class Run(msgspec.Struct, frozen=True, gc=False):
    """A run that is over, of one request or of a batch. Times are as in `Trace`.

    Attributes:
        device: The device's name.
        runner: The runner's name.
        job: The number of the request, in a batch of the first request.
        lane: The lane; -1 for an inline run.
        slot: The slot.
        epoch: The epoch of the weights.
        priority: The priority of the request, in a batch of the first request.
        tenant: The tenant of that request, as text; "" without a tenant.
        batch_size: How many requests ran as one.
        cores: Cores that the run took; 0 for an inline run.
        launched: When the slot and the lane were given to the run.
        started: The lane's stamp before the run.
        finished: The lane's stamp after the run.
        collected: When the event loop took note of the end. The lane was free from then on.
        ok: Whether the run succeeded.
        held: Whether the run used the slot of a held lease.
        overdue: Whether its request was launched out of turn, since it had waited for longer than
            `DeviceConfig(max_wait=)`.
    """

    device: str
    runner: str
    job: int
    lane: int
    slot: int
    epoch: int
    priority: str
    tenant: str
    batch_size: int
    cores: int
    launched: float
    started: float
    finished: float
    collected: float
    ok: bool
    held: bool = False
    overdue: bool = False


class Loaded(msgspec.Struct, frozen=True):
    """A model that takes requests on a device.

    Attributes:
        device: The device's name.
        runner: The runner's name.
        slots: How many runs of the model may go on at once.
        cores: Cores that a run takes on a lane.
        lanes: How many runs may go on at once on the device.
        device_cores: Cores of the device.
        batch_delay: Seconds that a request may wait for others to join its batch.
        max_batch: The most rows of a batch; 1 without batching.
        batch_seconds: The most seconds that a batch is expected to take; None for a learned bound.
        placement: "auto", "lane" or "inline".
        inline_limit: Seconds below which "auto" runs inline.
        share: The model's share of the device's time.
        predicts: Whether requests that would miss their deadlines are refused.
        sheds: Whether a full queue drops the worst request.
        limit: The most queued requests of the model; None for no bound.
        device_limit: The most queued requests of the device; None for no bound.
        max_wait: Seconds after which a queued request is overdue; None for never.
    """

    device: str
    runner: str
    slots: int
    cores: int
    lanes: int
    device_cores: int
    batch_delay: float = 0.0
    max_batch: int = 1
    batch_seconds: float | None = None
    placement: str = "lane"
    inline_limit: float = 0.0
    share: float = 1.0
    predicts: bool = False
    sheds: bool = False
    limit: int | None = None
    device_limit: int | None = None
    max_wait: float | None = None


class Pause(msgspec.Struct, frozen=True):
    """The time in which a runner started nothing, for an update of its weights.

    Attributes:
        device: The device's name.
        runner: The runner's name.
        closed: When the barrier was closed.
        opened: When the barrier was opened.
        epoch: The epoch that serves from then on.
        published: Whether the epoch has changed.
    """

    device: str
    runner: str
    closed: float
    opened: float
    epoch: int
    published: bool


class Held(msgspec.Struct, frozen=True):
    """A lease that was released.

    Attributes:
        device: The device's name.
        runner: The runner's name.
        slot: The slot.
        granted: When the lease was granted.
        released: When it was released.
    """

    device: str
    runner: str
    slot: int
    granted: float
    released: float


class MemoryUse(msgspec.Struct, frozen=True):
    """A change of the memory that weights take on a device.

    Attributes:
        device: The device's name.
        runner: The runner's name.
        change: "measured" after a load or an update, "evicted", "restored", "not restored" or
            "freed".
        time: When.
        bytes: Bytes of the runner's weights.
        used: Bytes of all weights on the device, after the change.
    """

    device: str
    runner: str
    change: str
    time: float
    bytes: int
    used: int


Event = Trace | Run | Pause | Held | MemoryUse | Loaded
"""What an observer may see."""


class Observer:
    """Sees what happens inside a scheduler. Override the methods that you need.

    `Scheduler.add_observer` attaches an observer. The scheduler calls it on its event loop, between
    two steps and in the order in which things happened. A method must not block. An observer that
    raises is logged once and dropped; no request is lost.
    """

    def loaded(self, model: Loaded) -> None:
        """See a model that takes requests now, or took them when the observer was attached."""

    def finished(self, trace: Trace) -> None:
        """See a request that has ended for its caller, with or without a result."""

    def ran(self, run: Run) -> None:
        """See a run that is over. A batch is one run."""

    def paused(self, pause: Pause) -> None:
        """See the end of the pause that an update of weights has made."""

    def held(self, held: Held) -> None:
        """See a lease that was released."""

    def memory_changed(self, use: MemoryUse) -> None:
        """See weights that were measured, evicted, restored or freed."""


class CallerObserver(Observer):
    """An observer that also knows the callers of requests, such as one that makes spans."""

    def caller(self) -> Any:
        """Return what to keep of the caller of a request that is being submitted; None for nothing.

        Called at each submission in the caller's own context, whose context variables are there.
        """

    def finished_for(self, trace: Trace, caller: Any) -> None:
        """See a request that has ended, after `finished`, with what `caller` returned for it."""

    def log_values(self, caller: Any) -> Mapping[str, Any]:
        """Return what the log events of a request get besides, by name.

        A value of an event's own, such as its `runner`, stays as it is.
        """
        del caller
        return {}
