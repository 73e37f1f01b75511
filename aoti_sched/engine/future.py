"""RunFuture: the asyncio future of one request, and the trace of where and when the request ran."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Any

from aoti_sched.engine.traces import tag_of, trace_of
from aoti_sched.errors import AotiSchedError, RunError
from aoti_sched.events import Trace
from aoti_sched.foreign import own, raise_again
from aoti_sched.signature import R

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aoti_sched.engine.replica import Replica
    from aoti_sched.engine.request import Callers
    from aoti_sched.queue.job import Job


class RunFuture(asyncio.Future[R]):
    """The result of `runner.submit(...)`, an asyncio future: gather, wait and timeouts work.

    Cancelling the future takes a queued request out at once. A running request finishes on its
    lane, and its result is dropped.
    """

    __slots__ = ("_callers", "_inputs", "_job", "_replica", "_tag")

    _replica: Replica
    _job: Job
    _inputs: Sequence[Any]
    """Kept until the run begins; in a batch to its end, since a failed batch is retried singly."""
    _tag: str
    """What the caller named the request; "" without a name."""
    _callers: Callers
    """Set only where observers have kept the caller; see `callers_of`."""

    @property
    def trace(self) -> Trace:
        """Where and when the request ran, as far as it is known now.

        While a recording is on, `trace.waits` tells why the request waited.
        """
        observers, trace = self._replica.dispatcher.observers, self._trace_of_job()
        return trace if observers is None else observers.explained(trace)

    def _trace_of_job(self) -> Trace:
        """Return the trace without the causes of its waits. It is final once the future is done."""
        return trace_of(self._job, self._replica.dispatcher.queue, tag_of(self))

    def cancel(self, msg: Any = None) -> bool:
        """Cancel the request. Returns False if the request is done already."""
        if not super().cancel(msg):
            return False
        self._inputs = ()
        self._replica.dispatcher.cancel(self._job)
        return True

    @property
    def _is_observed(self) -> bool:
        """Whether the scheduler has observers, which know more of the request."""
        return self._replica.dispatcher.observers is not None

    # --- for the dispatcher ----------------------------------------------------------------------

    def _deliver(self, outputs: list[Any]) -> None:
        """Resolve with a run's outputs in the structure that the module returned."""
        self._inputs = ()
        try:
            result = self._replica.call_spec.unflatten(outputs)
        except BaseException as error:  # noqa: BLE001 -- a user's pytree type may raise anything
            self._refuse(error)
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                # Raised once the current callback has ended.
                self.get_loop().call_soon(raise_again, error)
        else:
            self.set_result(result)

    def _refuse(self, error: BaseException) -> None:
        """Resolve with an error."""
        self._inputs = ()
        ours = own(error, RunError, f"runner {self._replica.name!r}: the request")
        tag = tag_of(self)
        if tag and isinstance(ours, AotiSchedError):
            shared, ours = ours, copy.copy(ours)  # other requests of a batch may end with it
            ours.__cause__, ours.tag = shared.__cause__, tag
        self.set_exception(ours)


def future_of(replica: Replica, job: Job, inputs: Sequence[Any], tag: str = "") -> RunFuture:
    """Return the future of a job and make it the job's payload.

    A constructor in Python would cost three times as much.
    """
    job.payload = future = RunFuture(loop=replica.loop)
    future._replica = replica
    future._job = job
    future._inputs = inputs
    future._tag = tag  # always: asking for a slot that is not set would raise inside
    return future
