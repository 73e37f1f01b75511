"""`aoti-sched timeline`: records a running process, for Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from aoti_sched.cli.failures import UsageError
from aoti_sched.cli.options import Flag
from aoti_sched.cli.output import Report, out, print_json
from aoti_sched.cli.processes import PATIENCE, Process, choose, pieces
from aoti_sched.cli.units import seconds as seconds_of
from aoti_sched.cli.units import size_text
from aoti_sched.whole_file import whole_file


class TimelineReport(Report, frozen=True, kw_only=True):
    """What `timeline --json` prints.

    Attributes:
        path: The file.
        bytes: Its size.
        seconds: How long was recorded.
    """

    path: str
    bytes: int
    seconds: float


def timeline_command(
    process: Process = None,
    /,
    *,
    seconds: str = "5",
    output: Annotated[Path, Parameter(name=("--output", "-o"))] = Path("timeline.json"),
    json: Flag = False,
) -> None:
    """Record a running process and write a timeline that Perfetto opens.

    Open the file at https://ui.perfetto.dev or in chrome://tracing.

    Args:
        process: A process id, a name, the path of a socket, or http://127.0.0.1:PORT; it can be
            left out where only one scheduler is exposed.
        seconds: How long to record, up to 5 minutes.
        output: The file. It is written whole, or not at all.
        json: Print JSON.
    """
    length = seconds_of(seconds, "--seconds")
    if not 0.01 <= length <= 300:
        raise UsageError(f"--seconds: expected 10 ms to 5 minutes, got {seconds!r}.")
    target = choose(process)
    with whole_file(output) as beside, beside.open("wb") as file:
        found = pieces(target, f"/timeline?seconds={length:g}", patience=length + PATIENCE)
        file.writelines(found)
        size = file.tell()
    if json:
        print_json(TimelineReport(path=str(output), bytes=size, seconds=length))
    else:
        out().print(f"{output}: {length:g} s of {target.label}, {size_text(size)}")
