"""Replica: one model on one device.

Everything that works on "the model on this device" takes a Replica: dispatching, weights, eviction.
A runner's router (`router.py`) knows all replicas of the runner and tells each of them about the
others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from aoti_sched.engine.second_record import SecondRecord
from aoti_sched.engine.weights.live import Inactive, LiveWeights
from aoti_sched.errors import RunnerClosedError
from aoti_sched.events import log
from aoti_sched.foreign import said
from aoti_sched.queue.runner_state import Phase

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from aoti_sched.backends.contracts import Container
    from aoti_sched.engine.dispatcher import Dispatcher
    from aoti_sched.engine.sessions import Sessions
    from aoti_sched.model.batch_layout import Grouping
    from aoti_sched.model.call_spec import CallSpec
    from aoti_sched.model.input_check import Check
    from aoti_sched.model.specs import ConstantSpec
    from aoti_sched.queue.job import Job
    from aoti_sched.queue.runner_state import RunnerState
    from aoti_sched.stats import RunnerInfo, RunnerStats


class Replica:
    """One model on one device.

    Args:
        info: What is known of the model when it is loaded.
        state: Its state in the device's queue.
        container: The loaded model.
        call_spec: Turns arguments into tensors, and outputs into a result.
        input_check: Checks the tensors of a request.
        batch_layout: How requests become a batch; None without batching.
        dispatcher: The device's.
        blocks_when_full: Whether a request waits for room where a bound is reached.
        rebuild_on_failure: Whether the container is rebuilt after failing runs.
        not_evictable_because: Why the weights must stay in memory; "" when they may be evicted.

    Attributes:
        behind: Has the requests of sessions that are behind; None until there are such sessions.
    """

    __slots__ = (
        "_info",
        "batch_layout",
        "behind",
        "blocks_when_full",
        "call_spec",
        "capture_stream",
        "container",
        "device",
        "dispatcher",
        "inherit_stream",
        "input_check",
        "leave",
        "loop",
        "name",
        "not_evictable_because",
        "peers",
        "place_again",
        "rebuild_on_failure",
        "removed_because",
        "route",
        "sessions",
        "state",
        "threads",
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
        batch_layout: Grouping | None,
        dispatcher: Dispatcher,
        blocks_when_full: bool,
        rebuild_on_failure: bool,
        not_evictable_because: str,
    ) -> None:
        self._info = info
        self.name = info.name
        self.device = info.device
        self.threads = info.threads
        self.state = state
        self.container = container
        self.capture_stream = container.capture_stream
        self.inherit_stream = container.inherit_stream
        self.call_spec = call_spec
        self.input_check = input_check
        self.batch_layout = batch_layout
        self.dispatcher = dispatcher
        self.loop = dispatcher.loop
        self.blocks_when_full = blocks_when_full
        self.rebuild_on_failure = rebuild_on_failure
        self.not_evictable_because = not_evictable_because
        self.weights = LiveWeights()
        self.behind: SecondRecord | None = None
        self.removed_because = ""
        # The router of its runner sets these: the sessions of the runner, its replicas that take
        # requests, how a new job is routed where that is not always here, how a pinned job is
        # placed anew, and how this replica is taken out.
        self.sessions: Sessions
        self.peers: list[Replica] = [self]
        self.place_again: Callable[[Job], None] | None = None
        self.route: Callable[[Job], Replica] | None = None
        self.leave: Callable[[str], int] | None = None

    @property
    def is_removed(self) -> bool:
        """Return whether this replica takes no requests, and others serve in its place."""
        return bool(self.removed_because and self.peers)

    @property
    def epoch(self) -> int:
        """The epoch that serves."""
        return self.state.epoch

    @property
    def kept_epoch(self) -> int:
        """The epoch whose weights the inactive buffer keeps; 0 without one."""
        weights = self.weights
        return weights.previous_epoch if weights.inactive is Inactive.PREVIOUS else 0

    @property
    def constants(self) -> tuple[ConstantSpec, ...]:
        """The specs of the model's constants."""
        return self._info.constants

    @property
    def info(self) -> RunnerInfo:
        """What is known of the model now."""
        weights = self.weights
        return msgspec.structs.replace(
            self._info,
            epoch=self.epoch,
            staged=weights.inactive is Inactive.STAGED,
            previous_epoch=self.kept_epoch or None,
            inactive_bytes=self.container.inactive_bytes,
            cuda_graphs=self.container.graphs,
        )

    def stats(self) -> RunnerStats:
        """Return its numbers now and since its load."""
        return self.dispatcher.runner_stats(self.state)

    def must_be_open(self) -> None:
        """Check that the weights may be changed.

        Raises:
            RunnerClosedError: The replica drains or is closed.
        """
        if self.state.phase is not Phase.OPEN:
            raise RunnerClosedError(
                f"runner {self.name!r} is {self.state.phase.name.lower()}; "
                "its weights can't be changed"
            )

    def drain(self, *, terminate: bool) -> list[asyncio.Future[None]]:
        """Begin to drain (or terminate) it. The futures are done when nothing is left."""
        states = [self.state] if self.behind is None else [self.state, self.behind.state]
        return [self.dispatcher.drain(state, terminate=terminate) for state in states]

    def withdraw(self, move: Callable[[Job], None]) -> int:
        """Take out the queued jobs, and `move` each of them. Returns their number."""
        count = self.dispatcher.withdraw(self.state, move)
        if self.behind is not None:
            count += self.dispatcher.withdraw(self.behind.state, move)
        return count

    def keep_for_sessions(self) -> None:
        """Let the sessions of the epoch that ends go on with it.

        Called when the weights have been exchanged, and the next epoch does not serve yet.
        """
        move = self.place_again
        if move is None or (self.behind is None and not self.sessions.keeps(self.epoch)):
            return
        if self.behind is None:
            self.behind = SecondRecord(
                self.state, self.dispatcher, self.container, move=move, retire=self.retire
            )
        else:
            self.behind.keep_epoch()
        self.dispatcher.moves(self.state, move)
        self.dispatcher.tell(self.dispatcher.queue.withdraw_pinned, self.state)

    def refresh_memory_use(self) -> None:
        """Record how much of the device's memory the model uses, and whether it may be evicted."""
        container = self.container
        kept = "" if self.weights.is_empty else f"it keeps {self.weights.inactive.value}"
        inactive = container.constant_bytes if container.inactive_bytes else 0
        self.dispatcher.settle(
            self.state.memory,
            constants=container.constant_bytes,
            inactive=inactive,
            fixed=self.not_evictable_because or container.unparkable or kept,
        )

    def retire(self, why: str, error: BaseException) -> None:
        """Never run the container again, since its answers could be wrong.

        Other replicas take the requests.
        """
        log.error(why, runner=self.name, device=self.device, error=error, exc_info=error)
        if self.leave is not None and not self.removed_because and len(self.peers) > 1:
            self.leave(f"its {why} on {self.device!r}: {said(error)}")
        self.drain(terminate=True)
