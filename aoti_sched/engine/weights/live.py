"""The live weights of one replica: their lock, the inactive buffer, and the call under way.

The classes here are records. `staging.py` and `transaction.py` act on them.
"""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable


class Inactive(enum.Enum):
    """What the inactive buffer of a container holds."""

    NOTHING = "nothing"
    STAGED = "a staged set"
    PREVIOUS = "the previous set"


class Staged(msgspec.Struct):
    """What staging cost."""

    bytes: int = 0
    stage_seconds: float = 0.0
    fold_seconds: float = 0.0
    ignored: tuple[str, ...] = ()


class Attempt:
    """One call under way. Its caller may give it up until it is committed.

    Attributes:
        scope: Cancelled to give the attempt up.
        committed: Whether the attempt takes effect, so that it can't be given up any more.
        waits: Whether it waits for the lock of a replica.
        closing: The name of a runner of the attempt that closes, "" if none does. Nothing more is
            read then.
        reads: The live weights that are read for now.
        leave: Leaves the source that is read.
    """

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.committed = False
        self.waits = False
        self.closing = ""
        self.reads: LiveWeights | None = None
        self.leave: Callable[[], None] | None = None

    async def commit(self) -> None:
        """Let the attempt take effect from here on. One that was given up ends here."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        self.committed = True


class LiveWeights:
    """A replica's record of its updates.

    Attributes:
        lock: Admits one writer per container, in the order of their calls.
        inactive: What the inactive buffer holds.
        previous_epoch: The epoch of the previous set.
        staged: What the staged set cost.
        attempt: The attempt that has the lock and reads weights.
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.inactive = Inactive.NOTHING
        self.previous_epoch = 0
        self.staged = Staged()
        self.attempt: Attempt | None = None

    @property
    def is_empty(self) -> bool:
        """Return whether the inactive buffer holds nothing."""
        return self.inactive is Inactive.NOTHING
