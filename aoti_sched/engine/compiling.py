"""Compilation: the class decorator that mypyc reads, for classes that it compiles.

mypy reads the types of this file, and mypyc does not compile it. The library needs no part of mypy
at run time.
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
