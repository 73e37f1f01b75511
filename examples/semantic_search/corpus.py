"""What is searched and what is asked: the lines of `sentences.txt` and `queries.txt`."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent


def sentences() -> list[str]:
    """The sentences that are searched."""
    return _lines("sentences.txt")


def queries() -> dict[str, str]:
    """Each query, and the sentence a reader would say answers it."""
    return dict(line.split(" | ") for line in _lines("queries.txt"))


def _lines(name: str) -> list[str]:
    """The lines of a file beside this one, without blank lines and comments."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]
