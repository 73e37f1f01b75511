"""Holding: what one model has of its device's memory, and where its constants are."""

from __future__ import annotations

import enum
import math
from typing import Any


class Stay(enum.IntEnum):
    """Where a model's constants are."""

    HERE = 0
    LEAVING = 1  # nothing of it starts any more; when all slots are home, they are freed
    AWAY = 2
    COMING = 3  # room for them was promised; nothing of it starts yet


class Holding:
    """What one model has of its device's memory, in bytes: its `constants`, and what its `inactive` buffer takes beside them.

    `since` is when it began to come, or came; `took` is how long that lasted. `fixed` says why it is not to be
    parked, "" when it may; `updating` that its weights are being changed. `payload` is the front's.
    """

    __slots__ = (
        "constants",
        "fixed",
        "inactive",
        "name",
        "parked",
        "payload",
        "since",
        "stay",
        "took",
        "updating",
        "workspace",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.constants = 0
        self.inactive = 0
        self.stay = Stay.COMING
        self.since = -math.inf
        self.took = 0.0
        self.fixed = ""
        self.updating = False
        self.parked = 0
        """How often it was."""
        self.payload: Any = None
        self.workspace = 0
        """Bytes that its runs take besides. No rule reads it, since it is not known beforehand."""

    @property
    def bytes(self) -> int:
        """Its own, whether they are there or not."""
        return self.constants + self.inactive

    @property
    def is_here(self) -> bool:
        return self.stay is Stay.HERE
