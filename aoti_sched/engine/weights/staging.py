"""Staging: writes, folds, exchanges and frees the inactive buffers of containers.

A source of weights may be foreign code that never returns, so a thread of its own reads it and can
be left behind.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import anyio
import msgspec

from aoti_sched import arguments
from aoti_sched.backends.reading import Abandoned
from aoti_sched.engine.leasing import slot_for_update
from aoti_sched.engine.parking import claim
from aoti_sched.engine.weights.live import Inactive, Staged
from aoti_sched.engine.worker import SourceThread, in_worker
from aoti_sched.errors import ResourcesError, RunnerClosedError, UpdateError
from aoti_sched.events import log
from aoti_sched.foreign import own

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from aoti_sched.backends.contracts import StagedSet
    from aoti_sched.backends.reading import Reading
    from aoti_sched.engine.dispatcher import Clock
    from aoti_sched.engine.replica import Replica
    from aoti_sched.engine.weights.live import Attempt

_T = TypeVar("_T")


class StageOptions(msgspec.Struct, frozen=True):
    """How a set of weights is written.

    Attributes:
        partial: Keep the current values of names that are not given.
        strict: Refuse names that the model does not know.
        fold: Compute folded constants now, and not in the first request.
        check_finite: Refuse NaN and infinities.
    """

    partial: bool
    strict: bool
    fold: bool
    check_finite: bool

    def check(self, call: str) -> None:
        """Check the options as arguments of a call.

        Raises:
            ConfigError: An option is neither True nor False.
        """
        arguments.flags(call, **msgspec.structs.asdict(self))


class InactiveBuffers:
    """Works on the inactive buffers of one scheduler's replicas. The caller has their locks.

    Args:
        limiter: Limits the threads that fold and free.
        clock: The scheduler's.
    """

    def __init__(self, limiter: anyio.CapacityLimiter, clock: Clock) -> None:
        self._limiter = limiter
        self._clock = clock

    async def stage(
        self, attempt: Attempt, replica: Replica, weights: object, options: StageOptions
    ) -> None:
        """Write a set into the inactive buffer and fold it; do nothing for a removed replica."""
        try:
            if not replica.is_removed:
                await self._stage(attempt, replica, weights, options)
        except Exception as error:
            if not replica.is_removed:
                raise
            log.warning(
                "weights not staged where none are wanted", device=replica.device, error=error
            )

    async def _stage(
        self, attempt: Attempt, replica: Replica, weights: object, options: StageOptions
    ) -> None:
        replica.must_be_open()
        container, live = replica.container, replica.weights
        if container.updatable:
            raise UpdateError(
                f"runner {replica.name!r}: its weights can't be updated live: {container.updatable}"
            )
        if not container.inactive_bytes:
            await claim(replica.dispatcher, replica.state.memory, container.constant_bytes)
        began = self._clock.time()
        with _overwriting(replica):
            written = await _read(
                replica,
                attempt,
                lambda reading: container.stage(
                    weights,
                    partial=options.partial,
                    strict=options.strict,
                    check_finite=options.check_finite,
                    reading=reading,
                ),
            )
        live.inactive = Inactive.STAGED
        staged = self._clock.time()
        try:
            if options.fold and container.folds:
                await self._fold(replica)
        except BaseException:
            await self.drop([replica], Inactive.STAGED)
            raise
        live.staged = Staged(
            written.bytes, staged - began, self._clock.time() - staged, ignored=written.ignored
        )

    async def _fold(self, replica: Replica) -> None:
        """Fold the inactive buffer, which takes an instance, so a slot is held."""
        reached = None
        replica.must_be_open()
        try:
            async with slot_for_update(replica):
                try:
                    await self.in_thread(replica.container.fold)
                except Exception:
                    # The runtime leaves the instance it folded with on the inactive buffer: nothing
                    # may start there.
                    reached = replica.dispatcher.close_barrier(replica.state, abort=False)
                    raise
        except Exception:
            if reached is not None:
                with anyio.CancelScope(shield=True):
                    await self.rebuild(replica, reached, "folding constants failed", usable=False)
            raise

    async def rebuild(
        self, replica: Replica, reached: asyncio.Future[None], why: str, *, usable: bool
    ) -> None:
        """Replace the container behind a closed barrier by a fresh one with the current weights.

        Args:
            replica: Whose container.
            reached: Done when no run is under way.
            why: The reason, for the log.
            usable: Whether the old container may serve on if no fresh one can be made. Otherwise
                the replica is retired.
        """
        await reached
        replica.weights.inactive = Inactive.NOTHING
        try:
            await self.in_thread(replica.container.rebuild)
        except Exception as error:
            if not usable:  # nothing may run on it when the barrier opens
                replica.retire("container can't be rebuilt", error)
            raise
        finally:
            replica.dispatcher.open_barrier(replica.state, None)
        log.warning("container rebuilt", runner=replica.name, why=why)

    async def free(self, replica: Replica) -> None:
        """Free the inactive buffer."""
        with _overwriting(replica):
            await self.in_thread(replica.container.free_inactive)

    async def drop(self, replicas: Sequence[Replica], held: Inactive) -> None:
        """Free the inactive buffers that hold `held`. Failures are logged and not raised."""
        with anyio.CancelScope(shield=True):
            for replica in replicas:
                if replica.weights.inactive is not held:
                    continue
                try:
                    await self.free(replica)
                except Exception as error:  # noqa: BLE001 -- the next update writes over the memory
                    log.warning("weights can't be freed", runner=replica.name, error=error)
                    if held is Inactive.STAGED:
                        replica.weights.inactive = Inactive.NOTHING  # it is not to be published

    async def in_thread(self, call: Callable[[], _T]) -> _T:
        """Make a blocking call in a worker thread. A cancelled caller waits for its end."""
        return await in_worker(call, self._limiter, "changing the weights")


def swap_all(replicas: Sequence[Replica]) -> None:
    """Exchange the buffers of all replicas, or of none. A replica that can't go back is retired."""
    swapped: list[Replica] = []
    try:
        for replica in replicas:
            replica.container.swap()
            swapped.append(replica)
    except BaseException:
        for replica in reversed(swapped):
            try:
                replica.container.swap()
            except BaseException as error:  # noqa: BLE001, PERF203 -- the first error is raised
                replica.retire("container can't go back to its weights", error)
        raise


