"""What a probe is asked, and what it finds: symbols, rows, findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from aoti_sched.model.specs import DynamicDim, RowEvidence, TensorSpec

_TRUSTED = 2
"""The compiler assumes that every dynamic size is at least this."""


class Symbol(msgspec.Struct, frozen=True):
    """The values that a symbol may have.

    Attributes:
        name: The symbol's.
        floor: The least value that is examined. Running the model must show values below `trusted`.
        trusted: The least value that the compiler vouches for.
        most: The largest value; None without a bound.
    """

    name: str
    floor: int
    trusted: int
    most: int | None


class Rows(msgspec.Struct, frozen=True):
    """Which rows to examine.

    Attributes:
        dim: The dimension along which rows lie.
        symbol: The dimension's symbol; "" where its size was compiled in.
        sizes: The only numbers of rows that the model is run with; () for any.
    """

    dim: int
    symbol: str
    sizes: tuple[int, ...] = ()


class Findings(msgspec.Struct):
    """What was found.

    Attributes:
        least: For each symbol that was examined, the least value that was shown to be right, and
            why no smaller value was.
        rows: Whether rows are independent; None where that was not examined.
        mutated: Numbers of the inputs that a run wrote to; None where that is unknown.
        failure: Why the model could not be run on values made up for it; "" where it could.
        zeros: Whether the model could be run on zeros only.
    """

    least: dict[str, tuple[int, str]] = {}
    rows: RowEvidence | None = None
    mutated: tuple[int, ...] | None = None
    failure: str = ""
    zeros: bool = False


def symbols_in(specs: Sequence[TensorSpec], *, stated_by_user: bool) -> dict[str, Symbol]:
    """Return the symbols of a model's inputs with the values that their dimensions state.

    A wrapper's least value of 2 may be the compiler's assumption alone, so 0 and 1 are examined. A
    least value that a user states is meant, and is not extended.
    """
    low: dict[str, int] = {}
    high: dict[str, int | None] = {}
    for spec in specs:
        for dim in spec.shape:
            if isinstance(dim, DynamicDim):
                least = -(-(dim.min - dim.offset) // dim.scale)
                most = None if dim.max is None else (dim.max - dim.offset) // dim.scale
                low[dim.symbol] = max(low.get(dim.symbol, 0), least)
                before = high.get(dim.symbol)
                high[dim.symbol] = (
                    most if before is None else before if most is None else min(before, most)
                )
    found = {}
    for name, least in low.items():
        trusted = max(least, _TRUSTED)
        floor = least if stated_by_user or least > _TRUSTED else 0
        most = high[name]
        if most is not None and most < trusted:
            trusted = floor = least
        found[name] = Symbol(name, floor, trusted, most)
    return found


def with_least(
    specs: Sequence[TensorSpec], least: Mapping[str, tuple[int, str]]
) -> tuple[TensorSpec, ...]:
    """Return the specs with the least sizes that were found."""

    def changed(dim: int | DynamicDim) -> int | DynamicDim:
        if isinstance(dim, int) or dim.symbol not in least:
            return dim
        value, reason = least[dim.symbol]
        return msgspec.structs.replace(dim, min=dim.scale * value + dim.offset, reason=reason)

    return tuple(
        msgspec.structs.replace(spec, shape=tuple(changed(dim) for dim in spec.shape))
        for spec in specs
    )
