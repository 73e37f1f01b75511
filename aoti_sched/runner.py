"""Runner: the user's handle on a loaded model. `run` and `submit` take exactly the model's own arguments.

How to schedule is said apart from them, through `runner.options(...)`: a light, immutable view.
"""

from __future__ import annotations

import asyncio
import functools
import operator
from asyncio import _get_running_loop  # the public one raises; this one is for the hot path
from collections.abc import Hashable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched import arguments
from aoti_sched.engine.future import RunFuture, future_of
from aoti_sched.engine.tenants import Tenant, Tenants
from aoti_sched.engine.weights import Barrier, Inactive, LiveWeights, UpdateReport
from aoti_sched.errors import ConfigError, RunnerClosedError, UnsupportedLoopError, brief
from aoti_sched.queue.job import Job, Priority
from aoti_sched.stats import RunnerInfo, RunnerStats

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractContextManager

    from typing_extensions import Self

    from aoti_sched.backends.contracts import Container
    from aoti_sched.engine.blocking import BlockingCalls
    from aoti_sched.engine.dispatcher import Dispatcher
    from aoti_sched.engine.weights import Updates
    from aoti_sched.model.batch_layout import Grouping
    from aoti_sched.model.call_spec import CallSpec
    from aoti_sched.model.input_check import Check
    from aoti_sched.model.specs import ConstantSpec
    from aoti_sched.queue.runner_state import Lease as LeaseState
    from aoti_sched.queue.runner_state import RunnerState, Source


class Options(msgspec.Struct, frozen=True):
    """How requests are scheduled. `timeout` is in seconds and covers waiting, queue and run."""

    priority: Priority = Priority.NORMAL
    timeout: float | None = None
    min_epoch: int = 0
    tenant: Tenant | None = None


