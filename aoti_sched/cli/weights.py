"""`aoti-sched weights`: changes and extracts the weights of a running process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cyclopts import Parameter

from aoti_sched.cli.failures import UsageError
from aoti_sched.cli.options import Flag
from aoti_sched.cli.output import out
from aoti_sched.cli.processes import PATIENCE, Process, ask, choose
from aoti_sched.cli.units import seconds, size_text, time_text
from aoti_sched.expose.reports import (
    ExtractRequest,
    PublishRequest,
    StageRequest,
    WeightsReport,
)

_LONG = 3600.0
"""Seconds that a change may take where no timeout is given."""


def stage_command(
    model: str,
    weights: Path,
    /,
    *,
    partial: Flag = False,
    not_strict: Flag = False,
    check_finite: Flag = False,
    timeout: str | None = None,
    process: Process = None,
    json: Flag = False,
) -> None:
    """Write new weights beside those that serve. `weights commit` publishes them.

    The program has to call `await scheduler.expose(weights=True)`.

    Args:
        model: The runner's name.
        weights: A `.safetensors` file or a torch checkpoint, which the process reads.
        partial: Keep the current values of names that the file lacks.
        not_strict: Accept names that the model does not know.
        check_finite: Refuse NaN and infinities.
        timeout: How long it may take, such as "30s".
        process: A process id, a name or a socket, where several schedulers are exposed.
        json: Print JSON.
    """
    if not weights.exists():
        raise UsageError(f"{weights}: there is no such file.")
    limit = _timeout(timeout)
    asked = StageRequest(
        runner=model,
        file=str(weights.absolute()),
        partial=partial,
        strict=not not_strict,
        check_finite=check_finite,
        timeout=limit,
    )
    report = _ask("stage", asked, process, limit)
    _show(report, json, f"{model}: {weights} is staged; epoch {report.epochs.get(model)} serves")


def commit_command(
    *models: str,
    barrier: Literal["drain", "abort"] = "drain",
    drop_previous: Flag = False,
    timeout: str | None = None,
    process: Process = None,
    json: Flag = False,
) -> None:
    """Publish the staged weights of one or more models, at one instant.

    Args:
        models: The runners' names.
        barrier: "drain" lets queued requests wait, and "abort" fails them.
        drop_previous: Do not keep the old weights for `weights rollback`.
        timeout: How long it may take, such as "30s".
        process: A process id, a name or a socket, where several schedulers are exposed.
        json: Print JSON.
    """
    limit = _timeout(timeout)
    asked = PublishRequest(
        runners=_some(models), barrier=barrier, keep_previous=not drop_previous, timeout=limit
    )
    _show(_ask("commit", asked, process, limit), json, None)


def rollback_command(
    *models: str,
    barrier: Literal["drain", "abort"] = "drain",
    timeout: str | None = None,
    process: Process = None,
    json: Flag = False,
) -> None:
    """Publish the previous weights of one or more models again, at one instant.

    Args:
        models: The runners' names.
        barrier: "drain" lets queued requests wait, and "abort" fails them.
        timeout: How long it may take, such as "30s".
        process: A process id, a name or a socket, where several schedulers are exposed.
        json: Print JSON.
    """
    limit = _timeout(timeout)
    asked = PublishRequest(runners=_some(models), barrier=barrier, timeout=limit)
    _show(_ask("rollback", asked, process, limit), json, None)


def extract_command(
    model: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"))],
    inactive: Flag = False,
    process: Process = None,
    json: Flag = False,
) -> None:
    """Write the weights that serve to a file, a full set for `weights stage`.

    Args:
        model: The runner's name.
        output: A `.safetensors` file, which the process writes, whole or not at all.
        inactive: The staged or previous set, in place of the one that serves.
        process: A process id, a name or a socket, where several schedulers are exposed.
        json: Print JSON.
    """
    if output.suffix != ".safetensors":
        raise UsageError(f"--output {output}: the name must end in .safetensors.")
    asked = ExtractRequest(runner=model, file=str(output.absolute()), inactive=inactive)
    report = _ask("extract", asked, process, None)
    _show(report, json, f"{output}: the weights of {model}")


def _ask(verb: str, asked: object, process: str | None, limit: float | None) -> WeightsReport:
    patience = _LONG if limit is None else limit + PATIENCE
    target = choose(process)
    if not target.path:
        raise UsageError(
            f"{target.label}: weights are changed and extracted through the socket alone. Name the "
            "process by its id, its name or its socket."
        )
    return ask(target, f"/weights/{verb}", WeightsReport, body=asked, patience=patience)


def _show(report: WeightsReport, json: bool, text: str | None) -> None:
    if json:
        written = msgspec.json.format(msgspec.json.encode(report), indent=2)
        sys.stdout.write(written.decode() + "\n")
        return
    console = out()
    if text is not None:
        console.print(text)
    for done in report.updates:
        console.print(
            f"{done['runner']}: epoch {done['epoch']} serves, {size_text(done['bytes'])}; "
            f"requests paused for {time_text(done['pause_seconds'])}, {done['waited']} waited"
        )


def _some(models: tuple[str, ...]) -> tuple[str, ...]:
    if not models:
        raise UsageError("weights: name at least one model.")
    return models


def _timeout(text: str | None) -> float | None:
    return None if text is None else seconds(text, "--timeout")
