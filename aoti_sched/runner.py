"""Runner: the user's handle on a loaded model, on one device or on several."""

from __future__ import annotations

import asyncio
import inspect
from asyncio import _get_running_loop
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.engine.weights.live import Inactive
from aoti_sched.engine.weights.staging import StageOptions
from aoti_sched.handle import Handle, Options, wrong_loop
from aoti_sched.lease import LeaseContext
from aoti_sched.session import SessionContext
from aoti_sched.signature import P, R

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aoti_sched.engine.router import Router
    from aoti_sched.engine.weights.report import UpdateReport
    from aoti_sched.engine.weights.transaction import Barrier, Updates
    from aoti_sched.model.specs import ConstantSpec
    from aoti_sched.stats import RunnerInfo, RunnerStats


class RunnerView(Handle["RunnerView[P, R]", P, R]):
    """A runner with other options, made by `options()`."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The name that the runner was loaded with."""
        return self._router.name

    @property
    def info(self) -> RunnerInfo:
        """What the runner is: specs and their source, runtime, instances, notes worth reading."""
        return self._router.info

    def stats(self) -> RunnerStats:
        """Return the runner's numbers now and since its load, those of all its views together."""
        return self._router.stats()

    def lease(self) -> LeaseContext[P, R]:
        """Hold one slot for several runs.

        Use it as `async with runner.lease() as lease: await lease.run(...)`. The slot is granted in
        the order of the queue, with this view's priority and timeout.
        """
        return LeaseContext(self._router, self._replica, self._source, self._options)

    def session(self, *, blocks_updates: bool = False) -> SessionContext[P, R]:
        """Keep the weights that serve now for several requests, without holding a slot.

        Use it as `async with runner.session() as session: await session.run(...)`. All requests of
        the session run on one epoch, in batches with others of that epoch, and in between the
        session holds no slot. While a second set is published, the two sets take turns.

        A third set needs the memory of the first. Before it is written, an update waits for the
        sessions of the first set that began with `blocks_updates`; the requests of the others fail
        with EpochError from then on.

        Args:
            blocks_updates: Let such an update wait until the session ends.

        Raises:
            ConfigError: An argument is of the wrong type.
        """
        return SessionContext(self._router, self._options, blocks_updates)

    def _with(self, options: Options) -> RunnerView[P, R]:
        return RunnerView(self._router, self._replica, self._source, options)

    def __dir__(self) -> list[str]:
        kind = type(self)
        return [
            name
            for name in super().__dir__()
            if not isinstance(inspect.getattr_static(kind, name, None), _NotOfViews)
        ]


