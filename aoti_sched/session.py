"""Session: requests that all run on the weights that the session began with."""

from __future__ import annotations

from asyncio import _get_running_loop
from typing import TYPE_CHECKING, Generic

import msgspec

from aoti_sched import arguments
from aoti_sched.errors import ConfigError, RunnerClosedError
from aoti_sched.handle import Handle, Options, wrong_loop
from aoti_sched.queue.runner_state import Phase
from aoti_sched.signature import P, R

if TYPE_CHECKING:
    from types import TracebackType

    from aoti_sched.engine.future import RunFuture
    from aoti_sched.engine.router import Router
    from aoti_sched.engine.sessions import Pin


class Session(Handle["Session[P, R]", P, R]):
    """Requests on one set of weights. They are queued and batched as those of the runner are.

    Between its requests a session holds nothing but its set of weights.
    """

    __slots__ = ("_pin",)

    def __init__(self, router: Router, options: Options, pin: Pin) -> None:
        first = router.replicas[0]
        super().__init__(router, first, first.state, options)
        self._pin = pin

    @property
    def epoch(self) -> int:
        """The epoch that all its requests see."""
        return self._pin.epoch

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> RunFuture[R]:
        """Queue a run on the session's weights and return its future.

        Raises:
            EpochError: The session has ended. Or its weights are gone, since two more sets were
                published.
            LeaseError: This task holds a lease of the runner, and the weights of the session can't
                serve before its end.
            AotiSchedError: As `Runner.submit`.
        """
        router, pin = self._router, self._pin
        router.sessions.must_go_on(pin)
        self._replica, self._source = router.place_of(pin.epoch)
        if router.holders.held and self._source is not self._replica.state:
            router.holders.must_hold_none("a request of a session that is behind")
        future = super().submit(*args, **kwargs)
        router.sessions.took(pin, future)
        return future

    def end(self) -> None:
        """End the session. Its accepted requests are finished. Ending twice is fine."""
        self._router.sessions.end(self._pin)

    def _with(self, options: Options) -> Session[P, R]:
        if options.min_epoch != self._pin.epoch:
            raise ConfigError(
                f"runner {self._router.name!r}: options(min_epoch=) of a session: its requests "
                f"run on epoch {self._pin.epoch}"
            )
        return Session(self._router, options, self._pin)


class SessionContext(Generic[P, R]):
    """Begins a session on entry, and ends it on exit."""

    __slots__ = ("_blocks_updates", "_options", "_router", "_session")

    def __init__(self, router: Router, options: Options, blocks_updates: bool) -> None:
        self._router = router
        self._options = options
        self._blocks_updates = arguments.flag("session(blocks_updates=)", blocks_updates)
        self._session: Session[P, R] | None = None

    async def __aenter__(self) -> Session[P, R]:
        router, options = self._router, self._options
        if _get_running_loop() is not router.loop:
            raise wrong_loop(router.name)
        if not any(one.state.phase is Phase.OPEN for one in router.serving):
            raise RunnerClosedError(f"runner {router.name!r} takes no requests any more")
        if options.min_epoch > router.epoch:
            raise ConfigError(
                f"runner {router.name!r}: options(min_epoch={options.min_epoch}).session(): epoch "
                f"{router.epoch} serves. Begin the session when that epoch is published"
            )
        pin = router.sessions.begin(blocks_updates=self._blocks_updates)
        its = msgspec.structs.replace(options, min_epoch=pin.epoch, pinned=True)
        self._session = Session(router, its, pin)
        return self._session

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """End the session if it has begun. Ending twice is fine."""
        if self._session is not None:
            self._session.end()
            self._session = None
