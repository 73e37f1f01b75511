"""Recorded: what a file of `Recording.save` says of requests, runs and settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from aoti_sched.config import (
    INLINE_LIMIT,
    Batching,
    DeviceConfig,
    Limits,
    ModelConfig,
    SchedulerConfig,
    is_part,
)
from aoti_sched.errors import ConfigError, first_line
from aoti_sched.events import Loaded, Run, Trace
from aoti_sched.simulation.replay import Arrival
from aoti_sched.simulation.service_times import ServiceTimes
from aoti_sched.timeline import VERSION

_SECOND = 1e-6
"""Seconds of a microsecond, the unit of the file."""
_BEGIN = 1.0
"""What the file calls 0: a time of 0.0 stands for "not yet" in a `Trace`."""


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """A recording that was read.

    Attributes:
        models: The models on their devices.
        requests: The requests, in the order in which they came.
        runs: The runs, in the order in which they began.
        leases: Leases that were held.
        updates: Updates of weights.
    """

    models: list[Loaded]
    requests: list[Trace]
    runs: list[Run]
    leases: int
    updates: int


def read_recording(path: Path) -> Recorded:
    """Read a file that `Recording.save` has written.

    Raises:
        ConfigError: The file is no recording, or one of another version.
        OSError: The file can't be read.
    """
    content = path.read_bytes()
    try:
        file = msgspec.json.decode(content)
        about = file["otherData"]["aoti_sched"]
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no recording: {first_line(error)}.") from error
    except (KeyError, TypeError, IndexError):
        raise ConfigError(
            f"{path}: no recording of this version of aoti_sched. Save one with "
            "scheduler.record() and recording.save()."
        ) from None
    try:
        if about["version"] != VERSION:
            raise ConfigError(
                f"{path}: a recording of version {about['version']}, and this is {VERSION}. "
                "Record it anew."
            )
        return _read(msgspec.convert(about["models"], list[Loaded]), file["traceEvents"])
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: a damaged recording: {first_line(error)}.") from error


def _read(models: list[Loaded], events: Sequence[Mapping[str, Any]]) -> Recorded:
    devices = {
        event["pid"]: event["args"]["name"]
        for event in events
        if event["ph"] == "M" and event["name"] == "process_name"
    }
    requests, runs, begun = [], [], {"lease": 0, "update": 0}
    for event in events:
        kind, device = event.get("cat"), devices.get(event["pid"], "")
        if event["ph"] == "X" and kind == "run":
            runs.append(_run(event, device))
        elif event["ph"] == "b" and kind == "waiting":
            requests.append(_trace(event, device))
        elif event["ph"] == "b" and kind in begun:
            begun[kind] += 1
    return Recorded(
        models=models,
        requests=sorted(requests, key=lambda one: (one.queued, one.job)),
        runs=sorted(runs, key=lambda run: run.started),
        leases=begun["lease"],
        updates=begun["update"],
    )


def _time(microseconds: float) -> float:
    return _BEGIN + microseconds * _SECOND


def _trace(event: Mapping[str, Any], device: str) -> Trace:
    args = event["args"]

    def at(name: str) -> float:
        return _time(args[name]) if name in args else 0.0

    queued = _time(event["ts"])
    timeout = args.get("timeout")
    return Trace(
        runner=event["name"],
        device=device,
        state=args["state"],
        placement="lane",
        lane=-1,
        slot=-1,
        epoch=0,
        queued=queued,
        admitted=at("admitted") or queued,
        started=at("started"),
        finished=at("finished"),
        ended=at("ended"),
        batch_size=args["batch size"],
        tag=args["tag"],
        job=args["job"],
        priority=args["priority"],
        tenant=args.get("tenant", ""),
        timeout=None if timeout is None else timeout * _SECOND,
        lease=args.get("lease", False),
        rows=args["rows"],
    )


def _run(event: Mapping[str, Any], device: str) -> Run:
    args = event["args"]
    started = _time(event["ts"])
    finished = started + event["dur"] * _SECOND
    return Run(
        device=device,
        runner=event["name"],
        job=args["job"],
        lane=event["tid"] - 1,
        slot=args["slot"],
        epoch=args["epoch"],
        priority=args["priority"],
        tenant=args["tenant"],
        batch_size=args["batch size"],
        cores=0,
        launched=started,
        started=started,
        finished=finished,
        collected=finished,
        ok=args["ok"],
    )


# --- what a simulation takes from it --------------------------------------------------------------


def arrivals_of(recorded: Recorded) -> list[Arrival]:
    """Return the requests as they came. Requests for leases are left out."""
    requests = [one for one in recorded.requests if not one.lease]
    begin = requests[0].queued if requests else 0.0
    return [
        Arrival(
            at=one.queued - begin,
            runner=one.runner,
            priority=one.priority,
            tenant=one.tenant,
            timeout=one.timeout,
            leaves_after=max(0.0, one.ended - one.queued) if one.state == "CANCELLED" else None,
        )
        for one in requests
    ]


def times_of(recorded: Recorded) -> dict[str, ServiceTimes]:
    """Return the service times of each model, from its runs that succeeded."""
    numbers = {
        (one.device, one.job): number
        for number, one in enumerate(one for one in recorded.requests if not one.lease)
    }
    by_size: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    of_runs: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for run in recorded.runs:
        if not run.ok:
            continue
        seconds = run.finished - run.started
        by_size[run.runner][run.batch_size].append(seconds)
        leader = numbers.get((run.device, run.job))
        if leader is not None:
            of_runs[run.runner][leader, run.batch_size] = seconds
    return {name: ServiceTimes(sizes, of_runs[name]) for name, sizes in by_size.items()}


def settings_of(recorded: Recorded) -> SchedulerConfig:
    """Return the settings that a recording was made with, as far as it says them."""
    devices: dict[str, DeviceConfig] = {}
    models: dict[str, ModelConfig] = {}
    core = 0
    for one in recorded.models:
        if one.device not in devices:
            part = is_part(one.device)
            devices[one.device] = DeviceConfig(
                lanes=one.lanes,
                cores=one.device_cores,
                max_wait=one.max_wait,
                affinity=tuple(range(core, core + one.lanes)) if part else None,
                limits=Limits(jobs=one.device_limit),
            )
            core += one.lanes
    for one in recorded.models:
        where = tuple(other.device for other in recorded.models if other.runner == one.runner)
        models[one.runner] = ModelConfig(
            path=one.runner,
            device=where[0] if len(where) == 1 else "cpu",
            devices=where if len(where) > 1 else None,
            instances=one.slots,
            threads=one.cores,
            share=one.share,
            overflow=_overflow(recorded, one),
            admission="predictive" if one.predicts else "bounded",
            limits=Limits(jobs=one.limit),
            placement=one.placement,  # type: ignore[arg-type]
            inline_limit=one.inline_limit or INLINE_LIMIT,
            batching=_batching(recorded, one),
        )
    return SchedulerConfig(devices=devices, models=models)


def rows_of(recorded: Recorded, runner: str) -> int:
    """Return how many rows a request of a model usually has, at least 1."""
    rows = [one.rows for one in recorded.requests if one.runner == runner]
    return max(1, round(median(rows))) if rows else 1


def _overflow(recorded: Recorded, model: Loaded) -> Any:
    if model.sheds:
        return "shed"
    waited = any(
        one.runner == model.runner and one.admitted > one.queued for one in recorded.requests
    )
    return "wait" if waited else "reject"


def _batching(recorded: Recorded, model: Loaded) -> Batching | None:
    """Return the batching of a model whose requests count as one row each."""
    if model.max_batch <= 1:
        return None
    return Batching(
        max_size=max(1, model.max_batch // rows_of(recorded, model.runner)),
        max_delay=model.batch_delay,
        max_seconds=model.batch_seconds,
    )
