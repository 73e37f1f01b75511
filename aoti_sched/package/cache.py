"""The directory of unpacked packages: written once, found by content, never changed.

    <cache>/                      ours (or root's), writable by no other user: what lies here is
    executed
        <key>.lock                held while an entry is made; a dead holder's lock is free
        <key>/                    the key is a hash of the files' bytes, and the model's name
            .new-<token>/         being written; a leftover of a crash goes when the next one makes
            the entry <token>/              complete and on the disk, because it was renamed to this
            name only then
                manifest.json     each file's digest and identity
                files/            the model's files; what else lies here is ignored

A hit costs a look at every file's status. A file whose identity is not the recorded one (a copied
or restored cache, a changed file) is read and compared with its digest. Where the caller names the
package's hash, every file is compared with the package itself, so nothing in the cache is believed.

A token is never used twice. A damaged entry is replaced by one at a *new* path: a process may still
have the old library mapped, and rewriting a mapped file is SIGBUS (deleting it is not). It is
always safe to delete the whole cache while nothing is being loaded.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from aoti_sched.errors import PackageError
from aoti_sched.package import manifest
from aoti_sched.package.archive import MemberSource
from aoti_sched.package.manifest import FileRecord, Manifest, recorded_name
from aoti_sched.package.trust import Folder, check_planted, inventory, make_private, private_folder
from aoti_sched.package.usage import use

if TYPE_CHECKING:
    from filelock import FileLock

_STAGING = ".new-"
_ENTRY = re.compile(r"[0-9a-f]{64}-[\w.-]+")
_FILES = "files"
_LOCK_TIMEOUT = 600.0
"""Seconds to wait for another process that is unpacking the same package; then it is taken for
stuck.
"""
_GONE_OR_BROKEN = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EIO, errno.ESTALE}
"""What reading an entry ends with when it is damaged, or replaced by another process meanwhile."""


def default_cache_dir() -> Path:
    """Return `$AOTI_SCHED_CACHE`, else `$XDG_CACHE_HOME/aoti_sched`, else `~/.cache/aoti_sched`.

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


def unpack(
    source: MemberSource,
    key: str,
    files: Mapping[str, str],
    cache_dir: Path | None,
    *,
    compare: bool = False,
) -> Path:
    """Return the directory in which `files` lie, unpacked now or earlier.

    Blocking, and right from any number of threads and processes at once; one of them does the work.

    Args:
        source: where the files' bytes come from.
        key: the entry's name; equal keys must mean equal bytes in every file.
        files: for each path inside the directory, the member of `source` that it holds.
        cache_dir: instead of `default_cache_dir()`.
        compare: compare every file that was unpacked earlier with `source`, byte by byte.

    Raises:
        PackageError: the cache cannot be used or trusted, or there is no room; it names the
            directory.
        PackageFormatError, PackageHashError: a member is damaged or the source changed. Nothing is
            left behind.
    """
    cache = cache_dir if cache_dir is not None else default_cache_dir()
    if "\0" in str(cache):
        raise PackageError(
            f"The cache directory {str(cache)!r} has a NUL in its name. Name another."
        )
    try:
        folder = private_folder(cache)
        cache = folder.name
        _check_executable(folder)
        # Where others can put another folder of ours in the cache's place, what is found is not
        # believed.
        sizes = {name: source.members[member] for name, member in files.items()}
        wanted = _Wanted(folder, key, sizes, source, files, compare or folder.moved)
        if (found := _find_and_use(wanted)) is not None:
            return found
        with _locked(folder, key):
            if (found := _find_complete(wanted, locked=True)) is not None:
                use(folder, key)
                return found
            make_private(wanted.entry)
            _remove_remains(wanted.entry)
            _check_room(wanted.cache, source, sum(sizes.values()))
            directory = _write(wanted, source)
            use(folder, key)
            return directory
    except PackageError:
        raise
    except OSError as error:
        at = f" ({error.filename})" if error.filename else ""
        raise PackageError(
            f"Cannot unpack {source.path} into {cache}: {error.strerror or error}{at}. "
            "Name another directory in AOTI_SCHED_CACHE or cache_dir=.",
            path=str(source.path),
        ) from error


