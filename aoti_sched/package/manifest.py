"""The manifest of a cache entry: each file's digest, and the identity by which it is known.

A file's identity is its size, times and inode. No program can set the time of change (ctime), so a
file whose identity is the recorded one was not written to since, and need not be read. The device's
number is no part of it: on network and overlay file systems it changes with every mount.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import msgspec

NAME = "manifest.json"
_VERSION = 1
_BLOCK = 1 << 20
_CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What fsync says on file systems that have no such thing; nothing was lost."""


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file: its content, and its identity when the content was last known to be right."""

    sha256: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    def describes(self, status: os.stat_result) -> bool:
        """Return whether the file of this status is the recorded one, unchanged."""
        return stat.S_ISREG(status.st_mode) and (
            self.size,
            self.mtime_ns,
            self.ctime_ns,
            self.inode,
        ) == (
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
        )


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The files of one entry."""

    version: int
    key: str
    """The entry's name in the cache, so that an entry under another name is not taken for that one.
    """
    files: dict[str, FileRecord]
    """By `recorded_name` of the path in the entry."""


def recorded_name(path: str) -> str:
    """Return a path as the manifest spells it: ASCII, whatever bytes a file's name has."""
    return quote(path.encode("utf-8", "surrogateescape"))


def record(sha256: str, status: os.stat_result) -> FileRecord:
    """Return the record of a file with this digest, as its status describes it."""
    return FileRecord(sha256, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def new_manifest(key: str, files: dict[str, FileRecord]) -> Manifest:
    """Return the manifest of an entry, in today's version."""
    return Manifest(_VERSION, key, files)


def read_manifest(path: Path, key: str) -> Manifest | None:
    """Return the manifest at `path`; None for another version or key, or a damaged one."""
    with open(path, "rb", opener=_no_link) as file:
        content = file.read()
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return manifest if (manifest.version, manifest.key) == (_VERSION, key) else None


def digest(path: Path) -> FileRecord:
    """Return the record of the file at `path` as it is now; read once, in whole."""
    sha256 = hashlib.sha256()
    with open(path, "rb", buffering=0, opener=_no_link) as file:
        status = os.fstat(file.fileno())
        while block := file.read(_BLOCK):
            sha256.update(block)
    return record(sha256.hexdigest(), status)


def holds(path: Path, chunks: Iterable[bytes]) -> bool:
    """Return whether the file at `path` has exactly these bytes."""
    with open(path, "rb", opener=_no_link) as file:
        return all(file.read(len(chunk)) == chunk for chunk in chunks) and not file.read(1)


def sync(path: Path) -> os.stat_result:
    """Return the status of a file or folder once it is on disk, as far as its file system tells.

    Raises:
        OSError: it did not reach the disk; the disk may be full.
    """
    if os.name != "posix":  # Windows writes through no read-only handle, and has none for folders
        return path.stat()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _CANNOT_SYNC:
                raise
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))
