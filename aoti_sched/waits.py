"""Waits: why a request waited, found from what else went on at its device.

The time from the admission of a request to its launch is cut at each moment at which a run, a
lease or a pause began or ended. In each piece, the first rule below that holds gives the cause:

1. `update`: a barrier of an update was closed.
2. `eviction`: the weights were evicted, and restored.
3. All slots of the runner were taken, all lanes were busy, or too few cores were free. The piece
   is divided evenly among the runs and leases that took them.
4. `unknown`: what was in the way then was not recorded, or is not kept any more.
5. `batch`: the request waited for others to join its batch.
6. `loop`: nothing was in the way, and the event loop had not come to it.

A run that was launched before the request was admitted gives `slots`, `lanes` or `cores`, a lease
gives `leases`. A later run was preferred, and the cause is the rule that preferred it: `overdue`,
`class`, `share`, `tenant` or `order`.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from typing import TYPE_CHECKING

from aoti_sched.events import Held, Loaded, MemoryUse, Pause, Run, Trace, Wait
from aoti_sched.spans import Spans

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_NEVER = math.inf
_Taker = Run | Held
_RANK = {"HIGH": 0, "NORMAL": 1, "LOW": 2}


class History:
    """What went on at one device.

    Args:
        limit: The number of the last runs that are kept at least, and of other events of a kind.
    """

    def __init__(self, limit: int) -> None:
        self.runs: Spans[Run] = Spans(limit)
        self.held: dict[str, Spans[Held]] = defaultdict(lambda: Spans(limit))
        self.pauses: dict[str, Spans[Pause]] = defaultdict(lambda: Spans(limit))
        self.memory: deque[MemoryUse] = deque(maxlen=limit)
        self._evictions: dict[str, Spans[tuple[float, float]]] = defaultdict(lambda: Spans(limit))
        self._evicted: dict[str, float] = {}

    def since(self, runner: str) -> float:
        """Return the end of the last event that is not kept of those that may delay a runner."""
        parts = (self.runs, self.held[runner], self.pauses[runner], self._evictions[runner])
        return max(part.since for part in parts)

    def add(self, event: Run | Held | Pause | MemoryUse) -> None:
        """Keep an event that is over. Those of a kind come in the order of their ends."""
        if isinstance(event, Run):
            self.runs.add(event, event.launched, end_of(event))
        elif isinstance(event, Held):
            self.held[event.runner].add(event, event.granted, end_of(event))
        elif isinstance(event, Pause):
            self.pauses[event.runner].add(event, event.closed, end_of(event))
        else:
            self._add_memory(event)

    def _add_memory(self, use: MemoryUse) -> None:
        self.memory.append(use)
        if use.change == "evicted":
            self._evicted[use.runner] = use.time
        elif use.change in ("restored", "freed") and use.runner in self._evicted:
            begin = self._evicted.pop(use.runner)
            self._evictions[use.runner].add((begin, use.time), begin, use.time)

    def evictions(self, runner: str, begin: float, end: float) -> Iterator[tuple[float, float]]:
        """Find when a runner's weights were evicted between these, as pairs of begin and end."""
        yield from self._evictions[runner].during(begin, end)
        if runner in self._evicted:
            yield self._evicted[runner], _NEVER


def end_of(event: Run | Held | Pause | MemoryUse) -> float:
    """Return when an event ended."""
    if isinstance(event, Run):
        return event.collected
    if isinstance(event, Held):
        return event.released
    return event.opened if isinstance(event, Pause) else event.time


def waits_of(
    trace: Trace,
    model: Loaded | None,
    history: History,
    going_on: Iterable[Run | Held | Pause] = (),
    since: float = -math.inf,
) -> tuple[Wait, ...]:
    """Return why a request waited; the parts add up to the time before its run.

    Args:
        trace: The request. One that still waits has no causes yet.
        model: Its model; None where it is not known.
        history: What went on at its device.
        going_on: The runs, leases and pauses that have begun there and not ended.
        since: When the history begins. Nothing is known of what had ended before.
    """
    found = _Found()
    begin, end = trace.queued, trace.launched or trace.ended
    if not end:
        return ()
    admitted = min(trace.admitted, end) if trace.admitted else end
    if admitted > begin:
        found.add("epoch" if trace.min_epoch > 1 else "room", admitted - begin)
    if end > admitted:
        if model is None:
            found.add("unknown", end - admitted)
        else:
            since = max(since, history.since(trace.runner))
            _find(found, trace, model, history, list(going_on), admitted, end, since)
    if trace.launched and not trace.lease and trace.started > trace.launched:
        found.add("lane", trace.started - trace.launched)
    return found.waits()


