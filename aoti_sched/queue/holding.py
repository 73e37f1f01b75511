"""Holding: the memory that one model has on its device, and where its constants are."""

from __future__ import annotations

import enum
import math
from typing import Any


class Stay(enum.IntEnum):
    """The residency of a model's constants."""

    HERE = 0  # resident
    LEAVING = 1  # being evicted: no run starts; once every slot is free, the constants are freed
    AWAY = 2  # evicted
    COMING = 3  # being loaded or restored: their memory is reserved, and no run starts yet


class Holding:
    """The record of the memory that one model has on its device.

    Args:
        name: The model's name, for messages.

    Attributes:
        constants: Bytes of the constants.
        inactive: Bytes that the inactive buffer takes besides.
        stay: Where the constants are.
        since: When the restore that is under way began, or the last one ended.
        took: Seconds that the last restore took.
        fixed: Why the model can't be evicted; "" when it can.
        updating: Whether the weights are being changed, so that the model is not evicted.
        parked: How often the model was evicted.
        payload: The caller's own; no rule reads it.
        number: The number of the record on its device, where facts are recorded; -1 before.
    """

    __slots__ = (
        "constants",
        "fixed",
        "inactive",
        "name",
        "number",
        "parked",
        "payload",
        "since",
        "stay",
        "took",
        "updating",
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
        self.payload: Any = None
        self.number = -1

    @property
    def bytes(self) -> int:
        """Return the size of the constants and the inactive buffer, resident or not."""
        return self.constants + self.inactive

    @property
    def is_here(self) -> bool:
        return self.stay is Stay.HERE
