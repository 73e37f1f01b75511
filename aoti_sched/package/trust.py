"""Trust: checks that no other user can change the cache, whose files are executed.

Two users are trusted: the user of this process, and root. These users can change a folder:

- its owner;
- users that its mode lets write. With the sticky bit, they can only change their own files;
- users that can change a folder above it.

An access list shows in the group bits of the mode (POSIX), or does not show (NFSv4, SMB). Windows
has no such modes, so nothing is checked there.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

import msgspec

from aoti_sched.errors import PackageError

_POSIX = os.name == "posix"
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH
_MOST_LINKS = 40  # the most links that Linux resolves in one path
_ELSEWHERE = "or name another directory in AOTI_SCHED_CACHE or cache_dir=."


class Folder(msgspec.Struct, frozen=True):
    """A folder that no other user can write to."""

    path: Path
    """The path to work with. No other user can make it lead elsewhere."""
    name: Path
    """The path to show to people."""
    moved: bool
    """Whether another user can remove the folder at `name` or put another of ours there."""


def private_folder(path: Path) -> Folder:
    """Return the folder at `path`, made with mode 0700, once no other user can change it.

    Each folder and each link of the path is checked, from the root on. Where another user can
    change the path, Linux opens the folder and uses it through its descriptor. The descriptor stays
    open for the life of the process, like the libraries that are mapped through it.

    Raises:
        PackageError: Another user owns the folder or can write to it. Or another user can change
            the path, and this system can't map files through a descriptor.
        OSError: The operating system refuses to make or to read the folder.
    """
    if not _POSIX:
        path.mkdir(parents=True, exist_ok=True)
        return Folder(path.resolve(), path.resolve(), moved=False)
    real, weakness = _walk(path)
    if weakness is None:
        status = real.lstat()
        _check_folder(real, status, _trusted())
        return Folder(real, real, moved=False)
    return Folder(_opened(real, weakness), real, moved=True)


def trusted_folder(path: Path) -> tuple[Path, str | None]:
    """Return the folder at `path`, made with mode 0700, and what lets another user change it.

    Returns:
        The folder, with no links in its path, and the weakness; None where there is none.

    Raises:
        OSError: The operating system refuses to make or to read the folder.
    """
    real, weakness = _walk(path)
    status = real.lstat()
    if weakness is None and status.st_mode & _WRITABLE:  # a sticky folder takes others' files
        weakness = f"{real} may be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return real, weakness or _weakness(real, status)


def inventory(cache: Folder, entry: Path) -> dict[str, os.stat_result]:
    """Return the status of each file beneath `entry` by its relative path, `/` between the parts.

    Args:
        cache: The cache.
        entry: A folder in the cache. Links beneath the folder are listed, not resolved.

    Raises:
        PackageError: Another user owns the folder or something in it, or can write there.
        FileNotFoundError, NotADirectoryError: The folder is missing, or is being removed.
    """
    check_planted(cache, entry, entry.lstat())
    files: dict[str, os.stat_result] = {}
    pending = [(entry, "")]
    while pending:
        directory, prefix = pending.pop()
        with os.scandir(directory) as found:
            for item in found:
                path = directory / item.name
                status = path.lstat()
                check_planted(cache, path, status)
                if stat.S_ISDIR(status.st_mode):
                    pending.append((path, f"{prefix}{item.name}/"))
                else:
                    files[f"{prefix}{item.name}"] = status
    return files


def check_planted(cache: Folder, path: Path, status: os.stat_result) -> None:
    """Refuse a file or a folder in the cache that another user owns or can write to.

    Raises:
        PackageError: Another user owns the file or can write to it.
    """
    if not _POSIX:
        return
    if status.st_uid not in _trusted():
        why = f"belongs to user {status.st_uid}"
    elif not stat.S_ISLNK(status.st_mode) and status.st_mode & _WRITABLE:
        why = f"may be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    else:
        return
    raise PackageError(
        f"The cache directory {cache.name} holds {path.relative_to(cache.path)}, which {why}. "
        "What lies there is executed, and may have been planted. Delete everything in "
        f"{cache.name}, {_ELSEWHERE}",
        path=str(cache.name),
    )


def make_private(path: Path) -> None:
    """Make a folder and its missing parents with mode 0700, independent of the umask."""
    try:
        path.mkdir(0o700)
    except FileNotFoundError:
        make_private(path.parent)
        make_private(path)
    except FileExistsError:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise


def _trusted() -> frozenset[int]:
    return frozenset((0, os.geteuid()))


def _walk(path: Path) -> tuple[Path, str | None]:
    """Resolve `path`, and return what lets another user change the way to its folder.

    The check goes from the root downwards. In a safe folder, every name of this user or of root is
    safe.

    Returns:
        The folder, with no links in its path, and the weakness; None where there is none.
    """
    path = path.absolute()
    current = Path(path.anchor)
    pending = list(reversed(path.parts[1:]))
    weakness: str | None = None
    links = 0
    while pending:
        weakness = weakness or _weakness(current, current.lstat())
        part = pending.pop()
        if part == "..":
            current = current.parent
            continue
        child = current / part
        status = _found_or_made(child)
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(child))
            if status.st_uid not in _trusted():
                weakness = weakness or f"the link {child} belongs to user {status.st_uid}"
            target = child.readlink()
            if target.is_absolute():
                current = Path(target.anchor)
            pending += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        elif stat.S_ISDIR(status.st_mode):
            current = child
        else:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(child))
    return current, weakness


def _found_or_made(path: Path) -> os.stat_result:
    try:
        return path.lstat()
    except FileNotFoundError:
        with suppress(FileExistsError):
            path.mkdir(0o700)
        return path.lstat()


def _weakness(folder: Path, status: os.stat_result) -> str | None:
    """Return what lets another user replace a name of ours in `folder`; None without a weakness."""
    if status.st_uid not in _trusted():
        return f"{folder} belongs to user {status.st_uid}"
    if status.st_mode & _WRITABLE and not status.st_mode & stat.S_ISVTX:
        return f"{folder} may be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _check_folder(cache: Path, status: os.stat_result, owners: frozenset[int]) -> None:
    if status.st_uid not in owners:
        raise PackageError(
            f"The cache directory {cache} belongs to user {status.st_uid}, but this process is "
            f"user {os.geteuid()}. What lies there is executed, so it must be your own: name "
            "another in AOTI_SCHED_CACHE or cache_dir=.",
            path=str(cache),
        )
    if status.st_mode & _WRITABLE:
        advice = (
            f"Name a directory of your own beneath it, such as {cache / 'aoti_sched'}, in "
            "AOTI_SCHED_CACHE or cache_dir=."
            if status.st_mode & stat.S_ISVTX
            else f"Delete everything in it, then chmod 700 {cache}, {_ELSEWHERE}"
        )
        raise PackageError(
            f"The cache directory {cache} may be written by others (mode "
            f"{stat.S_IMODE(status.st_mode):04o}). What lies there is executed, and may have been "
            f"planted. {advice}",
            path=str(cache),
        )


# --- a folder by its descriptor -------------------------------------------------------------------

_open: dict[tuple[int, int], int] = {}
"""The descriptors of open folders, by the folder's device and inode.

