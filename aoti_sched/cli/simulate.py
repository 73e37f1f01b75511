"""`aoti-sched simulate`: a recording's requests under other settings, in virtual time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from aoti_sched.cli.failures import OK, UsageError
from aoti_sched.cli.options import Flag
from aoti_sched.cli.output import Report, err, out, print_json, print_table, print_title
from aoti_sched.cli.units import seconds, time_text
from aoti_sched.config import (
    Admission,
    Batching,
    DeviceConfig,
    ModelConfig,
    Overflow,
    PlacementName,
    SchedulerConfig,
)
from aoti_sched.simulation.outcome import Outcome, outcome_of
from aoti_sched.simulation.recorded import Recorded, rows_of
from aoti_sched.simulation.replay import Arrival, Replay, replay
from aoti_sched.simulation.service_times import EXTRAPOLATED, ServiceTimes

_FAR = 0.2
"""The part by which a simulation may differ from the recording without a note."""


class SimulationReport(Report, frozen=True, kw_only=True):
    """What `simulate --json` prints.

    Attributes:
        path: The recording.
        settings: The settings that were simulated: those of the devices and of the models.
        changed: Whether they differ from those of the recording.
        recording: What was recorded.
        same: The simulation of the recorded settings: its distance from the recording is what the
            simulation leaves out.
        simulation: The simulation of the changed settings; `same` where nothing is changed.
        models: The three for each model, by its name.
        runs: How many simulated runs took a time of which source, by the model's name: "recorded
            run", "measured size", "interpolated" or "extrapolated".
        notes: What the simulation could not take from the recording.
    """

    path: str
    settings: dict[str, Any]
    changed: bool
    recording: Outcome
    same: Outcome
    simulation: Outcome
    models: dict[str, dict[str, Outcome]]
    runs: dict[str, dict[str, int]]
    notes: tuple[str, ...]


def simulate_command(
    trace: Path,
    /,
    *,
    settings: Path | None = None,
    model: str | None = None,
    lanes: int | None = None,
    cores: int | None = None,
    max_wait: str | None = None,
    instances: int | None = None,
    max_size: int | None = None,
    max_delay: str | None = None,
    placement: PlacementName | None = None,
    admission: Admission | None = None,
    overflow: Overflow | None = None,
    speed: float = 1.0,
    timeline: Path | None = None,
    json: Flag = False,
) -> int:
    """Replay a recording under other settings, in virtual time and without the models.

    The requests come as they were recorded, and the rules that serve decide. A run takes the time
    that was recorded for runs of its size; the report says what had to be extrapolated.

    Args:
        trace: A file that recording.save() has written.
        settings: A scheduler.toml whose devices and models replace those of the recording, by their
            names. Its packages are not read.
        model: The model that the options below change; by default all.
        lanes: Runs that go on at once, on each device.
        cores: Cores that all runs may use together, on each device.
        max_wait: The time after which a queued request is overdue.
        instances: Runs of the model that may go on at once.
        max_size: The most rows of one batch; 1 for no batching.
        max_delay: How long a request waits for others to join its batch.
        placement: Where runs happen: auto, lane or inline.
        admission: What admission checks: bounded or predictive.
        overflow: What happens at a full queue: reject, wait or shed.
        speed: The factor by which the requests come faster.
        timeline: Write the simulation to this file, which Perfetto opens.
        json: Print JSON.
    """
    from aoti_sched.simulation.recorded import arrivals_of, read_recording, settings_of, times_of

    if not 0 < speed < 1e6:
        raise UsageError(f"--speed {speed:g}: write a number above 0, such as 2.")
    _check_counts(lanes=lanes, cores=cores, instances=instances, max_size=max_size)
    recorded = read_recording(trace)
    known = {one.runner for one in recorded.models}
    if model is not None and model not in known:
        raise UsageError(f"--model {model}: {trace} has {', '.join(sorted(known))}.")
    arrivals, times = arrivals_of(recorded), times_of(recorded)
    if not arrivals:
        raise UsageError(f"{trace}: no request was recorded.")
    notes = _notes(recorded)
    arrivals = _simulable(arrivals, times, known, notes)
    own = settings_of(recorded)
    wanted = own if settings is None else _from_file(settings, own, recorded, notes)
    of_model = {
        "instances": instances,
        "placement": placement,
        "admission": admission,
        "overflow": overflow,
    }
    delay = None if max_delay is None else seconds(max_delay, "--max-delay")
    overdue = None if max_wait is None else seconds(max_wait, "--max-wait")
    wanted = SchedulerConfig(
        devices={
            name: _given(device, {"lanes": lanes, "cores": cores, "max_wait": overdue})
            for name, device in wanted.devices.items()
        },
        models={
            name: one
            if model not in (None, name)
            else _batched(_given(one, of_model), rows_of(recorded, name), max_size, delay)
            for name, one in wanted.models.items()
        },
    )
    changed = wanted != own or speed != 1
    same = replay(arrivals, own, times)
    found, taken = same, times
    if changed or timeline is not None:
        taken = times_of(recorded)
        faster = [_sooner(arrival, speed) for arrival in arrivals]
        found = replay(faster, wanted, taken, timeline=timeline)
    report = _report(trace, recorded, (own, wanted), (same, found), taken, notes, changed=changed)
    report = msgspec.structs.replace(report, notes=(*report.notes, *_distance(report)))
    if json:
        print_json(report)
    else:
        _print(report)
    return OK


# --- the settings ---------------------------------------------------------------------------------


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} {count}: write a number of at least 1.")


def _given(settings: Any, values: Mapping[str, Any]) -> Any:
    """Return settings with the values that are given."""
    found = {name: value for name, value in values.items() if value is not None}
    if "lanes" in found and settings.affinity is not None:
        found["affinity"] = None
    return msgspec.structs.replace(settings, **found)


def _batched(
    settings: ModelConfig, rows: int, max_size: int | None, max_delay: float | None
) -> ModelConfig:
    """Return a model's settings with other batches. Each request counts as one row here."""
    batching = settings.batching
    if max_size is not None:
        size = max(1, max_size // rows)
        delay = batching.max_delay if isinstance(batching, Batching) else 0.0
        longest = batching.max_seconds if isinstance(batching, Batching) else None
        batching = Batching(max_size=size, max_delay=delay, max_seconds=longest)
        batching = None if max_size == 1 else batching
    if max_delay is not None:
        if not isinstance(batching, Batching):
            raise UsageError(
                f"--max-delay: the model {settings.path!r} runs no batches. Give --max-size, too."
            )
        batching = msgspec.structs.replace(batching, max_delay=max_delay)
    return msgspec.structs.replace(settings, batching=batching)


def _from_file(
    path: Path, own: SchedulerConfig, recorded: Recorded, notes: list[str]
) -> SchedulerConfig:
    """Return the recorded settings, with those of a file in their place."""
    from aoti_sched.config_file import read_config
    from aoti_sched.model.batch_layout import MAX_SIZE

    given = read_config(path)
    devices = {
        name: _device(given.devices[name], device) if name in given.devices else device
        for name, device in own.devices.items()
    }
    models = {}
    for name, old in own.models.items():
        new = given.models.get(name)
        if new is None:
            notes.append(f"{path} has no model {name!r}: it keeps the recorded settings.")
            models[name] = old
            continue
        if new.threads not in (None, old.threads):
            notes.append(
                f"{name!r} has {new.threads} threads instead of {old.threads}: its runs take other "
                "cores here, and the time that was recorded."
            )
        batching = Batching() if new.batching is True else new.batching or None
        if batching is not None:
            most = batching.max_size or MAX_SIZE
            size = max(1, most // rows_of(recorded, name))
            batching = msgspec.structs.replace(batching, max_size=size, max_tokens=None, ragged={})
        models[name] = msgspec.structs.replace(
            new,
            path=name,
            device=old.device,
            devices=old.devices,
            threads=new.threads or old.threads,
            batching=batching,
            weights=None,
            cuda_graphs=False,
            stream_priority=0,
        )
    return SchedulerConfig(devices=devices, models=models)


def _device(new: DeviceConfig, old: DeviceConfig) -> DeviceConfig:
    """Return a device of a file; without lanes or cores in the file, it has the recorded ones."""
    lanes = new.lanes or old.lanes
    affinity = old.affinity if lanes == old.lanes else None
    return msgspec.structs.replace(
        new, lanes=lanes, cores=new.cores or old.cores, affinity=affinity, memory_limit=None,
        evict=None, launchers=None, wait=None,
    )  # fmt: skip


def _sooner(arrival: Arrival, speed: float) -> Arrival:
    return msgspec.structs.replace(arrival, at=arrival.at / speed)


# --- what the recording lacks ---------------------------------------------------------------------


def _notes(recorded: Recorded) -> list[str]:
    failed = sum(not run.ok for run in recorded.runs)
    left_out = (
        (recorded.leases, "lease", "its runs count as requests, and its slot is not held"),
        (recorded.updates, "update of weights", "nothing pauses for it"),
        (failed, "run that failed", "every simulated run succeeds"),
    )
    return [
        f"{count} {what}{'s' * (count != 1)} left out: {why}."
        for count, what, why in left_out
        if count
    ]


def _simulable(
    arrivals: list[Arrival],
    times: Mapping[str, ServiceTimes],
    known: set[str],
    notes: list[str],
) -> list[Arrival]:
    """Return the requests of models with a recorded run; no time is known for other models."""
    lost = Counter(
        one.runner for one in arrivals if one.runner not in times or one.runner not in known
    )
    for name, count in lost.items():
        notes.append(f"{count} requests of {name!r} left out: no run of it was recorded.")
    kept = [one for one in arrivals if one.runner not in lost]
    if not kept:
        raise UsageError("no run was recorded, so that nothing is known of how long runs take.")
    return kept


def _distance(report: SimulationReport) -> list[str]:
    """Return a sentence where the simulation of the recorded settings is far from the recording."""
    recorded, same = report.recording.latency, report.same.latency
    if recorded is None or same is None:
        return []
    for figure in ("p50", "p99"):
        was, is_now = getattr(recorded, figure), getattr(same, figure)
        if abs(is_now - was) > _FAR * was:
            note = (
                f"with the recorded settings the {figure} is {time_text(is_now)} in the simulation "
                f"and was {time_text(was)}: the rest is the event loop's work, other processes, or "
                "what the recording does not say. Compare the two simulations with each other."
            )
            return [note]
    return []


def _report(
    path: Path,
    recorded: Recorded,
    settings: tuple[SchedulerConfig, SchedulerConfig],
    replays: tuple[Replay, Replay],
    times: Mapping[str, ServiceTimes],
    notes: Sequence[str],
    *,
    changed: bool,
) -> SimulationReport:
    wanted = settings[1]
    requests = [one for one in recorded.requests if not one.lease]
    same, found = replays
    sources = {
        "recording": (requests, recorded.runs),
        "same": (same.requests, same.runs),
        "simulation": (found.requests, found.runs),
    }
    names = list(times)
    return SimulationReport(
        path=str(path),
        settings={
            "devices": {
                name: {"lanes": one.lanes, "cores": one.cores, "max_wait": one.max_wait}
                for name, one in wanted.devices.items()
            },
            "models": {name: _settings(wanted.models[name]) for name in names},
        },
        changed=changed,
        recording=outcome_of(*sources["recording"]),
        same=outcome_of(*sources["same"]),
        simulation=outcome_of(*sources["simulation"]),
        models={
            model: {
                name: outcome_of(
                    [one for one in requests if one.runner == model],
                    [run for run in runs if run.runner == model],
                )
                for name, (requests, runs) in sources.items()
            }
            for model in names
        },
        runs={model: dict(times[model].sources) for model in names},
        notes=tuple(notes),
    )


def _settings(model: ModelConfig) -> dict[str, Any]:
    batching = model.batching if isinstance(model.batching, Batching) else None
    return {
        "instances": model.instances,
        "threads": model.threads,
        "max_size": 1 if batching is None else batching.max_size,
        "max_delay": 0.0 if batching is None else batching.max_delay,
        "placement": model.placement,
        "admission": model.admission,
        "overflow": model.overflow,
    }


# --- for people -----------------------------------------------------------------------------------


def _print(report: SimulationReport) -> None:
    console = out()
    print_title(console, f"{report.path}: {report.recording.requests} requests")
    parts = [("", {name: getattr(report, name) for name in ("recording", "same", "simulation")})]
    if len(report.models) > 1:
        parts += list(report.models.items())
    for title, outcomes in parts:
        console.print()
        columns = ["recording", "same"] + ["simulation"] * report.changed
        words = {"recording": "recorded", "same": "simulated as recorded", "simulation": "changed"}
        rows = [
            (name, *(figure(outcomes[column]) for column in columns)) for name, figure in _FIGURES
        ]
        print_table(console, (title, *(words[column] for column in columns)), rows)
    console.print()
    for name, sources in report.runs.items():
        print_title(console, f"{name}: {_words(report.settings['models'][name])}")
        total = sum(sources.values())
        parts_of = ", ".join(f"{count / total:.1%} {source}" for source, count in sources.items())
        if total:
            console.print(f"  times of its {total} runs: {parts_of}")
    for note in report.notes:
        err().print(f"aoti-sched: {note}")
    guessed = [name for name, sources in report.runs.items() if sources.get(EXTRAPOLATED)]
    if guessed:
        names = ", ".join(guessed)
        err().print(
            f"aoti-sched: {names}: runs of some sizes lie beyond all recorded ones, and their "
            "times are extrapolated. Record such batches, or use bench or tune."
        )


def _words(settings: Mapping[str, Any]) -> str:
    shown = {**settings, "max_delay": time_text(settings["max_delay"])}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


def _time(outcome: Outcome, part: str, figure: str) -> str:
    found = getattr(outcome, part)
    return "-" if found is None else time_text(getattr(found, figure))


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


_FIGURES: tuple[tuple[str, Any], ...] = (
    ("answers", lambda one: one.ended.get("DONE", 0)),
    ("answers/s", lambda one: _number(one.throughput)),
    *(
        (f"latency {figure}", lambda one, figure=figure: _time(one, "latency", figure))
        for figure in ("p50", "p90", "p99", "max")
    ),
    ("queue p50", lambda one: _time(one, "queue", "p50")),
    ("queue p99", lambda one: _time(one, "queue", "p99")),
    ("run p50", lambda one: _time(one, "run", "p50")),
    ("missed deadlines", lambda one: one.missed),
    ("requests of a run", lambda one: _number(one.batch_size)),
    ("runs at once", lambda one: _number(one.busy)),
    (
        "without an answer",
        lambda one: (
            ", ".join(
                f"{count} {state.lower()}" for state, count in one.ended.items() if state != "DONE"
            )
            or 0
        ),
    ),
)
