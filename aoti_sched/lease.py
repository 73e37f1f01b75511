"""Lease: one slot of a runner, held for several runs; and the context that acquires the slot."""

from __future__ import annotations

from asyncio import _get_running_loop
from typing import TYPE_CHECKING

import msgspec

from aoti_sched.engine.leasing import acquire
from aoti_sched.handle import Handle, Options, wrong_loop
from aoti_sched.queue.job import Job

if TYPE_CHECKING:
    from types import TracebackType

    from aoti_sched.engine.replica import Replica
    from aoti_sched.engine.router import Router
    from aoti_sched.queue.runner_state import Lease as LeaseState
    from aoti_sched.queue.runner_state import Source


class Lease(Handle["Lease"]):
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

    def release(self) -> None:
        """Release the slot once the runs accepted so far are finished. Releasing twice is fine."""
        self._replica.dispatcher.release(self._state)

    def _with(self, options: Options) -> Lease:
        return Lease(self._router, self._replica, self._source, options)

    @property
    def _target(self) -> Replica:
        return self._replica

    @property
    def _state(self) -> LeaseState:
        return self._source  # type: ignore[return-value]


class LeaseContext:
    """Waits for a slot on entry, and releases it on exit."""

    __slots__ = ("_lease", "_options", "_replica", "_router", "_source")

    def __init__(self, router: Router, replica: Replica, source: Source, options: Options) -> None:
        self._router = router
        self._replica = replica
        self._source = source
        self._options = options
        self._lease: Lease | None = None

    async def __aenter__(self) -> Lease:
        replica, options = self._replica, self._options
        if _get_running_loop() is not replica.loop:
            raise wrong_loop(replica.name)
        job = Job(
            self._source, options.priority, None, 0, is_lease_request=True, tenant=options.tenant
        )
        if options.timeout is not None:
            job.deadline = replica.dispatcher.deadline(options.timeout)
            job.timeout = options.timeout
        job.min_epoch = options.min_epoch
        if replica.route is not None and self._source is replica.state:
            replica = replica.route(job)
        holder, state = await acquire(replica, job, options.tag)
        its = msgspec.structs.replace(options, timeout=None, min_epoch=0)
        self._lease = Lease(self._router, holder, state, its)
        return self._lease

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None
