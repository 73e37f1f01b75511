"""Leases and sessions of a `BlockingScheduler`."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Generic

import msgspec

from aoti_sched.blocking_calls import Calls, Owner
from aoti_sched.engine.loop_thread import LoopThread
from aoti_sched.errors import AotiSchedError
from aoti_sched.queue.job import Priority
from aoti_sched.signature import P, R

if TYPE_CHECKING:
    from collections.abc import Hashable
    from types import TracebackType

    from typing_extensions import Self

    from aoti_sched.lease import Lease, LeaseContext
    from aoti_sched.session import Session, SessionContext


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


class BlockingLeaseContext(Generic[P, R]):
    """Waits for a slot on entry, and releases it on exit."""

    __slots__ = ("_context", "_scheduler")

    def __init__(self, scheduler: Owner, context: LeaseContext[P, R]) -> None:
        self._scheduler = scheduler
        self._context = context

    def __enter__(self) -> BlockingLease[P, R]:
        try:
            lease = self._thread.call(self._context.__aenter__)
        except BaseException:
            self._release()  # a thread that is interrupted may have been granted the slot
            raise
        return BlockingLease(self._scheduler, lease)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def _release(self) -> None:
        with suppress(AotiSchedError):  # closed, or forked: there is no slot any more
            self._thread.post(self._context.release)

    @property
    def _thread(self) -> LoopThread:
        return self._scheduler._thread  # noqa: SLF001


class BlockingSession(_Holder[P, R]):
    """Requests that all run on the weights that the session began with."""

    __slots__ = ()

    _handle: Session[P, R]

    @property
    def epoch(self) -> int:
        """The epoch that all requests of this session see."""
        return self._handle.epoch

    def end(self) -> None:
        """End the session. Its accepted requests are finished. Ending twice is fine."""
        self._thread.ask(self._handle.end)


class BlockingSessionContext(Generic[P, R]):
    """Begins a session on entry, and ends it on exit."""

    __slots__ = ("_context", "_scheduler")

    def __init__(self, scheduler: Owner, context: SessionContext[P, R]) -> None:
        self._scheduler = scheduler
        self._context = context

    def __enter__(self) -> BlockingSession[P, R]:
        try:
            session = self._thread.call(self._context.__aenter__)
        except BaseException:
            self._end()  # a thread that is interrupted may have begun the session
            raise
        return BlockingSession(self._scheduler, session)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        with suppress(AotiSchedError):  # closed, or forked: there is no session any more
            self._thread.post(self._context.end)

    @property
    def _thread(self) -> LoopThread:
        return self._scheduler._thread  # noqa: SLF001