class Runner(RunnerView[P, R]):
    """A loaded model. Made by `Scheduler.load`; closed by `aclose` or with its scheduler.

    A runner has a replica on each of its devices, and routes each request to one of them.

    Type parameters: the arguments of the model and its result, as `load(..., signature=)` states
    them; without it, any.

    Attributes:
        device: The device of the model; several are separated by commas.
    """

    __slots__ = ("_close", "_updates", "device")

    def __init__(
        self,
        router: Router,
        *,
        options: Options,
        updates: Updates,
        close: Callable[[Runner[P, R], bool], Awaitable[None]],
    ) -> None:
        first = router.replicas[0]
        super().__init__(router, first, first.state, options)
        self.device = router.device
        self._updates = updates
        self._close = close

    @property
    def epoch(self) -> int:
        """The number of the weights that serve.

        The weights that it was loaded with are 1, and each set published gets the next number.
        """
        return self._router.epoch

    # --- live weights ----------------------------------------------------------------------------

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
        """Replace the weights between two requests. Each request runs on one set only, old or new.

        Staging goes on beside the requests. Then running requests and held leases are waited for,
        queued requests wait, and the sets are exchanged. The tensors are copied; don't write to
        them until this returns.

        Args:
            weights: A mapping of names (FQNs) to tensors such as a state dict, (name, tensor)
                pairs, or the path of a `.safetensors` file or torch checkpoint.
            partial: Keep the current values of names that are not given. Otherwise every parameter
                and buffer of the module's `state_dict()` that the model uses must be given.
            strict: Refuse names that neither the model nor the compiled module has. Otherwise the
                report lists them as `ignored`. A package that `compile_package` made knows the
                module's names. A package of torch's does not: names that its graph does not use
                are unknown there, and so are values that were compiled into the code.
            fold: Compute now what the model folds from its constants, and not in the first request.
            barrier: "drain" lets queued requests wait. "abort" fails them with UpdateAbortedError.
            keep_previous: Keep the old set in memory, for `rollback`.
            check_finite: Refuse NaN and infinities.
            timeout: Seconds for all of it. When they pass, nothing has changed.

        Raises:
            ConstantMismatchError: The set does not fit. Every fault is listed, and nothing changed.
            WeightsFileError, WeightsTypeError: The weights can't be read.
            UpdateError: This model's weights can't be updated live.
            MemoryLimitError: Two sets do not fit into the device's `memory_limit`.
            DeadlineExceededError: The timeout passed.
            RunnerClosedError: The runner is closing.
            LeaseError: This task itself holds a lease of the runner, or a session that the update
                waits for, and would wait for ever.
        """
        self._must_not_wait_for_own_lease("update()")
        self._router.sessions.must_not_wait_for_own("update()")
        reports = await self._updates.update(
            {self._router: weights},
            StageOptions(partial, strict, fold, check_finite),
            barrier=barrier,
            keep_previous=keep_previous,
            timeout=timeout,
        )
        return reports[self._router]

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
        """Write the new set beside the one that serves: the first half of `update`.

        A previous set that was kept there is gone.

        Raises:
            LeaseError: This task itself has a session that the call waits for.
            AotiSchedError: As `update`.
        """
        self._router.sessions.must_not_wait_for_own("stage()")
        options = StageOptions(partial, strict, fold, check_finite)
        if self._router.holders.held:  # folding takes a slot
            self._router.holders.watch()
        await self._updates.stage(self._router, weights, options, timeout=timeout)

    async def commit(
        self,
        *,
        barrier: Barrier = "drain",
        keep_previous: bool = True,
        timeout: float | None = None,
    ) -> UpdateReport:
        """Publish the staged set: the second half of `update`.

        Raises:
            UpdateError: Nothing is staged.
        """
        self._must_not_wait_for_own_lease("commit()")
        reports = await self._updates.commit(
            [self._router], barrier=barrier, keep_previous=keep_previous, timeout=timeout
        )
        return reports[self._router]

    async def discard(self) -> None:
        """Drop the staged set and free its memory. Without one, nothing happens."""
        await self._updates.free(self._router, Inactive.STAGED)

    async def rollback(
        self,
        *,
        barrier: Barrier = "drain",
        timeout: float | None = None,
    ) -> UpdateReport:
        """Go back to the previous set and its epoch. A second rollback returns to the set left.

        Raises:
            UpdateError: No previous set is kept. There was no update, `keep_previous` was off, or
                another set was staged since.
        """
        self._must_not_wait_for_own_lease("rollback()")
        reports = await self._updates.rollback([self._router], barrier=barrier, timeout=timeout)
        return reports[self._router]

    async def free_previous(self) -> None:
        """Free the memory of the previous set. No rollback is possible then.

        Sessions that keep the previous set end first, as before an update.

        Raises:
            LeaseError: This task itself has a session that the call waits for.
        """
        self._router.sessions.must_not_wait_for_own("free_previous()")
        await self._updates.free(self._router, Inactive.PREVIOUS)

    def constants(self) -> dict[str, ConstantSpec]:
        """What can be updated, and what is folded from it, by FQN."""
        return {spec.fqn: spec for spec in self._replica.constants}

    async def extract(self, *, inactive: bool = False) -> dict[str, Any]:
        """Return copies of the weights that serve, or of the inactive set, by FQN.

        The result is a full set for `update`. It has every constant that is not computed from
        others, each under one name, with non-persistent buffers and tensors that the compiler made.

        Raises:
            UpdateError: There is no inactive set.
        """
        return await self._updates.extract(self._router, inactive=inactive)

    # --- leaving ---------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Refuse new requests, and wait until all accepted ones and held leases have ended."""
        self._must_be_here()
        self._must_not_wait_for_own_lease("drain()")
        drains = [
            each for replica in self._router.replicas for each in replica.drain(terminate=False)
        ]
        await asyncio.shield(asyncio.gather(*drains))

    async def aclose(self) -> None:
        """Drain, then free the model.

        The close is shielded from cancellation. Closing twice waits for the same end.
        """
        self._must_be_here()
        self._must_not_wait_for_own_lease("aclose()")
        await self._close(self, False)

    async def terminate(self) -> None:
        """Fail what is queued with RunnerClosedError, wait for what runs, then free the model."""
        self._must_be_here()
        await self._close(self, True)

    def _must_not_wait_for_own_lease(self, call: str) -> None:
        """Check that this task does not wait for the end of a lease that it holds."""
        holders = self._router.holders
        if holders.held:
            holders.must_hold_none(call)
            holders.watch()

    def _must_be_here(self) -> None:
        if _get_running_loop() is not self._router.loop:
            raise wrong_loop(self.name)


class _NotOfViews:
    """An attribute of runners that views lack. Reading it on a view raises AttributeError.

    A descriptor costs nothing where `__getattr__` would slow down each request.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, view: RunnerView | None, kind: type) -> None:
        if view is None:
            raise AttributeError(f"type object {kind.__name__!r} has no attribute {self._name!r}")
        raise AttributeError(
            f"{view!r}: options() gives a view, and {self._name!r} belongs to the runner. "
            "Use it on the runner that load() returned."
        )


for _name in [name for name in vars(Runner) if not name.startswith("_")]:
    setattr(RunnerView, _name, _NotOfViews(_name))


def set_timeout(runner: Runner, seconds: float | None) -> None:
    """Give a runner another default timeout. Views and leases made before keep theirs."""
    runner._options = msgspec.structs.replace(runner._options, timeout=seconds)  # noqa: SLF001


def router_of(runner: Runner) -> Router:
    """Return a runner's replicas; for the scheduler, and for tests."""
    return runner._router  # noqa: SLF001 -- the one door from the face to the engine
