"""What the pages say of the command line is so."""

import re
import shlex
from importlib.metadata import version
from pathlib import Path

import pytest

import tests.unit.cli.support  # noqa: F401 -- skips where the extra is missing
from aoti_sched.cli import app, docs

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/cli.md").read_text()
PINNED = re.search(r"^cyclopts==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
COMMANDS = [
    line
    for name in ("README.md", "docs/cli.md")
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("aoti-sched ")
]


@pytest.mark.skipif(version("cyclopts") != PINNED, reason="another cyclopts words help otherwise")
def test_the_page_is_what_the_commands_say_now():
    assert docs.page() == PAGE, "run: python -m aoti_sched.cli.docs > docs/cli.md"


def test_the_page_names_every_command_and_exit_code():
    for name, what in app.COMMANDS.items():
        names = [name] if isinstance(what, str) else [f"{name} {inner}" for inner in what]
        assert [one for one in names if f"# aoti-sched {one}\n" not in PAGE] == []
    assert re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE) == ["0", "1", "2", "3", "130"]


def test_the_pages_show_commands():
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_that_a_page_shows_is_understood(line):
    _, *arguments = shlex.split(line, comments=True)
    command, bound, _ = app.make_app().parse_args(arguments, exit_on_error=False)
    assert command.__module__.startswith("aoti_sched.cli.")
    assert bound.arguments is not None
