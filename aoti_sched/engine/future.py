"""RunFuture: the asyncio future of one request, and the trace of where and when the request ran."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.engine.request import tag_of
from aoti_sched.errors import AotiSchedError, RunError
from aoti_sched.foreign import own, raise_again
from aoti_sched.signature import R

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aoti_sched.engine.replica import Replica
    from aoti_sched.queue.job import Job


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """Where and when a request ran. Times are seconds on the scheduler's clock (`time.monotonic`).

    Attributes:
        runner: The runner's name.
        device: The device that the request was queued on.
        state: The state of the request, as a word.
        placement: "lane", or "inline" for a run on the event loop's own thread.
        lane: The lane of the run; -1 before the run, and for an inline run.
        slot: The slot of the run; -1 before the run.
        epoch: The epoch of the weights that the request ran on.
        queued: When the request was submitted.
        started: The lane's stamp before the run; 0.0 for a request that has not run.
        finished: The lane's stamp after the run; 0.0 for a request that has not run.
        batch_size: How many requests ran as one.
        tag: What `options(tag=)` named the request.
    """

    runner: str
    device: str
    state: str
    placement: str
    lane: int
    slot: int
    epoch: int
    queued: float
    started: float
    finished: float
    batch_size: int = 1
    tag: str = ""

    @property
    def queue_seconds(self) -> float:
        """Seconds from submission to the start of the run; 0.0 before the start."""
        return max(0.0, self.started - self.queued) if self.started else 0.0

    @property
    def run_seconds(self) -> float:
        """Seconds of the run itself; 0.0 before its end."""
        return max(0.0, self.finished - self.started) if self.started and self.finished else 0.0


class RunFuture(asyncio.Future[R]):
    """The result of `runner.submit(...)`, an asyncio future: gather, wait and timeouts work.

    Cancelling the future takes a queued request out at once. A running request finishes on its
    lane, and its result is dropped.
    """

    __slots__ = ("_inputs", "_job", "_replica", "_tag")

    _replica: Replica
    _job: Job
    _inputs: Sequence[Any]
    """Kept until the run begins; in a batch to its end, since a failed batch is retried singly."""
    _tag: str
    """Set only where the request has one; see `tag_of`."""

    @property
    def trace(self) -> Trace:
        """Where and when the request ran, as far as it is known now."""
        job = self._job
        return Trace(
            runner=self._replica.name,
            device=self._replica.device,
            state=job.state.name,
            placement="inline" if job.inline else "lane",
            lane=job.lane,
            slot=job.slot,
            epoch=job.epoch,
            queued=job.submitted,
            started=job.started,
            finished=job.finished,
            batch_size=job.batch,
            tag=tag_of(self),
        )

    def cancel(self, msg: Any = None) -> bool:
        """Cancel the request. Returns False if the request is done already."""
        if not super().cancel(msg):
            return False
        self._inputs = ()
        self._replica.dispatcher.cancel(self._job)
        return True

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
    if tag:
        future._tag = tag
    return future
