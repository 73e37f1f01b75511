"""Mapping: a model over each item of a source, a bounded number of requests at once.

Results are drawn by the consumer, and requests follow the results: a consumer that stops drawing
stops the source. A request has no task; an async source has one, which is gone with the mapping.
"""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from aoti_sched import arguments
from aoti_sched.errors import ConfigError, UnsupportedLoopError, brief
from aoti_sched.signature import R

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from types import TracebackType

    from typing_extensions import Self

    from aoti_sched.engine.blocking import BlockingFuture

OnError = Literal["raise", "return"]
"""What a request's error does: it ends the mapping, or takes the result's place."""


class MapResults(AsyncIterator[R]):
    """The results of `runner.map(...)`, for `async for`.

    Leaving the loop early cancels what is queued and running. Python does this when the last
    reference to this object is gone; `async with` and `aclose` do so for one that is kept.
    """

    def __init__(
        self,
        submit: Callable[..., asyncio.Future[Any]],
        source: Iterable[Any] | AsyncIterable[Any],
        loop: asyncio.AbstractEventLoop,
        *,
        at_once: int,
        ordered: bool,
        errors: OnError,
        unpack: bool,
        must_not_wait: Callable[[], None] | None = None,
    ) -> None:
        at_once, ordered, unpack = checked(at_once, ordered, errors, unpack)
        if not isinstance(source, (AsyncIterable, Iterable)):
            raise ConfigError(
                f"map(source): expected an iterable or an async iterable, got {brief(source)}."
            )
        self._raises = errors == "raise"
        self._must_not_wait = must_not_wait
        self._flow = _Flow(submit, source, loop, at_once, ordered=ordered, unpack=unpack)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> R:
        """Return the next result.

        A wait that is cancelled loses nothing: the next call goes on.

        Raises:
            AotiSchedError: The request's error, with errors="raise". The others are cancelled.
            LeaseError: This task itself holds every slot, and would wait for ever.
            StopAsyncIteration: The source is exhausted, or the mapping is closed.
        """
        flow, raises, must_not_wait = self._flow, self._raises, self._must_not_wait
        del self  # the traceback of a wait that is cancelled would keep this object
        if _get_running_loop() is not flow.loop:
            raise UnsupportedLoopError(
                "map(): its runner belongs to another event loop, or none is running here"
            )
        future = flow.take()
        flow.fill()  # before this result is used: as many requests as wanted are under way
        while future is None and (future := flow.take()) is None:
            if flow.is_over:
                flow.end()
                if flow.fault is not None:
                    fault, flow.fault = flow.fault, None
                    raise fault
                raise StopAsyncIteration
            if must_not_wait is not None:
                must_not_wait()
            await flow.something_new()
            flow.fill()
        error = future.exception()
        if error is None:
            result: R = future.result()
            return result
        try:
            if not raises:
                return error  # type: ignore[return-value]  # R is that or an Exception then
            flow.end()
            raise error
        finally:
            del error, future  # the traceback holds this frame

    async def aclose(self) -> None:
        """Cancel what is queued and running, and end the reading of the source. Twice is fine."""
        self._flow.end()
        await self._flow.left_source()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        flow: _Flow | None = getattr(self, "_flow", None)
        if flow is None or flow.ended:
            return
        if _get_running_loop() is flow.loop:
            flow.end()
        else:  # the garbage collector runs in any thread
            with suppress(RuntimeError):  # a loop that is closed
                flow.loop.call_soon_threadsafe(flow.end)


