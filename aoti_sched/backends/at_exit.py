"""At interpreter exit, lanes are waited for: one that came back from native code later would find torch torn down."""

from __future__ import annotations

import atexit
import weakref
from typing import Protocol


class Closable(Protocol):
    def close(self) -> None: ...


_open: weakref.WeakSet[Closable] = weakref.WeakSet()


def close_at_exit(executor: Closable) -> None:
    """Close this executor at interpreter exit, unless it is gone by then; closing twice must do nothing."""
    _open.add(executor)


@atexit.register
def _close_all() -> None:
    for executor in list(_open):
        executor.close()
