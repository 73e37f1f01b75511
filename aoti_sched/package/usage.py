"""Usage of the cache: which entries running processes use.

    <cache>/users/<token>    the entries that one process uses, one a line; its lock is held by the
                             process, so the system releases the lock when the process ends

A process reads an entry's files after its load, too: where evicted weights are restored, and where
a container is rebuilt. So `prune` leaves the entries that are in use. The time of an entry's folder
is the time of its last use.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from aoti_sched.package.trust import Folder, check_planted, make_private

FOLDER = "users"


_open: dict[Path, tuple[int, set[str]]] = {}
"""The file of this process in each cache, and the entries in it. Only the end of the process closes
the files, because what was loaded stays mapped until then.
"""


def use(cache: Folder, key: str) -> None:
    """Note that this process uses an entry from now on, where the cache can be written to."""
    with suppress(OSError):
        os.utime(cache.path / key)
    with suppress(OSError, ImportError):  # Windows has no such locks, and deletes no mapped file
        if cache.path not in _open:
            _open[cache.path] = (_new_file(cache), set())
        descriptor, keys = _open[cache.path]
        if key not in keys:
            os.write(descriptor, f"{key}\n".encode())
            keys.add(key)


def in_use(cache: Folder) -> set[str]:
    """Return the entries that processes use. Files of processes that have ended are deleted."""
    used = set(_open[cache.path][1]) if cache.path in _open else set()
    try:
        import fcntl
    except ImportError:  # Windows deletes no mapped file
        return used
    for path in _files(cache):
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                with open(descriptor, "rb", closefd=False) as file:
                    used.update(file.read().decode("ascii", "replace").splitlines())
            finally:
                os.close(descriptor)
    return used


def _files(cache: Folder) -> Iterator[Path]:
    folder = cache.path / FOLDER
    with suppress(FileNotFoundError):
        check_planted(cache, folder, folder.lstat())
        for path in list(folder.iterdir()):
            with suppress(FileNotFoundError):
                check_planted(cache, path, path.lstat())
                yield path


def _new_file(cache: Folder) -> int:
    """Return the descriptor of this process's own file, locked."""
    import fcntl

    folder = cache.path / FOLDER
    make_private(folder)
    while True:
        path = folder / secrets.token_hex(8)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # before it was locked, it was taken for a dead process's
    return descriptor
