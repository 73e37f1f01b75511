"""Sessions: which epochs the sessions of a runner keep.

A session keeps the weights that it began with while a second set is published. From then on its
requests go to the second record of a replica's queue, which takes turns with the first
(`queue/weight_turns.py`). A container holds two sets. So before a third one is written, the
sessions that are behind end, or the update waits for them.
"""

from __future__ import annotations

import asyncio
import functools
import weakref
from typing import TYPE_CHECKING, Any

from aoti_sched.engine.callers import PATIENCE, caller
from aoti_sched.errors import EpochError, LeaseError
from aoti_sched.events import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from aoti_sched.engine.dispatcher import Clock


class Pin:
    """One session's hold on an epoch.

    Attributes:
        epoch: The epoch.
        blocks_updates: Whether an update waits for the session before it overwrites its weights.
        owner: The task or thread that began the session; a weak reference.
        ended: Why the session takes no requests any more; "" while it does.
        requests: How many of its requests have not ended. They keep the epoch, too.
    """

    __slots__ = ("blocks_updates", "ended", "epoch", "owner", "requests")

    def __init__(self, epoch: int, *, blocks_updates: bool) -> None:
        self.epoch = epoch
        self.blocks_updates = blocks_updates
        present = caller()
        self.owner = None if present is None else weakref.ref(present)
        self.ended = ""
        self.requests = 0


class Sessions:
    """The sessions of one runner.

    Args:
        name: The runner's.
        epoch: The epoch that serves.
        clock: The scheduler's.

    Attributes:
        epoch: The epoch that serves; kept up to date at each publication.
    """

    __slots__ = ("_clock", "_name", "_pins", "_waits", "_when_left", "epoch")

    def __init__(self, name: str, epoch: int, clock: Clock) -> None:
        self.epoch = epoch
        self._name = name
        self._clock = clock
        self._pins: set[Pin] = set()
        self._waits: list[asyncio.Future[None]] = []
        self._when_left: dict[int, list[Callable[[], object]]] = {}

    # --- for sessions ----------------------------------------------------------------------------

    def begin(self, *, blocks_updates: bool) -> Pin:
        """Begin a session on the epoch that serves."""
        pin = Pin(self.epoch, blocks_updates=blocks_updates)
        self._pins.add(pin)
        return pin

    def end(self, pin: Pin) -> None:
        """End a session. Its accepted requests are finished; ending twice is fine."""
        pin.ended = pin.ended or "the session has ended; call it inside its block"
        self._leave_if_over(pin)

    def took(self, pin: Pin, request: asyncio.Future[Any]) -> None:
        """Note that a session's request was accepted. The epoch is kept until it ends."""
        pin.requests += 1
        request.add_done_callback(functools.partial(self._request_ended, pin))

    def _request_ended(self, pin: Pin, request: asyncio.Future[Any]) -> None:
        del request
        pin.requests -= 1
        self._leave_if_over(pin)

    def _leave_if_over(self, pin: Pin) -> None:
        """Keep the epoch no longer if the session and its requests have ended."""
        if pin.requests or not pin.ended:
            return
        self._pins.discard(pin)
        for waits in self._waits:
            if not waits.done():
                waits.set_result(None)
        if not self.keeps(pin.epoch):
            for left in self._when_left.pop(pin.epoch, ()):
                left()

    def must_go_on(self, pin: Pin) -> None:
        """Check that a session takes requests.

        Raises:
            EpochError: It has ended, or its weights are gone.
        """
        if pin.ended:
            raise EpochError(f"runner {self._name!r}: {pin.ended}")

    def gone(self, epoch: int) -> EpochError:
        """Return the error of a request whose weights are gone."""
        return EpochError(f"runner {self._name!r}: {_gone(epoch)}")

    def is_behind(self, pin: Pin) -> bool:
        """Return whether a session's weights are not those that serve."""
        return pin.epoch != self.epoch

    # --- for updates -----------------------------------------------------------------------------

    def keeps(self, epoch: int) -> bool:
        """Return whether a session keeps an epoch."""
        return any(pin.epoch == epoch for pin in self._pins)

    def when_left(self, epoch: int, call: Callable[[], object]) -> None:
        """Call something once the last session of an epoch ends. There is one such now."""
        self._when_left.setdefault(epoch, []).append(call)

    def must_not_wait_for_own(self, call: str) -> None:
        """Check that the present task does not wait for the end of a session of its own.

        Raises:
            LeaseError: It would.
        """
        present = caller()
        owners = [pin.owner() for pin in self._blocking() if pin.owner and not pin.ended]
        if present is not None and present in owners:
            raise LeaseError(
                f"runner {self._name!r}: {call} would wait for ever: it waits for sessions with "
                "blocks_updates=True that are behind, and its caller has one. Leave the block first"
            )

    async def leave_behind(self) -> None:
        """Wait for the sessions that are behind and block updates; end the others that are."""
        timer = self._clock.call_at(self._clock.time() + PATIENCE, self._report)
        try:
            while self._blocking():
                waits = asyncio.get_running_loop().create_future()
                self._waits.append(waits)
                try:
                    await waits
                finally:
                    self._waits.remove(waits)
        finally:
            timer.cancel()
        for pin in list(self._pins):
            if self.is_behind(pin):
                pin.ended = _gone(pin.epoch)
                self._pins.remove(pin)

    def _report(self) -> None:
        count = len(self._blocking())
        if count:
            log.warning("an update waits for sessions", runner=self._name, sessions=count)

    def _blocking(self) -> list[Pin]:
        return [pin for pin in self._pins if pin.blocks_updates and self.is_behind(pin)]


def _gone(epoch: int) -> str:
    return (
        f"the weights of epoch {epoch} are gone: a session keeps its weights while one more set is "
        "published, and not two. Begin a new session, or begin it with blocks_updates=True, so "
        "that updates wait for it"
    )
