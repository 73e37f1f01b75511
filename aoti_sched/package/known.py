"""Known packages: what an earlier load found out, so that nothing is hashed or parsed again.

    <cache>/known/<name>.json    a description of the package at one path

A description holds for one state of the file: its size, times and inode, and the hash of its end,
where a zip has the checksum of each member. No program can set the time of change (ctime), so a
file in that state was not written to since. A file that was written less than two seconds before it
was hashed is not described, because a later write might bear the same times.

A description lies in the cache, which no other user can change, and is believed as far as the cache
is. The extracted files are checked as at every load. Where another user can put another folder in
the cache's place, or the caller names the package's hash, no description is used.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

import msgspec

from aoti_sched.package.archive import FileDigest, open_regular_file
from aoti_sched.package.cache import default_cache_dir, find_unpacked
from aoti_sched.package.description import Extracted, ModelFiles, PackagedModel
from aoti_sched.package.trust import Folder, check_planted, make_private, private_folder

FOLDER = "known"
_VERSION = 1
"""Raise this number when a package is read in another way than before."""
_END = 1 << 16
"""Bytes at the end of a file that are hashed at each load."""
_SETTLED = 2.0
"""Seconds since a file's last change until its times tell it from a later change.

A file system's clock ticks every 4 ms on Linux, and every 2 s on FAT.
"""


class FileState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One state of a package's file. A file found in the same state was not written to since."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    end: str
    """A hash of the last 64 KiB."""


class KnownModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model of a package, and its files."""

    model: PackagedModel
    files: ModelFiles


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of a package, in one state of its file."""

    version: int
    path: str
    """The package's absolute path."""
    state: FileState
    sha256: str
    default: str | None
    """The model that is meant where none is named."""
    models: dict[str, KnownModel]
    """The models that were extracted, by name."""


class KnownPackage:
    """A package that was read earlier and has not changed, with the model that is wanted of it.

    It answers as a `Package` does.

    Args:
        path: The package, as the caller named it.
        sha256: Of the file.
        known: The model.
        directory: Where the model's files lie, found right.

    Raises:
        OSError: A file of the entry can't be read any more.
    """

    def __init__(self, path: Path, sha256: str, known: KnownModel, directory: Path) -> None:
        self.path = path
        self.sha256 = sha256
        self._model = msgspec.structs.replace(known.model, path=str(path))
        self._extracted = known.files.within(directory)
        wrapper = known.files.wrapper
        self._wrapper = (
            None if wrapper is None else (directory / wrapper).read_text("utf-8", "replace")
        )

    def model(self, name: str | None = None) -> PackagedModel:
        del name  # it was looked up with this name
        return self._model

    def extract(
        self, model: PackagedModel | str | None = None, cache_dir: Path | None = None
    ) -> Extracted:
        del model, cache_dir
        return self._extracted

    def wrapper_source(self, model: PackagedModel | str | None = None) -> str | None:
        del model
        return self._wrapper


def recall(path: Path, name: str | None, cache_dir: Path | None) -> KnownPackage | None:
    """Return what is known of a package; None where it must be read.

    Args:
        path: The package.
        name: The model that is wanted; None for the default.
        cache_dir: Instead of `default_cache_dir()`.

    Raises:
        PackageError: The cache can't be trusted.
    """
    try:
        folder = private_folder(cache_dir if cache_dir is not None else default_cache_dir())
        if folder.moved:
            return None
        found = _read(folder, path)
        if found is None or found.state != _state_of(path):
            return None
        known = found.models.get(found.default or "" if name is None else name)
        if known is None:
            return None
        directory = find_unpacked(folder, known.files.key, known.files.sizes)
        return None if directory is None else KnownPackage(path, found.sha256, known, directory)
    except (OSError, ValueError):  # a ValueError for a NUL in a path
        return None


def settled_state(digest: FileDigest) -> FileState | None:
    """Return the state of a hashed file; None where another state may look the same."""
    status = digest.status
    if status is None or digest.began - status.st_ctime < _SETTLED:
        return None
    try:
        state = _state_of(digest.path)
    except OSError:
        return None
    now = (state.size, state.mtime_ns, state.ctime_ns, state.inode)
    then = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return state if now == then and state.size == digest.size else None


def remember(
    path: Path,
    state: FileState,
    sha256: str,
    default: str | None,
    known: KnownModel,
    cache_dir: Path | None,
) -> None:
    """Keep what is known of one model of a package, where the cache can be written to.

    Args:
        path: The package.
        state: The state of its file.
        sha256: Of the file.
        default: The model that is meant where none is named.
        known: The model.
        cache_dir: Instead of `default_cache_dir()`.
    """
    with suppress(OSError, ValueError):  # a name that is no UTF-8 can't be written
        folder = private_folder(cache_dir if cache_dir is not None else default_cache_dir())
        models = {known.model.name: known}
        with suppress(OSError):
            other = _read(folder, path)
            if other is not None and (other.state, other.sha256) == (state, sha256):
                models = {**other.models, **models}
        found = Description(_VERSION, _absolute(path), state, sha256, default, models)
        _write(_file(folder, path), msgspec.json.encode(found))


def forget_missing(cache: Folder) -> None:
    """Delete the descriptions of packages whose extracted files are gone."""
    for file in list((cache.path / FOLDER).glob("*")):  # there may be no folder
        with suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            found = msgspec.json.decode(file.read_bytes(), type=Description)
            if any((cache.path / one.files.key).exists() for one in found.models.values()):
                continue
            file.unlink()


def _write(file: Path, content: bytes) -> None:
    make_private(file.parent)
    new = file.with_suffix(f".new-{secrets.token_hex(8)}")
    try:
        with open(new, "xb", opener=_private) as stream:
            stream.write(content)
        new.replace(file)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise


def _read(folder: Folder, path: Path) -> Description | None:
    file = _file(folder, path)
    for part in (file.parent, file):
        status = part.lstat()
        check_planted(folder, part, status)
    if not stat.S_ISREG(status.st_mode):
        return None
    with open(file, "rb", opener=_no_link) as stream:
        content = stream.read()
    try:
        found = msgspec.json.decode(content, type=Description)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return found if (found.version, found.path) == (_VERSION, _absolute(path)) else None


def _file(folder: Folder, path: Path) -> Path:
    digest = hashlib.sha256(_absolute(path).encode("utf-8", "surrogateescape")).hexdigest()
    return folder.path / FOLDER / f"{digest}.json"


def _absolute(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 -- no link is resolved


def _state_of(path: Path) -> FileState:
    with open_regular_file(path) as file:
        status = os.fstat(file.fileno())
        file.seek(max(0, status.st_size - _END))
        end = hashlib.blake2b(file.read(_END) or b"", digest_size=16).hexdigest()
    return FileState(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, end)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o400)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))
