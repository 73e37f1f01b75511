"""What a probe found: numbers and sentences under names, printed as one line of JSON at its end."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MARK = "DEVICE-FINDINGS "


class Findings:
    """Collects what a probe found.

    A block that raises is a finding, too, and the next one goes on.
    """

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.failed: list[str] = []

    def __setitem__(self, name: str, value: Any) -> None:
        self.found[name] = value
        print(f"{name}: {value}", flush=True)

    def check(self, name: str, holds: bool, value: Any = None) -> None:
        """State whether something holds; if not, the step fails at its end."""
        self[name] = holds if value is None else {"holds": holds, "value": value}
        if not holds:
            self.failed.append(name)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # noqa: BLE001 -- it is the finding
            traceback.print_exc()
            self.failed.append(name)
            self[name] = f"{type(error).__name__}: {error}"[:600]

    def end(self) -> None:
        """Print everything; exit with 1 when a check failed."""
        print(MARK + json.dumps({"found": self.found, "failed": self.failed}), flush=True)
        if self.failed:
            sys.exit(1)


def table(results: dict[str, Any]) -> str:
    """Return the findings of all steps as a table in Markdown, with the versions above it."""
    versions = results.get("versions", {})
    lines = [
        ", ".join(f"{name} {value}" for name, value in versions.items() if value is not None),
        "",
        "| step | ended | found | not as it should be |",
        "|---|---|---|---|",
    ]
    for step, result in results.items():
        if step == "versions":
            continue
        found = result.get("found", {})
        ended = "well" if result.get("exit") == 0 else f"with {result.get('exit')}"
        failed = ", ".join(result.get("failed", ())) or "-"
        cells = (step, f"{ended}, {result.get('seconds')} s", _numbers(found) or "-", failed)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _numbers(found: dict[str, Any]) -> str:
    """Return the findings that are numbers or yes and no, in a line."""
    plain = {name: value for name, value in found.items() if isinstance(value, (int, float))}
    return "; ".join(f"{name}: {value}" for name, value in plain.items())
