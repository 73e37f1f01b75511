"""Commands as users run them: in a process of their own, or in a copy of one."""

import functools
import json
import os
import subprocess
import sys

import pytest

from tests.forks import Forks

pytest.importorskip("cyclopts", reason="the command line needs the extra cli")
pytest.importorskip("rich", reason="the command line needs the extra cli")


def _environment(env):
    """Return an environment for plain output, without settings other than `env`."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("AOTI_SCHED_")}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        kept.pop(name, None)
    return {**kept, **(env or {})}


def run(*arguments, env=None, cwd=None, timeout=500):
    """Run a command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "aoti_sched", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=_environment(env),
        cwd=cwd,
        timeout=timeout,
        check=False,
    )


def _run_in_copy(*arguments, env=None, cwd=None, timeout=500):
    """Run a command in a copy of an interpreter that has imported the commands."""
    return _forks().run(
        "-m",
        "aoti_sched",
        [*map(str, arguments)],
        environment=_environment(env),
        folder=cwd,
        timeout=timeout,
    )


IMPORTED = [f"aoti_sched.cli.{name}" for name in ("app", "doctor", "simulate", "stats")]
"""Modules that the copied interpreter has imported."""


@functools.cache
def _forks():
    return Forks(*IMPORTED)


def json_of(*arguments, **settings):
    """The report of a command that succeeds, with nothing on stderr."""
    done = _run_in_copy(*arguments, "--json", **settings)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def refused(*arguments, code=2, **settings):
    """The one line that a command says on stderr when it is refused; stdout stays empty."""
    done = _run_in_copy(*arguments, **settings)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("aoti-sched: ")
    return line.removeprefix("aoti-sched: ")


def refused_here(capsys, *arguments, code=2):
    """As `refused`, in this process: for commands whose imports take seconds."""
    from aoti_sched.cli import app

    assert app.run([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("aoti-sched: ")
    return line.removeprefix("aoti-sched: ")
