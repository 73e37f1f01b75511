"""Commands as users run them: in a process of their own."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("cyclopts", reason="the command line needs the extra cli")
pytest.importorskip("rich", reason="the command line needs the extra cli")


def run(*arguments, env=None, cwd=None, timeout=500):
    """Run a command with plain output; its environment has no settings but `env`."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("AOTI_SCHED_")}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        kept.pop(name, None)
    return subprocess.run(
        [sys.executable, "-m", "aoti_sched", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**kept, **(env or {})},
        cwd=cwd,
        timeout=timeout,
        check=False,
    )


def json_of(*arguments, **settings):
    """The report of a command that succeeds, with nothing on stderr."""
    done = run(*arguments, "--json", **settings)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def refused(*arguments, code=2, **settings):
    """The one line that a command says on stderr when it is refused; stdout stays empty."""
    done = run(*arguments, **settings)
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
