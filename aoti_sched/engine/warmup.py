"""Warming up: the values that a model is first run on, and the runs themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from aoti_sched.errors import AotiSchedError, ConfigError, InputMismatchError, first_line
from aoti_sched.events import log
from aoti_sched.model.evidence import example_of, tensors_like
from aoti_sched.model.size_conditions import SizeCondition
from aoti_sched.model.specs import DynamicDim, ExampleSpec, ModelSpec, TensorSpec

if TYPE_CHECKING:
    from aoti_sched.backends.contracts import Container
    from aoti_sched.model.call_spec import CallSpec


def tensors_given(call_spec: CallSpec, inputs: object, name: str) -> list[Any]:
    """Return the tensors of `warmup_inputs`, which are arguments as `run` takes them.

    Raises:
        ConfigError: They are no arguments of the model.
    """
    args, kwargs = inputs, {}
    if isinstance(inputs, tuple) and len(inputs) == 2:
        first, second = inputs
        if isinstance(first, tuple) and isinstance(second, dict):
            args, kwargs = first, second
    if not isinstance(args, tuple):
        raise ConfigError(
            f"model {name!r}: warmup_inputs is a {type(inputs).__name__}. Give the arguments of "
            "run() as a tuple, or a tuple and a "
            "dict: (args, kwargs)."
        )
    try:
        return call_spec.flatten(args, kwargs)
    except InputMismatchError as error:
        raise ConfigError(f"model {name!r}: warmup_inputs: {error}") from error


def examples_for(
    own: ModelSpec | None, specs: Sequence[TensorSpec], given: Sequence[Any] | None
) -> Sequence[ExampleSpec]:
    """Return what values made up for the model must be like.

    The user's values come first, then the example that the model was compiled with.
    """
    if given is not None and len(given) == len(specs):
        return [example_of(tensor) for tensor in given]
    return () if own is None or len(own.examples) != len(specs) else own.examples


def example_inputs(specs: Sequence[TensorSpec]) -> list[Any]:
    """Return tensors of zeros that fit the specs, as small as their ranges allow but not empty."""
    return [tensor.zero_() for tensor in tensors_like(specs, _least_sizes(specs), seed=0)]


def _least_sizes(specs: Sequence[TensorSpec]) -> dict[str, int]:
    symbols: dict[str, int] = {}
    for spec in specs:
        for dim in spec.shape:
            if isinstance(dim, DynamicDim):
                least = -(-(max(dim.min, 1) - dim.offset) // dim.scale)
                symbols[dim.symbol] = max(symbols.get(dim.symbol, 0), least)
    return symbols


def values_for(
    own: ModelSpec | None, specs: Sequence[TensorSpec], given: Sequence[Any] | None
) -> Callable[[], Sequence[Any]]:
    """Return a function that makes the inputs to warm up with.

    They are the user's; or like the example that the model was compiled with; or zeros. Sizes are
    as small as is safe.
    """
    if given is not None:
        return lambda: [tensor.clone() for tensor in given]
    examples = examples_for(own, specs, None)
    sizes = _sizes_of(examples, specs) if examples else None
    if own is not None and sizes is not None:
        sizes = _smaller(own, specs, sizes)
    if sizes is not None:
        return lambda: tensors_like(specs, sizes, examples, seed=0)
    return lambda: example_inputs(specs)


def _sizes_of(
    examples: Sequence[ExampleSpec], specs: Sequence[TensorSpec]
) -> dict[str, int] | None:
    """Return the values of the symbols in the examples' shapes; None where shapes do not fit."""
    sizes: dict[str, int] = {}
    for example, spec in zip(examples, specs, strict=True):
        if len(example.shape) != len(spec.shape):
            return None
        for size, dim in zip(example.shape, spec.shape, strict=True):
            if isinstance(dim, DynamicDim):
                sizes[dim.symbol] = (size - dim.offset) // dim.scale
    return sizes


def _smaller(own: ModelSpec, specs: Sequence[TensorSpec], sizes: dict[str, int]) -> dict[str, int]:
    """Return the least sizes that values like the example's are safe with.

    A whole number may be an index or a length, which is right for the example's sizes only. Then
    only the number of rows is lowered, where rows were shown to be independent. Sizes that do not
    meet the model's conditions are not lowered.
    """
    least = _least_sizes(specs)
    if all(spec.dtype.startswith(("float", "bfloat", "complex")) for spec in specs):
        lowered = set(least)
    elif own.batch is not None and own.rows is not None and own.rows.independent:
        lowered = {own.batch.symbol}
    else:
        lowered = set()
    smaller = {**sizes, **{name: min(sizes[name], least[name]) for name in lowered & sizes.keys()}}
    fit = all(SizeCondition(text).holds(smaller) for text in own.conditions)
    return smaller if fit else sizes


def warm_up(
    container: Container,
    name: str,
    make_inputs: Callable[[], Sequence[Any]],
    failure: str,
    threads: int | None = None,
) -> list[str]:
    """Warm a model up, and return notes about it.

    On a CPU, `threads` are the intra-op threads of a run, as on a lane. The default of the calling
    thread, which is all cores, would start a team of threads that stays.

    Values that are made up may be nonsense to a model. So a failure is noted, and the model is
    loaded anyway.
    """
    advice = "Give load() warmup_inputs= that it can be run on."
    if failure:  # it was tried apart
        log.warning("warm-up failed", runner=name, error=failure)
        note = "Not warmed up, so the first requests may be slow: it fails on values made up for it"
        return [f"{note}: {failure}. {advice}"]
    try:
        with _threads(threads):
            container.warm_up(make_inputs)
    except AotiSchedError as error:
        log.warning("warm-up failed", runner=name, error=first_line(error))
        return [f"Warm-up failed, so the first requests may be slow: {first_line(error)}. {advice}"]
    return []


def _threads(count: int | None) -> AbstractContextManager[None]:
    if count is None:
        return nullcontext()
    from aoti_sched.backends.cpu import with_threads  # imports torch

    return with_threads(count)
