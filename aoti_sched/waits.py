"""Waits: why a request waited, found from what else went on at its device.

The time from the admission of a request to its launch is cut at each moment at which a run, a
lease or a pause began or ended. In each piece, the first rule below that holds gives the cause:

1. `update`: a barrier of an update was closed.
2. `eviction`: the weights were evicted, and restored.
3. All slots of the runner were taken, all lanes were busy, or too few cores were free. The piece
   is divided evenly among the runs and leases that took them.
4. `batch`: the request waited for others to join its batch.
5. `loop`: nothing was in the way, and the event loop had not come to it.

A run that was launched before the request was admitted gives `slots`, `lanes` or `cores`, a lease
gives `leases`. A later run was preferred, and the cause is the rule that preferred it: `class`,
`share`, `tenant` or `order`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from aoti_sched.events import Held, Loaded, MemoryUse, Pause, Run, Trace, Wait

_T = TypeVar("_T")
_Taker = Run | Held
_RANK = {"HIGH": 0, "NORMAL": 1, "LOW": 2}


class History:
    """What went on at one device.

    Args:
        limit: The number of the last runs that are kept at least, and of other events of a kind.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.models: dict[str, Loaded] = {}
        self.runs: list[Run] = []
        self.longest = 0.0  # seconds from a launch to its collection
        self.held: dict[str, list[Held]] = defaultdict(list)
        self.pauses: dict[str, list[Pause]] = defaultdict(list)
        self.memory: list[MemoryUse] = []

    def add_run(self, run: Run) -> None:
        """Keep a run. Runs come in the order in which they were collected."""
        self.longest = max(self.longest, run.collected - run.launched)
        _append(self.runs, run, self.limit)

    def add_held(self, held: Held) -> None:
        """Keep a lease that was released."""
        _append(self.held[held.runner], held, self.limit)

    def add_pause(self, pause: Pause) -> None:
        """Keep a pause that is over."""
        _append(self.pauses[pause.runner], pause, self.limit)

    def add_memory(self, use: MemoryUse) -> None:
        """Keep a change of memory."""
        _append(self.memory, use, self.limit)

    def runs_during(self, begin: float, end: float) -> Iterator[Run]:
        """Find the runs on lanes that had their lane at some time between these."""
        runs = self.runs
        for index in range(bisect_right(runs, begin, key=_collected), len(runs)):
            run = runs[index]
            if run.launched < end and run.lane >= 0:
                yield run
            elif run.launched >= end and run.collected - self.longest > end:
                return

    def evictions(self, runner: str) -> Iterator[tuple[float, float]]:
        """Find the times in which a runner's weights were evicted, as (begin, end)."""
        begin = None
        for use in self.memory:
            if use.runner == runner and use.change == "evicted":
                begin = use.time
            elif use.runner == runner and use.change == "restored" and begin is not None:
                yield begin, use.time
                begin = None
        if begin is not None:
            yield begin, float("inf")


def waits_of(
    trace: Trace, history: History, going_on: Iterable[Run | Held | Pause] = ()
) -> tuple[Wait, ...]:
    """Return why a request waited; the parts add up to the time before its run.

    Args:
        trace: The request. One that still waits has no causes yet.
        history: What went on at its device.
        going_on: The runs, leases and pauses that have begun there and not ended.
    """
    found = _Found()
    begin, end = trace.queued, trace.launched or trace.ended
    if not end:
        return ()
    admitted = min(trace.admitted, end) if trace.admitted else end
    if admitted > begin:
        found.add("epoch" if trace.min_epoch > 1 else "room", admitted - begin)
    model = history.models.get(trace.runner)
    if end > admitted:
        if model is None:
            found.add("unknown", end - admitted)
        else:
            _find(found, trace, model, history, list(going_on), admitted, end)
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
) -> None:
    """Cut the time between these at each event, and find the cause of each piece."""
    runner = trace.runner
    runs = [*history.runs_during(begin, end)]
    runs += [one for one in going_on if isinstance(one, Run) and one.lane >= 0]
    runs = [run for run in runs if run.device == trace.device and run.job != trace.job]
    held: list[Held] = [*history.held[runner]]
    held += [one for one in going_on if isinstance(one, Held) and one.runner == runner]
    pauses = [(pause.closed, pause.opened) for pause in history.pauses[runner]]
    pauses += [
        (one.closed, one.opened)
        for one in going_on
        if isinstance(one, Pause) and one.runner == runner
    ]
    evictions = list(history.evictions(runner))
    spans: list[tuple[float, float, object]] = [(run.launched, run.collected, run) for run in runs]
    spans += [(lease.granted, lease.released, lease) for lease in held]
    spans += [(*pause, "update") for pause in pauses]
    spans += [(*eviction, "eviction") for eviction in evictions]
    events: list[tuple[float, int, int]] = []
    for number, (since, until, _) in enumerate(spans):
        if since < end and until > begin:
            events.append((max(since, begin), 1, number))
            if until < end:
                events.append((until, 0, number))
    events.sort()
    present: dict[int, object] = {}
    now = begin
    for time, opens, number in [*events, (end, 0, -1)]:
        if time > now:
            _blame(found, trace, model, list(present.values()), time - now, begin)
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
    cause = "batch" if model.batch_delay else "loop"
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
    if _RANK[taker.priority] < _RANK[trace.priority]:
        return "class"
    if taker.runner != trace.runner:
        return "share"
    return "tenant" if taker.tenant != trace.tenant else "order"


def _append(kept: list[_T], event: _T, limit: int) -> None:
    """Append an event, and now and then drop the oldest, so that `limit` of them are left."""
    kept.append(event)
    if len(kept) >= 2 * limit:
        del kept[:-limit]


def _collected(run: Run) -> float:
    return run.collected
