"""What a workload is made of: entrants, the figures that come of each, and what is wanted of them.

A workload has entrants, one for each line of its table. An entrant is opened in a process of its
own and gives a function that measures for so many seconds. Durations are seconds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scale:
    """How much is measured. `pace` multiplies every measurement's seconds."""

    repetitions: int = 7
    pace: float = 1.0
    depths: tuple[int, ...] = (10, 100, 1_000, 10_000, 100_000)
    runners: tuple[int, ...] = (1, 10, 100, 1_000)
    requests: int = 1_000_000
    staged: str = "large"
    """The model whose weights are staged under load."""
    forked: bool = False
    """Whether processes are forked from one that has imported torch. They start in a tenth of the
    time, but their memory is not that of a fresh process.
    """


QUICK = Scale(
    repetitions=2,
    pace=0.1,
    depths=(10, 1_000),
    runners=(1, 100),
    requests=20_000,
    staged="heavy",
    forked=True,
)


@dataclass(frozen=True)
class Measured:
    """One repetition's figures; `series` holds values over the course of it, for the picture.

    `others` is the share of all cores that other processes took meanwhile. The caller fills it in.
    """

    figures: dict[str, float]
    series: dict[str, list[float]] = field(default_factory=dict)
    others: float = 0.0


Measure = Callable[[float], Awaitable[Measured]]


@dataclass(frozen=True)
class Opened:
    """An entrant that is ready: how to measure it, and the first numbers of its answer, where
    it has one.
    """

    measure: Measure
    answer: tuple[float, ...] = ()


@dataclass(frozen=True)
class Entrant:
    """One line of a workload's table."""

    name: str
    note: str
    open: Callable[[], AbstractAsyncContextManager[Opened]]
    environment: Mapping[str, str] = field(default_factory=dict)
    uvloop: bool = False
    missing: Sequence[str] = ()
    files: tuple[tuple[str, str], ...] = ()
    """The models it needs, and of which kind each."""


@dataclass(frozen=True)
class Figure:
    """One column: a field of the figures, its heading with the unit, and what to multiply it
    with for that unit.
    """

    field: str
    heading: str
    unit: float = 1.0
    more_is_better: bool = False


@dataclass(frozen=True)
class Target:
    """What is wanted: an entrant's figure, as a multiple of another's (or as it is), at most or
    at least so much.

    `figure` names the field. Without `against`, the bound is in the figure's own unit. `of` names
    the other entrant's field where it is another one.
    """

    sentence: str
    entrant: str
    figure: str
    against: str | None = None
    of: str | None = None
    most: float | None = None
    least: float | None = None


@dataclass(frozen=True)
class Workload:
    """A table. Ratios are those of the first figure, to the `baseline`."""

    key: str
    title: str
    entrants: Callable[[Scale], list[Entrant]]
    figures: tuple[Figure, ...]
    baseline: str | None
    targets: Callable[[Scale], list[Target]]
    seconds: float
    warm_up: float
    repeated: bool = True