class _Flow:
    """What is under way between a source and the consumer of the results.

    Nothing here refers to the `MapResults`, whose end is to be noticed.

    Attributes:
        fault: What the source raised.
        ended: Whether nothing is to be submitted any more.
    """

    def __init__(
        self,
        submit: Callable[..., asyncio.Future[Any]],
        source: Iterable[Any] | AsyncIterable[Any],
        loop: asyncio.AbstractEventLoop,
        at_once: int,
        *,
        ordered: bool,
        unpack: bool,
    ) -> None:
        self.loop = loop
        self.fault: BaseException | None = None
        self.ended = False
        self._submit = submit
        self._at_once = at_once
        self._ordered = ordered
        self._unpack = unpack
        self._async: AsyncIterable[Any] | None = None
        self._items: Iterator[Any] | None = None
        if isinstance(source, AsyncIterable):
            self._async = source
        else:
            self._items = iter(source)
        self._exhausted = False
        self._reader: asyncio.Task[None] | None = None
        # Requests without a taken result: in the source's order, or those done in that of their
        # ends.
        self._line: deque[asyncio.Future[Any]] = deque()
        self._open: set[asyncio.Future[Any]] = set()
        self._news: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    @property
    def is_over(self) -> bool:
        """Return whether no result comes any more."""
        return self.ended or (self._exhausted and not self._open)

    def take(self) -> asyncio.Future[Any] | None:
        """Return the next request that is done, if there is one."""
        if not self._line or not self._line[0].done():
            return None
        future = self._line.popleft()
        self._open.discard(future)
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        return future

    def fill(self) -> None:
        """Submit requests until as many as wanted are under way."""
        if self._async is not None:
            if self._reader is None and not self.ended:
                self._reader = self.loop.create_task(self._read(self._async))
            return
        while not (self.ended or self._exhausted) and len(self._open) < self._at_once:
            try:
                item = next(self._items)  # type: ignore[arg-type]
            except StopIteration:  # noqa: PERF203
                self._exhausted = True
            except Exception as error:  # noqa: BLE001 -- raised after the results that came before
                self.fault, self._exhausted = error, True
            else:
                self._put(item)

    async def something_new(self) -> None:
        """Wait until a result may be there, or the source is exhausted."""
        if self._news is not None:
            raise RuntimeError("map(): two tasks wait for its next result; use one")
        self._news = self.loop.create_future()
        try:
            await self._news
        finally:
            self._news = None

    def end(self) -> None:
        """Cancel all requests, and read the source no further."""
        self.ended = True
        if self._reader is not None:
            self._reader.cancel()
        self._line.clear()
        while self._open:
            self._open.pop().cancel()
        self._items = self._async = None
        self._tell()

    async def left_source(self) -> None:
        """Wait until the source is left."""
        if self._reader is not None:
            await asyncio.wait([self._reader])

    async def _read(self, source: AsyncIterable[Any]) -> None:
        try:
            try:
                async for item in source:
                    if self.ended:  # a source may go on after its cancellation
                        return
                    self._put(item)
                    while len(self._open) >= self._at_once:
                        self._room = self.loop.create_future()
                        await self._room
            finally:
                if isinstance(source, AsyncGenerator):
                    await source.aclose()
        except BaseException as error:
            if not self.ended:
                self.fault = error
            if not isinstance(error, (Exception, asyncio.CancelledError)):
                raise
        finally:
            self._exhausted = True
            self._tell()

    def _put(self, item: Any) -> None:
        try:
            future = self._submit(*item) if self._unpack else self._submit(item)
        except Exception as error:  # noqa: BLE001 -- it takes the place of the item's result
            future = self.loop.create_future()
            future.set_exception(error)
            future.exception()  # retrieved, whatever becomes of the mapping
        self._open.add(future)
        if self._ordered:
            self._line.append(future)
        if future.done():
            self._done(future)
        else:
            future.add_done_callback(self._done)

    def _done(self, future: asyncio.Future[Any]) -> None:
        if self.ended:
            return
        if not self._ordered:
            self._line.append(future)
        if self._line and self._line[0].done():
            self._tell()

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


def map_blocking(
    submit: Callable[..., BlockingFuture],
    source: Iterable[Any],
    *,
    at_once: int,
    ordered: bool,
    errors: OnError,
    unpack: bool,
) -> Iterator[Any]:
    """Do as `MapResults`, for a thread that waits for each result.

    Raises:
        ConfigError: An argument is of the wrong type or out of range.
    """
    at_once, ordered, unpack = checked(at_once, ordered, errors, unpack)
    if not isinstance(source, Iterable):
        raise ConfigError(f"map(source): expected an iterable, got {brief(source)}.")
    return _results(submit, iter(source), at_once, ordered, errors == "raise", unpack)


def _results(
    submit: Callable[..., BlockingFuture],
    items: Iterator[Any],
    at_once: int,
    ordered: bool,
    raises: bool,
    unpack: bool,
) -> Iterator[Any]:
    under_way: dict[Future[Any], None] = {}  # in the order of the source
    ended: SimpleQueue[Future[Any]] = SimpleQueue()
    exhausted = False
    fault: Exception | None = None

    def fill() -> None:
        nonlocal exhausted, fault
        while not exhausted and len(under_way) < at_once:
            try:
                item = next(items)
            except StopIteration:  # noqa: PERF203
                exhausted = True
            except Exception as error:  # noqa: BLE001 -- raised after the results before it
                fault, exhausted = error, True
            else:
                future = submit(*item) if unpack else submit(item)
                under_way[future] = None
                if not ordered:
                    future.add_done_callback(ended.put)

    try:
        fill()
        while under_way:
            future = next(iter(under_way)) if ordered else ended.get()
            error = future.exception()
            del under_way[future]
            if error is not None and raises:
                raise error
            fill()  # as many as wanted are under way while this result is used
            yield future.result() if error is None else error
            del future, error
        if fault is not None:
            raise fault
    finally:
        for future in under_way:
            future.cancel()


def checked(
    at_once: object, ordered: object, errors: object, unpack: object
) -> tuple[int, bool, bool]:
    """Return the settings of a mapping.

    Raises:
        ConfigError: A setting is of the wrong type or out of range.
    """
    number = arguments.whole("map(at_once=)", at_once, least=1)
    arguments.one_of("map(errors=)", errors, ("raise", "return"))
    return number, arguments.flag("map(ordered=)", ordered), arguments.flag("map(unpack=)", unpack)
