"""Compiling: what mypyc asks of a class beyond its text.

Read for its types, but not compiled, so that nothing of mypy is needed where the library runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mypy_extensions import mypyc_attr
else:

    def mypyc_attr(**_: object) -> Callable[[type], type]:
        """Return a decorator that leaves a class as it is: the class is Python."""
        return lambda kind: kind


__all__ = ["mypyc_attr"]
