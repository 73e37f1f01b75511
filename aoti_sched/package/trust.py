"""Who else can change what lies at a path.

What lies in the cache is executed, so the answer must be: no other user.

Two users are trusted: the one of this process, and root. A folder can be changed by its owner, by
those whom its mode lets write (with the sticky bit: only what is theirs), and by whoever can change
a folder above it. An access list shows in the group's bits of the mode (POSIX), or not at all
(NFSv4, SMB).

Windows has no such modes; there nothing is checked.
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
_MOST_LINKS = 40  # as many as Linux follows in one path
_ELSEWHERE = "or name another directory in AOTI_SCHED_CACHE or cache_dir=."


class Folder(msgspec.Struct, frozen=True):
    """A folder that no other user can write to."""

    path: Path
    """The path to work with. No other user can make it lead elsewhere."""
    name: Path
    """The path to show to people."""
    moved: bool
    """Whether other users can put another folder of ours, or none, at `name` before the next
    process starts.
    """


def private_folder(path: Path) -> Folder:
    """Return the folder at `path`, made with mode 0700, once no other user can change it.

    Each folder and each link on the way from the root is checked. Where another user can change the
    way, Linux still has an answer: the folder is held open, and used through its descriptor. The
    descriptor stays open for the life of the process, as the libraries that are mapped through it
    do.

    Raises:
        PackageError: other users can write to the folder, or it is another user's; or they can
            change the way to it, and this system can't map files through a descriptor.
        OSError: the operating system refuses to make or to read it.
    """
    if not _POSIX:
        path.mkdir(parents=True, exist_ok=True)
        return Folder(path.resolve(), path.resolve(), moved=False)
    real, weakness = _walk(path)
    if weakness is None:
        status = real.lstat()
        _check_folder(real, status, _trusted())
        return Folder(real, real, moved=False)
    return Folder(_held(real, weakness), real, moved=True)


def inventory(cache: Folder, entry: Path) -> dict[str, os.stat_result]:
    """Return the status of each file beneath `entry` by its relative path, `/` between the parts.

    Args:
        cache: the cache.
        entry: a folder in it. Links beneath are listed, not followed.

    Raises:
        PackageError: something in it, or the folder itself, belongs to another user, or others can
            write to it.
        FileNotFoundError, NotADirectoryError: it is not there, or goes at this moment.
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
        PackageError: with the advice to empty the cache.
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
    """Return the folder that `path` means, and what lets another user change the way to it.

    The folder has no links in its path. None means that nothing lets another user in.

    From the root downwards: once a folder is known to be safe, so is every name in it that is ours
    or root's.
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
    """Return what lets another user replace a name of ours in `folder`; None: nothing does."""
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
"""The descriptors of held folders, by the folder's device and inode: one for each folder and
process.

Global as mapped libraries are. Only exec closes them.
"""


def _held(folder: Path, weakness: str) -> Path:
    """Return a path to the folder that is at `folder` now, even if another one is put there later.

    The folder must be this process's own, not root's: whoever can change the way could lead it to
    any of root's.
    """
    owner = frozenset((os.geteuid(),))
    _check_folder(
        folder, folder.lstat(), owner
    )  # for the message: what is another's may not even be opened
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
            kept = True  # the first; or a careless os.closerange() closed the former
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
    # For the kernel this is the folder itself; names beneath it are found as by openat().
    return Path(f"/proc/self/fd/{descriptor}")
