"""Routes: what can be read of an exposed scheduler.

| path | answer |
|---|---|
| `/` | the live page |
| `/stats` | the numbers (`StatsReport`) |
| `/stream?interval=` | the numbers as server-sent events |
| `/timeline?seconds=` | a recording of the seconds to come, for Perfetto |
| `/metrics` | the numbers for Prometheus, with the extra `metrics` |
| `/health` | `HealthReport`, with the status 200 or 503 |

A client gets the newest numbers when it takes them; nothing is queued for a slow one.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.to_thread
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from aoti_sched.errors import AotiSchedError
from aoti_sched.expose.answers import JSON, RefusedError, answer, number, refusal, refused
from aoti_sched.expose.guard import Guard
from aoti_sched.expose.reports import HealthReport, StatsReport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from contextlib import AbstractContextManager

    from starlette.requests import Request
    from starlette.types import ASGIApp

    from aoti_sched.recording import Recording
    from aoti_sched.stats import SchedulerStats

PAGE = Path(__file__).parent / "page"
_FRESH = 0.05
"""Seconds in which all readers get the same numbers."""
_LONGEST = 300.0
_RECORDINGS = 2
"""How many recordings may go on at once."""


class Exposed(Protocol):
    """What this room needs of a scheduler."""

    @property
    def runners(self) -> Mapping[str, Any]: ...

    def stats(self) -> SchedulerStats: ...

    def record(self, limit: int = ...) -> AbstractContextManager[Recording]: ...

    async def commit(self, *runners: Any, **settings: Any) -> dict[Any, Any]: ...

    async def rollback(self, *runners: Any, **settings: Any) -> dict[Any, Any]: ...


class Reading:
    """Answers what can be read.

    Args:
        scheduler: The scheduler.
        name: Its name.
        pid: Its process.
        closing: Set when the scheduler is about to be closed. Open streams end then.
    """

    def __init__(self, scheduler: Exposed, name: str, pid: int, closing: asyncio.Event) -> None:
        self._scheduler = scheduler
        self._name = name
        self._pid = pid
        self._closing = closing
        self._began = time.monotonic()
        self._taken: tuple[float, SchedulerStats] | None = None
        self._recordings = 0
        self._worker = anyio.CapacityLimiter(1)

    def app(self, routes: list[Route], *, writable: bool, on_port: bool) -> ASGIApp:
        """Return the application.

        Args:
            routes: Further routes.
            writable: Whether they change weights.
            on_port: Whether browsers can reach the application.
        """
        own = [
            ("/", self._page),
            ("/stats", self._stats),
            ("/stream", self._stream),
            ("/timeline", self._timeline),
            ("/metrics", self._metrics),
            ("/health", self._health),
        ]
        app = Starlette(
            routes=[
                *(Route(path, endpoint) for path, endpoint in own),
                *routes,
                Mount("/page", StaticFiles(directory=PAGE)),
            ],
            exception_handlers={
                AotiSchedError: refused,
                HTTPException: _not_here,
                Exception: _unexpected,
            },
        )
        app.state.writable = writable
        return Guard(app, check_origin=on_port)

    def forget(self) -> None:
        """Drop the scheduler after the last answer: the server's objects are a reference cycle."""
        del self._scheduler

    # --- routes ----------------------------------------------------------------------------------

    async def _page(self, _: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def _stats(self, request: Request) -> Response:
        return Response(self._report(request), media_type=JSON)

    async def _stream(self, request: Request) -> Response:
        interval = number(request, "interval", 1.0, 0.1, 60.0)

        async def events() -> AsyncIterator[bytes]:
            yield b"retry: 1000\n\n"
            while True:
                yield b"event: stats\ndata: " + self._report(request) + b"\n\n"
                if await self._closes_within(interval):
                    return

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _timeline(self, request: Request) -> Response:
        seconds = number(request, "seconds", 5.0, 0.01, _LONGEST)
        if self._recordings >= _RECORDINGS:
            raise RefusedError(
                429, f"{_RECORDINGS} recordings go on already. Try again when one has ended."
            )
        self._recordings += 1
        try:
            with self._scheduler.record() as recording:
                await self._stays_for(request, seconds)
        finally:
            self._recordings -= 1
        return StreamingResponse(self._in_pieces(recording.pieces()), media_type=JSON)

    async def _metrics(self, _: Request) -> Response:
        try:
            await anyio.to_thread.run_sync(importlib.import_module, "aoti_sched.expose.metrics")
            from aoti_sched.expose.metrics import CONTENT_TYPE, page
        except ModuleNotFoundError:
            raise RefusedError(
                501, "Metrics need an extra. Run: pip install 'aoti_sched[metrics]'"
            ) from None
        text = await anyio.to_thread.run_sync(page, self._numbers(), limiter=self._worker)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    async def _health(self, _: Request) -> Response:
        problems = tuple(_problems(self._numbers()))
        status = "failing" if problems else "ok"
        return answer(HealthReport(status=status, problems=problems), 503 if problems else 200)

    # --- numbers ---------------------------------------------------------------------------------

    def _numbers(self) -> SchedulerStats:
        """Return the numbers. Many readers at once cost the event loop no more than one."""
        now = time.monotonic()
        if self._taken is None or now - self._taken[0] > _FRESH:
            self._taken = now, self._scheduler.stats()
        return self._taken[1]

    def _report(self, request: Request) -> bytes:
        stats = self._numbers()
        taken = time.monotonic() if self._taken is None else self._taken[0]
        report = StatsReport(
            name=self._name,
            pid=self._pid,
            time=time.time(),
            uptime=taken - self._began,
            weights=request.app.state.writable,
            stats=stats,
        )
        return msgspec.json.encode(report)

    # --- waiting ---------------------------------------------------------------------------------

    async def _closes_within(self, seconds: float) -> bool:
        """Wait, and return whether the scheduler closes."""
        try:
            await asyncio.wait_for(self._closing.wait(), seconds)
        except (TimeoutError, asyncio.TimeoutError):
            return False
        return True

    async def _stays_for(self, request: Request, seconds: float) -> None:
        """Wait, at most until the scheduler closes or the client has gone."""
        gone = asyncio.ensure_future(_disconnected(request))
        closing = asyncio.ensure_future(self._closing.wait())
        both = (gone, closing)
        try:
            await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waits in both:
                waits.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _in_pieces(self, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
        """Yield pieces that a worker thread makes, beside the event loop."""
        while piece := await anyio.to_thread.run_sync(next, pieces, b"", limiter=self._worker):
            yield piece


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _problems(stats: SchedulerStats) -> Iterator[str]:
    for device in stats.devices.values():
        if device.lost:
            yield f"device {device.name!r} is lost: {device.lost}"
        for name, runner in device.runners.items():
            if runner.health != "ok":
                yield f"runner {name!r} on {device.name!r} is {runner.health}"


async def _not_here(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    what = {404: "there is no such page", 405: f"{request.method} is not for this page"}
    return refusal(status, f"{request.url.path}: {what.get(status, str(error))}.")


async def _unexpected(_: Request, error: Exception) -> Response:
    return refusal(500, f"{type(error).__name__}: the request has failed.", type(error).__name__)
