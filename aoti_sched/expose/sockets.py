"""Sockets: where the sockets of exposed schedulers lie, and which of them are alive.

A socket is a file `PID-NAME.sock` of mode 0600 in a folder that no other user can change. The file
appears when the process already listens, so a socket that refuses a connection belongs to a process
that is dead, and is removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import sys
import tempfile
import weakref
from pathlib import Path

import msgspec

from aoti_sched.errors import ConfigError, ExposeError, brief
from aoti_sched.package.trust import trusted_folder

_FILE = re.compile(r"([0-9]+)-(.+)\.sock")
_NAME = re.compile(r"(?=.*[^0-9])[A-Za-z0-9_][A-Za-z0-9_.-]{0,39}")
_LONGEST_PATH = 103
"""Bytes that the path of a socket may have on every system."""
_BACKLOG = 16


class Found(msgspec.Struct, frozen=True, order=True):
    """An exposed scheduler.

    Attributes:
        pid: Its process.
        name: Its name, which no other scheduler of the process has.
        path: Its socket.
    """

    pid: int
    name: str
    path: str


def find() -> list[Found]:
    """Return the exposed schedulers of this user. Sockets of dead processes are removed."""
    found = []
    for folder in folders():
        try:
            if not folder.is_dir():  # a search makes no folder
                continue
            real, weakness = trusted_folder(folder)
            if weakness is None:
                found += [one for one in map(_parsed, real.iterdir()) if one and _is_alive(one)]
        except OSError:  # of another user, or being removed
            continue
    return sorted(found)


def listen(name: str | None) -> tuple[socket.socket, Found]:
    """Return a socket that listens, and where it is found.

    Args:
        name: The scheduler's name; None for the program's name, with a number where it is taken.

    Raises:
        ConfigError: The name is none, or another scheduler of this process has it.
        ExposeError: No folder is fit for a socket.
    """
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ConfigError(
            f"expose(name=): {brief(name)} is no name for a socket. Use up to 40 letters, digits, "
            "'_', '-' and '.', not digits alone."
        )
    problems = []
    for folder in folders():
        try:
            real, weakness = trusted_folder(folder)
            if weakness is None:
                return _listen_in(real, name)
        except OSError as error:
            weakness = f"{folder}: {error.strerror or error}"
        problems.append(weakness)
    why = "; ".join(problems) or "there is none for temporary files"
    raise ExposeError(
        f"expose(): no folder is fit for a socket: {why}. Set $XDG_RUNTIME_DIR to a folder of your "
        "own."
    )


def folders() -> list[Path]:
    """Return the folders that sockets may lie in, the best one first."""
    user = os.geteuid()
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    # A service may lack the variable that the user's shell has.
    runtime = Path(given if given.startswith("/") else f"/run/user/{user}")
    found = []
    with contextlib.suppress(OSError):  # no search permission, or a path that is too long
        if runtime.is_dir():
            found.append(runtime / "aoti_sched")
    with contextlib.suppress(OSError):  # a system where no folder for such files can be written
        found.append(Path(tempfile.gettempdir()) / f"aoti_sched-{user}")
    return found


def closed_in_children(listener: socket.socket) -> socket.socket:
    """Have a socket closed in each forked child, and return it.

    A child may outlive this process. Until its end, connections to the socket would be accepted,
    and never answered, and the port would stay taken.
    """
    _listeners.add(listener)
    return listener


def _close_in_child() -> None:
    for listener in list(_listeners):
        with contextlib.suppress(OSError):  # it is closed already
            os.close(listener.detach())


_listeners: weakref.WeakSet[socket.socket] = weakref.WeakSet()
os.register_at_fork(after_in_child=_close_in_child)


def remove(found: Found, inode: int) -> None:
    """Remove a socket's file, unless another socket has taken its place."""
    with contextlib.suppress(OSError):
        if Path(found.path).lstat().st_ino == inode:
            Path(found.path).unlink()


def _listen_in(folder: Path, name: str | None) -> tuple[socket.socket, Found]:
    pid = os.getpid()
    for one in map(_parsed, folder.iterdir()):  # this process may have the number of a dead one
        if one is not None:
            _is_alive(one)
    base, number = name or _program(), 1
    while True:
        found = Found(pid, base, str(folder / f"{pid}-{base}.sock"))
        if len(os.fsencode(found.path)) > _LONGEST_PATH - len(".new"):
            raise OSError(f"{found.path} is too long for a socket")
        listener = _bound(Path(f"{found.path}.new"))
        try:
            os.link(f"{found.path}.new", found.path)  # fails where the name is taken
        except FileExistsError:
            listener.close()
            if name is not None:
                raise ConfigError(
                    f"expose(name={name!r}): another scheduler of this process has that name. "
                    "Choose another."
                ) from None
            number += 1
            base = f"{_program()}-{number}"
        except BaseException:
            listener.close()
            raise
        else:
            return closed_in_children(listener), found
        finally:
            Path(f"{found.path}.new").unlink(missing_ok=True)


def _bound(path: Path) -> socket.socket:
    """Return a socket that listens at a path with mode 0600."""
    path.unlink(missing_ok=True)  # left by a dead process of the same number
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)  # no other user can enter the folder's way meanwhile
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        path.unlink(missing_ok=True)
        raise
    return listener


def _program() -> str:
    """Return the program's name: "app" for app.py and for `python -m app`."""
    given = sys.argv[0] if sys.argv else ""
    main = Path("" if given.startswith("-") else given)
    stem = main.parent.name if main.stem == "__main__" else main.stem
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.")[:36]
    return name if _NAME.fullmatch(name) else f"python{name}"


def _parsed(path: Path) -> Found | None:
    match = _FILE.fullmatch(path.name)
    return None if match is None else Found(int(match[1]), match[2], str(path))


def _is_alive(found: Found) -> bool:
    """Return whether a process listens. The socket of a dead process is removed."""
    with contextlib.suppress(OSError):
        status = Path(found.path).lstat()
        if not stat.S_ISSOCK(status.st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.setblocking(False)
            try:
                client.connect(found.path)
            except BlockingIOError:  # its backlog is full
                return True
            except ConnectionRefusedError:
                remove(found, status.st_ino)
                return False
        return True
    return False
