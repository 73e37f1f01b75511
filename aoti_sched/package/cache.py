"""The directory where packages lie unpacked: written once, found by content, never changed in place.

    <cache>/                      0700, ours alone: whoever can write here decides what we execute
        <key>.lock                held while an entry is made; a dead holder's lock is free
        <key>/                    the key is a hash of the files' bytes, and the model's name
            .new-<token>/         being written; a leftover of a crash goes when the next one makes the entry
            <token>/              complete, because it was renamed to this name only when it was

A token is never used twice. A damaged entry is replaced by one at a *new* path: a process may still have
the old library mapped, and rewriting a mapped file is SIGBUS (deleting it is not). It is always safe to
delete the whole cache while nothing is being loaded.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from aoti_sched.errors import PackageError
from aoti_sched.package.archive import MemberSource

_STAGING = ".new-"
_LOCK_TIMEOUT = 600.0
"""Seconds to wait for another process that is unpacking the same package; then it is taken for stuck."""


def default_cache_dir() -> Path:
    """`$AOTI_SCHED_CACHE`, else `$XDG_CACHE_HOME/aoti_sched`, else `~/.cache/aoti_sched`.

    Raises:
        PackageError: none of them is set and the user has no home directory.
    """
    if named := os.environ.get("AOTI_SCHED_CACHE"):
        try:
            return Path(named).expanduser()
        except RuntimeError as error:
            raise PackageError(
                f"AOTI_SCHED_CACHE={named!r}: {error}. Write the directory in full."
            ) from error
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():  # the XDG specification: a relative one is to be ignored
        return xdg / "aoti_sched"
    try:
        return Path.home() / ".cache" / "aoti_sched"
    except RuntimeError as error:
        raise PackageError(
            f"No place to unpack packages: {error}. Set AOTI_SCHED_CACHE to a directory."
        ) from error


def unpack(source: MemberSource, key: str, files: Mapping[str, str], cache_dir: Path | None) -> Path:
    """The directory in which `files` lie, unpacked now or earlier.

    Blocking, and right from any number of threads and processes at once; one of them does the work.

    Args:
        key: the entry's name; equal keys must mean equal bytes in every file.
        files: for each path inside the directory, the member of `source` that it holds.
        cache_dir: instead of `default_cache_dir()`.

    Raises:
        PackageError: the cache cannot be used or trusted, or there is no room; it names the directory.
        PackageFormatError, PackageHashError: a member is damaged or the source changed. Nothing is left behind.
    """
    cache = cache_dir if cache_dir is not None else default_cache_dir()
    sizes = {name: source.members[member] for name, member in files.items()}
    try:
        cache = _trusted(cache)
        entry = cache / key
        if (found := _find_complete(entry, sizes)) is not None:
            return found
        with _locked(cache / f"{key}.lock"):
            if (found := _find_complete(entry, sizes)) is not None:
                return found
            entry.mkdir(mode=0o700, exist_ok=True)
            _remove_remains(entry)
            _check_room(cache, source, sum(sizes.values()))
            return _write(entry, source, files)
    except PackageError:
        raise
    except OSError as error:
        raise PackageError(
            f"Cannot unpack {source.path} into {cache}: {error.strerror or error}. "
            "Name another directory in AOTI_SCHED_CACHE or cache_dir=.",
            path=str(source.path),
        ) from error


def _trusted(cache: Path) -> Path:
    """The cache directory, made if need be, once it is certain that nobody else can put code into it."""
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    cache = cache.resolve()
    if os.name != "posix":
        return cache
    status = cache.stat()
    if status.st_uid != os.geteuid():
        raise PackageError(
            f"The cache directory {cache} belongs to user {status.st_uid}, but this process is user {os.geteuid()}. "
            "What lies there is executed, so it must be your own: name another in AOTI_SCHED_CACHE or cache_dir=.",
            path=str(cache),
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PackageError(
            f"The cache directory {cache} may be written by others (mode {stat.S_IMODE(status.st_mode):04o}). "
            f"What lies there is executed: chmod 700 {cache}, or name another in AOTI_SCHED_CACHE or cache_dir=.",
            path=str(cache),
        )
    if os.statvfs(cache).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise PackageError(
            f"The cache directory {cache} lies on a file system mounted noexec; libraries cannot be loaded from it. "
            "Name another in AOTI_SCHED_CACHE or cache_dir=.",
            path=str(cache),
        )
    return cache


def _find_complete(entry: Path, sizes: Mapping[str, int]) -> Path | None:
    """A directory of this entry in which every file has its size.

    The rename made it complete; the sizes find what broke later (a truncated library kills the process that
    maps it). Hashing everything again would cost as much as unpacking.
    """
    try:
        candidates = sorted(path for path in entry.iterdir() if not path.name.startswith(_STAGING))
    except FileNotFoundError:
        return None
    for candidate in candidates:
        if all(_has_size(candidate / name, size) for name, size in sizes.items()):
            return candidate
    return None


def _has_size(path: Path, size: int) -> bool:
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # A new FileLock each time: the operating system's lock then also keeps threads of one process apart,
    # and is let go by the kernel when its holder dies. The file itself may stay; it means nothing.
    lock = FileLock(str(path), timeout=_LOCK_TIMEOUT)
    try:
        lock.acquire()
    except Timeout as error:
        raise PackageError(
            f"Waited {_LOCK_TIMEOUT:.0f} s for another process to unpack the same package. If none is at work, "
            f"delete {path}.",
            path=str(path),
        ) from error
    try:
        yield
    finally:
        lock.release()


def _remove_remains(entry: Path) -> None:
    """Remove what a crash or damage left. The lock is held: nobody else is writing here."""
    for path in entry.iterdir():
        shutil.rmtree(path)


def _check_room(cache: Path, source: MemberSource, needed: int) -> None:
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise PackageError(
            f"Unpacking {source.path} needs {needed} bytes in {cache}, where {free} are free. "
            "Make room, or name another directory in AOTI_SCHED_CACHE or cache_dir=.",
            path=str(source.path),
        )


def _write(entry: Path, source: MemberSource, files: Mapping[str, str]) -> Path:
    token = secrets.token_hex(8)
    staging = entry / f"{_STAGING}{token}"
    try:
        staging.mkdir(mode=0o700)
        for name, member in files.items():
            path = staging / name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(path, "xb", opener=_private) as file:
                file.writelines(source.chunks(member))
        return staging.rename(entry / token)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):
            entry.rmdir()
        raise


def _private(path: str, flags: int) -> int:
    # Readable only: what is mapped must not change, not even by our own mistake.
    return os.open(path, flags, 0o400)
