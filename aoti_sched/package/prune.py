"""Pruning of the cache: entries that no process uses are deleted, by age and by size."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from aoti_sched.package import known
from aoti_sched.package.cache import default_cache_dir, entries, lock_entry
from aoti_sched.package.trust import Folder, private_folder
from aoti_sched.package.usage import in_use


class Pruned(msgspec.Struct, frozen=True):
    """What was pruned, and what is left."""

    entries: int
    bytes: int
    left_bytes: int


def prune(cache_dir: Path | None, *, limit: int | None, age: float | None) -> Pruned:
    """Delete entries that no process uses: those not used for long, then the least recently used.

    Blocking, and right beside any number of processes.

    Args:
        cache_dir: Instead of `default_cache_dir()`.
        limit: Bytes that may stay, those of entries in use included; None for any number.
        age: Seconds since the last use after which an entry is deleted; None for never.

    Raises:
        PackageError: The cache can't be used or trusted.
        OSError: The operating system refuses to read it.
    """
    cache = private_folder(cache_dir if cache_dir is not None else default_cache_dir())
    found = sorted((_last_use(entry), entry, _size(entry)) for entry in entries(cache))
    total = sum(size for _, _, size in found)
    freed = count = 0
    now = time.time()
    for last, entry, size in found:
        too_old = age is not None and now - last > age
        too_much = limit is not None and total - freed > limit
        if (too_old or too_much) and _delete(cache, entry):
            freed += size
            count += 1
    if count:
        known.forget_missing(cache)
    return Pruned(count, freed, total - freed)


def _delete(cache: Folder, entry: Path) -> bool:
    """Delete an entry unless a process uses or makes it, and return whether it is gone."""
    lock = lock_entry(cache, entry.name)
    if lock is None:
        return False
    away = cache.path / f".gone-{secrets.token_hex(8)}"
    try:
        if entry.name in in_use(cache):
            return False
        # A process notes its use, and then looks whether the entry is still there. So a process
        # that finds the entry was seen here, or is seen below.
        entry.rename(away)
        if entry.name in in_use(cache):
            away.rename(entry)
            return False
        shutil.rmtree(away, ignore_errors=True)
    except OSError:
        return False
    else:
        return True
    finally:
        lock.release()


def _last_use(entry: Path) -> float:
    try:
        return entry.lstat().st_mtime
    except OSError:
        return time.time()


def _size(entry: Path) -> int:
    size = 0
    for folder, _, names in os.walk(entry):
        for name in names:
            with suppress(OSError):
                size += (Path(folder) / name).lstat().st_size
    return size
