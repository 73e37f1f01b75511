"""Leases and sessions of a `BlockingScheduler`."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from aoti_sched.blocking_calls import Calls, Owner
from aoti_sched.errors import AotiSchedError
from aoti_sched.queue.job import Priority
from aoti_sched.signature import P, R

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Hashable
    from types import TracebackType

    from typing_extensions import Self

    from aoti_sched.lease import Lease
    from aoti_sched.session import Session


_T = TypeVar("_T")


class _Holder(Calls[P, R]):
    """What holds a slot or a set of weights. Its requests may have other options."""

    __slots__ = ()

    _handle: Lease[P, R] | Session[P, R]

    def options(
        self,
        *,
        priority: Priority | None = None,
        timeout: float | msgspec.UnsetType | None = msgspec.UNSET,
        min_epoch: int | None = None,
        tenant: Hashable | msgspec.UnsetType = msgspec.UNSET,
        tag: str | None = None,
        copy: bool | None = None,
    ) -> Self:
        """Return a light handle on the same slot or weights with other options."""
        handle = self._on_loop_for(
            tenant,
            lambda: self._handle.options(
                priority=priority,
                timeout=timeout,
                min_epoch=min_epoch,
                tenant=tenant,
                tag=tag,
                copy=copy,
            ),
        )
        return type(self)(self._scheduler, handle)


class BlockingLease(_Holder[P, R]):
    """One slot, held. Its runs go one after the other."""

    __slots__ = ()

    _handle: Lease[P, R]

    @property
    def slot(self) -> int:
        """The number of the runner's slot."""
        return self._handle.slot

    @property
    def epoch(self) -> int:
        """The epoch that all runs of this lease see."""
        return self._handle.epoch

    def release(self) -> None:
        """Release the slot once the runs accepted so far are finished. Releasing twice is fine."""
        self._thread.ask(self._handle.release)


class BlockingSession(_Holder[P, R]):
    """Requests that all run on the weights that the session began with."""

    __slots__ = ()

    _handle: Session[P, R]

    @property
    def epoch(self) -> int:
        """The epoch that all its requests see."""
        return self._handle.epoch

    def end(self) -> None:
        """End the session. Its accepted requests are finished. Ending twice is fine."""
        self._thread.ask(self._handle.end)


class _Block(Generic[_T]):
    """A `with` block: enters on the event loop, and leaves there on exit.

    Args:
        scheduler: Whose event loop.
        enters: Called there on entry.
        leaves: Called there on exit, and where entering was interrupted.
    """

    __slots__ = ("_enters", "_leaves", "_scheduler")

    def __init__(
        self,
        scheduler: Owner,
        enters: Callable[[], Coroutine[Any, Any, _T]],
        leaves: Callable[[], object],
    ) -> None:
        self._scheduler = scheduler
        self._enters = enters
        self._leaves = leaves

    def _enter(self) -> _T:
        try:
            return self._scheduler._thread.call(self._enters)  # noqa: SLF001
        except BaseException:
            self._leave()  # a thread that is interrupted may have got what it waited for
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        with suppress(AotiSchedError):  # closed, or forked: nothing is held any more
            self._scheduler._thread.post(self._leaves)  # noqa: SLF001


class BlockingLeaseContext(_Block["Lease[P, R]"], Generic[P, R]):
    """Waits for a slot on entry, and releases it on exit."""

    __slots__ = ()

    def __enter__(self) -> BlockingLease[P, R]:
        return BlockingLease(self._scheduler, self._enter())


class BlockingSessionContext(_Block["Session[P, R]"], Generic[P, R]):
    """Begins a session on entry, and ends it on exit."""

    __slots__ = ()

    def __enter__(self) -> BlockingSession[P, R]:
        return BlockingSession(self._scheduler, self._enter())
