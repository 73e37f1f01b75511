"""The type variables of what a model takes and gives: `P` and `R` of `Runner[P, R]`.

Their defaults are any arguments and any result, so that `Runner` alone is a complete type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import ParamSpec, TypeVar

    P = ParamSpec("P", default=...)
    R = TypeVar("R", default=Any)
else:  # the same without the defaults, which only a type checker reads
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")

__all__ = ["P", "R"]
