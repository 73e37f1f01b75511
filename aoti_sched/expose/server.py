"""Server: serves an exposed scheduler on its own event loop, and ends with the scheduler.

uvicorn's server is used without its process: signals and logging stay as they are, and nothing is
polled while it serves.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from aoti_sched.errors import ConfigError, ExposeError, brief
from aoti_sched.events import log
from aoti_sched.expose import sockets
from aoti_sched.expose.reports import Exposure
from aoti_sched.expose.routes import Exposed, Reading
from aoti_sched.expose.writing import Writing

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_CLIENTS = 64
"""Connections that are served at once; more get the status 503."""
_PATIENCE = 1.0
"""Seconds that clients have to take their last answer, when the scheduler closes."""


class _Config(uvicorn.Config):
    def configure_logging(self) -> None:
        """Leave the loggers as they are: the application may have a uvicorn of its own."""


_log = logging.getLogger("uvicorn.error.aoti_sched")
"""uvicorn's log without warnings: they tell of mistakes that every user of the machine can make."""
_log.setLevel(logging.ERROR)


class _Protocol(H11Protocol):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.access_log = False
        self.logger = _log


class _Server(uvicorn.Server):
    """Serves one application on one socket, until `stop`."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            _Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                proxy_headers=False,
                server_header=False,
                date_header=False,
                limit_concurrency=_CLIENTS,
            )
        )
        self._stopped = asyncio.Event()
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        # The inherited one takes the signals, ticks, and logs the process's start and end.
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        try:
            await self.startup(sockets)
            if not self.ready.done():  # it is cancelled with the caller
                self.ready.set_result(None)
            await self._stopped.wait()
        finally:
            await self.shutdown(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        state = self.server_state
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        for connection in list(state.connections):
            connection.shutdown()  # once it has sent its answer
        now = asyncio.get_running_loop().time
        until = now() + _PATIENCE
        while state.connections and now() < until:  # noqa: ASYNC110 -- no event tells their end
            await asyncio.sleep(0.01)
        for connection in list(state.connections):
            if connection.transport is not None:
                connection.transport.abort()  # a client that does not read
        tasks = list(state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_PATIENCE)

    def stop(self) -> None:
        self._stopped.set()


_Start = Callable[[Callable[[], Awaitable[None]]], "asyncio.Future[None]"]


class Door:
    """The way into one scheduler. `opened` is called once, and `close` at any time after that.

    Args:
        scheduler: The scheduler.
        start: Starts work that ends with the scheduler.
        name: As in `Scheduler.expose`.
        port: As in `Scheduler.expose`.
        weights: As in `Scheduler.expose`.

    Raises:
        ConfigError: An argument is wrong.
        ExposeError: There is no place for the socket, or the port is taken.
    """

    def __init__(
        self,
        scheduler: Exposed,
        start: _Start,
        *,
        name: str | None,
        port: int | None,
        weights: bool,
    ) -> None:
        on_port = [] if port is None else [sockets.closed_in_children(_port(port))]
        try:
            listener, self._file = sockets.listen(name)
        except BaseException:
            for each in on_port:
                each.close()
            raise
        self._inode = Path(self._file.path).lstat().st_ino
        address = f"http://127.0.0.1:{on_port[0].getsockname()[1]}/" if on_port else None
        self.exposure = Exposure(
            name=self._file.name,
            pid=self._file.pid,
            path=self._file.path,
            url=address,
            weights=weights,
        )
        self._closing = asyncio.Event()
        reading = Reading(scheduler, self._file.name, self._file.pid, self._closing)
        writing = Writing(scheduler, allowed=weights)
        self._users: list[Reading | Writing] = [reading, writing]
        private = reading.app(writing.routes(), writable=weights, on_port=False)
        public = reading.app([], writable=False, on_port=True)
        pairs = [(_Server(private), listener), *((_Server(public), each) for each in on_port)]
        self._servers = [server for server, _ in pairs]
        self._ends = [_serve(start, server, each) for server, each in pairs]

    async def opened(self) -> None:
        """Wait until clients are served. An interrupted call closes the door."""
        try:
            await asyncio.gather(*(server.ready for server in self._servers))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.close()
            raise
        one = self.exposure
        log.info(
            "scheduler exposed", name=one.name, path=one.path, url=one.url, weights=one.weights
        )

    async def close(self) -> None:
        """End every stream and close the sockets. Never raises an error."""
        sockets.remove(self._file, self._inode)
        self._closing.set()
        for server in self._servers:
            server.stop()
        for outcome in await asyncio.gather(*self._ends, return_exceptions=True):
            if isinstance(outcome, BaseException):
                log.warning("exposure failed", name=self.exposure.name, error=outcome)
        while self._users:
            self._users.pop().forget()


def _serve(start: _Start, server: _Server, listener: socket.socket) -> asyncio.Future[None]:
    async def work() -> None:
        try:
            await server.serve([listener])
        except BaseException as error:
            if not server.ready.done():
                server.ready.set_exception(error)
            raise
        finally:
            listener.close()

    return start(work)


def _port(port: Any) -> socket.socket:
    """Return a socket that is bound to a port of the loopback interface."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 1 << 16:
        raise ConfigError(
            f"expose(port=): expected a number from 0 to 65535, or None, got {brief(port)}."
        )
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise ExposeError(
            f"expose(port={port}): {error.strerror or error}. Choose another port, or 0 for any "
            "free one."
        ) from None
    return listener
