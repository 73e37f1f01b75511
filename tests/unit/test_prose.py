"""The package's text and the documentation use plain English: no phrase that the style bans."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = {".py", ".pyi", ".c", ".cpp", ".hpp"}
CODE = [path for path in sorted((ROOT / "aoti_sched").rglob("*")) if path.suffix in SUFFIXES]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
NAMES = [str(path.relative_to(ROOT)) for path in sorted([*CODE, *PAGES])]

# "Who" is for people: it follows one of these words.
PERSON = re.compile(r"\b(?:anyone|callers?|owners?|people|person|readers?|users?),? $")
BANNED = re.compile(
    r"\b(?:(?:is|are|was|were|be|been) (?:said|told)|but for|all the same|as here|be it that|shall"
    r"|so (?:many|much)\b(?![^.]*\bthat\b)|whoever|nobody|somebody|who(?! else))\b",
    re.IGNORECASE,
)


def findings(text: str) -> list[str]:
    """Return the banned phrases of a text, each with its line."""
    # A phrase may go on behind a line break and the mark of a comment.
    joined = re.sub(r"\n[ \t]*(?:#|//|\*)?[ \t]*", "\n", text)
    flat = joined.replace("\n", " ")
    return [
        f"line {joined.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for match in BANNED.finditer(flat)
        if match[0].lower() != "who" or not PERSON.search(flat[: match.start()])
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_no_banned_phrase(name):
    assert findings((ROOT / name).read_text()) == []


def test_a_phrase_is_found_across_lines_and_comments():
    text = "# The fact is\n    # told.\n# A user who asks, and a job who waits, be it so much.\n"
    assert findings(text) == ["line 1: is told", "line 3: who", "line 3: so much"]
    assert findings("# It takes so much time that nothing else runs.") == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".md")])
def test_a_line_of_prose_has_at_most_100_columns(name):
    prose = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    lines = [line for line in prose.split("\n") if not line.startswith(("|", "!["))]
    assert [line for line in lines if len(line) > 100 and " " in line.strip("- ")] == []
