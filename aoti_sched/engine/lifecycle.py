"""Lifecycle: from a runner's name to its last freed byte.

Drains, closes and frees replicas; survives lost devices.

A runner's life is one record with a stage. A close, a drained device and a lost device all free a
replica; the first of them does it. Nothing here refers to the scheduler or its devices, so that a
closed scheduler is no part of a reference cycle.
"""

from __future__ import annotations

import asyncio
import enum
import functools
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from aoti_sched.engine.second_record import SUFFIX
from aoti_sched.engine.worker import in_worker
from aoti_sched.errors import ConfigError, RunnerClosedError
from aoti_sched.events import log
from aoti_sched.foreign import said
from aoti_sched.queue.runner_state import UNHEALTHY, Phase

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    import anyio

    from aoti_sched.engine.parking import Parking
    from aoti_sched.engine.replica import Replica
    from aoti_sched.engine.router import Router
    from aoti_sched.engine.tasks import Housekeeping
    from aoti_sched.engine.weights.transaction import Updates
    from aoti_sched.errors import DeviceLostError
    from aoti_sched.queue.runner_state import RunnerState

SLOW_CLOSE = 60.0
"""Seconds after which a close that still waits for runs or leases is logged, as asyncpg's pool
does.
"""


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_Handle = TypeVar("_Handle", bound=_Named)


class Stage(enum.Enum):
    """How far a runner's life has got."""

    LOADING = enum.auto()
    """Its name is taken, and it is on no device yet."""
    ABANDONED = enum.auto()
    """Its load was cancelled, or the scheduler closes: what the load brings is freed."""
    OPEN = enum.auto()
    CLOSING = enum.auto()
    """Its replicas drain and are freed. After a failure, the next close tries again."""
    CLOSED = enum.auto()


class Life:
    """The record of one runner.

    Attributes:
        name: The runner's.
        stage: How far its life has got.
        router: Routes over the runner's replicas; None while the runner is being loaded.
        closing: Done when the close that is under way ends.
        freed: Done when a replica is freed; of each whose freeing has begun and not failed.
        leave: Leaves the source that the load reads, while it reads one.
    """

    __slots__ = ("closing", "freed", "leave", "name", "router", "stage")

    def __init__(self, name: str) -> None:
        self.name = name
        self.stage = Stage.LOADING
        self.router: Router | None = None
        self.closing: asyncio.Future[None] | None = None
        self.freed: dict[Replica, asyncio.Future[None]] = {}
        self.leave: Callable[[], None] | None = None

    def abandon(self) -> None:
        """Open no runner when the load ends, and wait for no source that it reads."""
        self.stage = Stage.ABANDONED
        if self.leave is not None:
            self.leave()

    def is_wanted(self) -> bool:
        """Return whether a load goes on."""
        return self.stage is Stage.LOADING

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """All replicas there were from the beginning."""
        return () if self.router is None else self.router.replicas


