"""Percentiles: the one definition that the command line and simulations use."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Percentiles(msgspec.Struct, frozen=True):
    """A distribution in seconds. A percentile is of the nearest rank."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Return the percentiles of values, by nearest rank; None without a value."""
    if not values:
        return None
    ordered = sorted(values)

    def at(percent: int) -> float:
        return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]

    return Percentiles(sum(ordered) / len(ordered), at(50), at(90), at(99), ordered[-1])
