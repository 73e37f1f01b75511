"""Failures: the exit codes, and the one sentence that each error becomes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from cyclopts import CycloptsError

from aoti_sched.errors import AotiSchedError, ConfigError, first_line, readable

OK = 0
FAILED = 1
USAGE = 2
BUDGET_MISSED = 3
INTERRUPTED = 130


class UsageError(AotiSchedError):
    """An option or an argument of a command is wrong."""


def exit_code(command: Callable[[], int], *, debug: Callable[[], bool]) -> int:
    """Run a command, report its error on stderr, and return the exit code.

    Args:
        command: Does the work and returns its own exit code.
        debug: Whether to print tracebacks; asked after the error.
    """
    try:
        code = command()
        sys.stdout.flush()
    except SystemExit as end:  # of cyclopts, after a help text
        return end.code if isinstance(end.code, int) else OK
    except KeyboardInterrupt:
        _say("interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has gone. The interpreter's own flush at exit must not fail again.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:  # noqa: BLE001 -- the end of the program: every error is reported
        if debug():
            traceback.print_exception(error)
        _say(sentence(error))
        usage = isinstance(error, (CycloptsError, UsageError, ConfigError))
        return USAGE if usage else FAILED
    return code


def sentence(error: Exception) -> str:
    """Return what to tell a user about an error."""
    if isinstance(error, CycloptsError):
        return readable(" ".join(str(error).split()))
    if isinstance(error, AotiSchedError):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return readable(f"{os.fsdecode(error.filename)}: {error.strerror}.")
    return readable(
        f"{first_line(error)}. This is unexpected. Run the command again with --debug, and report "
        "what it prints."
    )


def _say(text: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"aoti-sched: {text}\n")
