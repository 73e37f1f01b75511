"""`aoti-sched top`: watches a running process in the terminal."""

from __future__ import annotations

import sys

from aoti_sched.cli.failures import UsageError
from aoti_sched.cli.processes import Process, ask, choose
from aoti_sched.cli.units import seconds
from aoti_sched.errors import AotiSchedError
from aoti_sched.expose.reports import StatsReport


def top_command(process: Process = None, /, *, interval: str = "1s") -> int:
    """Watch a running process: devices and runners, sortable, until q is pressed.

    It needs the extra `top`. Rates and quantiles are those of the last ten seconds.

    Args:
        process: A process id, a name, the path of a socket, or http://127.0.0.1:PORT; it can be
            left out where only one scheduler is exposed.
        interval: The time between two looks, 100 ms to a minute.
    """
    length = seconds(interval, "--interval")
    if not 0.1 <= length <= 60:
        raise UsageError(f"--interval: expected 100 ms to a minute, got {interval!r}.")
    try:
        from aoti_sched.cli.top_screen import Top
    except ModuleNotFoundError as error:
        raise AotiSchedError(
            f"top: {error.name} is missing. Run: pip install 'aoti_sched[top]'"
        ) from None
    first = ask(choose(process), "/stats", StatsReport)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("top: this is no terminal. `aoti-sched stats` shows the numbers once.")
    app = Top(process, first, length)
    app.run()
    return app.return_code or 0
