"""Recording: the last requests, runs, updates and changes of memory of a scheduler."""

from __future__ import annotations

import math
import sys
import threading
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from aoti_sched import arguments
from aoti_sched.events import Event, Held, Loaded, MemoryUse, Observer, Pause, Run, Trace, Wait
from aoti_sched.explanation import explain
from aoti_sched.timeline import DeviceEvents, pieces, write
from aoti_sched.waits import History, end_of, waits_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator


class KeptRequest(Protocol):
    """A finished request as the engine keeps it. It takes less memory than the trace."""

    queued: float
    ended: float
    device: str

    def trace(self) -> Trace:
        """Return the trace."""


class KeptRun(Protocol):
    """A run as the engine keeps it."""

    def run(self) -> Run:
        """Return the run."""


class Recording(Observer):
    """Keeps what has happened. Made by `Scheduler.record`, and is an `Observer` of its own.

    What was kept can be read in any thread, also while more is being kept.

    Args:
        limit: The number of the last requests that are kept at least; and of runs.
    """

    def __init__(self, limit: int = 100_000) -> None:
        self.limit = limit = min(limit, sys.maxsize)  # the longest that a deque takes
        self._requests: deque[Trace | KeptRequest] = deque(maxlen=limit)
        # What came since the histories were read last. It is kept without a lock.
        self._late: dict[type, deque[Any]] = {
            kind: deque(maxlen=limit) for kind in (Run, Pause, Held, MemoryUse)
        }
        self._histories: dict[str, History] = defaultdict(lambda: History(limit))
        self._since = -math.inf  # what had ended before is not known
        self._reading = threading.Lock()  # held while the histories are read
        self._models: dict[str, dict[str, Loaded]] = {}
        self._going_on: list[Run | Held | Pause] = []

    # --- what was kept ---------------------------------------------------------------------------

    @property
    def requests(self) -> list[Trace]:
        """The requests that have ended, in the order of their ends, with their `waits`.

        Causes are found when they are read, in some microseconds for each run that a request waited
        for. `slowest` finds those of a few requests.
        """
        return [self._explained(_trace(one)) for one in list(self._requests)]

    def slowest(self, count: int = 10) -> list[Trace]:
        """Return the requests that took longest from submission to end, the slowest first.

        Args:
            count: How many, at most.

        Raises:
            ConfigError: The count is no whole number from 0 up.
        """
        arguments.whole("slowest()", count)
        found = sorted(self._requests, key=lambda one: one.queued - one.ended)[:count]
        return [self._explained(_trace(one)) for one in found]

    def explain(self, trace: Trace) -> str:
        """Return in a sentence why a request of this recording took so long."""
        return explain(self._explained(trace))

    def waits(
        self, trace: Trace, *, going_on: Iterable[Run | Held | Pause] = ()
    ) -> tuple[Wait, ...]:
        """Return why a request waited.

        Args:
            trace: The request.
            going_on: What has begun and not ended; by default, what had not when recording ended.
        """
        here = [one for one in going_on or self._going_on if one.device == trace.device]
        model = self._models.get(trace.device, {}).get(trace.runner)
        with self._reading:
            self._sort_in()
            return waits_of(trace, model, self._histories[trace.device], here, self._since)

    def _explained(self, trace: Trace) -> Trace:
        return msgspec.structs.replace(trace, waits=self.waits(trace))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a trace that Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

        Each lane is a track of runs. Waiting requests, leases and updates are spans beside them,
        and the queued requests, busy lanes, cores and bytes of weights are counters. `aoti-sched
        simulate` replays the requests of such a file with other settings.

        Args:
            path: The file, in JSON. It is written whole, or not at all.

        Raises:
            OSError: The file can't be written.
        """
        write(path, self._events())

    def pieces(self) -> Iterator[bytes]:
        """Yield the content of the file that `save` writes, in pieces."""
        yield from pieces(self._events())

    def _events(self) -> dict[str, DeviceEvents]:
        requests = list(self._requests)
        with self._reading:
            self._sort_in()
            names = dict.fromkeys([*self._models, *self._histories])
            return {
                name: DeviceEvents(
                    requests=[_trace(one) for one in requests if one.device == name],
                    runs=list(self._histories[name].runs),
                    held=[held for each in self._histories[name].held.values() for held in each],
                    pauses=[one for each in self._histories[name].pauses.values() for one in each],
                    memory=list(self._histories[name].memory),
                    models=list(self._models.get(name, {}).values()),
                )
                for name in names
            }

    def _sort_in(self) -> None:
        """Bring the histories up to date."""
        for late in self._late.values():
            while late:
                is_full = len(late) == self.limit  # and has dropped the ones before
                one = late.popleft()
                event = one if type(one) in self._late else one.run()
                if is_full:
                    self._since = max(self._since, end_of(event))
                self._histories[event.device].add(event)

    # --- what is observed ------------------------------------------------------------------------

    def begins(self, now: float) -> None:
        """Note when the recording begins. It can't know what had ended before."""
        self._since = max(self._since, now)

    def keep(self, event: Event) -> None:
        """Keep anything that an observer may see."""
        if isinstance(event, Trace):
            self.finished(event)
        elif isinstance(event, Loaded):
            self.loaded(event)
        else:
            self._late[type(event)].append(event)

    def finished(self, trace: Trace) -> None:
        """Keep a request."""
        self._requests.append(trace)

    def ran(self, run: Run) -> None:
        """Keep a run."""
        self._late[Run].append(run)

    def paused(self, pause: Pause) -> None:
        """Keep a pause."""
        self._late[Pause].append(pause)

    def held(self, held: Held) -> None:
        """Keep a lease."""
        self._late[Held].append(held)

    def memory_changed(self, use: MemoryUse) -> None:
        """Keep a change of memory."""
        self._late[MemoryUse].append(use)

    @property
    def keep_request(self) -> Callable[[Trace | KeptRequest], None]:
        """The function that keeps a request. It costs less than `finished`."""
        return self._requests.append

    @property
    def keep_run(self) -> Callable[[Run | KeptRun], None]:
        """The function that keeps a run. It costs less than `ran`."""
        return self._late[Run].append

    def loaded(self, model: Loaded) -> None:
        """Keep what a runner may take. It may have brought lanes, which the others have as well."""
        models = self._models.setdefault(model.device, {})
        models[model.runner] = model
        for name, other in models.items():
            if (other.lanes, other.device_cores) != (model.lanes, model.device_cores):
                models[name] = msgspec.structs.replace(
                    other, lanes=model.lanes, device_cores=model.device_cores
                )

    def goes_on(self, event: Run | Held | Pause) -> None:
        """Note what has not ended when the recording ends."""
        self._going_on.append(event)


def _trace(kept: Trace | KeptRequest) -> Trace:
    return kept if isinstance(kept, Trace) else kept.trace()
