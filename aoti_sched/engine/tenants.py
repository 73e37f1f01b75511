"""Tenants: the scheduler's own objects in the place of the keys by which users name their tenants.

A user's key is hashed and compared when `options()` is called, and never again. Later code knows
the tenant alone, whose hash and equality are its identity. A key is kept as long as its tenant,
which views, requests and accounts keep.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Hashable

LONGEST = 80
"""Characters of a key's text in errors."""
SLICE = 64
"""Tenants that a call forgets: at most 1 ms. All of 100,000 at once took 1.2 s of the loop."""


_NUMBERS = itertools.count()


class Tenant:
    """Stands for one user's key. Its text is made once.

    Attributes:
        number: A number that no other tenant of the process has, by which facts are recorded.
    """

    __slots__ = ("__weakref__", "_text", "number")

    def __init__(self, text: str) -> None:
        self._text = text
        self.number = next(_NUMBERS)

    def __repr__(self) -> str:
        return self._text


class Tenants:
    """The tenants of one runner. May be used by several threads.

    Tenants that are gone are noted, and each of the next calls forgets some of them. So a key's
    destructor runs there, and not in the middle of other work.
    """

    __slots__ = ("_by_hash", "_gone", "_lock")

    def __init__(self) -> None:
        self._by_hash: dict[int, list[tuple[weakref.ref[Tenant], Hashable]]] = {}
        self._gone: deque[int] = deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._by_hash.values())

    def of(self, key: Hashable) -> Tenant:
        """Return the tenant of a key: the same tenant for equal keys.

        An error of the key's hash or comparison is raised.
        """
        number = hash(key)
        found = self._find(number, key)
        if found is None:
            mine = Tenant(_text(key))
            note = functools.partial(_note, self._gone, number)
            with self._lock:
                forgotten = self._forget()
                self._by_hash.setdefault(number, []).append((weakref.ref(mine, note), key))
            del forgotten
            found = self._find(number, key) or mine  # another thread may have been quicker
        return found

    def _find(self, number: int, key: Hashable) -> Tenant | None:
        with self._lock:
            entries = list(self._by_hash.get(number, ()))
        for reference, known in entries:
            tenant = reference()
            if tenant is not None and (known is key or known == key):
                return tenant
        return None

    def _forget(self) -> list[Hashable]:
        """Return the keys of some tenants that are gone; they are dropped without the lock."""
        keys: list[Hashable] = []
        gone = self._gone
        for _ in range(min(len(gone), SLICE)):
            number = gone.popleft()
            entries = self._by_hash.pop(number, [])
            keys += [key for reference, key in entries if reference() is None]
            alive = [entry for entry in entries if entry[0]() is not None]
            if alive:
                self._by_hash[number] = alive
        return keys


def _note(gone: deque[int], number: int, _: object) -> None:
    gone.append(number)


def _text(key: object) -> str:
    try:
        text = repr(key)
    except Exception:  # noqa: BLE001 -- a foreign `__repr__`
        text = f"<{type(key).__name__}>"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
