"""Numeric evidence: what running a model on chosen inputs shows of it.

Every function takes `run`, a callable from input tensors to output tensors. It may be an eager
module or a compiled model. No function here knows how a model is loaded, and none changes torch's
random state. torch is imported when a function is called. A function never catches what ends a
process: run unknown code on unusual sizes in a child process only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aoti_sched.errors import first_line
from aoti_sched.model.specs import DynamicDim, ExampleSpec, RowEvidence, TensorSpec

if TYPE_CHECKING:
    import torch

Run = Callable[[list["torch.Tensor"]], Sequence[Any]]
"""Runs a model on its tensor inputs. An output that is no tensor is not compared."""

VALUES_KEPT = 256
"""Integers or booleans of one example that a package keeps one by one; larger examples keep their
range alone.
"""

ROWS = 4
"""Rows that are run together, alone and in another order."""

_PADDING = 1024
"""Elements of sentinel before and after a guarded tensor; a multiple of every vector's width."""


# --- examples -------------------------------------------------------------------------------------


def example_of(tensor: torch.Tensor) -> ExampleSpec:
    """Return what is kept of an example input."""
    import torch

    shape = tuple(tensor.shape)
    plain = tensor.detach()
    if not plain.numel() or plain.is_complex() or plain.is_meta:
        return ExampleSpec(shape)
    discrete = not plain.is_floating_point()
    values = None
    if discrete and plain.numel() <= VALUES_KEPT:
        values = tuple(int(value) for value in plain.reshape(-1).tolist())
    if values is not None:
        return ExampleSpec(shape, float(min(values)), float(max(values)), values)
    numbers = (
        plain
        if plain.dtype in (torch.float32, torch.float64, torch.int32, torch.int64)
        else plain.float()
    )
    if not discrete:
        numbers = numbers[torch.isfinite(numbers)]
        if not numbers.numel():
            return ExampleSpec(shape)
    low, high = torch.aminmax(numbers)
    return ExampleSpec(shape, float(low), float(high))


