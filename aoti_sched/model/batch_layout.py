"""How requests become batches, derived from a model's specs and the user's settings.

Which requests go together is decided in `queue/batching.py`, how their tensors are put together in
`backends/executors/batches.py`. Here is what both need to know of a model: along which dimension
its rows lie, what must agree, what is padded.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import msgspec

from aoti_sched.config import Batching
from aoti_sched.errors import ConfigError
from aoti_sched.model.batch_plan import BatchPlan, InputPlan, OutputPlan, RaggedOut
from aoti_sched.model.size_conditions import mentioning
from aoti_sched.model.specs import (
    BatchDim,
    BoolSpec,
    DynamicDim,
    FloatSpec,
    IntegerSpec,
    LeafSpec,
    ModelSpec,
    RowEvidence,
    TensorSpec,
    row_symbols,
    with_one_symbol,
)
from aoti_sched.model.wrapper_source import writes_to_buffers

if TYPE_CHECKING:
    import torch

MAX_SIZE = 64
"""Rows of a batch, where neither the user nor the model sets a limit."""


class Grouping:
    """How one runner's requests are put together.

    Attributes:
        plan: For the backend.
        max_rows: The most rows of a run.
        max_delay: The most seconds that a request waits for others.
        max_seconds: The most seconds that a batch is expected to take; None for a learned bound.
        max_tokens: The most tokens of a run; None for no bound.
        sizes: The numbers of rows that the model is run with, rising; empty where any will do.
    """

    def __init__(
        self,
        plan: BatchPlan,
        *,
        max_rows: int,
        max_delay: float,
        max_seconds: float | None = None,
        max_tokens: int | None = None,
        sizes: tuple[int, ...] = (),
        alike: tuple[tuple[int, int], ...] = (),
    ) -> None:
        self.plan = plan
        self.max_rows = max_rows
        self.max_delay = max_delay
        self.max_seconds = max_seconds
        self.max_tokens = max_tokens
        self.sizes = sizes
        self._alike = alike  # (input, dimension) pairs whose sizes must agree within a batch
        self._dim = plan.inputs[0].dim if plan.inputs else None
        self.dim = self._dim or 0
        self._ragged = tuple(
            (index, dim) for index, each in enumerate(plan.inputs) for dim in each.ragged
        )

    def measure(self, inputs: Sequence[torch.Tensor]) -> tuple[int, Hashable]:
        """Return how many rows a request has, and its key; requests with the same key may batch.

        Without rows, there is no key.
        """
        if self._dim is None:
            return 1, 0
        rows = inputs[0].shape[self._dim]
        if not rows:
            return rows, None
        return rows, tuple(
            inputs[index].shape[dim] for index, dim in self._alike
        ) if self._alike else 0

    def tokens(self, inputs: Sequence[torch.Tensor]) -> int:
        """Return a request's length: the largest of the dimensions that are padded, at least 1."""
        return max((inputs[index].shape[dim] for index, dim in self._ragged), default=1) or 1

    def padded(self, rows: int) -> int:
        """Return how many rows the model is run with for a number of requested rows."""
        sizes = self.sizes
        place = bisect_left(sizes, rows)
        return sizes[place] if place < len(sizes) else rows


FAKE = BatchPlan((), ())
"""For models that are Python functions: each call is one row, and all may go together."""


