"""What a `BlockingScheduler` hands out: runners, leases and splits for threads without a loop.

Nothing is decided here: every call is the call of the same name on the event loop.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, overload

import msgspec

from aoti_sched.engine.holders import THREAD
from aoti_sched.engine.loop_thread import LoopThread
from aoti_sched.errors import AotiSchedError, ConfigError, brief
from aoti_sched.handle import call_of_thread
from aoti_sched.mapping import map_blocking
from aoti_sched.queue.job import Priority
from aoti_sched.signature import P, R
from aoti_sched.split import call_of_split

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator
    from types import TracebackType

    from aoti_sched.engine.blocking import BlockingFuture
    from aoti_sched.engine.future import RunFuture
    from aoti_sched.engine.weights.report import UpdateReport
    from aoti_sched.engine.weights.transaction import Barrier
    from aoti_sched.handle import Handle
    from aoti_sched.lease import Lease, LeaseContext
    from aoti_sched.mapping import OnError
    from aoti_sched.model.specs import ConstantSpec
    from aoti_sched.runner import Runner, RunnerView
    from aoti_sched.split import Shadow, Split, SplitView
    from aoti_sched.stats import RunnerInfo, RunnerStats, SplitStats

_T = TypeVar("_T")


class Owner(Protocol):
    """The scheduler that made a handle; the handle keeps it alive."""

    _thread: LoopThread


class _Calls(Generic[P, R]):
    """`run` and `submit` of what can be called.

    Args:
        scheduler: Kept alive as long as its runners are used.
        handle: What is called on the loop.
    """

    __slots__ = ("_handle", "_scheduler")

    def __init__(self, scheduler: Owner, handle: Handle[Any, P, R]) -> None:
        self._scheduler = scheduler
        self._handle = handle

    def run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the model on the exported module's own arguments and return what the module returns.

        Raises as `Runner.run_blocking` does.
        """
        token = THREAD.set(threading.current_thread())
        try:
            return self._handle.run_blocking(*args, **kwargs)
        finally:
            THREAD.reset(token)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> BlockingFuture[R]:
        """Queue a run and return its future at once.

        The future has the result, or any error of the request: arguments that do not fit and a full
        queue are known on the loop only.

        Raises:
            RunnerClosedError: The scheduler is closed.
            UnsupportedLoopError: Called in a forked child.
        """
        token = THREAD.set(threading.current_thread())
        try:
            return call_of_thread(self._handle, args, kwargs, waits=False).start()
        finally:
            THREAD.reset(token)

    def _on_loop_for(self, tenant: object, make: Callable[[], _T]) -> _T:
        """Make a handle: on the loop for a new tenant, and here where nothing is shared."""
        if tenant is None or tenant is msgspec.UNSET:
            return make()
        return self._thread.ask(make)

    @overload
    def map(
        self,
        source: Iterable[Any],
        *,
        at_once: int = 32,
        ordered: bool = True,
        errors: Literal["raise"] = "raise",
        unpack: bool = False,
    ) -> Iterator[R]: ...

    @overload
    def map(
        self,
        source: Iterable[Any],
        *,
        at_once: int = 32,
        ordered: bool = True,
        errors: Literal["return"],
        unpack: bool = False,
    ) -> Iterator[R | Exception]: ...

    def map(
        self,
        source: Iterable[Any],
        *,
        at_once: int = 32,
        ordered: bool = True,
        errors: OnError = "raise",
        unpack: bool = False,
    ) -> Iterator[Any]:
        """Run the model on each item of a source: `for result in runner.map(source): ...`.

        The source is read in the calling thread, as the results are used. `Runner.map` describes
        the arguments. Leaving the loop early cancels what is queued and running.

        Raises:
            ConfigError: An argument is of the wrong type or out of range.
        """
        return map_blocking(
            self.submit, source, at_once=at_once, ordered=ordered, errors=errors, unpack=unpack
        )

    @property
    def _thread(self) -> LoopThread:
        return self._scheduler._thread  # noqa: SLF001

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._handle!r}>"


class BlockingRunnerView(_Calls[P, R]):
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
        return BlockingLeaseContext(self._scheduler, self._handle.lease())


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


class BlockingSplitView(_Calls[..., Any]):
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
        return call_of_split(self._split, args, kwargs, waits=False).start()

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


class BlockingLease(_Calls[P, R]):
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

    def options(
        self,
        *,
        priority: Priority | None = None,
        timeout: float | msgspec.UnsetType | None = msgspec.UNSET,
        min_epoch: int | None = None,
        tenant: Hashable | msgspec.UnsetType = msgspec.UNSET,
        tag: str | None = None,
        copy: bool | None = None,
    ) -> BlockingLease[P, R]:
        """Return a light handle on the same slot with other options."""
        lease = self._on_loop_for(
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
        return BlockingLease(self._scheduler, lease)

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