class _Found:
    def __init__(self) -> None:
        self._seconds: dict[tuple[str, tuple[str, str] | None], float] = defaultdict(float)
        self._takers: dict[tuple[str, tuple[str, str] | None], set[int]] = defaultdict(set)

    def add(self, cause: str, seconds: float, taker: _Taker | None = None) -> None:
        behind = None
        if isinstance(taker, Run):
            behind = (taker.runner, taker.priority)
        elif taker is not None:
            behind = (taker.runner, "")
        self._seconds[cause, behind] += seconds
        if taker is not None:
            self._takers[cause, behind].add(id(taker))

    def waits(self) -> tuple[Wait, ...]:
        found = sorted(self._seconds.items(), key=lambda item: -item[1])
        return tuple(
            Wait(kind[0], seconds, kind[1], len(self._takers.get(kind, ())))
            for kind, seconds in found
            if seconds > 0
        )


def _find(
    found: _Found,
    trace: Trace,
    model: Loaded,
    history: History,
    going_on: Sequence[Run | Held | Pause],
    begin: float,
    end: float,
    known_from: float,
) -> None:
    """Cut the time between these at each event, and find the cause of each piece."""
    runner = trace.runner
    runs = [*history.runs.during(begin, end)]
    runs += [one for one in going_on if isinstance(one, Run)]
    runs = [run for run in runs if run.lane >= 0 and run.job != trace.job]
    held = [*history.held[runner].during(begin, end)]
    held += [one for one in going_on if isinstance(one, Held) and one.runner == runner]
    pauses = [(pause.closed, pause.opened) for pause in history.pauses[runner].during(begin, end)]
    pauses += [
        (one.closed, one.opened)
        for one in going_on
        if isinstance(one, Pause) and one.runner == runner
    ]
    spans: list[tuple[float, float, object]] = [(run.launched, run.collected, run) for run in runs]
    spans += [(lease.granted, lease.released, lease) for lease in held]
    spans += [(*pause, "update") for pause in pauses]
    spans += [(*eviction, "eviction") for eviction in history.evictions(runner, begin, end)]
    events: list[tuple[float, int, int]] = []
    for number, (since, until, _) in enumerate(spans):
        if since < end and until > begin:
            events.append((max(since, begin), 1, number))
            if until < end:
                events.append((until, 0, number))
    if begin < known_from < end:
        events.append((known_from, 0, -1))
    events.sort()
    present: dict[int, object] = {}
    now = begin
    for time, opens, number in [*events, (end, 0, -1)]:
        if time > now:
            is_known = now >= known_from
            _blame(found, trace, model, list(present.values()), time - now, begin, is_known)
            now = time
        if opens:
            present[number] = spans[number][2]
        else:
            present.pop(number, None)


def _blame(
    found: _Found,
    trace: Trace,
    model: Loaded,
    present: Sequence[object],
    seconds: float,
    admitted: float,
    is_known: bool,
) -> None:
    """Find the cause of one piece, in which the same things were present throughout."""
    for cause in ("update", "eviction"):
        if cause in present:
            found.add(cause, seconds)
            return
    runs = [one for one in present if isinstance(one, Run)]
    own: list[_Taker] = [run for run in runs if run.runner == trace.runner and not run.held]
    own += [one for one in present if isinstance(one, Held)]
    on_lanes = {run.lane: run for run in runs}  # two of one lane: handed ahead, or retried
    takers: Sequence[_Taker] = ()
    cause = "unknown" if not is_known else "batch" if model.batch_delay else "loop"
    if len({one.slot for one in own}) >= model.slots:
        takers, cause = own, "slots"
    elif len(on_lanes) >= model.lanes:
        takers, cause = runs, "lanes"
    elif sum(run.cores for run in on_lanes.values()) + model.cores > model.device_cores:
        takers, cause = runs, "cores"
    if not takers:
        found.add(cause, seconds)
    for taker in takers:
        found.add(_cause(trace, taker, cause, admitted), seconds / len(takers), taker)


def _cause(trace: Trace, taker: _Taker, resource: str, admitted: float) -> str:
    """Return why this run or lease had what the request waited for."""
    if isinstance(taker, Held):
        return "leases"
    if (taker.launched, taker.job) < (admitted, trace.job):
        return resource
    if taker.overdue:
        return "overdue"
    if _RANK[taker.priority] < _RANK[trace.priority]:
        return "class"
    if taker.runner != trace.runner:
        return "share"
    return "tenant" if taker.tenant != trace.tenant else "order"
