"""What docs/architecture.md says of files and states is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aoti_sched.queue.job import TRANSITIONS, JobState

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()


def diagram():
    """The state diagram of a job in Mermaid's language, drawn from the table that the rules use."""
    lines = ["stateDiagram-v2", f"    [*] --> {JobState.NEW.name}"]
    for state, row in TRANSITIONS.items():
        facts = {}
        for fact, target in row.items():
            if target is not state:
                facts.setdefault(target, []).append(fact.name.lower())
        lines += [
            f"    {state.name} --> {end.name}: {', '.join(names)}" for end, names in facts.items()
        ]
        if not facts:
            lines.append(f"    {state.name} --> [*]")
    return "\n".join(lines)


def tour(title):
    """The files that a tour of the page names, in order."""
    text = PAGE[PAGE.index(f"### {title}") :]
    text = text[: text.index("\n#", 1)]
    return re.findall(r"^\d+\. `([\w/]+\.\w+)`", text, re.MULTILINE)


def test_the_state_diagram_is_that_of_the_table():
    (shown,) = re.findall(r"```mermaid\n(.*?)\n```", PAGE, re.DOTALL)
    assert shown == diagram()


@pytest.mark.parametrize("title", ["The tour of a request", "The tour of a weight update"])
def test_a_tour_names_files_that_exist(title):
    files = tour(title)
    assert 5 < len(files) <= 20
    assert [file for file in files if not (ROOT / "aoti_sched" / file).is_file()] == []


def test_every_file_in_the_table_of_rooms_exists():
    table = PAGE[PAGE.index("| where |") : PAGE.index("`import aoti_sched`")]
    names = re.findall(r"`([\w/]+(?:\.\w+|/))`", table)
    assert len(names) > 30
    assert [name for name in names if not (ROOT / "aoti_sched" / name).exists()] == []