def group(
    name: str,
    wanted: Batching,
    specs: Sequence[TensorSpec] | None,
    own: ModelSpec | None,
    outputs: int | None,
    *,
    state: str = "",
) -> tuple[Grouping, tuple[TensorSpec, ...]]:
    """Return how a model's requests are batched, and the specs to check each request against.

    Args:
        name: What errors call the model.
        wanted: The user's wish.
        specs: Of its tensor inputs.
        own: What the package says of the model, if it was made by `compile_package`.
        outputs: How many outputs it has, where that is all that is known of them.
        state: Why it counts as writing to its buffers (`writes_to_buffers`), "" where it does not.

    Raises:
        ConfigError: It can't be done, with the reason.
    """
    if not specs:
        raise _impossible(
            name, "nothing is known of its inputs; compile it with aoti_sched.compile_package"
        )
    state = state or writes_to_buffers(own, None)
    if state:
        raise _impossible(name, f"{state}, so what a request does changes the next one")
    if own is not None:
        must_not_write_inputs(name, own.mutated_inputs or ())
        same_dim = own.batch is None or wanted.dim in (None, own.batch.dim)
        if (
            own.rows is not None
            and own.rows.independent is False
            and same_dim
            and not wanted.assume_independent
        ):
            must_be_independent(name, own.rows)
    if own is not None:
        _must_not_bind_rows(name, specs, own, wanted)
    specs, own = _with_one_row_symbol(specs, own, wanted)
    dim, most, symbol, static = _rows(name, wanted, specs, None if own is None else own.batch)
    sizes = _sizes(name, wanted, most, static)
    bounds = [
        size for size in (wanted.max_size, most, sizes[-1] if sizes else None) if size is not None
    ]
    limit = min(bounds, default=MAX_SIZE)
    if static is not None:
        row = DynamicDim("rows", min=1, max=limit)
        specs = [
            msgspec.structs.replace(spec, shape=(*spec.shape[:dim], row, *spec.shape[dim + 1 :]))
            for spec in specs
        ]
    ragged = _ragged(name, wanted, specs, dim)
    plans, alike = [], []
    for index, spec in enumerate(specs):
        if spec.strides is not None:
            raise _impossible(
                name,
                f"input {spec.name!r} was compiled for a view that is not dense, and batches are "
                "dense",
            )
        if spec.order is None:
            raise _impossible(name, f"how input {spec.name!r} lies in memory is not known")
        free = [d for d, size in enumerate(spec.shape) if isinstance(size, DynamicDim) and d != dim]
        padded = tuple(free) if spec.name in wanted.ragged else ()
        alike += [(index, d) for d in free if d not in padded]
        plans.append(InputPlan(dim, spec.order, padded, wanted.ragged.get(spec.name, 0)))
    if wanted.max_tokens is not None and not any(plan.ragged for plan in plans):
        raise _impossible(
            name,
            "max_tokens counts the dimensions that ragged pads, and ragged pads none; name the "
            "inputs whose lengths differ, for example ragged={'input_ids': 0}, or use max_size",
        )
    leaves: Sequence[LeafSpec | None] = (
        own.outputs if own is not None and own.outputs else [None] * (outputs or 0)
    )
    _must_be_free_of(name, dim, symbol, [*specs, *leaves])
    back = tuple(_output(name, dim, symbol, leaf, ragged) for leaf in leaves)
    grouping = Grouping(
        BatchPlan(tuple(plans), back, detach_rows=wanted.detach_rows),
        max_rows=limit,
        max_delay=wanted.max_delay,
        max_seconds=wanted.max_seconds,
        max_tokens=wanted.max_tokens,
        sizes=sizes[: bisect_left(sizes, limit) + 1],
        alike=tuple(alike),
    )
    return grouping, tuple(specs)


def as_requests(specs: Sequence[TensorSpec], grouping: Grouping) -> tuple[TensorSpec, ...]:
    """Return the specs that a request is checked against, made from the specs of a run.

    Every input has the same number of rows, and any number up to `grouping.max_rows` where the
    model's own is fixed.
    """
    dim = grouping.dim
    first, *others = row_symbols(specs, dim) or [""]
    for other in others:
        specs = with_one_symbol(specs, other, first)
    row = DynamicDim("rows", min=1, max=grouping.max_rows)
    return tuple(
        spec
        if isinstance(spec.shape[dim], DynamicDim)
        else msgspec.structs.replace(spec, shape=(*spec.shape[:dim], row, *spec.shape[dim + 1 :]))
        for spec in specs
    )


