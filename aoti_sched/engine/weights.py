"""Live weights: the transaction that brings new constants between two requests, on one runner or on many at once.

The order of events: stage into the inactive buffers, off the loop, while runs go on; fold what is computed from
constants, holding a lease; close the barrier of every runner concerned; once all slots are home, swap all and open
the barriers on the new epochs, in one piece of code that nothing can come between. Whatever fails or is given up
before the swap leaves every runner on the epoch that it serves.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import threading
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import anyio
import anyio.lowlevel
import msgspec

from aoti_sched import arguments
from aoti_sched.backends.reading import Abandoned, Reading
from aoti_sched.engine.parking import claim
from aoti_sched.engine.worker import in_worker
from aoti_sched.errors import DeadlineExceededError, RunnerClosedError, UpdateError
from aoti_sched.events import log
from aoti_sched.foreign import own, said
from aoti_sched.queue.runner_state import Phase

if TYPE_CHECKING:
    from aoti_sched.backends.contracts import StagedSet
    from aoti_sched.engine.dispatcher import Clock
    from aoti_sched.engine.parking import Parking
    from aoti_sched.runner import Runner

_T = TypeVar("_T")

Barrier = Literal["drain", "abort"]
"""What happens to queued requests while the weights change: they wait, or they fail with UpdateAbortedError."""


class UpdateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an update, commit or rollback did to one runner. Times are in seconds.

    `stage_seconds` and `fold_seconds` passed while requests were served (they are 0.0 for a rollback). From
    `drain_seconds` (waiting for runs and leases that were under way) and `swap_seconds` comes `pause_seconds`: how long the
    barrier was closed. `waited` is how many requests were queued when it opened. `ignored` are the names that were given and
    are of no use to the model: the module has them and the compiled graph does not use them, or `strict` was off.
    """

    runner: str
    epoch: int
    bytes: int
    stage_seconds: float
    fold_seconds: float
    drain_seconds: float
    swap_seconds: float
    pause_seconds: float
    waited: int
    ignored: tuple[str, ...] = ()


class Inactive(enum.Enum):
    """What the inactive buffer of a container holds."""

    NOTHING = "nothing"
    STAGED = "a staged set"
    PREVIOUS = "the previous set"


