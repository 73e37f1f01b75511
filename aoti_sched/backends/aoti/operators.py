"""The operators that compiled code can't call by a C function, and the notes on them for users.

Inductor lists them beside the library. Torch's own proxy executor calls them (`proxy_executor.py`),
or torch's own runner does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

OF_TORCH = frozenset({"aten", "prim", "prims"})
"""The namespaces of torch's own operators; the others are custom."""

MOST_NAMED = 8
"""So many operators are named in one sentence."""


def operators_of(library: Path) -> tuple[str, ...]:
    """Return the names of these operators, each once; () where there is no list.

    The list lies beside the model's library.
    """
    try:
        nodes = json.loads(library.with_suffix(".json").read_bytes())["nodes"]
        return tuple(dict.fromkeys(str(node["node"]["target"]) for node in nodes))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def custom(operators: Iterable[str]) -> list[str]:
    """Those that are not torch's own."""
    return [operator for operator in operators if operator.partition("::")[0] not in OF_TORCH]


def in_python(operators: Iterable[str]) -> list[str]:
    """Those whose work a function of Python does, as `torch.library` knows it."""
    known = [key.rpartition("/") for key in getattr(torch.library, "_impls", ())]
    named = {name.partition(".")[0] for name, _, dispatch_key in known if dispatch_key != "Meta"}
    return [one for one in operators if one.replace("::", "/", 1).partition(".")[0] in named]


def sentence(operators: Sequence[str]) -> str:
    """Return what a model calls, as a note for its user; "" for nothing."""
    strange = custom(operators)
    parts = []
    if len(strange) < len(operators):
        own = [one for one in operators if one not in strange]
        parts.append(
            f"Calls {names(own)} through torch's dispatcher, since there is no C function for that."
        )
    if strange:
        parts.append(f"Calls custom operators through torch's dispatcher: {names(strange)}.")
    return " ".join(parts)


def why_not_callable(error: RuntimeError, operators: Iterable[str]) -> str:
    """Return why torch can't call them, from its error, and what to do."""
    cause = str(error).partition("\nException raised from ")[0].strip().rstrip(".")
    if custom(operators):
        return (
            f"{cause}. A custom operator must be registered (imported) before its model is loaded."
        )
    return f"{cause}. Compile it again with this torch."


def names(operators: Sequence[str]) -> str:
    """Return the names, as many as a sentence takes."""
    more = len(operators) - MOST_NAMED
    return ", ".join(operators[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
