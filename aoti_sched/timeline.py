"""Timeline: a recording in the trace format that Perfetto and chrome://tracing open.

The format is the Chrome trace event format (JSON). A device is a process, and a lane is a thread.
`otherData` has the settings of the models, and each waiting request says when it ran and ended, so
that `simulation/recorded.py` can read what happened.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from aoti_sched.events import Held, Loaded, MemoryUse, Pause, Run, Trace
from aoti_sched.whole_file import whole_file

VERSION = 1
"""The version of what `otherData` and the arguments of waiting requests say."""
_US = 1e6
_DEVICES_FROM = 100_000
"""The process number of the first device: viewers call a thread of the same number the main one."""
_EVENT_LOOP = 1_000_000
"""The thread number of inline runs, after those of all lanes."""
_PIECE = 1000
"""Events in a piece of the file."""
_WITHOUT_A_RUN = {"EXPIRED", "SHED", "REVOKED", "REJECTED", "CANCELLED"}


class DeviceEvents(msgspec.Struct):
    """What happened on one device.

    Attributes:
        requests: Requests that have ended.
        runs: Runs that are over.
        held: Leases that were released.
        pauses: Times in which runners started nothing.
        memory: Changes of the memory that weights take.
        models: The models that took requests.
    """

    requests: list[Trace]
    runs: list[Run]
    held: list[Held]
    pauses: list[Pause]
    memory: list[MemoryUse]
    models: list[Loaded] = []


def write(path: str | os.PathLike[str], devices: Mapping[str, DeviceEvents]) -> None:
    """Write a file that Perfetto opens: whole, or not at all.

    Args:
        path: The file, which is replaced.
        devices: What happened, by the device's name.

    Raises:
        OSError: The file can't be written.
    """
    with whole_file(path) as beside, beside.open("wb") as file:
        file.writelines(pieces(devices))


def pieces(devices: Mapping[str, DeviceEvents]) -> Iterator[bytes]:
    """Yield the content of the file, in pieces that take milliseconds to make.

    Times begin at 0 with the first event, in microseconds. No more than one event is an object at a
    time: thousands of them would have Python's collector of garbage go through the whole process.

    Args:
        devices: What happened, by the device's name.
    """
    begin = min((time for events in devices.values() for time in _times(events)), default=0.0)
    found = (
        event
        for number, (name, events) in enumerate(devices.items(), _DEVICES_FROM)
        for event in _Device(number, name, events, begin).events()
    )
    models = [msgspec.to_builtins(model) for events in devices.values() for model in events.models]
    head = {
        "displayTimeUnit": "ms",
        "otherData": {"aoti_sched": {"version": VERSION, "models": models}},
    }
    yield msgspec.json.encode(head)[:-1] + b',"traceEvents":['
    comma = b""
    encoded = map(msgspec.json.Encoder().encode, found)
    while some := b",".join(itertools.islice(encoded, _PIECE)):
        yield comma + some
        comma = b","
    yield b"]}"


def _times(events: DeviceEvents) -> Iterator[float]:
    yield from (trace.queued for trace in events.requests)
    yield from (run.launched for run in events.runs)
    yield from (held.granted for held in events.held)
    yield from (pause.closed for pause in events.pauses)
    yield from (use.time for use in events.memory)


class _Device:
    """Turns the events of one device into those of the file."""

    def __init__(self, number: int, name: str, events: DeviceEvents, begin: float) -> None:
        self._pid = number
        self._name = name
        self._of = events
        self._begin = begin

    def events(self) -> Iterator[dict[str, Any]]:
        of = self._of
        yield self._named("process_name", 0, self._name)
        lanes = sorted({run.lane for run in of.runs if run.lane >= 0})
        for lane in lanes:
            yield self._named("thread_name", lane + 1, f"lane {lane}")
        if any(run.lane < 0 for run in of.runs):
            yield self._named("thread_name", _EVENT_LOOP, "event loop")
        for run in of.runs:
            yield self._run(run)
        for trace in of.requests:
            yield from self._waiting(trace)
        for number, held in enumerate(of.held):
            yield from self._span(
                "lease", f"lease {number}", held.runner, held.granted, held.released
            )
        for number, pause in enumerate(of.pauses):
            what = f"update of {pause.runner}"
            yield from self._span("update", f"update {number}", what, pause.closed, pause.opened)
            if pause.published:
                text = f"{pause.runner}: epoch {pause.epoch} serves"
                yield self._instant(text, pause.opened)
        for use in of.memory:
            if use.change != "measured":
                yield self._instant(f"{use.runner}: {use.change}", use.time)
            yield self._counter("memory", use.time, {"bytes": use.used})
        yield from self._levels("queued", self._queued())
        yield from self._levels("busy lanes", ((run, 1) for run in of.runs if run.lane >= 0))
        yield from self._levels("cores", ((run, run.cores) for run in of.runs if run.lane >= 0))

    def _run(self, run: Run) -> dict[str, Any]:
        return {
            "ph": "X",
            "name": run.runner,
            "cat": "run",
            "pid": self._pid,
            "tid": run.lane + 1 if run.lane >= 0 else _EVENT_LOOP,
            "ts": self._us(run.started),
            "dur": round((run.finished - run.started) * _US, 3),
            "args": {
                "job": run.job,
                "epoch": run.epoch,
                "priority": run.priority,
                "tenant": run.tenant,
                "batch size": run.batch_size,
                "slot": run.slot,
                "ok": run.ok,
            },
        }

    def _waiting(self, trace: Trace) -> Iterator[dict[str, Any]]:
        end = trace.started or trace.launched or trace.ended
        if end:
            args = {"job": trace.job, "state": trace.state, "tag": trace.tag, **self._more(trace)}
            identity = f"job {trace.job}"
            yield from self._span("waiting", identity, trace.runner, trace.queued, end, args)
        if trace.state in _WITHOUT_A_RUN and trace.ended:
            yield self._instant(f"{trace.runner}: {trace.state.lower()}", trace.ended)

    def _more(self, trace: Trace) -> dict[str, Any]:
        """Return what a simulation needs of a request; times as in the file."""
        times = {"started": trace.started, "finished": trace.finished, "ended": trace.ended}
        if trace.admitted != trace.queued:
            times["admitted"] = trace.admitted
        more: dict[str, Any] = {name: self._us(at) for name, at in times.items() if at}
        more["priority"] = trace.priority
        more["rows"] = trace.rows
        more["batch size"] = trace.batch_size
        if trace.tenant:
            more["tenant"] = trace.tenant
        if trace.timeout is not None:
            more["timeout"] = round(trace.timeout * _US, 3)
        if trace.lease:
            more["lease"] = True
        return more

    def _queued(self) -> Iterator[tuple[Trace, int]]:
        return ((trace, 1) for trace in self._of.requests if trace.launched or trace.ended)

    def _levels(
        self, name: str, uses: Iterable[tuple[Run | Trace, int]]
    ) -> Iterator[dict[str, Any]]:
        """Yield a counter for each change of how much is in use."""
        steps: dict[float, int] = {}
        for use, amount in uses:
            if isinstance(use, Run):
                begin, end = use.started, use.finished  # a run handed ahead has no lane before
            else:
                begin, end = use.queued, use.launched or use.ended
            steps[begin] = steps.get(begin, 0) + amount
            steps[end] = steps.get(end, 0) - amount
        level = 0
        for time in sorted(steps):  # numbers alone, which takes a fraction of the time of pairs
            level += steps[time]
            yield self._counter(name, time, {name: level})

    def _span(
        self,
        kind: str,
        identity: str,
        name: str,
        begin: float,
        end: float,
        args: dict[str, Any] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield the two events of a span that may overlap with others."""
        both = {"cat": kind, "id2": {"local": identity}, "name": name, "pid": self._pid}
        yield {**both, "ph": "b", "tid": 0, "ts": self._us(begin), "args": args or {}}
        yield {**both, "ph": "e", "tid": 0, "ts": self._us(end)}

    def _instant(self, name: str, time: float) -> dict[str, Any]:
        return {"ph": "i", "s": "p", "name": name, "pid": self._pid, "tid": 0, "ts": self._us(time)}

    def _counter(self, name: str, time: float, values: dict[str, int]) -> dict[str, Any]:
        return {"ph": "C", "name": name, "pid": self._pid, "ts": self._us(time), "args": values}

    def _named(self, what: str, thread: int, name: str) -> dict[str, Any]:
        return {"ph": "M", "name": what, "pid": self._pid, "tid": thread, "args": {"name": name}}

    def _us(self, time: float) -> float:
        return round((time - self._begin) * _US, 3)
