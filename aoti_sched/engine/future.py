"""RunFuture: the asyncio future of one request, and the trace of its way."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.errors import RunError
from aoti_sched.foreign import own, raise_again

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aoti_sched.queue.job import Job
    from aoti_sched.runner import Runner


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """Where and when a request ran. Times are seconds on the scheduler's clock (`time.monotonic`).

    `started` and `finished` are the lane's stamps around the run; for a request that has not run they
    are 0.0, and `lane` and `slot` are -1. `placement` is "lane" or, for a run on the event loop's own
    thread, "inline"; then there is no lane, either. `batch_size` is how many requests ran as one.
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

    @property
    def queue_seconds(self) -> float:
        """From submission to the start of the run; 0.0 if it has not started."""
        return max(0.0, self.started - self.queued) if self.started else 0.0

    @property
    def run_seconds(self) -> float:
        """The run itself; 0.0 if it has not finished."""
        return max(0.0, self.finished - self.started) if self.started and self.finished else 0.0


class RunFuture(asyncio.Future[Any]):
    """The result of `runner.submit(...)`: an asyncio future, so gather, wait and timeouts simply work.

    Cancelling it takes a queued request out at once; a running one is left to finish on its lane and its
    result is dropped.
    """

    __slots__ = ("inputs", "job", "runner")

    runner: Runner
    job: Job
    inputs: Sequence[Any]
    """Kept for a batch, whose requests are run again one by one should it fail; otherwise until the run begins."""

    @property
    def trace(self) -> Trace:
        """What is known of the request's way so far."""
        job = self.job
        return Trace(
            runner=self.runner.name,
            device=self.runner.device,
            state=job.state.name,
            placement="inline" if job.inline else "lane",
            lane=job.lane,
            slot=job.slot,
            epoch=job.epoch,
            queued=job.submitted,
            started=job.started,
            finished=job.finished,
            batch_size=job.batch,
        )

    def cancel(self, msg: Any = None) -> bool:
        """Give up on the request. Returns False if it is done already."""
        if not super().cancel(msg):
            return False
        self.inputs = ()
        self.runner.dispatcher.cancel(self.job)
        return True

    # --- for the dispatcher --------------------------------------------------------------------------

    def deliver(self, outputs: list[Any]) -> None:
        """Resolve with a run's outputs in the structure that the module returned."""
        self.inputs = ()
        try:
            result = self.runner.call_spec.unflatten(outputs)
        except BaseException as error:  # noqa: BLE001 -- a user's pytree type may raise anything; it is this request's
            self.refuse(error)
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                self.get_loop().call_soon(raise_again, error)  # after all steps of what goes on
        else:
            self.set_result(result)

    def refuse(self, error: BaseException) -> None:
        """Resolve with an error."""
        self.inputs = ()
        self.set_exception(own(error, RunError, f"runner {self.runner.name!r}: the request"))


def future_of(runner: Runner, job: Job, inputs: Sequence[Any]) -> RunFuture:
    """The future of a job: its payload. (A constructor in Python would cost three times as much.)"""
    job.payload = future = RunFuture(loop=runner.loop)
    future.runner = runner
    future.job = job
    future.inputs = inputs
    return future
