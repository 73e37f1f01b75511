"""`run`, `submit` and `map` of what a `BlockingScheduler` hands out.

Nothing is decided here: every call is the call of the same name on the event loop.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, overload

import msgspec

from aoti_sched.engine.callers import THREAD
from aoti_sched.engine.loop_thread import LoopThread
from aoti_sched.handle import call_of_thread
from aoti_sched.mapping import map_blocking
from aoti_sched.signature import P, R

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from aoti_sched.engine.blocking import BlockingFuture
    from aoti_sched.handle import Handle
    from aoti_sched.mapping import OnError

_T = TypeVar("_T")


class Owner(Protocol):
    """The scheduler that made a handle; the handle keeps it alive."""

    _thread: LoopThread


class Calls(Generic[P, R]):
    """`run` and `submit` of what can be called.

    Args:
        scheduler: Kept alive as long as its runners are used.
        handle: What is called on the loop.
    """

    __slots__ = ("_handle", "_scheduler")

    def __init__(self, scheduler: Owner, handle: Handle[Any, P, R]) -> None:
        self._scheduler = scheduler
        self._handle = handle

    def run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the model on the exported module's own arguments and return what the module returns.

        Raises as `Runner.run_blocking` does.
        """
        token = THREAD.set(threading.current_thread())
        try:
            return self._handle.run_blocking(*args, **kwargs)
        finally:
            THREAD.reset(token)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> BlockingFuture[R]:
        """Queue a run and return its future at once.

        The future has the result, or any error of the request: arguments that do not fit and a full
        queue are known on the loop only.

        Raises:
            RunnerClosedError: The scheduler is closed.
            UnsupportedLoopError: Called in a forked child.
        """
        token = THREAD.set(threading.current_thread())
        try:
            return call_of_thread(self._handle, args, kwargs, waits=False).start(self._thread.ask)
        finally:
            THREAD.reset(token)

    def _on_loop_for(self, tenant: object, make: Callable[[], _T]) -> _T:
        """Make a handle: on the loop for a new tenant, and here where nothing is shared."""
        if tenant is None or tenant is msgspec.UNSET:
            return make()
        return self._thread.ask(make)

    @overload
    def map(
        self,
        source: Iterable[Any],
        *,
        at_once: int = 32,
        ordered: bool = True,
        errors: Literal["raise"] = "raise",
        unpack: bool = False,
    ) -> Iterator[R]: ...

    @overload
    def map(
        self,
        source: Iterable[Any],
        *,
        at_once: int = 32,
        ordered: bool = True,
        errors: Literal["return"],
        unpack: bool = False,
    ) -> Iterator[R | Exception]: ...

    def map(
        self,
        source: Iterable[Any],
        *,
        at_once: int = 32,
        ordered: bool = True,
        errors: OnError = "raise",
        unpack: bool = False,
    ) -> Iterator[Any]:
        """Run the model on each item of a source: `for result in runner.map(source): ...`.

        The source is read in the calling thread, as the results are used. `Runner.map` describes
        the arguments. Leaving the loop early cancels what is queued and running.

        Raises:
            ConfigError: An argument is of the wrong type or out of range.
        """
        return map_blocking(
            self.submit, source, at_once=at_once, ordered=ordered, errors=errors, unpack=unpack
        )

    @property
    def _thread(self) -> LoopThread:
        return self._scheduler._thread  # noqa: SLF001

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._handle!r}>"
