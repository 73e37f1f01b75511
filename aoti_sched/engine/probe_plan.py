"""Examination: what to find out by running a model at load, and what follows for its specs.

Least sizes are examined where the compiler only assumed them, and rows where requests are to be
batched. `probing.py` runs the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.config import Batching
from aoti_sched.engine.probe_values import Findings, Rows, Symbol, symbols_in, with_least
from aoti_sched.engine.probing import examine
from aoti_sched.engine.warmup import examples_for
from aoti_sched.model.batch_layout import (
    Grouping,
    as_requests,
    group,
    must_be_independent,
    must_not_write_inputs,
    of_calls,
)
from aoti_sched.model.specs import (
    DynamicDim,
    ModelSpec,
    RowEvidence,
    SpecSource,
    TensorSpec,
)
from aoti_sched.model.wrapper_source import writes_in

if TYPE_CHECKING:
    from aoti_sched.backends.contracts import Container, Device, Inspected
    from aoti_sched.config import ModelConfig


class Model(msgspec.Struct, frozen=True, eq=False):
    """What is known of a model before it is run.

    Attributes:
        name: The runner's.
        settings: The user's.
        inspected: What its package says.
        container: The loaded model.
        specs: Specs of its tensor inputs; None where they are not known.
        source: Where the specs come from.
        state: Why it counts as writing to its buffers; "" where it does not.
        given: Its inputs for warming up, where the user gave some.
    """

    name: str
    settings: ModelConfig
    inspected: Inspected
    container: Container
    specs: tuple[TensorSpec, ...] | None
    source: SpecSource
    state: str
    given: list[Any] | None
    """Its inputs for warming up, if the user gave some."""

    @property
    def own(self) -> ModelSpec | None:
        """The specs that its package brings."""
        return self.inspected.own


def batch_layout(model: Model) -> Grouping | None:
    """Return how the model's requests are batched; None where that is not wanted.

    Raises:
        ConfigError: Its requests can't be batched.
    """
    wanted = _wanted(model.settings)
    if wanted is None:
        return None
    if model.inspected.call_spec is not None:
        return of_calls(wanted)
    outputs = model.container.info.num_outputs
    grouping, _ = group(model.name, wanted, model.specs, model.own, outputs, state=model.state)
    return grouping


def _wanted(settings: ModelConfig) -> Batching | None:
    return Batching() if settings.batching is True else settings.batching or None


def examined(
    device: Device, model: Model, grouping: Grouping | None
) -> tuple[tuple[TensorSpec, ...] | None, Findings]:
    """Run a model as far as something is to be found out.

    Args:
        device: Where it was loaded.
        model: What is known of it.
        grouping: How its requests are batched; None without batching.

    Returns:
        The specs with the least sizes that were shown to be right, and everything that was found.

    Raises:
        ConfigError: Batching is asked for, and rows influence each other or the model writes to its
            inputs.
    """
    own, specs, settings, name = model.own, model.specs, model.settings, model.name
    if not specs or model.inspected.call_spec is not None:
        return specs, Findings()
    wanted = _wanted(settings)
    rows, asked = None, specs
    if wanted is not None and grouping is not None:
        if isinstance(specs[0].shape[grouping.dim], DynamicDim):
            asked = as_requests(specs, grouping)
        must_not_write_inputs(name, written_inputs(model, specs, ()))
        rows = _rows_to_examine(wanted, grouping, asked, own)
    symbols = None
    from_package = model.source is SpecSource.PACKAGE and own is not None and not own.sizes_probed
    if model.source is SpecSource.WRAPPER or from_package:
        found = symbols_in(specs, stated_by_user=own is not None)
        symbols = {s.name: s for s in found.values() if s.floor < s.trusted} or None
    if model.state:  # each run would give another answer
        why = f"{model.state}, so that running it shows nothing"
        least = {s.name: (s.trusted, why) for s in (symbols or {}).values()} if own is None else {}
        return with_least(specs, least), Findings(least=least)
    # Whole numbers may be indices or lengths: a model of them is tried apart first, where its
    # failure ends and prints nothing.
    delicate = (
        own is None
        and settings.warmup
        and not all(s.dtype.startswith(("float", "bfloat")) for s in specs)
    )
    if symbols is None and rows is None and not (delicate and model.given is None):
        return specs, Findings()
    findings = _examine(device, model, asked, symbols, rows)
    if rows is not None:
        written = written_inputs(model, specs, findings.mutated or ())
        must_not_write_inputs(name, written)
        must_be_independent(
            name, findings.rows or RowEvidence(None, findings.failure or "it was not run")
        )
    return with_least(specs, findings.least), findings


def _examine(
    device: Device,
    model: Model,
    specs: Sequence[TensorSpec],
    symbols: dict[str, Symbol] | None,
    rows: Rows | None,
) -> Findings:
    set_threads: Callable[[int], None] | None = None
    on_cpu = device.name.partition(":")[0] == "cpu"
    if on_cpu:
        from aoti_sched.backends import cpu  # imports torch

        set_threads = cpu.set_threads
    return examine(
        model.container,
        specs,
        examples=examples_for(model.own, specs, model.given),
        symbols=symbols,
        rows=rows,
        dtypes=[constant.dtype for constant in model.container.info.constants],
        apart=on_cpu,
        set_threads=set_threads,
    )


def _rows_to_examine(
    wanted: Batching,
    grouping: Grouping,
    specs: Sequence[TensorSpec],
    own: ModelSpec | None,
) -> Rows | None:
    """Return what to find out about rows; None where the package or the user states it."""
    if wanted.assume_independent:
        return None
    told = (
        None
        if own is None or (own.batch is not None and own.batch.dim != grouping.dim)
        else own.rows
    )
    if told is not None and told.independent:
        return None
    size = specs[0].shape[grouping.dim]
    symbol = size.symbol if isinstance(size, DynamicDim) else ""
    return Rows(grouping.dim, symbol, grouping.sizes)


def written_inputs(model: Model, specs: Sequence[TensorSpec], seen: Sequence[int]) -> list[str]:
    """Return the names of the inputs that a run writes to.

    Args:
        model: What is known of the model.
        specs: Specs of its inputs.
        seen: Numbers of the inputs that a run was seen to write to.
    """
    own, wrapper = model.own, model.inspected.wrapper_source
    if own is not None and own.mutated_inputs is not None:
        return list(own.mutated_inputs)
    shown = None if wrapper is None else writes_in(wrapper)
    written = [] if shown is None else [index for index, found in enumerate(shown.inputs) if found]
    return [specs[index].name for index in sorted({*written, *seen}) if index < len(specs)]
