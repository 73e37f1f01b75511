"""Findings: what `compile_package` learns by running a module, its exported program and its code.

Trials run in a forked child where the platform can fork (`child`), so no trial changes the module,
the random state or the process. Models for an accelerator can't run in a forked child. For them, a
copy of the module and the exported program run in this process, and the compiled code is not run.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched import child
from aoti_sched.errors import first_line
from aoti_sched.model.evidence import (
    ROWS,
    difference,
    row_evidence,
    symbols_of,
    tensors_like,
    tolerance_of,
)
from aoti_sched.model.program_runs import OtherShapeError, ProgramRuns, copies, copy_of
from aoti_sched.model.row_flow import where_rows_meet
from aoti_sched.model.size_conditions import SizeCondition, with_symbol
from aoti_sched.model.specs import (
    DynamicDim,
    ExampleSpec,
    LeafSpec,
    ModelSpec,
    RowEvidence,
    TensorSpec,
    row_symbols,
    with_one_symbol,
)

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

SECONDS = 120.0
"""The most seconds that trials may take before compiling, and again after compiling.

A trial that has not ended by then shows nothing.
"""

LARGEST = 1 << 30
"""The most bytes of example inputs for which trials run.

An eager run of a larger request would take much memory, and minutes.
"""

EXPORTED_FROM = 2
"""The least value that export assumes of any dynamic size. Trials show smaller values to be right.
"""

_FACTORS = (2, 4, 16, 64, 256, 1024)
"""How many times larger than the example's the sizes are on which conditions are tried."""

_LARGEST_BEYOND = 1 << 26
"""The most bytes of such a request."""

_WORD = re.compile(r"^\w+$")
_RANDOM = "random"


def separated(args: tuple[Any, ...], kwargs: dict[str, Any], module: Any) -> tuple[Any, Any]:
    """Return the example arguments, with copies of tensors that share memory.

    A tensor is copied if it shares memory with an earlier tensor or with a weight. Otherwise export
    would take two equal tensors for one input, and an input that is a parameter for that parameter.
    Copies keep their strides.
    """
    import torch
    from torch.utils import _pytree as pytree

    taken = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.layout is torch.strided and not tensor.is_meta
    }

    def apart_from(leaf: Any) -> Any:
        if type(leaf) not in (torch.Tensor, torch.nn.Parameter) or leaf.layout is not torch.strided:
            return leaf
        storage = leaf.untyped_storage()
        if leaf.is_meta or not storage.nbytes() or storage.data_ptr() not in taken:
            taken.add(storage.data_ptr())
            return leaf
        return copy_of(leaf.detach())

    leaves, structure = pytree.tree_flatten((args, kwargs))
    own_args, own_kwargs = pytree.tree_unflatten([apart_from(leaf) for leaf in leaves], structure)
    return own_args, own_kwargs


class Stated:
    """The least sizes that `dynamic` states; `Dim.AUTO` and `Dim.DYNAMIC` state none."""

    def __init__(self, dynamic: Any) -> None:
        from torch.utils import _pytree as pytree

        self._names: set[str] = set()
        self._hints = False
        for leaf in pytree.tree_leaves(dynamic):
            root = getattr(leaf, "root", leaf)
            name = getattr(root, "__name__", None)
            if name is not None:
                self._names.add(name)
            elif getattr(leaf, "min", None) is not None:
                self._hints = True

    def leaves_open(self, symbol: str) -> bool:
        """Return whether a symbol is torch's own, so that the user did not tell it from others."""
        return symbol not in self._names

    def least(self, symbol: str, low: int) -> int:
        """Return the least value of a symbol, given the least value `low` that torch states."""
        return low if low != EXPORTED_FROM or symbol in self._names or self._hints else 0