def _must_not_bind_rows(
    name: str, specs: Sequence[TensorSpec], own: ModelSpec, wanted: Batching
) -> None:
    """Raise ConfigError if the code is right for some numbers of rows only."""
    dim = own.batch.dim if wanted.dim is None and own.batch is not None else wanted.dim or 0
    for symbol in row_symbols(specs, dim):
        if condition := mentioning(own.conditions, symbol):
            raise _impossible(
                name,
                f"it was compiled for numbers of rows with {condition} only, which a batch may not "
                "meet",
            )


def _with_one_row_symbol(
    specs: Sequence[TensorSpec], own: ModelSpec | None, wanted: Batching
) -> tuple[Sequence[TensorSpec], ModelSpec | None]:
    """Return the specs with one symbol for all numbers of rows, which must agree in a batch."""
    known = None if own is None else own.batch
    dim = known.dim if wanted.dim is None and known is not None else wanted.dim
    first, *others = ([] if dim is None else row_symbols(specs, dim)) or [""]
    for other in others:
        specs = with_one_symbol(specs, other, first)
        if own is not None:
            own = msgspec.structs.replace(own, outputs=with_one_symbol(own.outputs, other, first))
    return specs, own


def _impossible(name: str, why: str) -> ConfigError:
    return ConfigError(f"model {name!r}: its requests can't be batched: {why}")


def _rows(
    name: str, wanted: Batching, specs: Sequence[TensorSpec], known: BatchDim | None
) -> tuple[int, int | None, str, int | None]:
    """Return the row dimension, the most rows, the dimension's symbol and its fixed size."""
    if wanted.dim is None and known is None:
        raise _impossible(
            name,
            "its package does not say along which dimension requests' rows lie, or they depend "
            "on one another; if you know better, say so: Batching(dim=0)",
        )
    dim = known.dim if wanted.dim is None and known is not None else wanted.dim or 0
    found = set()
    for spec in specs:
        if not 0 <= dim < len(spec.shape):
            raise _impossible(name, f"input {spec.name!r} ({spec}) has no dimension {dim}")
        found.add(spec.shape[dim])
    sizes = " and ".join(sorted(str(size) for size in found))
    if len(found) > 1:
        raise _impossible(name, f"its inputs have different sizes in dimension {dim}: {sizes}")
    (size,) = found
    if isinstance(size, int):
        return dim, size, "", size
    if size.scale != 1 or size.offset:
        raise _impossible(
            name, f"its inputs' size in dimension {dim} is {sizes}, which is no number of rows"
        )
    return dim, size.max, size.symbol, None


def must_not_write_inputs(name: str, written: Sequence[str]) -> None:
    """Raise ConfigError if a run writes to inputs: in a batch, writes to the copies are lost."""
    if written:
        raise _impossible(
            name,
            f"it writes to its input {written[0]!r}, and in a batch that would be lost with the "
            "common copy",
        )


def must_be_independent(name: str, rows: RowEvidence) -> None:
    """Raise ConfigError where rows influence each other, or nothing shows that they don't."""
    if rows.independent:
        return
    reason = rows.reason.rstrip(".")
    if rows.independent is None:
        reason = (
            f"nothing shows that its rows do not influence each other ({reason}). "
            "Give load() warmup_inputs= that it can be run on"
        )
    raise _impossible(
        name, f"{reason}; if you know better, say so: Batching(assume_independent=True)"
    )


def _must_be_free_of(name: str, dim: int, symbol: str, leaves: Sequence[LeafSpec | None]) -> None:
    """Refuse another size that depends on the number of rows: rows of requests meet (x @ x.T)."""
    if not symbol:
        return
    mentions = re.compile(rf"\b{re.escape(symbol)}\b")
    for leaf in leaves:
        if not isinstance(leaf, TensorSpec):
            continue
        for position, size in enumerate(leaf.shape):
            if position != dim and isinstance(size, DynamicDim) and mentions.search(size.symbol):
                raise _impossible(
                    name,
                    f"dimension {position} of {leaf.name!r} ({leaf}) depends on the number of rows",
                )


