"""Histograms as plain values: they cross a wire, and those of several sources can be added."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from aoti_sched.errors import ConfigError, brief

LEAST_SECONDS = 8e-6
LEAST_SIZE = 1.0


class Histogram(msgspec.Struct, frozen=True):
    """How often values fell into fixed buckets.

    The buckets' upper bounds are `least` times 1, 1.5, 2, 3, 4, 6, 8, 12 and so on. So a quantile
    above `least` is off by at most half of itself. Histograms with an equal `least` can be added.

    Attributes:
        least: The upper bound of the first bucket: 8 microseconds, or a batch of 1.
        counts: Values in each bucket, up to the last bucket with values.
        sum: All values together.
        max: The largest value; 0.0 without values.
    """

    least: float
    counts: tuple[int, ...] = ()
    sum: float = 0.0
    max: float = 0.0

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(self.counts)

    @property
    def bounds(self) -> tuple[float, ...]:
        """The upper bound of each of `counts`; a value that equals a bound is in its bucket.

        The 54th bucket, if it is there, has the largest value as its bound.
        """
        every = tuple(self.least * 2**power * step for power in range(27) for step in (1.0, 1.5))
        every = every[:53]
        return (*every, self.max)[: len(self.counts)]

    @property
    def mean(self) -> float:
        """The mean of the values; 0.0 without values."""
        count = self.count
        return self.sum / count if count else 0.0

    @property
    def p50(self) -> float:
        """The median: half of the values are at most this."""
        return self.quantile(0.5)

    @property
    def p90(self) -> float:
        """The value that nine of ten do not exceed."""
        return self.quantile(0.9)

    @property
    def p99(self) -> float:
        """The value that 99 of 100 do not exceed."""
        return self.quantile(0.99)

    def quantile(self, part: float) -> float:
        """Estimate the value that this part of the values does not exceed; 0.0 without values.

        The values of a bucket are assumed to be spread evenly over it. Sizes are whole numbers.

        Args:
            part: From 0.0 to 1.0.

        Raises:
            ConfigError: The part is not in this range.
        """
        if not 0.0 <= part <= 1.0:
            raise ConfigError(f"quantile({brief(part)}): expected a part of all, from 0.0 to 1.0.")
        wanted, before, low = part * self.count, 0, 0.0
        for count, high in zip(self.counts, self.bounds, strict=True):
            if count and before + count >= wanted:
                value = min(self.max, low + (high - low) * (wanted - before) / count)
                return float(max(1, math.ceil(value))) if self.least >= LEAST_SIZE else value
            before += count
            low = high
        return self.max

    def __add__(self, other: Histogram) -> Histogram:
        """Return the histogram of the values of both; `sum` adds many.

        Raises:
            ValueError: The histograms have different buckets.
        """
        if not isinstance(other, Histogram):
            return NotImplemented
        if self.least != other.least:
            raise ValueError(
                f"histogram: buckets from {self.least:g} and from {other.least:g} can't be added. "
                "Add histograms of one unit"
            )
        longer, shorter = self.counts, other.counts
        if len(longer) < len(shorter):
            longer, shorter = shorter, longer
        counts = [a + b for a, b in zip(longer, shorter, strict=False)]
        return Histogram(
            self.least,
            (*counts, *longer[len(shorter) :]),
            self.sum + other.sum,
            max(self.max, other.max),
        )

    def __radd__(self, other: object) -> Histogram:
        """Return this histogram for the 0 that `sum` begins with."""
        return self if other == 0 else NotImplemented


class EndedRequests(msgspec.Struct, frozen=True, kw_only=True):
    """The histograms of the requests of one priority that ended in the same way.

    Attributes:
        outcome: "completed", "failed", "rejected", "expired", "cancelled", "revoked" or "shed".
        priority: "HIGH", "NORMAL" or "LOW".
        queue: Seconds from submission to the start of the run, or to the end without a run.
        run: Seconds of the runs that are over. A request that is granted a lease has no run.
        total: Seconds from submission to the end, of every request.
        batch_size: How many requests shared each of the runs in `run`.
    """

    outcome: str
    priority: str
    queue: Histogram
    run: Histogram
    total: Histogram
    batch_size: Histogram


def merged(parts: Iterable[EndedRequests]) -> tuple[EndedRequests, ...]:
    """Add the histograms of several sources, those of each outcome and priority by themselves."""
    found: dict[tuple[str, str], EndedRequests] = {}
    for part in parts:
        kind = (part.outcome, part.priority)
        known = found.get(kind)
        found[kind] = part if known is None else _sum(known, part)
    return tuple(found[kind] for kind in sorted(found))


def chosen(
    parts: Iterable[EndedRequests], of: str, outcome: str | None, priority: object
) -> Histogram:
    """Add one histogram of each part that is wanted.

    Args:
        parts: The histograms.
        of: "queue", "run", "total" or "batch_size".
        outcome: How the requests ended; None for all.
        priority: Their priority, or its name; None for all.
    """
    if of not in _NAMES:
        raise ValueError(f"histogram({of!r}): there are {', '.join(map(repr, _NAMES))}. Name one")
    name = None if priority is None else getattr(priority, "name", priority)
    total = Histogram(LEAST_SIZE if of == "batch_size" else LEAST_SECONDS)
    for part in parts:
        if outcome in (None, part.outcome) and name in (None, part.priority):
            total += getattr(part, of)
    return total


_NAMES = ("queue", "run", "total", "batch_size")


def _sum(one: EndedRequests, other: EndedRequests) -> EndedRequests:
    return EndedRequests(
        outcome=one.outcome,
        priority=one.priority,
        queue=one.queue + other.queue,
        run=one.run + other.run,
        total=one.total + other.total,
        batch_size=one.batch_size + other.batch_size,
    )