class Calls:
    """What can be called: a runner, a view of it with other options, or a held lease."""

    __slots__ = ("_options", "_runner", "_source")

    def __init__(self, runner: Runner | None, source: Source, options: Options) -> None:
        self._runner = (
            runner  # None for the runner itself: it must not be part of a reference cycle
        )
        self._source = source
        self._options = options

    async def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on the exported module's own arguments and return what the module returns.

        Raises:
            InputMismatchError: The arguments do not fit; nothing was queued.
            QueueFullError: A bound is reached (with overflow="reject").
            ShedError: It was queued, and dropped for a better one (with overflow="shed").
            DeadlineExceededError: The timeout passed, queued or running, or can't be met any more.
            DeadlineUnreachableError: The timeout could not be met, so it was not queued (with admission="predictive").
            RunnerClosedError: The runner takes no requests any more.
            RunError: The model failed; the text is torch's root cause.
        """
        return await self.submit(*args, **kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> RunFuture:
        """Queue a run now and return its future; raises as `run` does, but for what comes later."""
        runner: Runner = self._runner or self  # type: ignore[assignment]
        options = self._options
        if _get_running_loop() is not runner.loop:
            raise _wrong_loop(runner)
        inputs = runner.call_spec.flatten(args, kwargs)
        size = runner.input_check(inputs)
        job = Job(self._source, options.priority, None, size)
        if options.tenant is not None:
            job.tenant = options.tenant
        grouping = runner.grouping
        if grouping is not None:
            job.rows, key = grouping.measure(inputs)
            if self._source is runner.state:
                job.key = key
        if options.timeout is not None:
            job.deadline = runner.dispatcher.deadline(options.timeout)
            job.timeout = options.timeout
        if options.min_epoch:
            job.min_epoch = options.min_epoch
        if runner.place is not None and self._source is runner.state:
            runner = runner.place(job)
        tensors: Sequence[Any] = inputs
        if runner.arrive is not None:
            tensors = runner.arrive(inputs)
        future = future_of(runner, job, tensors)
        runner.dispatcher.submit(job, wait=runner.waits)
        return future

    def run_blocking(self, *args: Any, **kwargs: Any) -> Any:
        """`run` for callers in other threads: block until the result is there.

        The timeout counts from this call and fires in this thread, whatever the event loop does. Without a timeout, a
        thread waits as long as the loop runs. A thread that is interrupted takes its request back.

        Raises:
            RunnerClosedError: The event loop stopped, is closed, or does not run; or the scheduler is closed.
            UnsupportedLoopError: Called on the event loop's own thread, where it would wait for itself, or in a
                forked child.
            DeadlineExceededError: The timeout passed.
            AotiSchedError: As `run`.
        """
        runner = self._owner
        if _get_running_loop() is runner.loop:
            raise UnsupportedLoopError(
                f"runner {runner.name!r}: run_blocking() was called on the event loop's own thread and would wait "
                "for itself; use `await runner.run(...)` there"
            )
        return runner.blocking.run(self, runner, args, kwargs, self._options.timeout)

    def options(
        self,
        *,
        priority: Priority | None = None,
        timeout: float | msgspec.UnsetType | None = msgspec.UNSET,
        min_epoch: int | None = None,
        tenant: Hashable | msgspec.UnsetType = msgspec.UNSET,
    ) -> Self:
        """A light view whose requests have this priority and timeout (seconds; None for no timeout).

        Requests of one `tenant` (a customer's name, say) share the runner equally with those of each other one; those of none
        are a tenant, too.
        With `min_epoch` they run on the weights of that epoch or a later one: they wait for its publication, and
        fail with EpochError when it was rolled back. What is not given stays as it is here.

        Raises:
            ConfigError: A value is of the wrong type or out of range; it is a ValueError.
            TypeError: The tenant can't be hashed.
        """
        old = self._options
        # Whatever is a user's is compared, converted and hashed here, and not in the midst of something later.
        if tenant is msgspec.UNSET:
            whose = old.tenant
        else:
            whose = None if tenant is None else self._owner.whole.tenants.of(tenant)
        if timeout is msgspec.UNSET:
            timeout = old.timeout
        elif timeout is not None:
            timeout = arguments.timeout("options(timeout=)", timeout)
        if min_epoch is not None:
            min_epoch = arguments.whole("options(min_epoch=)", min_epoch)
        return self._with(
            Options(
                old.priority if priority is None else _priority(priority),
                timeout,
                old.min_epoch if min_epoch is None else min_epoch,
                whose,
            )
        )

    def _with(self, options: Options) -> Self:
        return type(self)(self._runner, self._source, options)

    @property
    def _owner(self) -> Runner:
        return self._runner or self  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._owner.name!r} on {self._owner.device}>"


class RunnerView(Calls):
    """A runner seen with other options."""

    __slots__ = ()

    def lease(self) -> LeaseContext:
        """Hold one slot for several runs in turn: `async with runner.lease() as lease: await lease.run(...)`.

        The slot is granted in the order of the queue, with this view's priority and timeout.
        """
        return LeaseContext(self._owner, self._source, self._options)


class Runner(RunnerView):
    """A loaded model. Made by `Scheduler.load`; closed by `aclose` or with its scheduler.

    What of it is on one device is a replica. A runner on one device is its own, and one on several has a runner on each
    (`aoti_sched.replicas`). `place` chooses one for a new job, where there is a choice, and `left` says why one that has left takes none.
    """

    __slots__ = (
        "_close",
        "_info",
        "_whole",
        "arrive",
        "as_here",
        "blocking",
        "call_spec",
        "container",
        "device",
        "dispatcher",
        "fixed",
        "grouping",
        "input_check",
        "left",
        "loop",
        "name",
        "place",
        "rebuilds",
        "state",
        "tenants",
        "threads",
        "updates",
        "waits",
        "weights",
    )

    def __init__(
        self,
        info: RunnerInfo,
        *,
        state: RunnerState,
        container: Container,
        call_spec: CallSpec,
        input_check: Check,
        grouping: Grouping | None,
        dispatcher: Dispatcher,
        options: Options,
        waits: bool,
        rebuilds: bool,
        fixed: str,
        updates: Updates,
        blocking: BlockingCalls,
        close: Callable[[Runner, bool], Awaitable[None]],
    ) -> None:
        super().__init__(None, state, options)
        self.name = info.name
        self.device = info.device
        self.state = state
        self.container = container
        # On a device: what the inputs depend on, and who uses the outputs; and, for another thread, its current stream.
        self.arrive = container.capture_stream
        self.as_here: Callable[[], AbstractContextManager[object]] = container.inherit_stream
        self.call_spec = call_spec
        self.input_check = input_check
        self.grouping = grouping
        self.dispatcher = dispatcher
        self.loop = dispatcher.loop
        self.threads = info.threads
        self.waits = waits
        self.rebuilds = rebuilds
        self.fixed = fixed
        self.updates = updates
        self.blocking = blocking
        self.weights = LiveWeights()
        self.tenants = Tenants()
        self._whole: Runner | None = None
        self.place: Callable[[Job], Runner] | None = None
        self.left = ""
        self._info = info
        self._close = close

    @property
    def replicas(self) -> tuple[Runner, ...]:
        """Those that take requests."""
        return () if self.left else (self,)

    @property
    def loaded(self) -> tuple[Runner, ...]:
        """All there were from the beginning."""
        return (self,)

    @property
    def whole(self) -> Runner:
        """The runner that this replica belongs to; itself on one device."""
        return self._whole or self

    def join(self, whole: Runner) -> None:
        """Become a replica of this runner."""
        self._whole = whole

    def let_go(self) -> None:
        """Refuse requests from now on, and drop what makes reference cycles. The runner is closed."""
        why = f"runner {self.name!r} is closed" if self.replicas else self._why_nowhere()
        self.place = functools.partial(_closed, why)
        for replica in self.loaded:
            replica._whole = None  # noqa: SLF001 -- of its own class
            replica.state.let_go()

    @property
    def absent(self) -> bool:
        """Whether it has left, and others serve in its place."""
        return bool(self.left and self.whole.replicas)

    def leave(self, replica: Runner, why: str) -> int:
        """This replica takes no more requests; what is queued there goes to others, if there are any. Says how much that was."""
        replica.left = why
        self.place = self.nowhere
        return 0

    def nowhere(self, job: Job) -> Runner:
        """No replica takes requests any more."""
        del job
        raise RunnerClosedError(self._why_nowhere())

    def _why_nowhere(self) -> str:
        why = "; ".join(replica.left for replica in self.loaded)
        return f"runner {self.name!r}: no device is left to run on: {why}"

    def _with(self, options: Options) -> Self:
        return RunnerView(self, self._source, options)  # type: ignore[return-value]  # a view, not a second owner

    @property
    def epoch(self) -> int:
        """Which set of weights serves: 1 is the one it was loaded with, and each set published gets the next number."""
        return self.state.epoch

    @property
    def info(self) -> RunnerInfo:
        """What this runner is: specs and their source, runtime, instances, notes worth reading."""
        weights = self.weights
        return msgspec.structs.replace(
            self._info,
            epoch=self.epoch,
            staged=weights.inactive is Inactive.STAGED,
            previous_epoch=weights.previous_epoch
            if weights.inactive is Inactive.PREVIOUS
            else None,
            inactive_bytes=self.container.inactive_bytes,
            cuda_graphs=self.container.graphs,
        )

    def stats(self) -> RunnerStats:
        """Its numbers now and since its load."""
        return self.dispatcher.runner_stats(self.state)

    # --- live weights --------------------------------------------------------------------------------

    async def update(
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
        """Replace the weights between two requests: each runs on the old set or on the new one, never on both.

        Staging goes on beside the requests; then what runs (and held leases) is waited for, what is queued waits, and the
        sets are exchanged. The tensors are copied; don't write to them until this returns.

        Args:
            weights: A mapping of names (FQNs) to tensors such as a state dict, (name, tensor) pairs, or the path of a
                `.safetensors` file or torch checkpoint.
            partial: Keep the current values of what is not given; otherwise every parameter and buffer of the module's
                `state_dict()` that the model uses must be.
            strict: Refuse names that neither the model nor the compiled module has; otherwise they are in the report's
                `ignored`. A package that `compile_package` made knows the module's names. One of torch's does not: names that
                its graph does not use are unknown there, and so are values that were compiled into the code.
            fold: Compute now what the model folds from its constants, and not in the first request.
            barrier: "drain" lets queued requests wait; "abort" fails them with UpdateAbortedError.
            keep_previous: Keep the old set in memory, for `rollback`.
            check_finite: Refuse NaN and infinities.
            timeout: Seconds for all of it; when they pass, nothing has changed.

        Raises:
            ConstantMismatchError: The set does not fit; every fault is listed, and nothing has changed.
            WeightsFileError, WeightsTypeError: The weights can't be read.
            UpdateError: This model's weights can't be updated live.
            MemoryLimitError: Two sets do not fit into the device's `memory_limit`.
            DeadlineExceededError: The timeout passed.
            RunnerClosedError: The runner is closing.
        """
        reports = await self.updates.update(
            {self: weights},
            partial=partial,
            strict=strict,
            fold=fold,
            barrier=barrier,
            keep_previous=keep_previous,
            check_finite=check_finite,
            timeout=timeout,
        )
        return reports[self]

    async def stage(
        self,
        weights: object,
        *,
        partial: bool = False,
        strict: bool = True,
        fold: bool = True,
        check_finite: bool = False,
        timeout: float | None = None,
    ) -> None:
        """The first half of `update`: write the new set beside the one that serves. A previous set kept there is gone."""
        await self.updates.stage(
            self,
            weights,
            partial=partial,
            strict=strict,
            fold=fold,
            check_finite=check_finite,
            timeout=timeout,
        )

    async def commit(
        self,
        *,
        barrier: Barrier = "drain",
        keep_previous: bool = True,
        timeout: float | None = None,
    ) -> UpdateReport:
        """The second half of `update`: publish the staged set.

        Raises:
            UpdateError: Nothing is staged.
        """
        reports = await self.updates.commit(
            [self], barrier=barrier, keep_previous=keep_previous, timeout=timeout
        )
        return reports[self]

    async def discard(self) -> None:
        """Drop the staged set and give its memory back; without one, nothing happens."""
        await self.updates.free(self, Inactive.STAGED)

    async def rollback(
        self,
        *,
        barrier: Barrier = "drain",
        timeout: float | None = None,
    ) -> UpdateReport:
        """Go back to the previous set, and to its epoch. The set left is kept in turn: a second rollback returns to it.

        Raises:
            UpdateError: None is kept: there was no update, `keep_previous` was off, or another set was staged since.
        """
        return (await self.updates.rollback([self], barrier=barrier, timeout=timeout))[self]

    async def free_previous(self) -> None:
        """Give the memory of the previous set back; there is no way back to it then."""
        await self.updates.free(self, Inactive.PREVIOUS)

    def constants(self) -> dict[str, ConstantSpec]:
        """What can be updated, and what is folded from it, by FQN."""
        return {spec.fqn: spec for spec in self._info.constants}

    async def extract(self, *, inactive: bool = False) -> dict[str, Any]:
        """Copies of the weights that serve (or of the inactive set) by FQN, a full set for `update`.

        It has every constant that is not computed from others, each under one name, non-persistent buffers and tensors that the
        compiler made included.

        Raises:
            UpdateError: There is no inactive set.
        """
        return await self.updates.extract(self, inactive=inactive)

    def lease_for_update(self) -> LeaseContext:
        """A slot for the library's own work on the weights: the next that is free, but for HIGH requests before it.

        Bounds are there against callers who send too much, so none holds it back.
        """
        return LeaseContext(self, self.state, Options(priority=Priority.HIGH), exempt=True)

    # --- leaving -------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Refuse new requests and wait until all accepted ones, held leases included, are through."""
        self._must_be_here()
        await asyncio.shield(self.dispatcher.drain(self.state, terminate=False))

    async def aclose(self) -> None:
        """Drain, then free the model. Shielded from cancellation; closing twice waits for the same end."""
        self._must_be_here()
        await self._close(self, False)

    async def terminate(self) -> None:
        """Fail what is queued with RunnerClosedError, wait for what runs, then free the model."""
        self._must_be_here()
        await self._close(self, True)

    def _must_be_here(self) -> None:
        if _get_running_loop() is not self.loop:
            raise _wrong_loop(self)


class Lease(Calls):
    """One slot, held. Its runs go one after the other, in priority with everything else for the lanes."""

    __slots__ = ()

    @property
    def slot(self) -> int:
        """Which of the runner's slots it is."""
        return self._state.slot

    @property
    def epoch(self) -> int:
        """The epoch that all runs of this lease see."""
        return self._state.epoch

    @property
    def _state(self) -> LeaseState:
        return self._source  # type: ignore[return-value]

    def release(self) -> None:
        """Give the slot back, once the runs accepted so far are through. Doing so twice is fine."""
        self._owner.dispatcher.release(self._state)


class LeaseContext:
    """Waits for a slot on entry, gives it back on exit."""

    __slots__ = ("_exempt", "_lease", "_options", "_runner", "_source")

    def __init__(
        self, runner: Runner, source: Source, options: Options, *, exempt: bool = False
    ) -> None:
        self._runner = runner
        self._source = source
        self._options = options
        self._exempt = exempt
        self._lease: Lease | None = None

    async def __aenter__(self) -> Lease:
        runner, options = self._runner, self._options
        if _get_running_loop() is not runner.loop:
            raise _wrong_loop(runner)
        job = Job(
            self._source,
            options.priority,
            None,
            0,
            holds=True,
            exempt=self._exempt,
            tenant=options.tenant,
        )
        if options.timeout is not None:
            job.deadline = runner.dispatcher.deadline(options.timeout)
            job.timeout = options.timeout
        job.min_epoch = options.min_epoch
        if runner.place is not None and self._source is runner.state:
            runner = runner.place(job)
        future = future_of(runner, job, ())
        runner.dispatcher.submit(job, wait=runner.waits)
        try:
            state = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                # granted, but cancelled before it could be taken; perhaps by another replica than it was asked of
                future.runner.dispatcher.release(future.result())
            raise
        self._lease = Lease(
            future.runner, state, msgspec.structs.replace(options, timeout=None, min_epoch=0)
        )
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


def _priority(value: object) -> Priority:
    if type(value) is Priority:
        return value
    try:
        return Priority(-1 if isinstance(value, bool) else operator.index(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigError(
            f"options(priority=): expected Priority.HIGH, NORMAL or LOW, got {brief(value)}."
        ) from None


def _closed(why: str, job: Job) -> Runner:
    del job
    raise RunnerClosedError(why)


def _wrong_loop(runner: Runner) -> UnsupportedLoopError:
    return UnsupportedLoopError(
        f"runner {runner.name!r} belongs to another event loop (or none is running here); call it on the loop that "
        "loaded it, or use run_blocking(...) from another thread"
    )