They are global, as mapped libraries are. Only exec closes them.
"""


def _opened(folder: Path, weakness: str) -> Path:
    """Return a path that leads to the present folder even if another one replaces it later.

    The folder must belong to this process's user and not to root, because another user who can
    change the way could make the way lead to any folder of root's.
    """
    owner = frozenset((os.geteuid(),))
    # Check before opening, for the message: another user's folder may refuse to be opened.
    _check_folder(folder, folder.lstat(), owner)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    kept = False
    try:
        status = os.fstat(descriptor)
        _check_folder(folder, status, owner)
        identity = (status.st_dev, status.st_ino)
        held = _open.get(identity)
        if held is not None and held != descriptor and _is_open_at(held, status):
            return _through(held)
        if _is_open_at(descriptor, status):
            kept = True  # the first descriptor, or os.closerange() has closed the previous one
            _open[identity] = descriptor
            return _through(descriptor)
    finally:
        if not kept:
            os.close(descriptor)
    raise PackageError(
        f"The cache directory {folder} can be replaced by others: {weakness}. What lies there is "
        f"executed. Take that right from them, {_ELSEWHERE}",
        path=str(folder),
    )


def _is_open_at(descriptor: int, status: os.stat_result) -> bool:
    try:
        return os.path.samestat((_through(descriptor) / ".").stat(), status)
    except OSError:
        return False


def _through(descriptor: int) -> Path:
    # For the kernel, this path is the folder itself. Names beneath it are resolved as by openat().
    return Path(f"/proc/self/fd/{descriptor}")