def tensors_like(
    specs: Sequence[TensorSpec],
    sizes: Mapping[str, int],
    examples: Sequence[ExampleSpec] = (),
    *,
    seed: int,
) -> list[torch.Tensor]:
    """Random tensors that fit the specs, with values in the examples' ranges.

    Args:
        specs: The tensor inputs.
        sizes: The value of each symbol; a `DynamicDim`'s size is `scale * value + offset`.
        examples: One for each spec; without them, values are those of a normal distribution,
            integers and booleans are 0 or 1.
        seed: The same seed and sizes give the same tensors.

    Raises:
        KeyError: A symbol has no size.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for index, spec in enumerate(specs):
        shape = [
            dim if isinstance(dim, int) else dim.scale * sizes[dim.symbol] + dim.offset
            for dim in spec.shape
        ]
        example = examples[index] if index < len(examples) else ExampleSpec(())
        dtype = getattr(torch, spec.dtype)
        values = _values(shape, dtype, example, generator)
        tensors.append(with_layout(values, spec).to(spec.device))
    return tensors


def _values(
    shape: list[int], dtype: torch.dtype, example: ExampleSpec, generator: torch.Generator
) -> torch.Tensor:
    import torch

    if example.values is not None and list(example.shape) == shape:
        return torch.tensor(example.values, dtype=torch.int64).reshape(shape).to(dtype)
    low, high = example.low, example.high
    if dtype.is_complex:
        real, imaginary = (torch.randn(shape, generator=generator) for _ in range(2))
        return torch.complex(real, imaginary).to(dtype)
    if not dtype.is_floating_point:
        least, most = (0, 1) if low is None or high is None else (int(low), int(high))
        most = min(most, least + 2**31)  # what the generator takes
        return torch.randint(least, most + 1, shape, generator=generator).to(dtype)
    if low is None or high is None or low == high == 0:
        return torch.randn(shape, generator=generator).to(dtype)
    low, high = min(low, 0.0) if low == high else low, max(high, 0.0) if low == high else high
    # Each row of a range of its own: rows that look alike hide that one is scaled by what is in
    # another.
    values = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    middle = (low + high) / 2
    for dim, size in enumerate(shape[:2]):
        width = (torch.arange(size, dtype=torch.float64) % 4 + 1) / 4
        values = middle + (values - middle) * width.reshape(
            [-1 if d == dim else 1 for d in range(len(shape))]
        )
    return values.to(dtype)


def with_layout(values: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return the same values in memory as the spec wants them: its order, or its strides.

    Sizes of an expanded tensor agree afterwards.
    """
    import torch

    shape = list(values.shape)
    if spec.strides is not None:
        strides = _strides(spec, shape)
        length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        memory = torch.zeros(length if values.numel() else 0, dtype=values.dtype)
        made = memory.as_strided(shape, strides)
        if values.numel() and not _separate(shape, strides):
            # Elements share memory: each place of it gets some of the values.
            memory.copy_(values.reshape(-1).repeat(-(-length // values.numel()))[:length])
            return made
        return made.copy_(values)
    order = spec.order or tuple(range(len(shape)))
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return values.permute(order).contiguous().permute(inverse)


def _strides(spec: TensorSpec, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor that is not dense, for its sizes."""
    symbols = {
        dim.symbol: (size - dim.offset) // dim.scale
        for dim, size in zip(spec.shape, shape, strict=True)
        if isinstance(dim, DynamicDim)
    }
    return tuple(
        step if isinstance(step, int) else step.scale * symbols[step.symbol] + step.offset
        for step in spec.strides or ()
    )


def _separate(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether no two elements of a strided tensor share memory, judged by nested strides."""
    reach = 0
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return True


def guarded(tensors: Sequence[torch.Tensor], *, high: bool) -> list[torch.Tensor]:
    """Return the tensors as views into larger buffers, where a read beyond one meets a sentinel.

    Where two runs on the same inputs with another `high` give other outputs, the model read beyond
    its input. An empty tensor has no address: a read beyond one still ends the process.

    Args:
        tensors: The inputs, of any strides.
        high: Which sentinel: floats are surrounded by NaN or by 10,000 (2 in small types); others
            by their own greatest or least value, so that an index read beyond a buffer stays one.
    """
    import torch

    views = []
    for tensor in tensors:
        length = 1 + sum(
            (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
        length = length if tensor.numel() else 0
        memory = torch.empty(length + 2 * _PADDING, dtype=tensor.dtype, device=tensor.device)
        memory.fill_(_sentinel(tensor, high=high))
        source = tensor.as_strided((length,), (1,)) if length else tensor.reshape(0)
        memory[_PADDING : _PADDING + length].copy_(source)
        views.append(memory.as_strided(tensor.shape, tensor.stride(), _PADDING))
    return views


def _sentinel(tensor: torch.Tensor, *, high: bool) -> float | int | bool:
    import torch

    if tensor.is_complex():
        return math.nan if high else 2.0
    if tensor.is_floating_point():
        if high:
            return math.nan
        return 2.0 if tensor.element_size() == 1 else 10_000.0
    if not tensor.numel():
        return 0
    if tensor.dtype is torch.bool:
        return high
    numbers = tensor.long()
    return int(numbers.max() if high else numbers.min())


# --- comparison -----------------------------------------------------------------------------------

_TOLERANCES = {
    "float64": 1e-6,
    "complex128": 1e-6,
    "float16": 2e-2,
    "bfloat16": 6e-2,
    "complex32": 2e-2,
}
"""Of float32 1e-3.

A batched matrix product rounds otherwise than one of a single row, and the difference grows with
each layer.
"""

_COARSE = 6e-2
_FRACTION = {True: 0.05, False: 0.002}
"""How many integers may differ: where two values are nearly equal (argmax, round), rounding
decides.
"""


def tolerance_of(dtypes: Iterable[str]) -> float:
    """Return the greatest relative difference that rounding explains in these dtypes.

    The difference is relative to the greatest value.
    """
    found = [0.0]
    for dtype in dtypes:
        if dtype.startswith("float8"):
            found.append(0.25)
        elif dtype.startswith(("float", "bfloat", "complex")):
            found.append(_TOLERANCES.get(dtype, 1e-3))
    return max(found) or 1e-3


def difference(expected: Sequence[Any], actual: Sequence[Any], tolerance: float | None) -> str:
    """Return where two runs' outputs differ, in a few words; "" where they don't.

    Args:
        expected: Outputs of one run; what is no tensor is not compared.
        actual: Outputs of the other.
        tolerance: As `tolerance_of` gives it; None compares shapes and dtypes alone.
    """
    import torch

    if len(expected) != len(actual):
        return f"there are {len(actual)} outputs in place of {len(expected)}"
    for index, (wanted, got) in enumerate(zip(expected, actual, strict=True)):
        if not isinstance(wanted, torch.Tensor) or not isinstance(got, torch.Tensor):
            continue
        if wanted.shape != got.shape:
            return f"output {index} has shape {tuple(got.shape)} in place of {tuple(wanted.shape)}"
        if tolerance is not None and wanted.numel() and not _alike(wanted, got, tolerance):
            return f"output {index} has other values"
    return ""


def _alike(wanted: torch.Tensor, got: torch.Tensor, tolerance: float) -> bool:
    import torch

    if wanted.layout is not torch.strided or wanted.is_quantized:
        return True
    if not (wanted.is_floating_point() or wanted.is_complex()):
        wrong = int((wanted != got.to(wanted.device)).sum())
        return wrong <= int(_FRACTION[tolerance >= _COARSE] * wanted.numel())
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    a, b = wanted.to(wide), got.to(wanted.device, wide)
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return False
    scale = float(a[finite].abs().max()) if bool(finite.any()) else 0.0
    return bool(((a - b)[finite].abs() <= tolerance * max(scale, 1e-30)).all())


def is_telling(outputs: Sequence[Any]) -> bool:
    """Return whether the outputs could show a difference: some element is finite."""
    import torch

    tensors = [o for o in outputs if isinstance(o, torch.Tensor) and o.numel()]
    return any(not t.is_floating_point() or bool(torch.isfinite(t.float()).any()) for t in tensors)


# --- rows -----------------------------------------------------------------------------------------


def row_evidence(
    run: Run,
    draw: Callable[[int], list[torch.Tensor]],
    dim: int,
    *,
    least: int,
    tolerance: float,
    draws: int = 3,
) -> RowEvidence:
    """Return whether the rows of a request influence each other.

    Rows are run together, alone and in another order, and the outputs compared.

    Args:
        run: The model. What it raises is the reason why nothing was found out.
        draw: Gives inputs for a seed, of the same sizes each time and at least 2 rows; different
            rows must differ.
        dim: The dimension in which every tensor input and output has its rows.
        least: The fewest rows that the model takes; "alone" means in groups of this size.
        tolerance: As `tolerance_of` gives it.
        draws: Draws after the first one that must differ, too, before rows count as dependent;
            rounding may tip a single one.
    """
    found = ""
    for seed in range(draws):
        try:
            try:
                found = _influence(run, draw(seed), dim, least, tolerance)
            except Exception:
                if least > 1:
                    raise
                # A row alone may be refused (batch norm in training mode), and two may show all
                # there is to see.
                found = _influence(run, draw(seed), dim, 2, tolerance)
        # A model raises what it likes; the reason is kept.
        except Exception as error:  # noqa: BLE001
            return RowEvidence(None, f"running it on random values failed: {first_line(error)}")
        if not found:
            return RowEvidence(True, "Rows alone, together and in another order gave the same.")
        if found == _VOID:
            return RowEvidence(
                None,
                "its random rows are all alike, or its outputs are not finite: they tell nothing",
            )
        if "shape" in found:
            break
    return RowEvidence(False, found)


_VOID = "void"


def _influence(run: Run, inputs: list[torch.Tensor], dim: int, least: int, tolerance: float) -> str:
    import torch

    rows = inputs[0].shape[dim]
    if all(bool((tensor == tensor.narrow(dim, 0, 1)).all()) for tensor in inputs):
        return _VOID
    together = _copied(run(_cloned(inputs)))
    if not is_telling(together):
        return _VOID
    for group, words in _groups(rows, max(least, 1)):
        index = torch.tensor(group, device=inputs[0].device)
        part = [
            _kept(tensor, tensor.index_select(dim, index.to(tensor.device))) for tensor in inputs
        ]
        expected = [
            out.index_select(dim, index.to(out.device))
            if isinstance(out, torch.Tensor) and dim < out.dim() and out.shape[dim] == rows
            else out
            for out in together
        ]
        what = difference(expected, _copied(run(part)), tolerance)
        if what:
            return f"Rows influence each other: {words}, {what}."
    return ""


def _groups(rows: int, least: int) -> list[tuple[list[int], str]]:
    """Selections of rows, each with words for an error."""
    every = list(range(rows))
    if least == 1:
        groups = [([row], f"row {row} of {rows} run alone") for row in every]
    else:
        groups = [
            (
                [(row + step) % rows for step in range(least)],
                f"with {least} of {rows} rows run apart",
            )
            for row in every
            if least < rows
        ]
    if rows > 2:
        groups.append((every[1:] + every[:1], "with the rows in another order"))
    return [*groups, (every[::-1], "with the rows in reverse order")]


def _kept(like: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return a selection of rows in the memory order of the tensor it was selected from."""
    usual = range(like.dim())
    strides = like.stride()
    order = sorted(usual, key=lambda dim: (-strides[dim], -like.shape[dim], dim))
    if like.is_contiguous():
        order = list(usual)
    inverse = sorted(usual, key=order.__getitem__)
    return part.permute(order).contiguous().permute(inverse)


def _cloned(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]


def _copied(outputs: Sequence[Any]) -> list[Any]:
    """Outputs that a later run can't change: a model may return its buffers or its inputs."""
    import torch

    return [out.detach().clone() if isinstance(out, torch.Tensor) else out for out in outputs]


def symbols_of(specs: Iterable[TensorSpec]) -> list[str]:
    """Return the symbols of the specs' dynamic dimensions, in order of appearance."""
    dims = [dim for spec in specs for dim in spec.shape if isinstance(dim, DynamicDim)]
    return list(dict.fromkeys(dim.symbol for dim in dims))
