"""The operators that compiled code can't call by a C function, and the notes on them for users.

Inductor writes a list of these operators beside the library. Torch's own proxy executor calls them
(`proxy_executor.py`), or torch's own runner does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

OF_TORCH = frozenset({"aten", "prim", "prims"})
"""The namespaces of torch's own operators. All other operators are custom."""

MOST_NAMED = 8
"""The most operators that a sentence names."""


def operators_of(library: Path) -> tuple[str, ...]:
    """Return the names of the operators that a model's library lists, each once.

    Returns () where there is no list beside the library.
    """
    try:
        nodes = json.loads(library.with_suffix(".json").read_bytes())["nodes"]
        return tuple(dict.fromkeys(str(node["node"]["target"]) for node in nodes))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def custom(operators: Iterable[str]) -> list[str]:
    """Return the operators that are not torch's own."""
    return [operator for operator in operators if operator.partition("::")[0] not in OF_TORCH]


def in_python(operators: Iterable[str]) -> list[str]:
    """Return the operators that `torch.library` has a Python implementation of."""
    known = [key.rpartition("/") for key in getattr(torch.library, "_impls", ())]
    named = {name.partition(".")[0] for name, _, dispatch_key in known if dispatch_key != "Meta"}
    return [one for one in operators if one.replace("::", "/", 1).partition(".")[0] in named]


def sentence(operators: Sequence[str]) -> str:
    """Return a note for users on the operators that a model calls; "" without operators."""
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
    """Return why torch can't call the operators, from torch's error, and what to do."""
    cause = str(error).partition("\nException raised from ")[0].strip().rstrip(".")
    if custom(operators):
        return (
            f"{cause}. A custom operator must be registered (imported) before its model is loaded."
        )
    return f"{cause}. Compile it again with this torch."


def names(operators: Sequence[str]) -> str:
    """Return the operators as text: up to `MOST_NAMED` names, then the number of the others."""
    more = len(operators) - MOST_NAMED
    return ", ".join(operators[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
