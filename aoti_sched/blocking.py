"""BlockingScheduler: the scheduler for programs without an event loop. Plain calls, any thread.

Scripts, notebooks and threaded servers call these objects as an asyncio program awaits those of
`scheduler.py`. The scheduler's loop runs in a thread of its own. Nothing is decided here: every
call is the call of the same name there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, overload

from aoti_sched.blocking_handles import (
    BlockingRunner,
    BlockingSplit,
    inner,
    inner_shares,
    inners,
)
from aoti_sched.engine.loop_thread import LoopThread
from aoti_sched.errors import AotiSchedError, UnsupportedLoopError
from aoti_sched.scheduler import Scheduler
from aoti_sched.signature import P, R

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Concatenate

    from typing_extensions import Self, Unpack

    from aoti_sched.apply import ConfigReport
    from aoti_sched.backends.contracts import Device
    from aoti_sched.config import SchedulerConfig
    from aoti_sched.engine.dispatcher import Clock
    from aoti_sched.engine.weights.report import UpdateReport
    from aoti_sched.engine.weights.transaction import Barrier
    from aoti_sched.events import Observer
    from aoti_sched.expose.reports import Exposure
    from aoti_sched.flight import FlightRecord
    from aoti_sched.load_settings import LoadSettings, Package
    from aoti_sched.recording import Recording
    from aoti_sched.runner import Runner
    from aoti_sched.stats import SchedulerStats


class BlockingScheduler:
    """A `Scheduler` with plain calls, for programs without an event loop.

    Use it as `with BlockingScheduler() as scheduler:`, or call `start()` and, at the end,
    `close()`. Its event loop runs in a thread of its own, and any thread may call it. A scheduler
    that is still open when the main thread ends is terminated then.

    Args:
        config: Settings. The models in them are loaded by `start`.
        devices: Devices by name, in place of the machine's own (for tests).
        clock: A clock in place of the event loop's (for tests).

    Raises:
        ConfigError: A setting is of the wrong type or out of range; the message gives its path.
    """

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        *,
        devices: Mapping[str, Device] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._begin(Scheduler(config, devices=devices, clock=clock))

    @classmethod
    def from_config(
        cls,
        path: str | os.PathLike[str],
        *,
        devices: Mapping[str, Device] | None = None,
        clock: Clock | None = None,
    ) -> Self:
        """Make a scheduler as a TOML file describes it. Its models are loaded by `start`.

        Args:
            path: The file.
            devices: Devices by name, in place of the machine's own (for tests).
            clock: A clock in place of the event loop's (for tests).

        Raises:
            ConfigError: A setting is wrong; the message gives its path.
        """
        made = cls.__new__(cls)
        made._begin(  # noqa: SLF001
            Scheduler.from_config(path, devices=devices, clock=clock)
        )
        return made

    def _begin(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._thread = LoopThread("BlockingScheduler")

    def start(self) -> Self:
        """Start the thread, load the models of the settings, and return this scheduler.

        Raises:
            UnsupportedLoopError: It was started or closed before.
            ResourcesError: No thread can be started.
            AotiSchedError: As `load`; nothing is left behind then.
        """
        self._thread.start()
        _open.add(self)
        try:
            self._thread.call(self._scheduler.__aenter__)
        except BaseException:
            self._thread.stop()
            raise
        # Without references to this object, so that one which is forgotten ends its thread.
        weakref.finalize(self, _abandon, self._scheduler, self._thread).atexit = False
        return self

    def __enter__(self) -> Self:
        return self if self._thread.is_open else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.terminate()

    @property
    def runners(self) -> Mapping[str, BlockingRunner]:
        """The open runners by name, as they are now."""
        runners = self._thread.ask(lambda: dict(self._scheduler.runners))
        return {name: BlockingRunner(self, runner) for name, runner in runners.items()}

    def stats(self) -> SchedulerStats:
        """Return the numbers of every device and runner as they are now."""
        return self._thread.ask(self._scheduler.stats)

    def flight_record(self) -> FlightRecord:
        """Return the last facts of every device, as `Scheduler.flight_record` does."""
        return self._thread.ask(self._scheduler.flight_record)

    @overload
    def load(self, path: Package, **settings: Unpack[LoadSettings]) -> BlockingRunner: ...

    @overload
    def load(
        self,
        path: Package,
        *,
        signature: Callable[Concatenate[Any, P], R],
        **settings: Unpack[LoadSettings],
    ) -> BlockingRunner[P, R]: ...

    def load(self, path: Package, **settings: Any) -> BlockingRunner[Any, Any]:
        """Load a model and return its runner. `Scheduler.load` describes arguments and errors.

        A thread that is interrupted gives the load up.
        """
        runner = self._thread.call(lambda: self._scheduler.load(path, **settings))
        return BlockingRunner(self, runner)

    def update(
        self,
        changes: Mapping[BlockingRunner, object],
        *,
        partial: bool = False,
        strict: bool = True,
        fold: bool = True,
        barrier: Barrier = "drain",
        keep_previous: bool = True,
        check_finite: bool = False,
        timeout: float | None = None,
    ) -> dict[BlockingRunner, UpdateReport]:
        """Replace the weights of several runners at one instant, all or none."""
        weights = {inner(runner): weights for runner, weights in changes.items()}
        return self._reports(
            self._thread.call(
                lambda: self._scheduler.update(
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
        )

    def commit(
        self,
        *runners: BlockingRunner,
        barrier: Barrier = "drain",
        keep_previous: bool = True,
        timeout: float | None = None,
    ) -> dict[BlockingRunner, UpdateReport]:
        """Publish the staged weights of several runners at one instant, all or none."""
        its = inners(runners)
        return self._reports(
            self._thread.call(
                lambda: self._scheduler.commit(
                    *its, barrier=barrier, keep_previous=keep_previous, timeout=timeout
                )
            )
        )

    def rollback(
        self, *runners: BlockingRunner, barrier: Barrier = "drain", timeout: float | None = None
    ) -> dict[BlockingRunner, UpdateReport]:
        """Publish the previous weights of several runners again, at one instant, all or none."""
        its = inners(runners)
        return self._reports(
            self._thread.call(
                lambda: self._scheduler.rollback(*its, barrier=barrier, timeout=timeout)
            )
        )

    def apply(self, config: SchedulerConfig | str | os.PathLike[str]) -> ConfigReport:
        """Make the models those of a configuration, as `Scheduler.apply` does."""
        return self._thread.call(lambda: self._scheduler.apply(config))

    def split(
        self, name: str, shares: Mapping[BlockingRunner[..., Any], float], *, sticky: bool = False
    ) -> BlockingSplit:
        """Share out the requests of one name among runners, as `Scheduler.split` does."""
        its = inner_shares(shares)
        split = self._thread.ask(lambda: self._scheduler.split(name, its, sticky=sticky))
        return BlockingSplit(self, split)

    def add_observer(self, observer: Observer) -> None:
        """Let an observer see what happens, as `Scheduler.add_observer` does.

        The observer is called on the scheduler's own thread.
        """
        self._thread.ask(lambda: self._scheduler.add_observer(observer))

    def remove_observer(self, observer: Observer) -> None:
        """Let an observer see no more."""
        self._thread.ask(lambda: self._scheduler.remove_observer(observer))

    @contextmanager
    def record(self, limit: int = 100_000) -> Iterator[Recording]:
        """Record what happens for the duration of a block, as `Scheduler.record` does."""
        context = self._scheduler.record(limit)
        recording = self._thread.ask(context.__enter__)
        try:
            yield recording
        finally:
            self._thread.ask(lambda: context.__exit__(None, None, None))

    def expose(
        self, name: str | None = None, *, port: int | None = None, weights: bool = False
    ) -> Exposure:
        """Let other processes of this user look inside, as `Scheduler.expose` does."""
        return self._thread.call(lambda: self._scheduler.expose(name, port=port, weights=weights))

    def drain_device(self, device: str) -> None:
        """Take a device out of service, and return when no model is left there."""
        self._thread.call(lambda: self._scheduler.drain_device(device))

    def close(self) -> None:
        """Finish accepted requests, free every model and lane, and end the thread.

        A close that is interrupted goes on, and may be called again. Closing twice does nothing,
        and neither does closing in a forked child.
        """
        self._close(terminate=False)

    def terminate(self) -> None:
        """Fail queued requests with RunnerClosedError, wait for running requests, free the rest."""
        self._close(terminate=True)

    def _close(self, *, terminate: bool) -> None:
        thread, scheduler = self._thread, self._scheduler
        if thread.is_open:
            thread.call(scheduler.terminate if terminate else scheduler.aclose)
            thread.stop()
        _open.discard(self)

    def _reports(
        self, reports: Mapping[Runner, UpdateReport]
    ) -> dict[BlockingRunner, UpdateReport]:
        return {BlockingRunner(self, runner): report for runner, report in reports.items()}


# --- the end of the program -----------------------------------------------------------------------

_open: weakref.WeakSet[BlockingScheduler] = weakref.WeakSet()


def _abandon(scheduler: Scheduler, thread: LoopThread) -> None:
    """Close a scheduler that nothing refers to any more, and do not wait for it."""

    async def end() -> None:
        try:
            await scheduler.aclose()
        finally:
            thread.end_soon()

    if thread.is_open:
        with suppress(AotiSchedError):  # it ends meanwhile
            thread.start_soon(end)


def _terminate_all() -> None:
    """Terminate what is open when the main thread ends, while other threads can still be started.

    Threads that are no daemons are waited for later, and anyio's workers are such threads.
    """
    for scheduler in list(_open):
        with suppress(AotiSchedError, UnsupportedLoopError):
            scheduler.terminate()


# `atexit` is too late. The standard library's thread pools are ended in this way, too.
threading._register_atexit(_terminate_all)  # type: ignore[attr-defined]  # noqa: SLF001