def find_unpacked(cache: Folder, key: str, sizes: Mapping[str, int]) -> Path | None:
    """Return the directory in which files were unpacked earlier, without a look at their package.

    Args:
        cache: The cache, which no other user can replace.
        key: The entry's name.
        sizes: The size of each file by its path inside the directory.

    Returns:
        The directory; None where a file is missing or not the one that was written.

    Raises:
        PackageError: Another user owns the entry or can write to it.
        OSError: The operating system refuses to read it.
    """
    _check_executable(cache)
    return _find_and_use(_Wanted(cache, key, sizes))


def entries(cache: Folder) -> list[Path]:
    """Return the folders of all entries, whole or not.

    Raises:
        OSError: The operating system refuses to read the cache.
    """
    return [path for path in cache.path.iterdir() if _ENTRY.fullmatch(path.name) and path.is_dir()]


def lock_entry(cache: Folder, key: str) -> FileLock | None:
    """Return the held lock of an entry; None while another process or thread makes the entry."""
    from filelock import Timeout

    lock = _lock(cache, key, timeout=0.0)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


class _Wanted(msgspec.Struct, frozen=True):
    """What `unpack` looks for or makes."""

    cache: Folder
    key: str
    sizes: Mapping[str, int]
    source: MemberSource | None = None
    files: Mapping[str, str] = {}
    compare: bool = False

    @property
    def entry(self) -> Path:
        return self.cache.path / self.key


def _check_executable(cache: Folder) -> None:
    if os.name == "posix" and os.statvfs(cache.path).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise PackageError(
            f"The cache directory {cache.name} lies on a file system mounted noexec; libraries "
            "cannot be loaded from it. Name another in AOTI_SCHED_CACHE or cache_dir=.",
            path=str(cache.name),
        )


# --- looking --------------------------------------------------------------------------------------


def _find_and_use(wanted: _Wanted) -> Path | None:
    """Return a complete directory that no other process prunes from now on."""
    found = _find_complete(wanted, locked=False)
    if found is None:
        return None
    use(wanted.cache, wanted.key)
    return found if found.exists() else None  # what was pruned before that is gone


def _find_complete(wanted: _Wanted, *, locked: bool) -> Path | None:
    """Return a directory in which every file is the one that was unpacked there.

    The rename made it complete; what broke later is found here. A truncated library kills the
    process that maps it, zeros in it do at its first call, and zeros in weights give wrong numbers.
    """
    try:
        check_planted(wanted.cache, wanted.entry, wanted.entry.lstat())
        candidates = sorted(
            path for path in wanted.entry.iterdir() if not path.name.startswith(_STAGING)
        )
    except FileNotFoundError:
        return None
    right = (candidate for candidate in candidates if _is_right(candidate, wanted, locked=locked))
    return next((candidate / _FILES for candidate in right), None)


def _is_right(candidate: Path, wanted: _Wanted, *, locked: bool) -> bool:
    if candidate.is_symlink() or not candidate.is_dir():
        return False  # a stray file, such as NFS leaves
    try:
        return _has_content(candidate, wanted, locked=locked)
    except OSError as error:
        if error.errno in _GONE_OR_BROKEN:
            return False
        raise


def _has_content(candidate: Path, wanted: _Wanted, *, locked: bool) -> bool:
    found = inventory(wanted.cache, candidate)
    if manifest.NAME not in found or not stat.S_ISREG(found[manifest.NAME].st_mode):
        return False
    written = manifest.read_manifest(candidate / manifest.NAME, wanted.key)
    if written is None or written.files.keys() != {recorded_name(name) for name in wanted.sizes}:
        return False
    changed = []
    for name, size in wanted.sizes.items():
        status = found.get(f"{_FILES}/{name}")
        if status is None or not stat.S_ISREG(status.st_mode) or status.st_size != size:
            return False
        if not written.files[recorded_name(name)].describes(status):
            changed.append(name)
    if wanted.compare and wanted.source is not None:
        # A file that the package lacks could still be loaded by its name. NFS's leftovers
        # begin with a dot.
        visible = {path for path in found if not path.rpartition("/")[2].startswith(".")}
        if visible - {f"{_FILES}/{name}" for name in wanted.sizes} != {manifest.NAME}:
            return False
        return all(
            manifest.holds(candidate / _FILES / name, wanted.source.chunks(member))
            for name, member in wanted.files.items()
        )
    return not changed or _has_digests(candidate, written, changed, wanted, locked=locked)


