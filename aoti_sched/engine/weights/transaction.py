"""Live weights: the transaction that publishes new constants between two requests.

One transaction covers one runner or several at once.

The order of events:

1. Lock every replica, in one fixed order, so that two updates never wait for each other.
2. Stage into the inactive buffers, off the loop, while runs go on.
3. Fold what is computed from constants, holding a slot.
4. Close the barrier of every replica, and wait until all slots are released.
5. Swap all buffers and open the barriers on the new epochs, in one piece of code that awaits
   nothing.

A transaction that fails or is given up before the swap leaves every replica on the epoch that
serves.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from aoti_sched import arguments
from aoti_sched.engine.weights.live import Attempt, Inactive, Staged
from aoti_sched.engine.weights.report import UpdateReport, reports_by_router
from aoti_sched.engine.weights.staging import (
    InactiveBuffers,
    StageOptions,
    closing_error,
    must_hold,
    present,
    swap_all,
)
from aoti_sched.errors import DeadlineExceededError, UpdateError
from aoti_sched.events import log
from aoti_sched.queue.runner_state import Phase

if TYPE_CHECKING:
    import anyio

    from aoti_sched.engine.dispatcher import Clock
    from aoti_sched.engine.parking import Parking
    from aoti_sched.engine.replica import Replica
    from aoti_sched.engine.router import Router

_T = TypeVar("_T")

Barrier = Literal["drain", "abort"]
"""Whether queued requests wait ("drain") or fail with UpdateAbortedError ("abort") meanwhile."""


class Updates:
    """Changes the weights of one scheduler's runners, of each on all its devices.

    A call that begins with a runner works on the replicas of the runner. A replica that is removed
    on the way is left out from there on, as long as others serve in its place.

    Args:
        start: Runs a coroutine to its end in the scheduler's task group.
        start_soon: Does so in the loop's next iteration, for callers in no task.
        parking: Restores evicted weights.
        limiter: Limits the threads that fold and free.
        clock: The scheduler's.
    """

    def __init__(
        self,
        start: Callable[[Callable[[], Awaitable[Any]]], asyncio.Future[Any]],
        start_soon: Callable[[Callable[[], Awaitable[object]]], None],
        parking: Parking,
        limiter: anyio.CapacityLimiter,
        clock: Clock,
    ) -> None:
        self._start = start
        self._start_soon = start_soon
        self._parking = parking
        self._buffers = InactiveBuffers(limiter, clock)
        self._clock = clock

    async def update(
        self,
        changes: Mapping[Router, object],
        options: StageOptions,
        *,
        barrier: Barrier,
        keep_previous: bool,
        timeout: float | None,  # noqa: ASYNC109 -- on the scheduler's clock
    ) -> dict[Router, UpdateReport]:
        """Stage and publish new weights on all runners, or on none."""
        options.check("update")
        arguments.flags("update", keep_previous=keep_previous)
        _check_barrier("update", barrier)
        each = {
            replica: weights
            for router, given in changes.items()
            for replica, weights in _weights_by_replica(router, given)
        }

        async def work(attempt: Attempt) -> dict[Replica, UpdateReport]:
            staged: list[Replica] = []
            async with self._exclusive(each, attempt=attempt, overwrites=True):
                try:
                    for replica, weights in each.items():
                        await self._buffers.stage(attempt, replica, weights, options)
                        staged.append(replica)
                    return await self._commit(attempt, staged, barrier, keep_previous=keep_previous)
                finally:
                    await self._buffers.drop(staged, Inactive.STAGED)

        reports = await self._run_transaction("update", changes, work, timeout)
        return reports_by_router(changes, reports)

    async def stage(
        self,
        router: Router,
        weights: object,
        options: StageOptions,
        *,
        timeout: float | None,  # noqa: ASYNC109
    ) -> None:
        """Write new weights beside those that serve."""
        options.check("stage")
        each = _weights_by_replica(router, weights)

        async def work(attempt: Attempt) -> None:
            staged: list[Replica] = []
            replicas = [replica for replica, _ in each]
            async with self._exclusive(replicas, attempt=attempt, overwrites=True):
                try:
                    for replica, share in each:
                        await self._buffers.stage(attempt, replica, share, options)
                        staged.append(replica)
                    await attempt.commit()
                except BaseException:
                    await self._buffers.drop(staged, Inactive.STAGED)
                    raise

        await self._run_transaction("stage", [router], work, timeout)

    async def commit(
        self,
        routers: Sequence[Router],
        *,
        barrier: Barrier,
        keep_previous: bool,
        timeout: float | None,  # noqa: ASYNC109
    ) -> dict[Router, UpdateReport]:
        """Publish the staged weights of all runners, or of none."""
        arguments.flags("commit", keep_previous=keep_previous)
        _check_barrier("commit", barrier)
        routers = list(dict.fromkeys(routers))
        each = _serving(routers)

        async def work(attempt: Attempt) -> dict[Replica, UpdateReport]:
            # An evicted replica has nothing staged, and stays evicted.
            async with self._exclusive(each, needed=False, attempt=attempt):
                return await self._commit(attempt, each, barrier, keep_previous=keep_previous)

        reports = await self._run_transaction("commit", routers, work, timeout)
        return reports_by_router(routers, reports)

    async def rollback(
        self,
        routers: Sequence[Router],
        *,
        barrier: Barrier,
        timeout: float | None,  # noqa: ASYNC109
    ) -> dict[Router, UpdateReport]:
        """Publish the previous weights of all runners again, or of none."""
        _check_barrier("rollback", barrier)
        routers = list(dict.fromkeys(routers))
        each = _serving(routers)

        async def work(attempt: Attempt) -> dict[Replica, UpdateReport]:
            # An evicted replica has no previous set, and stays evicted.
            async with self._exclusive(each, needed=False, attempt=attempt):
                replicas = present(each)
                for replica in replicas:
                    must_hold(replica, Inactive.PREVIOUS, "rollback() has nothing to go back to")
                epochs = {replica: replica.weights.previous_epoch for replica in replicas}
                for replica in replicas:
                    replica.weights.staged = Staged()
                return await self._publish(attempt, epochs, barrier)

        reports = await self._run_transaction("rollback", routers, work, timeout)
        return reports_by_router(routers, reports)

    async def free(self, router: Router, held: Inactive) -> None:
        """Free the inactive buffers that hold `held`."""
        each = _serving([router])

        async def work(attempt: Attempt) -> None:
            # An evicted replica keeps nothing, and stays evicted.
            overwrites = held is Inactive.PREVIOUS
            async with self._exclusive(each, needed=False, attempt=attempt, overwrites=overwrites):
                for replica in present(each):
                    replica.must_be_open()
                    if replica.weights.inactive is held:
                        await self._buffers.free(replica)

        await self._run_transaction("free", [router], work, None)

    async def renew(self, replica: Replica) -> None:
        """Replace a container whose runs fail by a fresh one with the current weights.

        Queued requests wait. A staged or previous set is gone then.
        """
        async with self._exclusive([replica], needed=False):
            if replica.state.phase is not Phase.OPEN or not replica.state.memory.is_here:
                return  # evicted weights are restored into a fresh container
            reached = replica.dispatcher.close_barrier(replica.state, abort=False)
            try:
                await self._buffers.rebuild(replica, reached, "its runs failed", usable=True)
                if replica.behind is not None:
                    replica.behind.revoke(replica.sessions.gone(replica.behind.state.epoch))
            except Exception as error:  # noqa: BLE001 -- the old container serves on
                log.error(
                    "container can't be rebuilt", runner=replica.name, error=error, exc_info=error
                )

    async def extract(self, router: Router, *, inactive: bool) -> dict[str, Any]:
        """Return copies of the weights of one replica, by FQN. All replicas have the same."""
        arguments.flags("extract", inactive=inactive)
        each = _serving([router])

        async def work(_: Attempt) -> dict[str, Any]:
            async with self._exclusive(each):
                replica = present(each)[0]
                replica.must_be_open()
                if inactive and replica.weights.is_empty:
                    raise UpdateError(
                        f"runner {router.name!r}: extract(inactive=True), "
                        "but the inactive buffer holds nothing"
                    )
                extract = replica.container.extract
                return await self._buffers.in_thread(lambda: extract(inactive=inactive))

        return await self._run_transaction("extract", [router], work, None)

    def leave_sources(self, replica: Replica) -> None:
        """Stop waiting for a foreign source that is read for a replica that closes.

        A removed replica is left out of the update. The source is left only when it is read for
        this replica.
        """
        attempt = replica.weights.attempt
        if attempt is None or (replica.is_removed and attempt.reads is not replica.weights):
            return
        attempt.closing = "" if replica.is_removed else replica.name
        if attempt.leave is not None:
            attempt.leave()
        elif attempt.waits and attempt.closing:  # another attempt may read for ever
            attempt.scope.cancel()

    # --- the steps -------------------------------------------------------------------------------

    async def _commit(
        self,
        attempt: Attempt,
        replicas: Sequence[Replica],
        barrier: Barrier,
        *,
        keep_previous: bool,
    ) -> dict[Replica, UpdateReport]:
        replicas = present(replicas)
        for replica in replicas:
            must_hold(
                replica,
                Inactive.STAGED,
                "commit() has nothing to publish; call stage(weights) first",
            )
        epochs = {replica: replica.state.published + 1 for replica in replicas}
        reports = await self._publish(attempt, epochs, barrier)
        if not keep_previous:
            await self._drop_previous(list(reports))
        return reports

    async def _drop_previous(self, replicas: Sequence[Replica]) -> None:
        """Free the previous sets, each as soon as no session keeps it."""
        free = []
        for replica in replicas:
            sessions, epoch = replica.sessions, replica.kept_epoch
            if sessions.keeps(epoch):
                sessions.when_left(
                    epoch, functools.partial(self._start_soon, self._free_left(replica))
                )
            else:
                free.append(replica)
        await self._buffers.drop(free, Inactive.PREVIOUS)

    def _free_left(self, replica: Replica) -> Callable[[], Awaitable[None]]:
        """Return what frees the previous set of a replica that its last session has left."""
        epoch = replica.kept_epoch

        async def free() -> None:
            async with self._exclusive([replica], needed=False, overwrites=True):
                if replica.kept_epoch == epoch and replica.state.phase is Phase.OPEN:
                    await self._buffers.drop([replica], Inactive.PREVIOUS)

        return free

    async def _publish(
        self, attempt: Attempt, epochs: Mapping[Replica, int], barrier: Barrier
    ) -> dict[Replica, UpdateReport]:
        """Swap every replica's buffers at one instant, and open each on its epoch."""
        closing = replicas = _in_order(epochs)
        for replica in replicas:
            replica.must_be_open()
        closed = self._clock.time()
        abort = barrier == "abort"
        reached = [r.dispatcher.close_barrier(r.state, abort=abort) for r in replicas]
        try:
            for one in reached:
                await one
            await attempt.commit()
            drained = self._clock.time()
            replicas = present(replicas)
            swap_all(replicas)
        except BaseException:
            for replica in closing:
                replica.dispatcher.open_barrier(replica.state, None)
            raise
        # From the exchange to the end nothing is awaited, so no request comes between the replicas.
        swapped = self._clock.time()
        reports = {}
        for replica in replicas:
            live = replica.weights
            live.inactive, live.previous_epoch = Inactive.PREVIOUS, replica.epoch
            replica.keep_for_sessions()
            reports[replica] = UpdateReport(
                runner=replica.name,
                epoch=epochs[replica],
                drain_seconds=drained - closed,
                swap_seconds=swapped - drained,
                pause_seconds=swapped - closed,
                waited=len(replica.state.queue) + len(replica.state.gate),
                **msgspec.structs.asdict(live.staged),
            )
        for replica in closing:
            epoch = epochs[replica] if replica in reports else None
            if epoch is not None:
                replica.sessions.epoch = epoch
            replica.dispatcher.open_barrier(replica.state, epoch)
        for replica in replicas:
            report = msgspec.structs.asdict(reports[replica])
            report["ignored"] = len(report["ignored"])
            log.info("weights published", device=replica.device, **report)
        return reports

    # --- how they are run ------------------------------------------------------------------------

    @asynccontextmanager
    async def _exclusive(
        self,
        replicas: Sequence[Replica] | Mapping[Replica, object],
        *,
        needed: bool = True,
        overwrites: bool = False,
        attempt: Attempt | None = None,
    ) -> AsyncIterator[None]:
        """Hold the locks of these replicas, on which the weights published last serve meanwhile.

        Args:
            replicas: The replicas.
            needed: Whether their weights must be in memory.
            overwrites: Whether the inactive buffers are written or freed, so that sessions which
                keep those sets end first.
            attempt: The call under way.
        """
        attempt = attempt or Attempt()
        async with AsyncExitStack() as stack:
            attempt.waits = True
            for replica in _in_order(replicas):
                await stack.enter_async_context(replica.weights.lock)
                stack.callback(setattr, replica.weights, "attempt", None)
                replica.weights.attempt = attempt
                if len(replicas) > 1 and not replica.is_removed:
                    replica.must_be_open()  # before the lock of the next one is waited for
                await stack.enter_async_context(self._parking.resident(replica, needed=needed))
            for replica in _in_order(replicas):
                await self._hold_turns(replica, stack, overwrites=overwrites)
            attempt.waits = False
            yield

    async def _hold_turns(
        self, replica: Replica, stack: AsyncExitStack, *, overwrites: bool
    ) -> None:
        """Let the weights that were published last serve until the stack ends."""
        if overwrites:
            await replica.sessions.leave_behind()
        behind = replica.behind
        if behind is not None:
            if overwrites:
                behind.revoke(replica.sessions.gone(behind.state.epoch))
            await behind.hold()
        stack.callback(self._release_turns, replica)

    @staticmethod
    def _release_turns(replica: Replica) -> None:
        if replica.behind is not None:  # perhaps made meanwhile, and on hold since
            replica.behind.release()

    async def _run_transaction(
        self,
        what: str,
        routers: Sequence[Router] | Mapping[Router, object],
        work: Callable[[Attempt], Awaitable[_T]],
        timeout: float | None,  # noqa: ASYNC109
    ) -> _T:
        """Run the work in the scheduler's task group.

        A cancelled or late caller gives the work up, unless it has taken effect.
        """
        if not routers:
            raise UpdateError(f"{what}: no runner was given")
        timeout = arguments.timeout(f"{what}(timeout=)", timeout)
        for replica in _serving(routers):
            replica.must_be_open()
        attempt = Attempt()
        late = asyncio.get_running_loop().create_future()

        async def within() -> list[_T]:
            with attempt.scope:
                return [await work(attempt)]
            if attempt.closing:
                raise closing_error(attempt.closing)
            return []  # given up

        def expire() -> None:
            if not attempt.committed:
                attempt.scope.cancel()
                late.set_result(None)

        outcome = self._start(within)
        timer = (
            None if timeout is None else self._clock.call_at(self._clock.time() + timeout, expire)
        )
        try:
            await asyncio.wait({outcome, late}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if not attempt.committed:
                attempt.scope.cancel()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if late.done():
            names = ", ".join(repr(router.name) for router in routers)
            raise DeadlineExceededError(
                f"{what} of {names}: the timeout of {timeout:.15g} s passed; nothing has changed"
            )
        (result,) = outcome.result()
        return result  # type: ignore[no-any-return]


def _check_barrier(what: str, barrier: object) -> None:
    arguments.one_of(f"{what}(barrier=)", barrier, ("drain", "abort"))


def _serving(routers: Iterable[Router]) -> list[Replica]:
    """Return the replicas that serve; all replicas of a router where none is left."""
    return [replica for router in routers for replica in router.serving or router.replicas]


def _weights_by_replica(router: Router, weights: object) -> list[tuple[Replica, object]]:
    """Return the weights for each replica.

    An iterator is read once, and remembered for the next replica.
    """
    replicas = _serving([router])
    if not isinstance(weights, Iterator) or len(replicas) == 1:
        return [(replica, weights) for replica in replicas]
    return list(zip(replicas, itertools.tee(weights, len(replicas)), strict=True))


def _in_order(replicas: Sequence[Replica] | Mapping[Replica, object]) -> list[Replica]:
    """Return the replicas in the one order in which they are locked and closed."""
    return sorted(replicas, key=lambda replica: (replica.device, replica.name))
