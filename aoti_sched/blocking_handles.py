"""What a `BlockingScheduler` hands out: runners and splits for threads without a loop.

Nothing is decided here: every call is the call of the same name on the event loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.blocking_calls import Calls, Owner
from aoti_sched.blocking_lease import BlockingLeaseContext, BlockingSessionContext
from aoti_sched.errors import ConfigError, brief
from aoti_sched.queue.job import Priority
from aoti_sched.signature import P, R
from aoti_sched.split import call_of_split

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from aoti_sched.engine.blocking import BlockingFuture
    from aoti_sched.engine.future import RunFuture
    from aoti_sched.engine.weights.report import UpdateReport
    from aoti_sched.engine.weights.transaction import Barrier
    from aoti_sched.model.specs import ConstantSpec
    from aoti_sched.runner import Runner, RunnerView
    from aoti_sched.split import Shadow, Split, SplitView
    from aoti_sched.stats import RunnerInfo, RunnerStats, SplitStats


class BlockingRunnerView(Calls[P, R]):
    """A runner with other options, made by `options()`."""

    __slots__ = ()

    _handle: RunnerView[P, R]

    @property
    def name(self) -> str:
        """The name that the runner was loaded with."""
        return self._handle.name

    @property
    def info(self) -> RunnerInfo:
        """What the runner is: specs and their source, runtime, instances, notes worth reading."""
        return self._thread.ask(lambda: self._handle.info)

    def stats(self) -> RunnerStats:
        """Return the runner's numbers now and since its load."""
        return self._thread.ask(self._handle.stats)

    def options(
        self,
        *,
        priority: Priority | None = None,
        timeout: float | msgspec.UnsetType | None = msgspec.UNSET,
        min_epoch: int | None = None,
        tenant: Hashable | msgspec.UnsetType = msgspec.UNSET,
        tag: str | None = None,
        copy: bool | None = None,
    ) -> BlockingRunnerView[P, R]:
        """Return a light handle with other options, as `Runner.options` does."""
        view = self._on_loop_for(
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
        return BlockingRunnerView(self._scheduler, view)

    def lease(self) -> BlockingLeaseContext[P, R]:
        """Hold one slot for several runs: `with runner.lease() as lease: lease.run(...)`."""
        its = self._handle.lease()
        return BlockingLeaseContext(self._scheduler, its.__aenter__, its.release)

    def session(self, *, blocks_updates: bool = False) -> BlockingSessionContext[P, R]:
        """Keep the weights that serve now for several requests, as `Runner.session` does.

        `with runner.session() as session: session.run(...)`
        """
        its = self._handle.session(blocks_updates=blocks_updates)
        return BlockingSessionContext(self._scheduler, its.__aenter__, its.end)


class BlockingRunner(BlockingRunnerView[P, R]):
    """A loaded model. Made by `BlockingScheduler.load`; any thread may use it.

    Methods and errors are those of `Runner`. Two objects of one model are equal.

    Attributes:
        device: The device of the model; several are separated by commas.
    """

    __slots__ = ("device",)

    _handle: Runner[P, R]

    def __init__(self, scheduler: Owner, handle: Runner[P, R]) -> None:
        super().__init__(scheduler, handle)
        self.device = handle.device

    @property
    def epoch(self) -> int:
        """The number of the weights that serve."""
        return self._thread.ask(lambda: self._handle.epoch)

    def update(
        self,
        weights: object,
        *,
        partial: bool = False,
        strict: bool = True,
        fold: bool = True,
        barrier: Barrier = "drain",
        keep_previous: bool = True,
        check_finite: bool = False,
        timeout: float | None = None,
    ) -> UpdateReport:
        """Replace the weights between two requests, as `Runner.update` does."""
        return self._thread.call(
            lambda: self._handle.update(
                weights,
                partial=partial,
                strict=strict,
                fold=fold,
                barrier=barrier,
                keep_previous=keep_previous,
                check_finite=check_finite,
                timeout=timeout,
            )
        )

    def stage(
        self,
        weights: object,
        *,
        partial: bool = False,
        strict: bool = True,
        fold: bool = True,
        check_finite: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Write the new set beside the one that serves: the first half of `update`."""
        self._thread.call(
            lambda: self._handle.stage(
                weights,
                partial=partial,
                strict=strict,
                fold=fold,
                check_finite=check_finite,
                timeout=timeout,
            )
        )

    def commit(
        self,
        *,
        barrier: Barrier = "drain",
        keep_previous: bool = True,
        timeout: float | None = None,
    ) -> UpdateReport:
        """Publish the staged set: the second half of `update`."""
        return self._thread.call(
            lambda: self._handle.commit(
                barrier=barrier, keep_previous=keep_previous, timeout=timeout
            )
        )

    def discard(self) -> None:
        """Drop the staged set and free its memory. Without one, nothing happens."""
        self._thread.call(self._handle.discard)

    def rollback(self, *, barrier: Barrier = "drain", timeout: float | None = None) -> UpdateReport:
        """Go back to the previous set and its epoch."""
        return self._thread.call(lambda: self._handle.rollback(barrier=barrier, timeout=timeout))

    def free_previous(self) -> None:
        """Free the memory of the previous set. No rollback is possible then."""
        self._thread.call(self._handle.free_previous)

    def constants(self) -> dict[str, ConstantSpec]:
        """What can be updated, and what is folded from it, by FQN."""
        return self._thread.ask(self._handle.constants)

    def extract(self, *, inactive: bool = False) -> dict[str, Any]:
        """Return copies of the weights that serve, or of the inactive set, by FQN."""
        return self._thread.call(lambda: self._handle.extract(inactive=inactive))

    def drain(self) -> None:
        """Refuse new requests, and wait until all accepted ones and held leases have ended."""
        self._thread.call(self._handle.drain)

    def close(self) -> None:
        """Drain, then free the model. An interrupted close goes on; closing twice is fine."""
        self._thread.call(self._handle.aclose)

    def terminate(self) -> None:
        """Fail what is queued with RunnerClosedError, wait for what runs, then free the model."""
        self._thread.call(self._handle.terminate)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockingRunner):
            return NotImplemented
        return self._handle is other._handle

    def __hash__(self) -> int:
        return hash(self._handle)


class BlockingSplitView(Calls[..., Any]):
    """A split with other options, made by `options()`."""

    __slots__ = ("_split",)

    def __init__(self, scheduler: Owner, split: SplitView) -> None:
        self._scheduler = scheduler
        self._split = split

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model of one of the runners, as `Split.run` does."""
        return self._split.run_blocking(*args, **kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> BlockingFuture[Any]:
        """Queue a run on one of the runners, and return its future at once."""
        return call_of_split(self._split, args, kwargs, waits=False).start(self._thread.ask)

    def options(
        self,
        *,
        priority: Priority | None = None,
        timeout: float | msgspec.UnsetType | None = msgspec.UNSET,
        tenant: Hashable | msgspec.UnsetType = msgspec.UNSET,
        tag: str | None = None,
        copy: bool | None = None,
    ) -> BlockingSplitView:
        """Return a light handle with other options, as `Split.options` does."""
        view = self._on_loop_for(
            tenant,
            lambda: self._split.options(
                priority=priority, timeout=timeout, tenant=tenant, tag=tag, copy=copy
            ),
        )
        return BlockingSplitView(self._scheduler, view)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._split!r}>"


class BlockingSplit(BlockingSplitView):
    """Requests shared out among runners. Made by `BlockingScheduler.split`."""

    __slots__ = ()

    _split: Split

    @property
    def name(self) -> str:
        """The name that was given."""
        return self._split.name

    @property
    def shares(self) -> dict[str, float]:
        """The part of the requests that each runner gets, by name; they sum up to 1."""
        return self._split.shares

    def change(self, shares: Mapping[BlockingRunner[..., Any], float]) -> None:
        """Share out the requests from now on in another way, as `Split.change` does."""
        its = inner_shares(shares)
        self._thread.ask(lambda: self._split.change(its))

    def shadow(
        self,
        runner: BlockingRunner[..., Any],
        on_result: Callable[[RunFuture[Any], RunFuture[Any]], object],
        *,
        share: float = 1.0,
        priority: Priority = Priority.LOW,
    ) -> Shadow:
        """Send copies of the requests to one more runner, as `Split.shadow` does.

        `on_result` is called in the scheduler's own thread, so it must not block.
        """
        its = inner(runner)
        return self._thread.ask(
            lambda: self._split.shadow(its, on_result, share=share, priority=priority)
        )

    def stats(self) -> SplitStats:
        """Return how many requests went to each runner, and what became of the copies."""
        return self._thread.ask(self._split.stats)


def inner(runner: object) -> Runner:
    """Return the runner on the loop.

    Raises:
        ConfigError: It is no runner of a `BlockingScheduler`.
    """
    if not isinstance(runner, BlockingRunner):
        raise ConfigError(f"expected the runner that load() returned, got {brief(runner)}.")
    return runner._handle  # noqa: SLF001


def inner_shares(shares: object) -> Any:
    """Return the shares of the runners on the loop; raises as `inner`."""
    if not isinstance(shares, Mapping):
        return shares  # refused on the loop
    return {inner(runner): share for runner, share in shares.items()}


def inners(runners: Iterable[object]) -> list[Runner]:
    """Return the runners on the loop; raises as `inner`."""
    return [inner(runner) for runner in runners]
