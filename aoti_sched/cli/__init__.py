"""The command line: `aoti-sched`, or `python -m aoti_sched`.

A command is a thin face of what the library can do, in a module of its own. `app` registers the
commands by name and imports a command's module when the command is run. No module here imports
torch, numpy or rich at its top, so a command that needs none of them starts quickly.

- Data goes to stdout, all else to stderr (`output`).
- An error becomes one sentence and an exit code (`failures`).
- Options also come from `AOTI_SCHED_*` and from a TOML file (`options`).

The extra `cli` installs what this room needs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from aoti_sched import __version__

MISSING = """\
aoti-sched: the command line needs the packages of an extra. Run: pip install 'aoti_sched[cli]'
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and end the process with its exit code.

    Args:
        arguments: The words after the program's name; by default those of this process.

    Raises:
        SystemExit: Always. The code is 0 for success, 1 for a failure, 2 for wrong usage, 3 for a
            budget that was missed, and 130 for an interruption.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:  # needs nothing of the extra, whose imports take most of the time
        sys.stdout.write(f"{__version__}\n")
        sys.exit(0)
    try:
        import cyclopts  # noqa: F401 -- the first import of an extra
    except ModuleNotFoundError:
        sys.stderr.write(MISSING)
        sys.exit(1)
    from aoti_sched.cli.app import run

    sys.exit(run(words))
