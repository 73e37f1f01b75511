"""Output: data on stdout, as text for people or as JSON for programs; all else on stderr.

rich turns colour off for `NO_COLOR`, for `TERM=dumb`, and where the output is no terminal.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from aoti_sched.errors import readable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_ENDLESS = 10_000
"""Columns of an output that is no terminal: no line is broken or cut there."""
_NUMBER = re.compile(r"(-?[0-9][^ ]*( [A-Za-zµ/%]+)?)?")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The base of what a reading command prints with `--json`.

    Attributes:
        version: The version of the report's format. A new field does not change the version.
    """

    version: int = 1


def print_json(report: Report) -> None:
    """Print a report on stdout as JSON. Numbers that JSON has no form for are null."""
    text = msgspec.json.format(msgspec.json.encode(report), indent=2)
    sys.stdout.write(text.decode() + "\n")


def out() -> Console:
    """Return the console for data."""
    return _console(stderr=False)


def err() -> Console:
    """Return the console for progress and messages."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _ENDLESS
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def print_title(console: Console, text: str) -> None:
    """Print a heading."""
    console.print(readable(text), style="bold")


def print_pairs(console: Console, pairs: Iterable[tuple[str, object]]) -> None:
    """Print names and values in two columns; a pair without a value is left out."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        if value not in (None, ""):
            table.add_row(f"  {readable(name)}", readable(str(value)))
    if table.row_count:
        _print(console, table)


def print_table(
    console: Console, headings: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    """Print a table. Columns whose values are numbers with units are aligned to the right."""
    from rich.table import Table

    texts = [tuple(readable(str(value)) for value in row) for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, heading in enumerate(headings):
        numbers = all(_NUMBER.fullmatch(row[index]) for row in texts)
        table.add_column(heading, justify="right" if numbers else "left", overflow="fold")
    for text in texts:
        table.add_row(*text)
    _print(console, table)


def _print(console: Console, table: Table) -> None:
    """Print a table. Where no terminal reads it, lines have no spaces at their ends."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    console.file.write("\n".join(lines) + "\n")


def log_to_stderr() -> None:
    """Send all events of the library to stderr; without this, only warnings go there."""
    import logging

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("aoti_sched")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