def _has_digests(
    candidate: Path, written: Manifest, names: Iterable[str], wanted: _Wanted, *, locked: bool
) -> bool:
    """Return whether these files have the content that was written; if so, keep their identity."""
    records = dict(written.files)
    for name in names:
        now = manifest.digest(candidate / _FILES / name)
        if now.sha256 != records[recorded_name(name)].sha256:
            return False
        records[recorded_name(name)] = now
    # A cache that can't be written to is read again at each start. So is this one if another has
    # the lock.
    with suppress(OSError):
        if locked:
            _replace_manifest(candidate, wanted.key, records)
        else:
            with _lock(wanted.cache, wanted.key, timeout=0.0):
                _replace_manifest(candidate, wanted.key, records)
    return True


def _replace_manifest(candidate: Path, key: str, records: dict[str, FileRecord]) -> None:
    new = candidate.parent / f"{_STAGING}{secrets.token_hex(8)}"
    try:
        _write_manifest(new, key, records)
        new.replace(candidate / manifest.NAME)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise


# --- making ---------------------------------------------------------------------------------------


@contextmanager
def _locked(cache: Folder, key: str) -> Iterator[None]:
    from filelock import Timeout

    lock = _lock(cache, key, timeout=_LOCK_TIMEOUT)
    try:
        lock.acquire()
    except Timeout as error:
        path = cache.name / f"{key}.lock"
        raise PackageError(
            f"Waited {_LOCK_TIMEOUT:.0f} s for another process to unpack the same package. If "
            f"none is at work, delete {path}.",
            path=str(path),
        ) from error
    try:
        yield
    finally:
        lock.release()


def _lock(cache: Folder, key: str, *, timeout: float) -> FileLock:
    from filelock import FileLock  # not for what is known: the import takes 20 ms

    # A new FileLock each time: the operating system's lock then also keeps threads of one process
    # apart, and is let go by the kernel when its holder dies. The file itself may stay; it means
    # nothing.
    path = cache.path / f"{key}.lock"
    with suppress(FileNotFoundError):
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise FileExistsError(errno.EEXIST, f"{path} is not a plain file", str(path))
        check_planted(cache, path, status)
    return FileLock(str(path), timeout=timeout, mode=0o600)


def _remove_remains(entry: Path) -> None:
    """Remove what a crash or damage left.

    The caller holds the lock, so no other process writes here.
    """
    for path in entry.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(
                path, ignore_errors=True
            )  # NFS keeps what is open as .nfs files, which stay for now
        else:
            with suppress(OSError):
                path.unlink()


def _check_room(cache: Folder, source: MemberSource, needed: int) -> None:
    free = shutil.disk_usage(cache.path).free
    if free < needed:
        raise PackageError(
            f"Unpacking {source.path} needs {needed} bytes in {cache.name}, where {free} are free. "
            "Make room, or name another directory in AOTI_SCHED_CACHE or cache_dir=.",
            path=str(source.path),
        )


def _write(wanted: _Wanted, source: MemberSource) -> Path:
    token = secrets.token_hex(8)
    staging, complete = wanted.entry / f"{_STAGING}{token}", wanted.entry / token
    try:
        digests = {}
        make_private(staging / _FILES)
        for name, member in wanted.files.items():
            path = staging / _FILES / name
            make_private(path.parent)
            digests[name] = _write_file(path, source.chunks(member))
        # After all is written: the first sync then takes the others' data along.
        records = {
            recorded_name(name): manifest.record(digest, manifest.sync(staging / _FILES / name))
            for name, digest in digests.items()
        }
        _write_manifest(staging / manifest.NAME, wanted.key, records)
        for folder, _, _ in os.walk(staging):
            manifest.sync(Path(folder))
        staging.rename(complete)
        manifest.sync(wanted.entry)
        manifest.sync(wanted.cache.path)
        return complete / _FILES
    except BaseException:
        for remains in (staging, complete):
            shutil.rmtree(remains, ignore_errors=True)
        with suppress(OSError):
            wanted.entry.rmdir()
        raise


def _write_manifest(path: Path, key: str, records: dict[str, FileRecord]) -> None:
    _write_file(path, [msgspec.json.encode(manifest.new_manifest(key, records))])
    manifest.sync(path)


def _write_file(path: Path, chunks: Iterable[bytes]) -> str:
    """Write a new file; its sha256."""
    digest = hashlib.sha256()
    with open(path, "xb", opener=_private) as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _private(path: str, flags: int) -> int:
    # Readable only: what is mapped must not change, not even by our own mistake.
    return os.open(path, flags, 0o400)
