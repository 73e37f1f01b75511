"""Loading: what commands that run a model share."""

from __future__ import annotations

import logging
from pathlib import Path


def quiet() -> None:
    """Keep the library's log off stderr, unless `--debug` sends it there.

    A command reports what went wrong itself.
    """
    logging.getLogger("aoti_sched").addHandler(logging.NullHandler())


def wrapper_of(path: Path, model: str | None) -> str | None:
    """Return the generated source of a model, which states the structure of its arguments."""
    from aoti_sched.package import find_package

    return find_package(path, model).wrapper_source(model)