def must_hold(replica: Replica, wanted: Inactive, otherwise: str) -> None:
    """Check what the inactive buffer holds.

    Raises:
        RunnerClosedError: The replica drains or is closed.
        UpdateError: The buffer holds something else. The text begins with `otherwise`.
    """
    replica.must_be_open()
    if replica.weights.inactive is not wanted:
        raise UpdateError(
            f"runner {replica.name!r}: {otherwise}: the inactive buffer holds "
            f"{replica.weights.inactive.value}"
        )


def present(replicas: Iterable[Replica]) -> list[Replica]:
    """Return the replicas that were not removed meanwhile."""
    return [replica for replica in replicas if not replica.is_removed]


def closing_error(name: str) -> RunnerClosedError:
    """Return the error of an update whose runner closes."""
    return RunnerClosedError(f"runner {name!r} is closing; its weights can't be changed")


@contextmanager
def _overwriting(replica: Replica) -> Iterator[None]:
    """Mark the inactive buffer empty during the block.

    If the block fails without touching the buffer, the mark is restored.
    """
    live = replica.weights
    held, live.inactive = live.inactive, Inactive.NOTHING
    try:
        yield
    except BaseException:
        if replica.container.inactive_ready:
            live.inactive = held
        raise


async def _read(
    replica: Replica, attempt: Attempt, call: Callable[[Reading], StagedSet]
) -> StagedSet:
    """Let a container read its weights in a thread of its own.

    The thread is left behind where foreign code does not return.

    Raises:
        UpdateError: No thread can be started, or the source has raised a `BaseException` that is no
            `Exception`.
        RunnerClosedError: The runner, or another one of the same update, closes.
    """
    what = f"runner {replica.name!r}: the source of its weights"

    def ended(error: BaseException) -> Exception:
        if isinstance(error, Abandoned):
            return closing_error(attempt.closing or replica.name)
        return own(error, UpdateError, what)

    if attempt.closing:
        raise closing_error(attempt.closing)
    try:
        thread = SourceThread(call, f"aoti weights of {replica.name}", what, ended)
    except ResourcesError as error:
        raise UpdateError(str(error)) from error
    attempt.reads, attempt.leave = replica.weights, thread.leave
    try:
        return await thread.result()
    finally:
        attempt.reads = attempt.leave = None
