"""ProbeRuns: the runs of one probe, and what they tell.

They happen in a child process where there can be one; `probing.py` starts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.child import Tell
from aoti_sched.engine.probe_values import Findings, Rows, Symbol
from aoti_sched.errors import first_line
from aoti_sched.model.evidence import (
    ROWS,
    difference,
    guarded,
    row_evidence,
    tensors_like,
    with_layout,
)
from aoti_sched.model.specs import DynamicDim, ExampleSpec, RowEvidence, TensorSpec

if TYPE_CHECKING:
    import torch

    from aoti_sched.backends.contracts import Container


class ProbeRuns:
    """The runs of one probe.

    Args:
        container: The model; nothing else may run on it.
        specs: Its inputs.
        examples: Values are made up like these, one for each input.
        symbols: All symbols of the inputs.
        tolerance: Relative; results that differ by less are the same.
        known: What earlier children found; it is not changed.
        tell: Takes each finding as a tuple: its kind, then its values.
    """

    def __init__(
        self,
        container: Container,
        specs: Sequence[TensorSpec],
        examples: Sequence[ExampleSpec],
        symbols: Mapping[str, Symbol],
        tolerance: float,
        known: Findings,
        tell: Tell,
    ) -> None:
        self._container = container
        self._specs = specs
        self._examples = examples
        self._tolerance = tolerance
        self._known = known
        self._tell = tell
        self._zeros = False
        # Two more than the least, so that one less shows how outputs grow.
        self._base = {s.name: _most(s, s.trusted + 2) for s in symbols.values()}
        self._all = symbols

    def all(self, todo: Mapping[str, Symbol], rows: Rows | None) -> None:
        """Examine the least values of some symbols, and rows where that is asked for."""
        if not self._first():
            return
        least: dict[str, int] = {}
        for symbol in todo.values():
            if symbol.name in self._known.least:
                least[symbol.name] = self._known.least[symbol.name][0]
            else:
                least[symbol.name] = self._find_least(symbol)
        self._together(todo, least)
        if rows is not None and self._known.rows is None:
            found = self._rows(rows, max(1, least.get(rows.symbol, self._least(rows.symbol))))
            self._tell(("rows", found.independent, found.reason))

    # --- runs
    # ------------------------------------------------------------------------------------------

    def _draw(self, sizes: Mapping[str, int], seed: int) -> list[torch.Tensor]:
        tensors = tensors_like(self._specs, sizes, self._examples, seed=seed)
        return [tensor.zero_() for tensor in tensors] if self._zeros else tensors

    def _run(self, inputs: Sequence[torch.Tensor], *, high: bool = False) -> list[Any]:
        outputs = self._container.run_raw(guarded(inputs, high=high))
        return [None if output is None else output.detach().clone() for output in outputs]

    def _first(self) -> bool:
        """Return whether the model runs at all on values made up for it."""
        failure = ""
        for zeros in (False, True):
            self._zeros = zeros
            inputs = guarded(self._draw(self._base, 0), high=False)
            before = [tensor.clone() for tensor in inputs]
            try:
                self._container.run_raw(inputs)
            except Exception as error:  # noqa: BLE001 -- the model's own
                failure = failure or first_line(error)
                continue
            changed = [
                i for i, (a, b) in enumerate(zip(before, inputs, strict=True)) if not _same(a, b)
            ]
            self._tell(("mutated", changed))
            self._tell(("zeros", zeros))
            return True
        self._tell(("failed", failure))
        return False

    # --- sizes
    # -----------------------------------------------------------------------------------------

    def _least(self, name: str) -> int:
        return self._all[name].floor if name in self._all else 1

    def _find_least(self, symbol: Symbol) -> int:
        name, value, why = symbol.name, symbol.trusted, ""
        if symbol.floor < symbol.trusted:
            growth = self._growth(symbol)
            if isinstance(growth, str):
                why = growth
            else:
                while value > symbol.floor and not why:
                    self._tell(("trying", name, value - 1))
                    why = growth.why_not(value - 1)
                    value -= not why
                why = why and f"{value - 1} is not taken: {why}."
        self._tell(("least", name, value, why))
        return value

    def _growth(self, symbol: Symbol) -> _Growth | str:
        most = self._base[symbol.name]
        if most - 1 < symbol.trusted:
            return "it takes one size alone, which does not show how its outputs grow"
        full, other = self._draw(self._base, 1), self._draw(self._base, 2)
        big, again = self._run(full), self._run(full, high=True)
        if not _all_same(big, again):
            return "its answers differ from run to run"
        mid = self._run(self._cut(full, symbol.name, most - 1))
        return _Growth(self, symbol.name, most, full, other, big, mid)

    def _cut(self, tensors: Sequence[torch.Tensor], name: str, value: int) -> list[torch.Tensor]:
        """Return the first rows of tensors, as many as a value of the symbol makes."""
        cut = []
        for spec, tensor in zip(self._specs, tensors, strict=True):
            part = tensor
            for position, dim in enumerate(spec.shape):
                if isinstance(dim, DynamicDim) and dim.symbol == name:
                    part = part.narrow(position, 0, dim.scale * value + dim.offset)
            cut.append(with_layout(part.clone(), spec))
        return cut

    def _together(self, todo: Mapping[str, Symbol], least: Mapping[str, int]) -> None:
        """Try the least values that were found one by one together."""
        lowered = [name for name, value in least.items() if value < todo[name].trusted]
        if len(lowered) < 2:
            return
        for bottom in (0, 1):
            values = {name: max(value, bottom) for name, value in least.items()}
            self._tell(("trying", "", bottom))
            try:
                outputs = [
                    self._run(self._draw(self._base | values, 3), high=high)
                    for high in (False, True)
                ]
                why = "" if _all_same(*outputs) else "it reads beyond its input"
            except Exception as error:  # noqa: BLE001
                why = first_line(error)
            if not why:
                break
        else:
            values = {name: todo[name].trusted for name in least}
        self._tell(("tried",))
        for name, value in values.items():
            if value != least[name]:
                self._tell(
                    (
                        "least",
                        name,
                        value,
                        f"the least sizes are not taken together: {why or 'not 0'}.",
                    )
                )

    # --- rows
    # ------------------------------------------------------------------------------------------

    def _rows(self, rows: Rows, least: int) -> RowEvidence:
        most = self._all[rows.symbol].most if rows.symbol in self._all else None
        count = max(ROWS, least) if most is None else min(max(ROWS, least), most)
        specs = self._specs
        if not rows.symbol:  # a number of rows that was compiled in
            count = min(ROWS, rows.sizes[-1])
            row = DynamicDim("rows")
            specs = [
                msgspec.structs.replace(
                    s, shape=(*s.shape[: rows.dim], row, *s.shape[rows.dim + 1 :])
                )
                for s in specs
            ]
        if count < 2:
            return RowEvidence(True, "It takes one row at a time.")

        def draw(seed: int) -> list[torch.Tensor]:
            sizes = {**self._base, (rows.symbol or "rows"): count}
            return tensors_like(specs, sizes, self._examples, seed=seed)

        def run(tensors: list[torch.Tensor]) -> list[Any]:
            return self._run_rows(tensors, rows)

        try:
            if not _all_same(run(draw(0)), run(draw(0))):
                return RowEvidence(None, "its answers differ from run to run")
        except _NoRowsError as error:
            return RowEvidence(False, f"{error}")
        except Exception as error:  # noqa: BLE001 -- the model's own
            return RowEvidence(
                None, f"running it on values made up for it failed: {first_line(error)}"
            )
        least = 1 if rows.sizes else least
        return row_evidence(run, draw, rows.dim, least=least, tolerance=self._tolerance)

    def _run_rows(self, tensors: list[torch.Tensor], rows: Rows) -> list[Any]:
        """Run the model as a batch is run: with rows of zeros up to a size that it is run with."""
        import torch

        count = tensors[0].shape[rows.dim]
        size = next((size for size in rows.sizes if size >= count), count)
        given = tensors
        if size > count:
            given = []
            for spec, tensor in zip(self._specs, tensors, strict=True):
                shape = [*tensor.shape]
                shape[rows.dim] = size - count
                whole = torch.cat([tensor, tensor.new_zeros(shape)], rows.dim)
                given.append(with_layout(whole, spec))
        outputs = self._run(given)
        for index, output in enumerate(outputs):
            if output is None:
                continue
            if rows.dim >= output.dim() or output.shape[rows.dim] != size:
                raise _NoRowsError(f"output {index} has no rows in dimension {rows.dim}")
            outputs[index] = output.narrow(rows.dim, 0, count)
        return outputs


class _NoRowsError(Exception):
    """An output has not as many rows as the inputs."""


class _Growth:
    """Find out how outputs depend on one symbol, from runs with `most` rows and one fewer.

    Also find out whether runs with fewer rows give the same values.
    """

    def __init__(
        self,
        owner: ProbeRuns,
        name: str,
        most: int,
        full: list[torch.Tensor],
        other: list[torch.Tensor],
        big: list[Any],
        mid: list[Any],
    ) -> None:
        self._owner = owner
        self._name = name
        self._most = most
        self._full = full
        self._other = other
        self._mid = mid
        self._slopes: list[tuple[int, ...] | None] = []
        self._prefix: list[bool] = []
        for large, small in zip(big, mid, strict=True):
            if large is None or small is None:
                self._slopes.append(None)
                self._prefix.append(False)
                continue
            self._slopes.append(tuple(a - b for a, b in zip(large.shape, small.shape, strict=True)))
            part = large[tuple(slice(size) for size in small.shape)]
            self._prefix.append(not difference([part], [small], owner._tolerance))  # noqa: SLF001

    def why_not(self, value: int) -> str:
        """Return why the model is not shown to be right with this value; "" where it is."""
        shapes = [self._shape(index, value) for index in range(len(self._mid))]
        if any(shape is not None and min(shape, default=0) < 0 for shape in shapes):
            return "an output would have a negative size"
        inputs = self._owner._cut(self._full, self._name, value)  # noqa: SLF001
        if any(not tensor.numel() for tensor in inputs):
            for index, shape in enumerate(shapes):
                if shape is not None and 0 not in shape:
                    return (
                        f"output {index} has values even of no rows, and nothing shows that they "
                        "are right"
                    )
        try:
            found = []
            for high, before in ((False, self._full), (True, self._other)):
                # Leaves other values where intermediate results were.
                self._owner._run(before)  # noqa: SLF001
                found.append(self._owner._run(inputs, high=high))  # noqa: SLF001
        except Exception as error:  # noqa: BLE001 -- the model's own
            return f"the run failed: {first_line(error)}"
        for index, (shape, output) in enumerate(zip(shapes, found[0], strict=True)):
            if shape is not None and (output is None or tuple(output.shape) != shape):
                got = None if output is None else tuple(output.shape)
                return f"output {index} has shape {got}, and {shape} was expected"
        if not _all_same(*found):
            return "it reads beyond its input"
        for index, shape in enumerate(shapes):
            if shape is None or not self._prefix[index]:
                continue
            part = self._mid[index][tuple(slice(size) for size in shape)]
            if difference([part], [found[0][index]], self._owner._tolerance):  # noqa: SLF001
                return f"output {index} is not that of the same rows in a larger request"
        return ""

    def _shape(self, index: int, value: int) -> tuple[int, ...] | None:
        slopes = self._slopes[index]
        if slopes is None:
            return None
        fewer = self._most - 1 - value
        return tuple(
            size - slope * fewer for size, slope in zip(self._mid[index].shape, slopes, strict=True)
        )


def _most(symbol: Symbol, wanted: int) -> int:
    return wanted if symbol.most is None else max(min(wanted, symbol.most), 1)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors have the same bytes: NaN is NaN."""
    import torch

    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    if a.layout is not torch.strided or not a.numel():
        return True
    # A copy: one element counts as contiguous whatever its stride is, and bytes want a stride of 1.
    plain = torch.contiguous_format
    one, other = (
        t.detach().cpu().clone(memory_format=plain).reshape(-1).view(torch.uint8) for t in (a, b)
    )
    return torch.equal(one, other)


def _all_same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(
        (a is None) == (b is None) and (a is None or _same(a, b))
        for a, b in zip(one, other, strict=True)
    )