class Findings:
    """One module, its exported program and its specs, and what running them shows.

    Args:
        module: The module.
        arguments: The module's example arguments and keyword arguments, as exported.
        program: The exported program.
        functional: The program after `run_decompositions`, which writes to nothing.
        spec: The specs that the program states.
        dynamic: The dynamic dimensions as the user gave them.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        program: ExportedProgram,
        functional: ExportedProgram,
        spec: ModelSpec,
        dynamic: Any,
    ) -> None:
        self._runs = ProgramRuns(module, arguments, program, functional, spec.inputs)
        self.examples = self._runs.examples
        self._spec = spec
        self.stated = Stated(dynamic)
        dtypes = [
            str(t.dtype).removeprefix("torch.") for t in (*module.parameters(), *module.buffers())
        ]
        dtypes += [
            leaf.dtype for leaf in (*spec.inputs, *spec.outputs) if isinstance(leaf, TensorSpec)
        ]
        self._tolerance: float | None = tolerance_of(dtypes)
        self._sizes = self._example_sizes()
        self._apart = child.can_fork() and all(spec.device == "cpu" for spec in self._runs.specs)
        self._apart = self._apart and all(
            tensor.is_cpu for tensor in (*module.parameters(), *module.buffers())
        )
        self._one_symbol: list[tuple[str, str]] = []  # symbols that `merged` has replaced, by which
        self._values = True  # whether the values of two runs can be compared
        self._found: dict[tuple[str, int], str] = {}
        self.impossible = self._why_not()

    def _why_not(self) -> str:
        size = self._runs.example_bytes()
        if size > LARGEST:
            return (
                f"the example has {size >> 20} MB, and trials run with at most {LARGEST >> 20} MB"
            )
        if any(not _WORD.match(symbol) for symbol in symbols_of(self._runs.specs)):
            return "a size depends on several dynamic ones"
        return ""

    def _example_sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for spec, example in zip(self._runs.specs, self.examples, strict=True):
            for dim, size in zip(spec.shape, example.shape, strict=True):
                if isinstance(dim, DynamicDim):
                    sizes.setdefault(dim.symbol, (size - dim.offset) // dim.scale)
        return sizes

    # --- before compiling -------------------------------------------------------------------------

    def disagreement(self) -> str:
        """Return where the exported program differs from the module on other inputs.

        Returns "" where it does not differ, and where that is not known.
        """
        if self.impossible:
            self._values = False
            return ""
        kind, where = self._answers([self._is_random, self._compare_exported])
        self._values = not kind and not self._spec.mutates_buffers
        return where.removeprefix(_DIFFERS) if self._values and where.startswith(_DIFFERS) else ""

    def merged(self) -> ModelSpec:
        """Return the spec with one symbol for the rows of inputs that the module requires equal.

        With `Dim.AUTO`, export gives each input a symbol of its own.
        """
        rows = row_symbols(self._runs.specs, 0)
        low = max((least for least, _ in map(self._bounds, rows)), default=0)
        count = min((most for _, most in map(self._bounds, rows) if most is not None), default=ROWS)
        count = max(min(count, ROWS), low + 1)
        if self.impossible or len(rows) < 2 or count <= EXPORTED_FROM:
            return self._spec
        first, *others = rows
        equal = {**self._sizes, **dict.fromkeys(rows, count)}
        each = [equal, *({**equal, other: count - 1} for other in others)]
        together, *different = self._answers(
            [functools.partial(self._exported, sizes) for sizes in each]
        )
        if together:
            return self._spec
        for other, refused in zip(others, different, strict=True):
            if refused and not child.is_unknown(refused):
                self._one_symbol.append((other, first))
                self._spec = msgspec.structs.replace(
                    self._spec,
                    inputs=with_one_symbol(self._spec.inputs, other, first),
                    outputs=with_one_symbol(self._spec.outputs, other, first),
                    conditions=with_symbol(self._spec.conditions, other, first),
                )
        self._runs.specs = [leaf for leaf in self._spec.inputs if isinstance(leaf, TensorSpec)]
        self._sizes = self._example_sizes()
        return self._spec

    def rows(self, dim: int, symbols: Sequence[str]) -> RowEvidence:
        """Return whether rows influence each other, by running them and by the program's graph.

        Args:
            dim: The dimension of the rows.
            symbols: The symbols of its size in the inputs.
        """
        found = self._rows_run(dim, symbols)
        if found.independent is False:
            return found
        if operator := where_rows_meet(self._runs.functional, dim):
            return RowEvidence(
                False,
                f"Rows may influence each other: {operator!r} computes a value of several rows, "
                "and an output depends on it.",
            )
        return found

    def _rows_run(self, dim: int, symbols: Sequence[str]) -> RowEvidence:
        if self.impossible:
            return RowEvidence(None, self.impossible)
        if self._spec.mutates_buffers:
            return RowEvidence(None, "it writes to its buffers")
        if not self._values:
            return RowEvidence(None, "the same request gives other values each time")
        low = max(self._least(symbol)[0] for symbol in symbols)
        high = min(
            (most for _, most in map(self._bounds, symbols) if most is not None), default=None
        )
        count = max(ROWS, low + 1) if high is None else min(max(ROWS, low + 1), high)
        if count < 2:
            return RowEvidence(None, "it takes no two rows")
        sizes = {**self._sizes, **dict.fromkeys(symbols, count)}
        for wide in (True, False):
            if wide and not self._can_widen():
                continue
            trial = functools.partial(self._row_trial, dim, sizes, max(low, 1), wide=wide)
            (text,) = self._answers([trial])
            found = _row_answer(text)
            if found.independent is False or not wide:
                return found
        return found

    def try_sizes(self) -> None:
        """Run the module and its program on sizes of 0, 1 and 2 in each dynamic dimension."""
        self._try(self._exported, self._wanted())

    # --- after compiling --------------------------------------------------------------------------

    def try_compiled(self, library: Path) -> None:
        """Run the compiled code on the sizes that have not failed yet."""
        if self.impossible or not self._apart or not self._sizes:
            return
        control, *_ = self._answers([lambda: self._compiled(library, self._sizes)])
        if control == child.DIED or control.startswith((_RAISES, child.NOT_STARTED, child.FAULT)):
            return  # the library can't be run alone (without its weights, say)
        if control:
            self._values = False
        wanted = [key for key in self._wanted() if not self._found.get(key)]
        self._try(lambda sizes: self._compiled(library, sizes), wanted)

    def needed(self, library: Path, conditions: Sequence[str]) -> tuple[str, ...]:
        """Return the conditions on sizes without which the compiled code is not right.

        Inductor chooses code by the example's sizes. Beyond them, some code is slower and some is
        wrong: it is run on sizes that do not meet a condition.
        """
        if self.impossible or not self._apart:
            return ()
        needed = []
        for old, new in self._one_symbol:
            conditions = with_symbol(conditions, old, new)
        for text in dict.fromkeys(conditions):
            beyond = self._sizes_beyond(SizeCondition(text))
            trials = [functools.partial(self._compiled, library, sizes) for sizes in beyond]
            answers = self._answers(trials)
            if any(answer and not child.is_unknown(answer) for answer in answers):
                needed.append(text)
        return tuple(needed)

    def _sizes_beyond(self, condition: SizeCondition) -> list[dict[str, int]]:
        """Return a few sizes that do not meet a condition, the smallest and near the example."""
        beyond: list[dict[str, int]] = []
        for symbol in sorted(condition.symbols & self._sizes.keys()):
            low, high = self._bounds(symbol)
            own = self._sizes[symbol]
            values = sorted({*range(own - 8, own + 9), *(own * factor for factor in _FACTORS)})
            if high is not None:
                values = sorted({*(value for value in values if value <= high), high})
            found = [
                {**self._sizes, symbol: value}
                for value in values
                if value >= max(low, EXPORTED_FROM)
                and self._bytes(symbol, value) <= _LARGEST_BEYOND
                and not condition.holds({**self._sizes, symbol: value})
            ]
            beyond += [*found[:2], *found[-1:]] if len(found) > 2 else found
        return beyond

    def _bytes(self, symbol: str, value: int) -> int:
        """Return about how many bytes a request has with another value of one symbol."""
        return self._runs.example_bytes() * value // max(self._sizes[symbol], 1)

    def with_minima(self, spec: ModelSpec) -> ModelSpec:
        """Return the spec with the least sizes that were shown to be right."""
        minima = {symbol: self._least(symbol) for symbol in symbols_of(self._runs.specs)}

        def bounded(leaf: LeafSpec) -> LeafSpec:
            if not isinstance(leaf, TensorSpec):
                return leaf
            return msgspec.structs.replace(
                leaf,
                shape=tuple(_at_least(dim, minima) for dim in leaf.shape),
            )

        return msgspec.structs.replace(
            spec,
            inputs=tuple(map(bounded, spec.inputs)),
            outputs=tuple(map(bounded, spec.outputs)),
            sizes_probed=bool(minima) and not self.impossible,
        )

    # --- sizes ------------------------------------------------------------------------------------

    def _bounds(self, symbol: str) -> tuple[int, int | None]:
        """Return the least and the greatest value of a symbol that the specs allow."""
        low, high = 0, None
        for spec in self._runs.specs:
            for dim in spec.shape:
                if isinstance(dim, DynamicDim) and dim.symbol == symbol:
                    low = max(
                        low, -(-(dim.min - dim.offset) // dim.scale), -(dim.offset // dim.scale)
                    )
                    if dim.max is not None:
                        most = (dim.max - dim.offset) // dim.scale
                        high = most if high is None else min(high, most)
        return self.stated.least(symbol, low), high

    def _wanted(self) -> list[tuple[str, int]]:
        """Return the symbols and the small values to try, the largest values of a symbol first."""
        wanted = []
        for symbol in symbols_of(self._runs.specs):
            low, high = self._bounds(symbol)
            top = EXPORTED_FROM if high is None else min(EXPORTED_FROM, high)
            wanted += [(symbol, value) for value in range(top, low - 1, -1)]
        return wanted

    def _try(
        self, trial: Callable[[dict[str, int]], str], wanted: Sequence[tuple[str, int]]
    ) -> None:
        if self.impossible:
            return
        trials = [
            functools.partial(trial, {**self._sizes, symbol: value}) for symbol, value in wanted
        ]
        for key, answer in zip(wanted, self._answers(trials), strict=True):
            self._found[key] = answer.removeprefix(_DIFFERS).removeprefix(_RAISES)

    def _least(self, symbol: str) -> tuple[int, str]:
        """Return the least value of a symbol and the reason why no less value is allowed.

        The reason is "" where the user or torch states that value.
        """
        low, high = self._bounds(symbol)
        if low > EXPORTED_FROM:
            return low, ""
        if self.impossible:
            return max(low, EXPORTED_FROM), f"Smaller sizes were not tried: {self.impossible}."
        untried = "no run was tried"
        least = EXPORTED_FROM if high is None else min(EXPORTED_FROM, high)
        if (refused := self._found.get((symbol, least), "")) and not child.is_unknown(refused):
            least += 1
        else:
            while least > low and not self._found.get((symbol, least - 1), untried):
                least -= 1
        if least == low:
            return low, ""
        return (
            least,
            f"With {least - 1} for {symbol!r}, {self._found.get((symbol, least - 1), untried)}.",
        )

    # --- trials -----------------------------------------------------------------------------------

    def _answers(self, trials: Sequence[child.Trial]) -> list[str]:
        if not trials:
            return []
        if self._apart:
            return child.answers(trials, seconds=SECONDS, prepare=_one_thread)
        return self._answers_here(trials)

    def _answers_here(self, trials: Sequence[child.Trial]) -> list[str]:
        """Run the trials in this process, on a copy of the module."""
        import torch

        module = self._runs.module
        try:
            self._runs.module = copy.deepcopy(module)
        except Exception as error:  # noqa: BLE001 -- copying calls the user's code
            return [f"the module can't be copied to try it ({first_line(error)})" for _ in trials]
        try:
            with torch.random.fork_rng():
                return [_answer(trial) for trial in trials]
        finally:
            self._runs.module = module

    def _is_random(self) -> str:
        """Return `_RANDOM` if two runs on the same inputs give different values, otherwise ""."""
        inputs, once = self._runs.run_module(self._sizes, 0)
        return (
            _RANDOM if difference(once, self._runs.eager(copies(inputs)), self._tolerance) else ""
        )

    def _compare_exported(self) -> str:
        inputs, wanted = self._runs.run_module(self._sizes, 1)
        what = difference(wanted, self._runs.interpret(inputs), self._tolerance)
        return f"{_DIFFERS}{what}" if what else ""

    def _exported(self, sizes: dict[str, int]) -> str:
        """Return what is wrong with the exported program on these sizes; "" if nothing is."""
        return self._beside(sizes, self._runs.interpret, "the exported program")

    def _compiled(self, library: Path, sizes: dict[str, int]) -> str:
        """Return what is wrong with the compiled code on these sizes; "" if nothing is."""
        for high in (True, False):
            run = functools.partial(self._runs.run_library, library, high=high)
            if what := self._beside(sizes, run, "the compiled code"):
                return what
        return ""

    def _beside(
        self, sizes: dict[str, int], run: Callable[[list[torch.Tensor]], Any], subject: str
    ) -> str:
        what = ""
        for seed in range(2):  # rounding may tip an integer in one draw
            try:
                inputs, wanted = self._runs.run_module(sizes, seed)
            except Exception as error:  # noqa: BLE001 -- a module may raise any error
                return f"the module itself raises {first_line(error).rstrip('.')}"
            try:
                got = run(inputs)
            except Exception as error:  # noqa: BLE001 -- and so may its program
                if isinstance(error, OtherShapeError):
                    return f"{_DIFFERS}{str(error).splitlines()[0]}"  # fx adds lines of its own
                return f"{_RAISES}{subject} raises {first_line(error).rstrip('.')}"
            what = difference(wanted, got, self._tolerance if self._values else None)
            if not what:
                return ""
        return f"{_DIFFERS}{subject} is wrong: {what}"

    def _row_trial(self, dim: int, sizes: dict[str, int], least: int, *, wide: bool) -> str:
        specs, tolerance = self._runs.specs, self._tolerance or 0.0
        if wide:
            self._runs.module.float()
            specs = [msgspec.structs.replace(s, dtype=_WIDER.get(s.dtype, s.dtype)) for s in specs]
            tolerance = tolerance_of(["float32"])
        found = RowEvidence(None, "")
        for examples in (_varied(self.examples, specs), self.examples):

            def draw(seed: int, examples: tuple[ExampleSpec, ...] = examples) -> list[torch.Tensor]:
                return tensors_like(specs, sizes, examples, seed=seed)

            found = row_evidence(self._runs.eager, draw, dim, least=least, tolerance=tolerance)
            if found.independent is not None:
                break
        return msgspec.json.encode(found).decode()

    def _can_widen(self) -> bool:
        """Return whether a half-precision module can also run in single precision.

        A weak influence of rows shows only in single precision. The module must contain no casts
        of its own.
        """
        import torch

        dtypes = {parameter.dtype for parameter in self._runs.module.parameters()}
        halves = dtypes & {torch.float16, torch.bfloat16} or any(
            s.dtype in _WIDER for s in self._runs.specs
        )
        if not self._apart or not halves:
            return False
        return not any(
            value in (torch.float16, torch.bfloat16)
            for node in self._runs.functional.graph.nodes
            for value in (*node.args, *node.kwargs.values())
            if isinstance(value, torch.dtype)
        )


_DIFFERS, _RAISES = "differs: ", "raises: "
_WIDER = {"float16": "float32", "bfloat16": "float32"}


def _varied(
    examples: Sequence[ExampleSpec], specs: Sequence[TensorSpec]
) -> tuple[ExampleSpec, ...]:
    """Return the examples with varied integers, because equal rows would show no influence.

    The other value is the one beside it and nearer to 0: False in a mask that is True everywhere,
    and a length that is no greater than the example's.
    """
    return tuple(
        msgspec.structs.replace(
            e, low=min(e.low, abs(e.low - 1)), high=max(e.low, abs(e.low - 1)), values=None
        )
        if e.low is not None
        and e.low == e.high
        and not s.dtype.startswith(("float", "bfloat", "complex"))
        else e
        for e, s in zip(examples, specs, strict=True)
    )


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _answer(trial: child.Trial) -> str:
    try:
        return trial()
    except Exception as error:  # noqa: BLE001 -- a model may raise any error
        return first_line(error)


def _row_answer(text: str) -> RowEvidence:
    try:
        return msgspec.json.decode(text, type=RowEvidence)
    except msgspec.MsgspecError:
        return RowEvidence(None, text)


def _at_least(dim: int | DynamicDim, minima: dict[str, tuple[int, str]]) -> int | DynamicDim:
    if isinstance(dim, int) or dim.symbol not in minima:
        return dim
    least, reason = minima[dim.symbol]
    return msgspec.structs.replace(dim, min=max(dim.scale * least + dim.offset, 0), reason=reason)
