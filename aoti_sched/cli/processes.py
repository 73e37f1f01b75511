"""Processes: finds the exposed scheduler that a command is about, and asks it over HTTP."""

from __future__ import annotations

import http.client
import socket
import stat
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from cyclopts import Parameter

from aoti_sched.cli.failures import UsageError
from aoti_sched.errors import ExposeError, shortened
from aoti_sched.expose.reports import VERSION, FailureReport
from aoti_sched.expose.sockets import Found, find

Process = Annotated[str | None, Parameter(show_default=False)]
"""Which process: an argument that may be left out where only one is exposed."""
PATIENCE = 10.0
"""Seconds that a process has to begin its answer."""
_PIECE = 1 << 16
_NONE = (
    "no scheduler of this user is exposed. A program exposes its scheduler with "
    "`await scheduler.expose()`."
)
_T = TypeVar("_T")


class Version(msgspec.Struct):
    """What every answer begins with."""

    version: int


class Target(msgspec.Struct, frozen=True):
    """A way to an exposed scheduler.

    Attributes:
        label: What to call it in messages.
        path: Its Unix socket; "" for a port.
        host: The host and the port; "localhost" for a socket.
    """

    label: str
    path: str
    host: str = "localhost"

    def connection(self, patience: float) -> http.client.HTTPConnection:
        """Return a connection that is not yet made."""
        if not self.path:
            return http.client.HTTPConnection(self.host, timeout=patience)
        return _UnixConnection(self.path, patience)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, patience: float) -> None:
        super().__init__("localhost", timeout=patience)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def choose(wanted: str | None) -> Target:
    """Return the exposed scheduler that is wanted.

    Args:
        wanted: A process id, a name, `PID-NAME`, the path of a socket, or the address of a port;
            None where only one is exposed.

    Raises:
        UsageError: Several fit, or the text is no address.
        ExposeError: None fits.
    """
    if wanted is not None and "://" in wanted:
        return _at(wanted)
    if wanted is not None and "/" in wanted:
        return _through(wanted)
    every = find()
    if wanted is None:
        fitting = every
    else:
        fitting = [
            one for one in every if wanted in (str(one.pid), one.name, f"{one.pid}-{one.name}")
        ]
    if len(fitting) == 1:
        return _found(fitting[0])
    listed = shortened((f"{one.pid}-{one.name}" for one in fitting or every), limit=20)
    if fitting:
        raise UsageError(f"several schedulers are exposed: {listed}. Name one of them.")
    hint = "" if wanted is None else _hint(wanted)
    if every:
        raise ExposeError(f"no exposed scheduler is called {wanted!r}. There are {listed}.{hint}")
    raise ExposeError(f"{_NONE}{hint}")


def ask(
    process: Target, path: str, kind: type[_T], *, body: object = None, patience: float = PATIENCE
) -> _T:
    """Return the answer to a request.

    Args:
        process: The exposed scheduler.
        path: The path, with its query.
        kind: What the answer is.
        body: What to send, with POST; None for GET.
        patience: Seconds without a sign of life.

    Raises:
        ExposeError: There is no answer, or a refusal.
        UsageError: What to send has a text that is no Unicode.
    """
    with _answer(process, path, body, patience) as response:
        content = response.read()
    return decoded(process, content, kind)


def pieces(process: Target, path: str, *, patience: float) -> Iterator[bytes]:
    """Yield the answer to a request for a large file, as it comes.

    Raises:
        ExposeError: There is no answer, a refusal, or an answer that breaks off.
    """
    with _answer(process, path, None, patience) as response:
        while piece := response.read(_PIECE):
            yield piece


def decoded(process: Target, content: bytes, kind: type[_T]) -> _T:
    """Return an answer as its struct.

    Raises:
        ExposeError: It is of another version, or of something else.
    """
    try:
        version = msgspec.json.decode(content, type=Version).version
        if version == VERSION:
            return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ExposeError(f"{process.label} answers, and is no scheduler of aoti_sched.") from None
    raise ExposeError(
        f"{process.label} answers in version {version} of the format, and this program knows "
        f"version {VERSION}. Use the program of the same installation."
    )


@contextmanager
def _answer(
    process: Target, path: str, body: object, patience: float
) -> Iterator[http.client.HTTPResponse]:
    connection = process.connection(patience)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", path, _encoded(body), headers)
        response = connection.getresponse()
        if response.status == 503:
            raise ExposeError(f"{process.label} has too many clients. Try again later.")
        if response.status >= 400:
            failure = decoded(process, response.read(), FailureReport)
            raise ExposeError(f"{process.label}: {failure.error}")
        yield response
    except TimeoutError:
        raise ExposeError(
            f"{process.label} did not answer for {patience:g} s. Its event loop may be blocked."
        ) from None
    except OSError as error:
        what = error.strerror or str(error)
        raise ExposeError(f"{process.label} can't be reached: {what}.") from None
    except http.client.HTTPException as error:
        raise ExposeError(
            f"{process.label} broke its answer off ({type(error).__name__}). It may have ended."
        ) from None
    finally:
        connection.close()


def _encoded(body: object) -> bytes:
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:
        raise UsageError(
            "a name or a path is no Unicode text, and can't be sent to the process. Give the file "
            "another name."
        ) from None


def _found(one: Found) -> Target:
    return Target(f"{one.name} (process {one.pid})", one.path)


def _through(path: str) -> Target:
    try:
        is_socket = stat.S_ISSOCK(Path(path).stat().st_mode)
    except OSError as error:
        paths = shortened((one.path for one in find()), limit=20)
        there = (
            f"The exposed schedulers are at {paths}." if paths else f"{_NONE[0].upper()}{_NONE[1:]}"
        )
        raise ExposeError(f"{path}: {error.strerror}. {there}{_hint(path)}") from None
    if not is_socket:
        raise UsageError(f"{path}: this is no socket.")
    return Target(path, path)


def _hint(wanted: str) -> str:
    """Return what to write where the text begins with a host and a port; otherwise ""."""
    try:
        parts = urllib.parse.urlsplit(f"http://{wanted}")
        is_one = parts.hostname and parts.port is not None
    except ValueError:
        return ""
    return f" For a port, write http://{parts.netloc}." if is_one else ""


def _at(address: str) -> Target:
    try:
        parts = urllib.parse.urlsplit(address)
        host = (parts.hostname or "").encode("idna").decode()  # as a connection encodes it
        fits = parts.scheme == "http" and parts.port is not None and parts.path in ("", "/")
    except ValueError:
        fits = False
    if not fits or not host:
        raise UsageError(f"{address}: expected an address such as http://127.0.0.1:8001.")
    return Target(address, "", f"{host}:{parts.port}")