class LiveWeights:
    """A runner's side of its updates: whose turn it is, and what the inactive buffer holds."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()  # one writer per container, in the order of their calls
        self.inactive = Inactive.NOTHING
        self.previous_epoch = 0
        self.staged = _Staged()
        self.attempt: _Attempt | None = None  # the one that has the turn and reads weights

    @property
    def is_empty(self) -> bool:
        return self.inactive is Inactive.NOTHING


class _Staged(msgspec.Struct):
    """What staging cost."""

    bytes: int = 0
    stage_seconds: float = 0.0
    fold_seconds: float = 0.0
    ignored: tuple[str, ...] = ()


class _Attempt:
    """One call on its way. It can be given up until it is settled."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.settled = False
        self.waits = False  # for its turn at a runner: another attempt has it
        self.closes = ""  # the name of a runner of it that does: nothing more is read
        self.reads: Runner | None = None  # whose weights are read now,
        self.leave: Callable[[], None] | None = None  # and how to leave their source

    async def settle(self) -> None:
        """From here it takes effect. Who gave it up was told that it does not: then it ends here."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        self.settled = True


class Updates:
    """Changes the weights of one scheduler's runners, of each on all its devices.

    What is begun with a runner is carried out on its replicas. One that leaves on the way is left out from there on, as long as others
    serve in its place.

    Args:
        start: Runs a coroutine to its end in the scheduler's task group.
        parking: Brings back those that are parked.
        limiter: Of the threads that stage, fold and free.
        clock: The scheduler's.
    """

    def __init__(
        self,
        start: Callable[[Callable[[], Awaitable[Any]]], asyncio.Future[Any]],
        parking: Parking,
        limiter: anyio.CapacityLimiter,
        clock: Clock,
    ) -> None:
        self._start = start
        self._parking = parking
        self._limiter = limiter
        self._clock = clock

    async def update(
        self,
        changes: Mapping[Runner, object],
        *,
        partial: bool,
        strict: bool,
        fold: bool,
        check_finite: bool,
        barrier: Barrier,
        keep_previous: bool,
        timeout: float | None,  # noqa: ASYNC109 -- on the scheduler's clock
    ) -> dict[Runner, UpdateReport]:
        arguments.flags(
            "update",
            partial=partial,
            strict=strict,
            fold=fold,
            check_finite=check_finite,
            keep_previous=keep_previous,
        )
        _check_barrier("update", barrier)
        each = {
            replica: weights
            for runner, given in changes.items()
            for replica, weights in _shares(runner, given)
        }

        async def work(attempt: _Attempt) -> dict[Runner, UpdateReport]:
            staged: list[Runner] = []
            async with self._turns(each, attempt=attempt):
                try:
                    for replica, weights in each.items():
                        await self._stage(
                            attempt,
                            replica,
                            weights,
                            partial=partial,
                            strict=strict,
                            fold=fold,
                            check_finite=check_finite,
                        )
                        staged.append(replica)
                    return await self._commit(attempt, staged, barrier, keep_previous=keep_previous)
                finally:
                    await self._drop(staged, Inactive.STAGED)

        return _of_each(changes, await self._carry_out("update", changes, work, timeout))

    async def stage(
        self,
        runner: Runner,
        weights: object,
        *,
        partial: bool,
        strict: bool,
        fold: bool,
        check_finite: bool,
        timeout: float | None,  # noqa: ASYNC109
    ) -> None:
        arguments.flags(
            "stage", partial=partial, strict=strict, fold=fold, check_finite=check_finite
        )
        each = _shares(runner, weights)

        async def work(attempt: _Attempt) -> None:
            staged: list[Runner] = []
            async with self._turns([replica for replica, _ in each], attempt=attempt):
                try:
                    for replica, share in each:
                        await self._stage(
                            attempt,
                            replica,
                            share,
                            partial=partial,
                            strict=strict,
                            fold=fold,
                            check_finite=check_finite,
                        )
                        staged.append(replica)
                    await attempt.settle()
                except BaseException:
                    await self._drop(staged, Inactive.STAGED)
                    raise

        await self._carry_out("stage", [runner], work, timeout)

    async def commit(
        self,
        runners: Sequence[Runner],
        *,
        barrier: Barrier,
        keep_previous: bool,
        timeout: float | None,  # noqa: ASYNC109
    ) -> dict[Runner, UpdateReport]:
        arguments.flags("commit", keep_previous=keep_previous)
        _check_barrier("commit", barrier)
        runners = list(dict.fromkeys(runners))
        each = _serving(runners)

        async def work(attempt: _Attempt) -> dict[Runner, UpdateReport]:
            async with self._turns(
                each, needed=False, attempt=attempt
            ):  # one that is parked has nothing staged
                return await self._commit(attempt, each, barrier, keep_previous=keep_previous)

        return _of_each(runners, await self._carry_out("commit", runners, work, timeout))

    async def rollback(
        self,
        runners: Sequence[Runner],
        *,
        barrier: Barrier,
        timeout: float | None,  # noqa: ASYNC109
    ) -> dict[Runner, UpdateReport]:
        _check_barrier("rollback", barrier)
        runners = list(dict.fromkeys(runners))
        each = _serving(runners)

        async def work(attempt: _Attempt) -> dict[Runner, UpdateReport]:
            async with self._turns(each, needed=False, attempt=attempt):  # nor a previous set
                replicas = _present(each)
                for replica in replicas:
                    _must_hold(replica, Inactive.PREVIOUS, "rollback() has nothing to go back to")
                epochs = {replica: replica.weights.previous_epoch for replica in replicas}
                for replica in replicas:
                    replica.weights.staged = _Staged()
                return await self._publish(attempt, epochs, barrier)

        return _of_each(runners, await self._carry_out("rollback", runners, work, timeout))

    async def free(self, runner: Runner, held: Inactive) -> None:
        """Give back the inactive buffer's memory, if that is what it holds."""

        each = _serving([runner])

        async def work(_: _Attempt) -> None:
            async with self._turns(each, needed=False):  # one that is parked keeps nothing
                for replica in _present(each):
                    _must_be_open(replica)
                    if replica.weights.inactive is held:
                        await self._free_inactive(replica)

        await self._carry_out("free", [runner], work, None)

    async def renew(self, runner: Runner) -> None:
        """Put a fresh container with the current weights in the place of one whose runs fail. What is queued waits for it.

        A staged or previous set is gone then.
        """
        async with self._turns([runner], needed=False):
            if runner.state.phase is not Phase.OPEN or not runner.state.memory.is_here:
                return  # one that is parked comes back in a fresh container
            reached = runner.dispatcher.close_barrier(runner.state, abort=False)
            try:
                await self._rebuild(runner, reached, "its runs failed", usable=True)
            except Exception as error:  # noqa: BLE001 -- what there was serves on
                log.error(
                    "container can't be rebuilt", runner=runner.name, error=error, exc_info=error
                )

    async def extract(self, runner: Runner, *, inactive: bool) -> dict[str, Any]:
        arguments.flags("extract", inactive=inactive)
        each = _serving([runner])

        async def work(_: _Attempt) -> dict[str, Any]:
            async with self._turns(each):
                one = _present(each)[0]  # they all have the same
                _must_be_open(one)
                if inactive and one.weights.inactive is Inactive.NOTHING:
                    raise UpdateError(
                        f"runner {runner.name!r}: extract(inactive=True), but the inactive buffer holds nothing"
                    )
                extract = one.container.extract
                return await self._in_thread(lambda: extract(inactive=inactive))

        return await self._carry_out("extract", [runner], work, None)

    def leave_sources(self, runner: Runner) -> None:
        """A runner closes: a foreign source that is read for an update of it is not waited for.

        One that is absent is left out of the update, and the source is left only when it is read for this very one.
        """
        attempt = runner.weights.attempt
        if attempt is None or (runner.absent and attempt.reads is not runner):
            return
        attempt.closes = "" if runner.absent else runner.name
        if attempt.leave is not None:
            attempt.leave()
        elif attempt.waits and attempt.closes:  # another attempt may read for ever
            attempt.scope.cancel()

    # --- the steps -----------------------------------------------------------------------------------

    async def _stage(
        self,
        attempt: _Attempt,
        runner: Runner,
        weights: object,
        *,
        partial: bool,
        strict: bool,
        fold: bool,
        check_finite: bool,
    ) -> None:
        try:
            if not runner.absent:
                await self._stage_here(
                    attempt,
                    runner,
                    weights,
                    partial=partial,
                    strict=strict,
                    fold=fold,
                    check_finite=check_finite,
                )
        except Exception as error:
            if not runner.absent:
                raise
            log.warning(
                "weights not staged where none are wanted", device=runner.device, error=error
            )

    async def _stage_here(
        self,
        attempt: _Attempt,
        runner: Runner,
        weights: object,
        *,
        partial: bool,
        strict: bool,
        fold: bool,
        check_finite: bool,
    ) -> None:
        _must_be_open(runner)
        container, live = runner.container, runner.weights
        if container.updatable:
            raise UpdateError(
                f"runner {runner.name!r}: its weights can't be updated live: {container.updatable}"
            )
        if not container.inactive_bytes:
            await claim(runner.dispatcher, runner.state.memory, container.constant_bytes)
        began = self._clock.time()
        with _overwriting(runner):
            written = await _read(
                runner,
                attempt,
                lambda reading: container.stage(
                    weights,
                    partial=partial,
                    strict=strict,
                    check_finite=check_finite,
                    reading=reading,
                ),
            )
        live.inactive = Inactive.STAGED
        staged = self._clock.time()
        try:
            if fold and container.folds:
                await self._fold(runner)
        except BaseException:
            await self._drop([runner], Inactive.STAGED)
            raise
        live.staged = _Staged(
            written.bytes, staged - began, self._clock.time() - staged, ignored=written.ignored
        )

    async def _fold(self, runner: Runner) -> None:
        """Fold the inactive buffer. That takes an instance, so it holds a lease."""
        reached = None
        _must_be_open(runner)
        try:
            async with runner.lease_for_update():
                try:
                    await self._in_thread(runner.container.fold)
                except Exception:
                    # The runtime leaves the instance it folded with on the inactive buffer: nothing may start there.
                    reached = runner.dispatcher.close_barrier(runner.state, abort=False)
                    raise
        except Exception:
            if reached is not None:
                with anyio.CancelScope(shield=True):
                    await self._rebuild(runner, reached, "folding constants failed", usable=False)
            raise

    async def _rebuild(
        self, runner: Runner, reached: asyncio.Future[None], why: str, *, usable: bool
    ) -> None:
        """Behind a barrier, put a fresh container with the current weights in the place of one that is not, or hardly, `usable`."""
        await reached
        runner.weights.inactive = Inactive.NOTHING
        try:
            await self._in_thread(runner.container.rebuild)
        except Exception as error:
            if not usable:  # nothing is to run on it when the barrier opens
                _retire(runner, "container can't be rebuilt", error)
            raise
        finally:
            runner.dispatcher.open_barrier(runner.state, None)
        log.warning("container rebuilt", runner=runner.name, why=why)

    async def _commit(
        self, attempt: _Attempt, runners: Sequence[Runner], barrier: Barrier, *, keep_previous: bool
    ) -> dict[Runner, UpdateReport]:
        runners = _present(runners)
        for runner in runners:
            _must_hold(
                runner,
                Inactive.STAGED,
                "commit() has nothing to publish; call stage(weights) first",
            )
        reports = await self._publish(attempt, {r: r.state.published + 1 for r in runners}, barrier)
        if not keep_previous:
            await self._drop(list(reports), Inactive.PREVIOUS)
        return reports

    async def _publish(
        self, attempt: _Attempt, epochs: Mapping[Runner, int], barrier: Barrier
    ) -> dict[Runner, UpdateReport]:
        """Swap every runner's buffers at one instant, and let them go on, each on its epoch."""
        closing = runners = _in_order(epochs)
        for runner in runners:
            _must_be_open(runner)
        closed = self._clock.time()
        reached = [r.dispatcher.close_barrier(r.state, abort=barrier == "abort") for r in runners]
        try:
            for one in reached:
                await one
            await attempt.settle()
            drained = self._clock.time()
            runners = _present(runners)
            _swap_all(runners)
        except BaseException:
            for runner in closing:
                runner.dispatcher.open_barrier(runner.state, None)
            raise
        # From the exchange to the end there is nothing that waits: no request comes between the runners.
        swapped = self._clock.time()
        reports = {}
        for runner in runners:
            live = runner.weights
            live.inactive, live.previous_epoch = Inactive.PREVIOUS, runner.epoch
            reports[runner] = UpdateReport(
                runner=runner.name,
                epoch=epochs[runner],
                drain_seconds=drained - closed,
                swap_seconds=swapped - drained,
                pause_seconds=swapped - closed,
                waited=len(runner.state.queue) + len(runner.state.gate),
                **msgspec.structs.asdict(live.staged),
            )
        for runner in closing:
            runner.dispatcher.open_barrier(
                runner.state, epochs[runner] if runner in reports else None
            )
        for runner in runners:
            report = msgspec.structs.asdict(reports[runner])
            report["ignored"] = len(report["ignored"])
            log.info("weights published", device=runner.device, **report)
        return reports

    async def _free_inactive(self, runner: Runner) -> None:
        with _overwriting(runner):
            await self._in_thread(runner.container.free_inactive)

    async def _drop(self, runners: Sequence[Runner], held: Inactive) -> None:
        """Free what nobody wants any more. What comes of it changes nothing for who waits for the outcome."""
        with anyio.CancelScope(shield=True):
            for runner in runners:
                if runner.weights.inactive is not held:
                    continue
                try:
                    await self._free_inactive(runner)
                except Exception as error:  # noqa: BLE001 -- the memory is written over by the next update
                    log.warning("weights can't be freed", runner=runner.name, error=error)
                    if held is Inactive.STAGED:
                        runner.weights.inactive = Inactive.NOTHING  # it is not to be published

    # --- how they are carried out --------------------------------------------------------------------

    @asynccontextmanager
    async def _turns(
        self,
        runners: Sequence[Runner] | Mapping[Runner, object],
        *,
        needed: bool = True,
        attempt: _Attempt | None = None,
    ) -> AsyncIterator[None]:
        """Be the one that may change the weights of all these runners, which are in memory if they are `needed`."""
        attempt = attempt or _Attempt()
        async with AsyncExitStack() as stack:
            attempt.waits = True
            for runner in _in_order(runners):
                await stack.enter_async_context(runner.weights.turn)
                stack.callback(setattr, runner.weights, "attempt", None)
                runner.weights.attempt = attempt
                if (
                    not runner.absent and len(runners) > 1
                ):  # before it waits for the turn of the next
                    _must_be_open(runner)
                await stack.enter_async_context(self._parking.at_home(runner, needed=needed))
            attempt.waits = False
            yield

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        """A blocking call; it goes on to its end when it is given up, and so does its caller."""
        return await in_worker(call, self._limiter, "changing the weights")

    async def _carry_out(
        self,
        what: str,
        runners: Sequence[Runner] | Mapping[Runner, object],
        work: Callable[[_Attempt], Awaitable[_T]],
        timeout: float | None,  # noqa: ASYNC109
    ) -> _T:
        """Let the scheduler do the work. The caller may leave, or run out of time: then it is given up where it can be."""
        if not runners:
            raise UpdateError(f"{what}: no runner was given")
        timeout = arguments.timeout(f"{what}(timeout=)", timeout)
        for runner in _serving(runners):
            _must_be_open(runner)
        attempt = _Attempt()
        late = asyncio.get_running_loop().create_future()

        async def within() -> list[_T]:
            with attempt.scope:
                return [await work(attempt)]
            if attempt.closes:
                raise _closing(attempt.closes)
            return []  # given up

        def expire() -> None:
            if not attempt.settled:
                attempt.scope.cancel()
                late.set_result(None)

        outcome = self._start(within)
        timer = (
            None if timeout is None else self._clock.call_at(self._clock.time() + timeout, expire)
        )
        try:
            await asyncio.wait({outcome, late}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if not attempt.settled:
                attempt.scope.cancel()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if late.done():
            names = ", ".join(repr(runner.name) for runner in runners)
            raise DeadlineExceededError(
                f"{what} of {names}: the timeout of {timeout:.15g} s passed; nothing has changed"
            )
        (result,) = outcome.result()
        return result  # type: ignore[no-any-return]


async def _read(
    runner: Runner, attempt: _Attempt, call: Callable[[Reading], StagedSet]
) -> StagedSet:
    """Let a container read its weights in a thread of its own, which is left behind where foreign code does not come back.

    Raises:
        UpdateError: No thread can be started, or the source has raised what is no `Exception`.
        RunnerClosedError: The runner, or another one of the same update, closes.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[StagedSet] = loop.create_future()
    reading = Reading()

    def finish(written: StagedSet | None, error: BaseException | None) -> None:
        if done.done():
            return
        if written is not None:
            done.set_result(written)
        elif isinstance(error, Abandoned):
            done.set_exception(_closing(attempt.closes or runner.name))
        elif error is not None:
            done.set_exception(
                own(error, UpdateError, f"runner {runner.name!r}: the source of its weights")
            )

    def work() -> None:
        written: StagedSet | None = None
        error: BaseException | None = None
        try:
            written = call(reading)
        except BaseException as caught:  # noqa: BLE001 -- it is the update's
            if isinstance(caught, Abandoned) and reading.abandon():
                return  # the owner has left
            error = caught
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, written, error)

    def leave() -> None:
        if reading.abandon():
            finish(None, Abandoned())

    if attempt.closes:
        raise _closing(attempt.closes)
    thread = threading.Thread(target=work, name=f"aoti weights of {runner.name}", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise UpdateError(
            f"runner {runner.name!r}: no thread can be started to read its weights: {error}. Try again later."
        ) from error
    attempt.reads, attempt.leave = runner, leave
    try:
        await asyncio.wait({done})
    except asyncio.CancelledError:
        if not reading.abandon():  # code of ours runs: soon over
            with anyio.CancelScope(shield=True):
                await asyncio.wait({done})
            done.exception()
        raise
    finally:
        attempt.reads = attempt.leave = None
    return done.result()


def _closing(name: str) -> RunnerClosedError:
    return RunnerClosedError(f"runner {name!r} is closing; its weights can't be changed")


def _check_barrier(what: str, barrier: object) -> None:
    arguments.one_of(f"{what}(barrier=)", barrier, ("drain", "abort"))


def _serving(runners: Iterable[Runner]) -> list[Runner]:
    """Their replicas; where none is left, those there were, which say so."""
    return [replica for runner in runners for replica in runner.replicas or runner.loaded]


def _present(replicas: Sequence[Runner]) -> list[Runner]:
    """Those that have not left meanwhile."""
    return [replica for replica in replicas if not replica.absent]


def _shares(runner: Runner, weights: object) -> list[tuple[Runner, object]]:
    """The weights for each replica; what can be gone through only once is remembered for the next."""
    replicas = _serving([runner])
    if not isinstance(weights, Iterator) or len(replicas) == 1:
        return [(replica, weights) for replica in replicas]
    return list(zip(replicas, itertools.tee(weights, len(replicas)), strict=True))


def _of_each(
    runners: Iterable[Runner], reports: Mapping[Runner, UpdateReport]
) -> dict[Runner, UpdateReport]:
    """One report for each runner, of what its replicas' say."""
    return {
        runner: _together([reports[replica] for replica in runner.loaded if replica in reports])
        for runner in runners
    }


def _together(reports: list[UpdateReport]) -> UpdateReport:
    """Staged one after the other, published at one instant."""
    return msgspec.structs.replace(
        reports[0],
        bytes=sum(report.bytes for report in reports),
        stage_seconds=sum(report.stage_seconds for report in reports),
        fold_seconds=sum(report.fold_seconds for report in reports),
        waited=sum(report.waited for report in reports),
    )


def _in_order(runners: Sequence[Runner] | Mapping[Runner, object]) -> list[Runner]:
    """The one order in which several runners are locked and closed, so that two updates can't wait for each other."""
    return sorted(runners, key=lambda runner: (runner.device, runner.name))


@contextmanager
def _overwriting(runner: Runner) -> Iterator[None]:
    """Afterwards the inactive buffer holds nothing of what it held; unless this fails and has not touched it."""
    live = runner.weights
    held, live.inactive = live.inactive, Inactive.NOTHING
    try:
        yield
    except BaseException:
        if runner.container.inactive_ready:
            live.inactive = held
        raise


def _swap_all(runners: Sequence[Runner]) -> None:
    swapped: list[Runner] = []
    try:
        for runner in runners:
            runner.container.swap()
            swapped.append(runner)
    except BaseException:
        for runner in reversed(swapped):
            try:
                runner.container.swap()
            except BaseException as error:  # noqa: BLE001, PERF203 -- the error that led here is raised
                _retire(runner, "container can't go back to its weights", error)
        raise


def _retire(runner: Runner, why: str, error: BaseException) -> None:
    """Its container is not to be run again: better no answer than a wrong one. Other replicas have the right one."""
    log.error(why, runner=runner.name, device=runner.device, error=error, exc_info=error)
    if not runner.left and len(runner.whole.replicas) > 1:
        runner.whole.leave(runner, f"its {why} on {runner.device!r}: {said(error)}")
    runner.dispatcher.drain(runner.state, terminate=True)


def _must_be_open(runner: Runner) -> None:
    if runner.state.phase is not Phase.OPEN:
        raise RunnerClosedError(
            f"runner {runner.name!r} is {runner.state.phase.name.lower()}; its weights can't be changed"
        )


def _must_hold(runner: Runner, wanted: Inactive, otherwise: str) -> None:
    _must_be_open(runner)
    if runner.weights.inactive is not wanted:
        raise UpdateError(
            f"runner {runner.name!r}: {otherwise}: the inactive buffer holds {runner.weights.inactive.value}"
        )