class Lifecycle(Generic[_Handle]):
    """The lives of one scheduler's runners.

    Args:
        runners: The open runners by name, as the user sees them; kept up to date here.
        tasks: The scheduler's task group.
        updates: The scheduler's.
        parking: The scheduler's.
        limiter: Of the threads that free containers.
    """

    def __init__(
        self,
        runners: dict[str, _Handle],
        tasks: Housekeeping,
        updates: Updates,
        parking: Parking,
        limiter: anyio.CapacityLimiter,
    ) -> None:
        self._runners = runners
        self._tasks = tasks
        self._updates = updates
        self._parking = parking
        self._limiter = limiter
        self._lives: dict[str, Life] = {}

    # --- loading and open ------------------------------------------------------------------------

    def begin(self, name: str, path: str) -> Life:
        """Take a name for a runner that is being loaded.

        Raises:
            ConfigError: Another runner has the name, or it is no name for a runner.
        """
        if name.endswith(SUFFIX):
            raise ConfigError(
                f"load({path!r}): {name!r} can't be a name, since it ends in {SUFFIX!r}; give it "
                "another name="
            )
        if not _is_text(name):
            raise ConfigError(
                f"load({path!r}): {name!r} can't be a name, since it is no Unicode text; give it "
                "another name="
            )
        if name in self._lives:
            raise ConfigError(
                f"load({path!r}): a runner named {name!r} exists; give it another name="
            )
        life = self._lives[name] = Life(name)
        return life

    def open(self, life: Life, handle: _Handle, router: Router) -> None:
        """Note that a runner is loaded.

        Args:
            life: Its record.
            handle: The runner as the user sees it.
            router: Routes over its replicas.
        """
        life.stage = Stage.OPEN
        life.router = router
        self._runners[life.name] = handle

    async def cancel(self, life: Life) -> None:
        """End a life whose load was cancelled; close the runner where it had just been opened."""
        self.abandon(life)
        if life.stage is not Stage.ABANDONED:
            await self._close(life, terminate=True)

    def abandon(self, life: Life) -> None:
        """Give a name back unless its runner has been opened.

        What its load still brings must be freed.
        """
        if life.stage is Stage.LOADING:
            life.abandon()
        if life.stage is Stage.ABANDONED and self._lives.get(life.name) is life:
            del self._lives[life.name]

    def abandon_loads(self) -> None:
        """Open no runner that is still being loaded."""
        for life in self._lives.values():
            if life.stage is Stage.LOADING:
                life.abandon()

    def must_own(self, handles: Iterable[_Handle]) -> None:
        """Raise RunnerClosedError unless all these runners are open here."""
        for handle in handles:
            if self._runners.get(handle.name) is not handle:
                raise RunnerClosedError(
                    f"runner {handle.name!r} is closed, or belongs to another scheduler"
                )

    # --- closing ---------------------------------------------------------------------------------

    async def close(self, handle: _Handle, terminate: bool) -> None:
        """Drain a runner and free it on every device. Shielded; closing twice does nothing.

        Args:
            handle: The runner.
            terminate: Whether queued requests fail; otherwise they are finished first.
        """
        if self._runners.get(handle.name) is handle:
            await self._close(self._lives[handle.name], terminate)

    async def close_all(self, *, terminate: bool) -> list[BaseException]:
        """Close every runner. Return the faults."""
        closes = [self._close(life, terminate) for life, _ in self._open()]
        return await _faults_of(closes)

    def terminate(self) -> None:
        """Fail what is queued on every runner."""
        for life, _ in self._open():
            self._drain(life, terminate=True)

    async def drain_device(self, device: str) -> None:
        """Free every replica on a device, and close each runner that has no other.

        Returns when all of that is done.
        """
        ends: list[Awaitable[None]] = []
        for life, router in self._open():
            for replica in router.replicas:
                if replica.device != device:
                    continue
                if not replica.removed_because:
                    self._remove(router, replica, f"{device!r} was drained")
                if router.serving:
                    ends.append(self._free(life, replica))
                else:
                    ends.append(asyncio.ensure_future(self._close(life, terminate=False)))
        await asyncio.shield(asyncio.gather(*ends))

    def _open(self) -> list[tuple[Life, Router]]:
        """Return the records of runners that are loaded and not yet closed, with their routers."""
        lives = self._lives.values()
        return [(life, life.router) for life in lives if life.router is not None]

    def _drain(self, life: Life, *, terminate: bool) -> None:
        for replica in life.replicas:
            replica.drain(terminate=terminate)

    async def _close(self, life: Life, terminate: bool) -> None:
        if life.stage is Stage.CLOSED:
            return
        self._tasks.must_be_here()
        self._drain(life, terminate=terminate)
        life.stage = Stage.CLOSING
        if life.closing is None:
            life.closing = self._tasks.start(functools.partial(self._carry_out_close, life))
        await asyncio.shield(life.closing)

    async def _carry_out_close(self, life: Life) -> None:
        try:
            faults = await _faults_of([self._free(life, replica) for replica in life.replicas])
            if faults:
                raise faults[0]
        finally:
            life.closing = None
        life.stage = Stage.CLOSED
        del self._runners[life.name]
        del self._lives[life.name]
        if life.router is not None:
            life.router.close()

    def _free(self, life: Life, replica: Replica) -> asyncio.Future[None]:
        """Drain and free a replica, once. After a failure the next call tries again."""
        freed = life.freed.get(replica)
        if freed is None:
            drained = replica.drain(terminate=False)
            self._updates.leave_sources(replica)
            work = functools.partial(self._carry_out_free, life, replica, drained)
            freed = life.freed[replica] = self._tasks.start(work)
        return freed

    async def _carry_out_free(
        self, life: Life, replica: Replica, drained: list[asyncio.Future[None]]
    ) -> None:
        slow = asyncio.get_running_loop().call_later(SLOW_CLOSE, _log_slow_close, replica)
        try:
            for each in drained:
                await each
            self._parking.leave(replica)
            async with replica.weights.lock:  # an update under way ends first
                for each in replica.drain(terminate=False):  # it may have kept an epoch
                    await each
                slow.cancel()
                await self._parking.settled_residency(replica)
                replica.dispatcher.remove(replica.state)
                await in_worker(
                    replica.container.close,
                    self._limiter,
                    f"runner {replica.name!r}: closing",
                    or_here=True,
                )
                replica.dispatcher.forget(replica.state.memory)
        except BaseException:
            del life.freed[replica]
            raise
        finally:
            slow.cancel()
        log.info("model closed", runner=replica.name, device=replica.device)

    # --- what dispatchers report -----------------------------------------------------------------

    def on_failing(self, state: RunnerState) -> None:
        """Log that a replica's last runs all failed, and rebuild the container if that is set."""
        replica = self._replica_of(state)
        log.warning(
            "runs fail again and again",
            runner=replica.name,
            device=replica.device,
            failures=UNHEALTHY,
        )
        if replica.rebuild_on_failure:
            self._start_soon(self._updates.renew, replica)

    def on_evict(self, state: RunnerState) -> None:
        """Free the weights of an idle replica, as its queue has decided."""
        self._start_soon(self._parking.park, self._replica_of(state))

    def on_restore(self, state: RunnerState) -> None:
        """Load the weights of a replica back, as its queue has decided."""
        self._start_soon(self._parking.bring_back, self._replica_of(state))

    def on_lost(self, device: str, error: DeviceLostError) -> None:
        """A run has met a lost device: reroute its jobs where a runner has a replica elsewhere.

        Called for each such run.
        """
        for life, router in self._open():
            for replica in list(router.serving):
                others = [one for one in router.serving if one is not replica]
                if replica.device == device and any(
                    one.state.phase is Phase.OPEN for one in others
                ):
                    log.error("device lost", device=device, runner=life.name, error=error)
                    self._remove(router, replica, f"{device!r} was lost: {said(error)}")
                    self._start_soon(functools.partial(self._free_lost, life), replica)

    async def _free_lost(self, life: Life, replica: Replica) -> None:
        try:
            await self._free(life, replica)
        except Exception as error:  # noqa: BLE001 -- no caller waits for it
            log.warning(
                "model can't be freed", runner=replica.name, device=replica.device, error=error
            )

    def _remove(self, router: Router, replica: Replica, why: str) -> None:
        moved = router.remove(replica, why)
        log.info("replica left", runner=replica.name, device=replica.device, why=why, moved=moved)

    def _replica_of(self, state: RunnerState) -> Replica:
        life = self._lives[state.name.removesuffix(SUFFIX)]
        return next(
            replica
            for replica in life.replicas
            if state is replica.state or (replica.behind and state is replica.behind.state)
        )

    def _start_soon(self, work: Callable[[Replica], Awaitable[object]], replica: Replica) -> None:
        self._tasks.start_soon(functools.partial(work, replica))


async def _faults_of(works: Iterable[Awaitable[Any]]) -> list[BaseException]:
    """Wait for all of them and return what they raised."""
    ends = await asyncio.gather(*works, return_exceptions=True)
    return [end for end in ends if isinstance(end, BaseException)]


def _is_text(name: str) -> bool:
    """Return whether a name can be written: in reports, recordings and metrics."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _log_slow_close(replica: Replica) -> None:
    log.warning("closing waits for runs or leases", runner=replica.name, stats=replica.stats())
