"""Lease: one slot of a runner, held for several runs; and the context that acquires the slot."""

from __future__ import annotations

from asyncio import _get_running_loop
from typing import TYPE_CHECKING, Generic

import msgspec

from aoti_sched.engine.leasing import acquire
from aoti_sched.handle import Handle, Options, wrong_loop
from aoti_sched.queue.job import Job
from aoti_sched.signature import P, R

if TYPE_CHECKING:
    from types import TracebackType

    from aoti_sched.engine.future import RunFuture
    from aoti_sched.engine.replica import Replica
    from aoti_sched.engine.router import Router
    from aoti_sched.queue.runner_state import Lease as LeaseState
    from aoti_sched.queue.runner_state import Source


class Lease(Handle["Lease[P, R]", P, R]):
    """One slot, held. Its runs go one after the other.

    The runs compete with all other requests for the lanes.
    """

    __slots__ = ()

    @property
    def slot(self) -> int:
        """The number of the runner's slot."""
        return self._state.slot

    @property
    def epoch(self) -> int:
        """The epoch that all runs of this lease see."""
        return self._state.epoch

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> RunFuture[R]:
        """Queue a run on the held slot and return its future."""
        self._router.holders.used(self._state)
        return super().submit(*args, **kwargs)

    def release(self) -> None:
        """Release the slot once the runs accepted so far are finished. Releasing twice is fine."""
        self._router.holders.released(self._state)
        self._replica.dispatcher.release(self._state)

    def _with(self, options: Options) -> Lease[P, R]:
        return Lease(self._router, self._replica, self._source, options)

    @property
    def _target(self) -> Replica:
        return self._replica

    @property
    def _state(self) -> LeaseState:
        return self._source  # type: ignore[return-value]


class LeaseContext(Generic[P, R]):
    """Waits for a slot on entry, and releases it on exit."""

    __slots__ = ("_lease", "_options", "_replica", "_router", "_source")

    def __init__(self, router: Router, replica: Replica, source: Source, options: Options) -> None:
        self._router = router
        self._replica = replica
        self._source = source
        self._options = options
        self._lease: Lease[P, R] | None = None

    async def __aenter__(self) -> Lease[P, R]:
        replica, options = self._replica, self._options
        if _get_running_loop() is not replica.loop:
            raise wrong_loop(replica.name)
        holders = self._router.holders
        if holders.held and self._source is replica.state:
            holders.must_leave_a_slot("lease()")
        job = Job(
            self._source, options.priority, None, 0, is_lease_request=True, tenant=options.tenant
        )
        if options.timeout is not None:
            job.deadline = replica.dispatcher.deadline(options.timeout)
            job.timeout = options.timeout
        job.min_epoch = options.min_epoch
        if replica.route is not None and self._source is replica.state:
            replica = replica.route(job)
        if holders.held:
            holders.watch()
        holder, state = await acquire(replica, job, options.tag)
        holders.acquired(state)
        its = msgspec.structs.replace(options, timeout=None, min_epoch=0)
        self._lease = Lease(self._router, holder, state, its)
        return self._lease

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Release the slot if it was granted. Releasing twice is fine."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None
