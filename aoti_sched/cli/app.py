"""The application: which commands there are, the options of all of them, and how one is run.

A command is registered by the path of its function, and imported when it is run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Group, Parameter
from cyclopts.config import Dict, Env

from aoti_sched import __version__
from aoti_sched.cli.failures import OK, exit_code
from aoti_sched.cli.options import Flag, read_options

NAME = "aoti-sched"
PREFIX = "AOTI_SCHED_"
"""What the names of environment variables begin with: `AOTI_SCHED_BENCH_CLIENTS` for
`bench --clients`.
"""

HELP = """\
Compile, inspect, run and measure models for aoti_sched.

Data goes to stdout, and messages go to stderr. \
Exit codes: 0 success, 1 failure, 2 wrong usage, 3 a missed budget, 130 an interruption.
"""

COMMANDS: dict[str, Any] = {
    "compile": "Compile a PyTorch module into a package.",
    "inspect": "Show what a package says of its models, without running any code of it.",
    "run": "Run a model on given inputs, or on random ones that fit its specs.",
    "bench": (
        "Measure a model under load: latency, throughput, queue and run time, loop lag, cores."
    ),
    "tune": (
        "Find the settings of a model that keep a latency at a load, and write them to a file."
    ),
    "simulate": "Replay a recording under other settings, in virtual time and without the models.",
    "stats": "Show the numbers of a running process: devices, runners, latencies.",
    "top": "Watch a running process: devices and runners, sortable, until q is pressed.",
    "timeline": "Record a running process and write a timeline that Perfetto opens.",
    "weights": {
        "stage": ("Write new weights beside those that serve. `weights commit` publishes them."),
        "commit": "Publish the staged weights of one or more models, at one instant.",
        "rollback": "Publish the previous weights of one or more models again, at one instant.",
        "extract": "Write the weights that serve to a file, a full set for `weights stage`.",
    },
    "doctor": "Show what this machine and this installation have: a report to paste.",
    "cache": {
        "ls": "List the packages that are extracted, with their size and age.",
        "prune": "Delete extracted packages that no process uses.",
    },
    "completion": "Print a script that completes the commands and options in a shell.",
}
"""The commands with one line of help; a dict has the commands below one."""

GROUPS = {
    "cache": "The folder of extracted packages.",
    "weights": "The weights of a running process.",
}

Shell = Literal["bash", "zsh", "fish"]
"""The shells that completion is written for."""


class Settings:
    """What the options of all commands set."""

    debug = False


def make_app(settings: Settings | None = None) -> App:
    """Return the application. No command's module is imported yet."""
    settings = settings or Settings()
    app = App(
        name=NAME,
        help=HELP,
        version=__version__,
        help_format="plaintext",
        config=(Env(PREFIX, show=False),),
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )
    for name, what in COMMANDS.items():
        if isinstance(what, str):
            app.command(f"aoti_sched.cli.{name}:{name}_command", name=name, help=what)
        else:
            group = App(name=name, help=GROUPS[name])
            for inner, line in what.items():
                path = f"aoti_sched.cli.{name}:{inner}_command"
                group.command(path, name=inner, help=line)
            app.command(group)
    app.meta.group_parameters = Group("Options of all commands", sort_key=0)
    app.meta.suppress_keyboard_interrupt = False
    app.meta.config = (Env(PREFIX, command=False, show=False),)
    app.meta.default(_launcher(app, settings))
    return app


def _launcher(app: App, settings: Settings) -> Any:
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        debug: Flag = False,
        config: Path | None = None,
    ) -> int:
        """Run a command.

        Args:
            tokens: The command and its arguments.
            debug: Print the traceback of an error, and the library's log.
            config: A TOML file with a table of options for each command.
        """
        settings.debug = debug
        if config is not None:
            names = {
                name: None if isinstance(what, str) else dict.fromkeys(what)
                for name, what in COMMANDS.items()
            }
            options = read_options(config, names)
            app.config = (Env(PREFIX, show=False), Dict(options, source=os.fspath(config)))
        if debug:
            from aoti_sched.cli.output import log_to_stderr

            log_to_stderr()
        code = app(tokens)
        return code if isinstance(code, int) else OK

    return launch


def run(arguments: Sequence[str]) -> int:
    """Run the command that the arguments name, and return the exit code."""
    settings = Settings()
    app = make_app(settings)
    return exit_code(lambda: app.meta(list(arguments)) or OK, debug=lambda: settings.debug)