def _sizes(name: str, wanted: Batching, most: int | None, static: int | None) -> tuple[int, ...]:
    """Return the numbers of rows that the model is run with; empty where any will do."""
    if static is not None:
        if wanted.pad_to not in {None, (static,)}:
            raise _impossible(
                name, f"it was compiled for {static} rows, so pad_to can only be ({static},)"
            )
        return (static,)
    if wanted.pad_to is None:
        return ()
    if wanted.pad_to == "powers_of_two":
        most = min((size for size in (wanted.max_size, most) if size is not None), default=MAX_SIZE)
        sizes = [1 << bits for bits in range(most.bit_length()) if 1 << bits <= most]
        return tuple(sizes) if sizes[-1] == most else (*sizes, most)
    if most is not None and max(wanted.pad_to) > most:
        raise _impossible(
            name, f"pad_to asks for {max(wanted.pad_to)} rows, it was compiled for at most {most}"
        )
    return tuple(sorted(set(wanted.pad_to)))


def _ragged(
    name: str, wanted: Batching, specs: Sequence[TensorSpec], dim: int
) -> dict[str, tuple[int, int]]:
    """Return, by symbol, the input and the dimension from which a padded size is read."""
    inputs = {spec.name: index for index, spec in enumerate(specs)}
    unknown = [given for given in wanted.ragged if given not in inputs]
    if unknown:
        raise _impossible(name, f"ragged names {unknown}; its inputs are {list(inputs)}")
    found: dict[str, tuple[int, int]] = {}
    for index, spec in enumerate(specs):
        for position, size in enumerate(spec.shape):
            if (
                isinstance(size, DynamicDim)
                and position != dim
                and spec.name in wanted.ragged
                and size.scale == 1
            ):
                found.setdefault(size.symbol, (index, position))
    for spec in specs:
        for position, size in enumerate(spec.shape):
            shared = isinstance(size, DynamicDim) and position != dim and size.symbol in found
            if shared and spec.name not in wanted.ragged:
                raise _impossible(
                    name,
                    f"ragged pads what input {spec.name!r} has too ({spec}); say with what it is "
                    f"padded, for example ragged={{..., {spec.name!r}: 0}}",
                )
    return found


def _output(
    name: str, dim: int, symbol: str, leaf: LeafSpec | None, ragged: dict[str, tuple[int, int]]
) -> OutputPlan:
    if isinstance(leaf, (IntegerSpec, FloatSpec, BoolSpec)):
        raise _impossible(name, f"output {leaf.name!r} is computed from the whole batch")
    if not isinstance(leaf, TensorSpec):
        return OutputPlan(dim)
    size = leaf.shape[dim] if dim < len(leaf.shape) else None
    if size is None or (symbol and not (isinstance(size, DynamicDim) and size.symbol == symbol)):
        raise _impossible(name, f"output {leaf.name!r} ({leaf}) has no rows in dimension {dim}")
    back = []
    for position, other in enumerate(leaf.shape):
        if position != dim and isinstance(other, DynamicDim) and other.symbol in ragged:
            if other.scale != 1 or other.offset:
                raise _impossible(
                    name, f"output {leaf.name!r} ({leaf}) can't be cut back to a request's own size"
                )
            back.append(RaggedOut(position, *ragged[other.symbol]))
    return OutputPlan(dim, tuple(back))


def of_calls(wanted: Batching) -> Grouping:
    """For fakes."""
    return Grouping(
        FAKE,
        max_rows=wanted.max_size or MAX_SIZE,
        max_delay=wanted.max_delay,
        max_seconds=wanted.max_seconds,
    )
