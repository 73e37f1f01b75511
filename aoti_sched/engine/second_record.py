"""Second record: holds the requests of a replica's sessions that are behind.

`queue/weight_turns.py` decides which of the two records serves. This file exchanges the weights
when the queue asks for a turn, and lets a change of the weights wait until the first record serves.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from aoti_sched.backends.contracts import Container
    from aoti_sched.engine.dispatcher import Dispatcher
    from aoti_sched.errors import AotiSchedError
    from aoti_sched.queue.job import Job
    from aoti_sched.queue.runner_state import RunnerState


SUFFIX = " (sessions)"
"""Ends the name of a second record, and the name of no model."""


class SecondRecord:
    """The second record of one replica. Made while the replica's barrier is reached.

    Args:
        main: The first record.
        dispatcher: The device's.
        container: The loaded model.
        move: Submits a withdrawn request where it belongs now.
        retire: Called with a reason and an error where the weights can't be exchanged.

    Attributes:
        state: The record, in the queue of the replica's device.
    """

    def __init__(
        self,
        main: RunnerState,
        dispatcher: Dispatcher,
        container: Container,
        *,
        move: Callable[[Job], None],
        retire: Callable[[str, BaseException], None],
    ) -> None:
        self._main = main
        self._dispatcher = dispatcher
        self._queue = dispatcher.queue
        self._container = container
        self._retire = retire
        self._move = move
        self._waits: list[asyncio.Future[None]] = []
        self.state = self._queue.add_behind(main, main.name + SUFFIX, dispatcher.now())
        dispatcher.on_turn[self._main.name] = self._exchange

    def keep_epoch(self) -> None:
        """Have the epoch that ends. The requests for the epoch before go where that is now."""
        self._dispatcher.moves(self.state, self._move)
        self._dispatcher.tell(self._queue.keep_epoch, self._main)

    def revoke(self, error: AotiSchedError) -> None:
        """Fail the requests that wait here, since their weights are about to be gone."""
        if self._is_removed:
            return
        now = self._dispatcher.now()
        self._dispatcher.perform(self._queue.revoke_behind(self._main, now, error))

    async def hold(self) -> None:
        """Let no turn begin, and wait until the first record serves."""
        if self._is_removed:
            return
        self._dispatcher.tell(self._queue.hold_turns, self._main)
        try:
            while not self._main_serves():
                waits = asyncio.get_running_loop().create_future()
                self._waits.append(waits)
                await waits
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let turns begin again."""
        if not self._is_removed:
            self._dispatcher.tell(self._queue.release_turns, self._main)

    @property
    def _is_removed(self) -> bool:
        return self._main not in self._queue.turns

    def _main_serves(self) -> bool:
        """Return whether the first record serves; also if nothing will serve any more."""
        turns = self._queue.turns.get(self._main)
        if turns is None or turns.broken:
            return True
        return turns.serving is self._main and not turns.turning

    def _exchange(self) -> None:
        try:
            self._container.swap()
        except BaseException as error:  # noqa: BLE001 -- no request may run on the wrong weights
            self._retire("container can't exchange its weights", error)
            exchanged = False
        else:
            exchanged = True
        now = self._dispatcher.now()
        self._dispatcher.perform(self._queue.turned(self._main, now, exchanged=exchanged))
        if self._main_serves():
            waits, self._waits = self._waits, []
            for one in waits:
                if not one.done():
                    one.set_result(None)
