"""Probing: runs a model at load to find its least sizes, independent rows and written inputs.

All of it blocks. On a CPU the runs happen in a child process (`child.py`). A run that fails
there ends no other process, prints nothing and changes no buffer. On other devices, and where there
are no child processes, only sizes that the compiler knew of are run, and size 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.child import FAULT, NOT_STARTED, Tell, can_fork, in_child
from aoti_sched.errors import first_line
from aoti_sched.model.evidence import (
    ROWS,
    difference,
    guarded,
    row_evidence,
    symbols_of,
    tensors_like,
    tolerance_of,
    with_layout,
)
from aoti_sched.model.specs import DynamicDim, ExampleSpec, RowEvidence, TensorSpec

if TYPE_CHECKING:
    import torch

    from aoti_sched.backends.contracts import Container

LIMIT = 10.0
"""Seconds that the runs in one child may take.

A child that dies is followed by another, at most 2 x symbols + 2.
"""

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


def examine(
    container: Container,
    specs: Sequence[TensorSpec],
    *,
    examples: Sequence[ExampleSpec] = (),
    symbols: Mapping[str, Symbol] | None = None,
    rows: Rows | None = None,
    dtypes: Sequence[str] = (),
    apart: bool = True,
    set_threads: Callable[[int], None] | None = None,
) -> Findings:
    """Run a model that was just loaded on values made up for it, and say what that shows.

    About 8 runs for each symbol.

    Args:
        container: The model; nothing else may run on it.
        specs: Its inputs.
        examples: Values are made up like these, one for each input.
        symbols: Those whose least values are to be found.
        rows: Whether these rows are independent is to be found.
        dtypes: In which it computes, besides those of its inputs.
        apart: Whether to run it in a child process, where there can be one.
        set_threads: Sets the intra-op threads of the child's only thread.
    """
    findings = Findings()
    todo = dict(symbols or {})
    odd = [name for name in todo if not name.isidentifier()]
    odd = odd or [name for name in symbols_of(specs) if not name.isidentifier()]
    if odd:
        findings.failure = f"the size {odd[0]} is none that inputs could be made for"
        findings.least = {s.name: (s.trusted, findings.failure) for s in todo.values()}
        return findings
    everything = symbols_in(specs, stated_by_user=True) | todo
    tolerance = tolerance_of([*(spec.dtype for spec in specs), *dtypes])
    apart = apart and can_fork()
    if not apart:
        todo = {name: msgspec.structs.replace(s, floor=max(s.floor, 1)) for name, s in todo.items()}

    def work(tell: Tell) -> None:
        if apart and set_threads is not None:
            set_threads(1)
        _Examination(container, specs, examples, everything, tolerance, findings, tell).all(
            todo, rows
        )

    if not apart:
        told: list[Any] = []
        work(told.append)
        _take(findings, todo, told)
        return findings
    for _ in range(2 * len(todo) + 2):  # each child that dies leaves one thing fewer to do
        told, end = in_child(work, LIMIT)
        trying = _take(findings, todo, told)
        if not end:
            break
        if not end.startswith((NOT_STARTED, FAULT)):
            end = f"a process that ran it so did not survive: {end}"
        if trying is None:
            findings.failure = findings.failure or end
            if rows is not None and findings.rows is None:
                findings.rows = RowEvidence(None, end)
            break
        name, value = trying
        if not name:  # all at their least values together
            findings.least = {
                s.name: (max(findings.least[s.name][0], 1) if value == 0 else s.trusted, f"{end}.")
                for s in todo.values()
            }
        else:
            what = "could not be tried" if end.startswith(FAULT) else "is not taken"
            findings.least[name] = (value + 1, f"{value} {what}: {end}.")
    for symbol in todo.values():
        findings.least.setdefault(symbol.name, (symbol.trusted, findings.failure))
    return findings


def _take(
    findings: Findings, todo: Mapping[str, Symbol], told: Sequence[Any]
) -> tuple[str, int] | None:
    """Note what a child told.

    Returns:
        The symbol and the value of the trial that did not end; None where every trial ended.
    """
    trying = None
    for kind, *values in told:
        trying = None
        if kind == "trying":
            trying = (values[0], values[1])
        elif kind == "least":
            findings.least[values[0]] = (values[1], values[2])
        elif kind == "rows":
            findings.rows = RowEvidence(values[0], values[1])
        elif kind == "mutated":
            findings.mutated = tuple(values[0])
        elif kind == "zeros":
            findings.zeros = values[0]
        elif kind == "failed":
            findings.failure = values[0]
            for symbol in todo.values():
                findings.least.setdefault(symbol.name, (symbol.trusted, values[0]))
    return trying


class _Examination:
    """The runs of one probe. `known` is what earlier children found."""

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
        owner: _Examination,
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
