"""Observers: tells the observers of one scheduler what has happened, when no fact is half done."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from aoti_sched.engine import traces
from aoti_sched.engine.traces import (
    KeptRequest,
    KeptRun,
    callers_of,
    loaded_of,
    run_of,
    tag_of,
    trace_of,
)
from aoti_sched.errors import ConfigError, brief
from aoti_sched.events import (
    CallerObserver,
    Event,
    Held,
    Loaded,
    MemoryUse,
    Observer,
    Pause,
    Run,
    Trace,
    log,
)
from aoti_sched.foreign import raise_again
from aoti_sched.recording import Recording

if TYPE_CHECKING:
    from aoti_sched.engine.request import Callers
    from aoti_sched.queue.device_queue import DeviceQueue
    from aoti_sched.queue.job import Job

_IS_COMPILED: Final = not traces.__file__.endswith(".py")
"""Whether mypyc has compiled `KeptRequest`. Only then does it take less memory than a trace."""

_METHODS: dict[type, str] = {
    Trace: "finished",
    Run: "ran",
    Pause: "paused",
    Held: "held",
    MemoryUse: "memory_changed",
    Loaded: "loaded",
}


class Observed(Protocol):
    """What observers need of a dispatcher."""

    queue: DeviceQueue
    observers: Observers | None

    def going_on(self) -> list[Run | Held | Pause]: ...

    def now(self) -> float: ...


class Observers:
    """The observers of one scheduler.

    Dispatchers refer to this object while it has observers, and otherwise to None. A recording gets
    each event at once, since it only appends. Other observers get the events in a later callback of
    the loop, when no fact is half done.
    """

    def __init__(self) -> None:
        self._recordings: list[Recording] = []
        self._keep_requests: list[Callable[[Trace | KeptRequest], None]] = []
        self._keep_runs: list[Callable[[Run | KeptRun], None]] = []
        # By their ids: observers may be equal, or compare as they like.
        self._others: dict[int, Observer] = {}
        self._know_callers: dict[int, CallerObserver] = {}
        self._wants_requests = False  # any observer
        self._wants_runs = False
        self._wants_traces = False  # an observer that is no recording
        self._wants_each_run = False
        self._pending: list[tuple[Event, Callers]] = []
        self._dispatchers: Mapping[str, Observed] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self, loop: asyncio.AbstractEventLoop, dispatchers: Mapping[str, Observed]) -> None:
        """Note where the scheduler runs.

        Args:
            loop: The scheduler's event loop.
            dispatchers: Its dispatchers, of which more may come.
        """
        self._loop = loop
        self._dispatchers = dispatchers

    def if_any(self) -> Observers | None:
        """Return this object for a dispatcher to tell; None without observers."""
        return self if self._recordings or self._others else None

    def add(self, observer: Observer) -> None:
        """Tell an observer what happens from now on, and first which models take requests."""
        self.flush()
        present = [
            loaded_of(dispatcher.queue, runner)
            for dispatcher in self._dispatchers.values()
            for runner in dispatcher.queue.runners.values()
            if not runner.aside
        ]
        if isinstance(observer, Recording):
            self._recordings.append(observer)
            for model in present:
                observer.loaded(model)
            for dispatcher in self._dispatchers.values():
                observer.begins(dispatcher.now())
                for use in evicted_from(dispatcher.queue, dispatcher.now()):
                    observer.keep(use)
        else:
            self._others[id(observer)] = observer
            if isinstance(observer, CallerObserver):
                self._know_callers[id(observer)] = observer
            for model in present:
                self._call(observer, model)
        self._connect()

    def remove(self, observer: Observer) -> None:
        """Tell an observer no more. One that is not attached is ignored."""
        self.flush()
        if isinstance(observer, Recording):
            if observer in self._recordings:
                self._recordings.remove(observer)
                for event in self._going_on():
                    observer.goes_on(event)
        elif id(observer) in self._others:
            self._forget(observer)
        self._connect()

    def submitted(self, future: Any) -> None:
        """Let observers keep something of the caller of a request. Never raises."""
        if self._know_callers:
            found = [(one, self._try(one, "caller")) for one in list(self._know_callers.values())]
            callers = [(one, caller) for one, caller in found if caller is not None]
            if callers:
                future._callers = callers  # noqa: SLF001

    def log_values(self, future: object) -> dict[str, Any]:
        """Return what the log events of a request get from observers. Never raises."""
        values: dict[str, Any] = {}
        for observer, caller in callers_of(future):
            found = self._try(observer, "log_values", caller)
            try:
                values.update(_named(found))
            except Exception as error:  # noqa: BLE001 -- it is no mapping of names
                self._drop(observer, error)
        return values

    def ended(self, job: Job, queue: DeviceQueue, future: object) -> None:
        """Tell all observers of a request that has ended. Never raises."""
        callers = callers_of(future) if self._know_callers else ()
        if not callers and not self._wants_requests:
            return
        tag = tag_of(future)
        if self._keep_requests:
            kept = KeptRequest(job, queue, tag) if _IS_COMPILED else trace_of(job, queue, tag)
            for keep in self._keep_requests:
                keep(kept)
        if callers or self._wants_traces:
            self._tell_soon(trace_of(job, queue, tag), callers)

    def ran(
        self,
        job: Job,
        queue: DeviceQueue,
        size: int,
        started: float,
        finished: float,
        now: float,
        ok: bool,
    ) -> None:
        """Tell all observers of a run that is over, as `run_of` makes it. Never raises."""
        if not self._wants_runs:
            return
        if self._keep_runs:
            # mypyc passes numbers unboxed only where a class is called by its own name.
            kept = (
                KeptRun(job, queue, size, started, finished, now, ok)
                if _IS_COMPILED
                else run_of(job, queue, size, started, finished, now, ok)
            )
            for keep in self._keep_runs:
                keep(kept)
        if self._wants_each_run:
            self._tell_soon(run_of(job, queue, size, started, finished, now, ok), ())

    def tell(self, event: Event) -> None:
        """Tell all observers of something else that has happened. Never raises."""
        for recording in self._recordings:
            recording.keep(event)
        if self._others:
            self._tell_soon(event, ())

    def _tell_soon(self, event: Event, callers: Callers) -> None:
        if not self._pending and self._loop is not None:
            self._loop.call_soon(self.flush)
        self._pending.append((event, callers))

    def flush(self) -> None:
        """Pass the pending events to observers."""
        while self._pending:
            events, self._pending = self._pending, []
            present = list(self._others.values())  # one that is added meanwhile came after these
            for event, callers in events:
                for observer in present:
                    self._call(observer, event)
                for one, caller in callers:
                    self._try(one, "finished_for", event, caller)

    def explained(self, trace: Trace) -> Trace:
        """Return a trace with the causes of its waits, where a recording is on."""
        if not self._recordings:
            return trace
        # The oldest has seen most. Others begin and end at any time, also from another process.
        waits = self._recordings[0].waits(trace, going_on=self._going_on())
        return msgspec.structs.replace(trace, waits=waits)

    def _connect(self) -> None:
        self._keep_requests = [one.keep_request for one in self._recordings]
        self._keep_runs = [one.keep_run for one in self._recordings]
        self._wants_traces = any(_overrides(one, "finished") for one in self._others.values())
        self._wants_each_run = any(_overrides(one, "ran") for one in self._others.values())
        self._wants_requests = bool(self._recordings) or self._wants_traces
        self._wants_runs = bool(self._recordings) or self._wants_each_run
        for dispatcher in self._dispatchers.values():
            dispatcher.observers = self.if_any()

    def _call(self, observer: Observer, event: Event) -> None:
        self._try(observer, _METHODS[type(event)], event)

    def _try(self, observer: Observer, method: str, *arguments: Any) -> Any:
        """Call an observer, and return its answer; None where it raises, or was dropped before."""
        if id(observer) not in self._others:  # dropped, or removed by another observer
            return None
        try:
            return getattr(observer, method)(*arguments)
        except BaseException as error:  # noqa: BLE001 -- an observer is foreign code
            self._drop(observer, error)
            return None

    def _drop(self, observer: Observer, error: BaseException) -> None:
        self._forget(observer)
        self._connect()
        log.error("observer dropped", observer=type(observer).__name__, error=error, exc_info=error)
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            # Raised once the current callback has ended.
            asyncio.get_running_loop().call_soon(raise_again, error)

    def _forget(self, observer: Observer) -> None:
        del self._others[id(observer)]
        self._know_callers.pop(id(observer), None)

    def _going_on(self) -> list[Run | Held | Pause]:
        """Return the runs, leases and pauses that have begun and not ended, as if they ended now.

        Their ends are infinite.
        """
        return [event for one in self._dispatchers.values() for event in one.going_on()]


def must_be_called(observer: Observer) -> None:
    """Check that no method of an observer is an `async def`: observers are called, not awaited.

    Raises:
        ConfigError: A method is one.
    """
    kinds = (Observer, CallerObserver) if isinstance(observer, CallerObserver) else (Observer,)
    for method in (name for kind in kinds for name in vars(kind) if not name.startswith("_")):
        try:
            found = getattr(observer, method)
        except Exception:  # noqa: BLE001, S112 -- foreign code: its call raises again
            continue
        if inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found):
            raise ConfigError(
                f"add_observer(): {type(observer).__name__}.{method} is an async def, and an "
                "observer is never awaited. Write it as def."
            )


def _named(found: object) -> dict[str, Any]:
    """Return what an observer adds to log events.

    Raises:
        TypeError: It is no mapping of names.
    """
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise TypeError(f"log_values() returned {brief(found)}, which is no mapping")
    named = dict(found)
    if not all(isinstance(name, str) for name in named):
        raise TypeError(f"log_values() returned {brief(found)}, whose keys are not all names")
    return named


def _overrides(observer: Observer, method: str) -> bool:
    """Return whether an observer overrides a method of `Observer`."""
    try:
        found = getattr(getattr(observer, method), "__func__", None)
    except Exception:  # noqa: BLE001 -- an observer is foreign code: its call raises again
        return True
    return found is not getattr(Observer, method)


def evicted_from(queue: DeviceQueue, now: float) -> Iterable[MemoryUse]:
    """Return the models whose weights are evicted at a device, as if that had happened now."""
    memory = queue.memory
    for holding, runner in memory.holdings.items():
        if runner is not None and not holding.is_here:
            yield MemoryUse(
                queue.name, holding.name, "evicted", now, memory.of(holding), memory.used
            )


def going_on(queue: DeviceQueue, closed: Mapping[str, float]) -> Iterable[Run | Held | Pause]:
    """Return what goes on at a device, with infinite ends.

    Args:
        queue: The device's queue.
        closed: When the barriers of runners were closed, by runner.
    """
    for job in queue.lanes.launched():
        yield run_of(
            job,
            queue,
            size=max(1, len(job.members)),
            started=job.started,
            finished=_NEVER,
            now=_NEVER,
            ok=True,
        )
    for runner in queue.runners.values():
        for lease in runner.leases.values():
            yield Held(queue.name, runner.name, lease.slot, lease.granted, _NEVER)
        if runner.name in closed:
            yield Pause(
                queue.name, runner.name, closed[runner.name], _NEVER, runner.epoch, published=False
            )


_NEVER = float("inf")
