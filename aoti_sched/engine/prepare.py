"""Loading, off the loop: from a package to all that a runner needs. Blocking; called in a worker thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.config import Batching
from aoti_sched.engine.probing import Findings, Rows, Symbol, examine, symbols_in, with_least
from aoti_sched.errors import AotiSchedError, ConfigError, InputMismatchError, LoadError, first_line
from aoti_sched.events import log
from aoti_sched.model.batch_layout import (
    Grouping,
    group,
    must_be_independent,
    must_not_write_inputs,
    of_calls,
)
from aoti_sched.model.call_spec import CallSpec, ExportedCallSpec
from aoti_sched.model.evidence import example_of, tensors_like
from aoti_sched.model.input_check import ArityCheck, Check, InputCheck, count_bytes
from aoti_sched.model.specs import (
    DynamicDim,
    ExampleSpec,
    LeafSpec,
    ModelSpec,
    RowEvidence,
    SpecSource,
    TensorSpec,
    specs_from_wrapper,
)
from aoti_sched.model.wrapper_source import MAY_WRITE, writes_in, writes_to_buffers
from aoti_sched.queue.selection.placement import FOLLOW_LIMIT, HOP_OF_ONE, Placement, Placing
from aoti_sched.stats import RunnerInfo

if TYPE_CHECKING:
    from aoti_sched.backends.contracts import Container, Device, Inspected, LoadRequest
    from aoti_sched.config import ModelConfig


class Prepared(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A loaded model, ready for a queue."""

    container: Container
    call_spec: CallSpec
    input_check: Check
    placing: Placing
    grouping: Grouping | None
    width: int
    """Cores that a run takes on a lane."""
    info: RunnerInfo
    fixed: str
    """Why it is not to be parked, "" when it may."""


def inspect(device: Device, request: LoadRequest) -> Inspected:
    """Read and check one model, so that memory can be reserved for it.

    Raises:
        PackageError, LoadError: As in `Scheduler.load`. Nothing is loaded yet.
    """
    if request.cuda_graphs and not device.records_runs:
        raise ConfigError(
            f"load({str(request.path)!r}): cuda_graphs=True, but {device.name!r} has no such thing; it is for 'cuda'"
        )
    return device.inspect(request)


def prepare(
    device: Device,
    inspected: Inspected,
    settings: ModelConfig,
    declared: Sequence[TensorSpec] | None,
    executor: str,
    cores: int,
    warmup_inputs: object = None,
) -> Prepared:
    """Load one model, find its specs and warm it up.

    Args:
        device: Where to load it.
        inspected: What `inspect` returned.
        settings: The model's settings.
        declared: Specs of its tensor inputs that the user gave.
        executor: The kind of the device's executor.
        cores: The most cores that a run may use.
        warmup_inputs: Arguments to warm it up with: a tuple, or a tuple and a dict.

    Raises:
        PackageError, LoadError: As in `Scheduler.load`. Nothing stays inspected.
    """
    container = device.load(inspected)
    try:
        return _prepare(
            device, inspected, container, settings, declared, executor, cores, warmup_inputs
        )
    except BaseException:
        container.close()
        raise


def _prepare(
    device: Device,
    inspected: Inspected,
    container: Container,
    settings: ModelConfig,
    declared: Sequence[TensorSpec] | None,
    executor: str,
    cores: int,
    warmup_inputs: object,
) -> Prepared:
    request, own = inspected.request, inspected.own
    name = request.name
    facts = container.info
    specs, source = _find_specs(own, declared, inspected.wrapper_source, facts.num_inputs, name)
    # A runner on several devices takes its inputs from the host; "cpu:0" is for torch's devices the CPU.
    place = "cpu" if request.replicated or device.name.startswith("cpu") else device.name
    specs = _on(place, specs, declared=source is SpecSource.DECLARED)
    call_spec = inspected.call_spec or ExportedCallSpec(
        name,
        facts.in_spec,
        facts.out_spec,
        inputs=own.inputs if own is not None else None,
        outputs=own.outputs if own is not None else None,
        parameters=own.parameters if own is not None else (),
    )
    state = writes_to_buffers(own, inspected.wrapper_source, facts.constants)
    given = None if warmup_inputs is None else _warmup_tensors(call_spec, warmup_inputs, name)
    model = _Model(name, settings, inspected, container, specs, source, state, given)
    specs, found = _examined(device, model)
    # With batching, a request may have fewer rows than a run; the model itself is never run with fewer than it takes.
    grouping, of_requests = _grouping(settings, inspected, container, own, specs, name, state)
    threads, notes = _threads(cores, settings, inspected, facts.instances)
    placing = _placing(settings, threads, allowed=facts.inline)
    check = _check(name, of_requests, facts.num_inputs, place, copies=settings.copy_inputs)
    if inspected.call_spec is not None and of_requests is not None:
        check = _of_calls(check)
    notes.extend(_sizes_found(specs, found))
    notes.extend(_literals_left_out(call_spec, specs, own))
    if settings.warmup and specs is not None and not state:
        notes.extend(_warm_up(container, name, _values(own, specs, given), found.failure))
        facts = container.info  # a warm container knows more of itself
    if source is SpecSource.ARITY and inspected.call_spec is None:
        notes.append(
            "Only the number of inputs is checked: the package states no specs. A wrong dtype or size can corrupt memory. "
            "Compile with aoti_sched.compile_package, or declare them: load(..., inputs=[TensorSpec(...)])."
        )
    if facts.reason:
        notes.append(facts.reason)
    notes.extend(facts.notes)
    if not facts.verified:
        notes.append(
            f"What runs models on {device.name.partition(':')[0]} was tested on a simulated device only, not on a real one."
        )
    if own is not None and own.frozen:
        notes.append(
            "Compiled with freeze=True: the weights are part of the code and can't be updated live."
        )
    if state == MAY_WRITE:
        notes.append(f"It counts as a model that writes to its buffers: {state}.")
    if state:
        notes.append("The model writes to its buffers; its runs go one at a time, on one instance.")
    if facts.missing:
        notes.append(
            f"Compiled by an older torch; missing in its C ABI: {', '.join(facts.missing)}."
        )
    info = RunnerInfo(
        name=name,
        path=str(request.path),
        sha256=inspected.sha256,
        device=device.name,
        executor=executor,
        runtime=facts.runtime,
        gil=facts.gil,
        instances=facts.instances,
        threads=threads,
        epoch=1,
        signature=str(call_spec),
        inputs=_leaves(own, specs) if own is not None else tuple(of_requests or ()),
        outputs=own.outputs if own is not None else (),
        spec_source=source,
        batch=own.batch if own is not None else None,
        max_batch=1 if grouping is None else grouping.max_rows,
        frozen=own.frozen if own is not None else None,
        verified=facts.verified,
        constants=facts.constants,
        metadata=inspected.metadata,
        notes=tuple(notes),
    )
    return Prepared(
        container=container,
        call_spec=call_spec,
        input_check=check,
        placing=placing,
        grouping=grouping,
        width=threads,
        info=info,
        fixed=state,  # it would forget what it wrote
    )


def _leaves(own: ModelSpec, specs: Sequence[TensorSpec] | None) -> tuple[LeafSpec, ...]:
    """The leaves of the inputs, with the tensors' specs as they are checked."""
    tensors = iter(specs or ())
    return tuple(
        next(tensors, leaf) if isinstance(leaf, TensorSpec) else leaf for leaf in own.inputs
    )


def _grouping(
    settings: ModelConfig,
    inspected: Inspected,
    container: Container,
    own: ModelSpec | None,
    specs: tuple[TensorSpec, ...] | None,
    name: str,
    state: str,
) -> tuple[Grouping | None, tuple[TensorSpec, ...] | None]:
    """How requests are batched, if that is wanted, and the specs that they are checked against then."""
    wanted = Batching() if settings.batching is True else settings.batching
    if not wanted:
        return None, specs
    if inspected.call_spec is not None:
        return of_calls(wanted), specs
    return group(name, wanted, specs, own, container.info.num_outputs, state=state)


class _Model(msgspec.Struct, frozen=True, eq=False):
    """What is known of a model before it was run."""

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


def _examined(device: Device, model: _Model) -> tuple[tuple[TensorSpec, ...] | None, Findings]:
    """The specs with the least sizes that were shown to be right, and what else running the model showed.

    Raises:
        ConfigError: Batching is asked for, and its rows influence each other or it writes to its inputs.
    """
    own, specs, settings, name = model.own, model.specs, model.settings, model.name
    if not specs or model.inspected.call_spec is not None:
        return specs, Findings()
    wanted = Batching() if settings.batching is True else settings.batching or None
    rows, asked = None, specs
    if wanted is not None:
        grouping, asked = _batched(model, wanted, specs)
        must_not_write_inputs(name, _written_inputs(model, specs, ()))
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
    # Whole numbers may be indices or lengths: a model of them is tried apart first, where its failure ends and prints nothing.
    delicate = (
        own is None
        and settings.warmup
        and not all(s.dtype.startswith(("float", "bfloat")) for s in specs)
    )
    if symbols is None and rows is None and not (delicate and model.given is None):
        return specs, Findings()
    findings = _examine(device, model, asked, symbols, rows)
    if rows is not None:
        written = _written_inputs(model, specs, findings.mutated or ())
        must_not_write_inputs(name, written)
        must_be_independent(
            name, findings.rows or RowEvidence(None, findings.failure or "it was not run")
        )
    return with_least(specs, findings.least), findings


def _examine(
    device: Device,
    model: _Model,
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
        examples=_examples(model.own, specs, model.given),
        symbols=symbols,
        rows=rows,
        dtypes=[constant.dtype for constant in model.container.info.constants],
        apart=on_cpu,
        set_threads=set_threads,
    )


def _batched(
    model: _Model, wanted: Batching, specs: tuple[TensorSpec, ...]
) -> tuple[Grouping, tuple[TensorSpec, ...]]:
    """How its requests are batched, and the specs of what a run takes then: with one symbol for rows."""
    outputs = model.container.info.num_outputs
    grouping, of_requests = group(model.name, wanted, specs, model.own, outputs, state=model.state)
    static = not isinstance(specs[0].shape[grouping.dim], DynamicDim)
    return grouping, specs if static else of_requests


def _rows_to_examine(
    wanted: Batching,
    grouping: Grouping,
    specs: Sequence[TensorSpec],
    own: ModelSpec | None,
) -> Rows | None:
    """What is to be found out of rows; None where the package says it, or the user."""
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


def _written_inputs(model: _Model, specs: Sequence[TensorSpec], seen: Sequence[int]) -> list[str]:
    """Names of the inputs that a run writes to, as far as the package, its source or a run shows."""
    own, wrapper = model.own, model.inspected.wrapper_source
    if own is not None and own.mutated_inputs is not None:
        return list(own.mutated_inputs)
    shown = None if wrapper is None else writes_in(wrapper)
    written = [] if shown is None else [index for index, found in enumerate(shown.inputs) if found]
    return [specs[index].name for index in sorted({*written, *seen}) if index < len(specs)]


def _examples(
    own: ModelSpec | None, specs: Sequence[TensorSpec], given: Sequence[Any] | None
) -> Sequence[ExampleSpec]:
    """What values made up for the model are like: the user's, or those that it was compiled with."""
    if given is not None and len(given) == len(specs):
        return [example_of(tensor) for tensor in given]
    return () if own is None or len(own.examples) != len(specs) else own.examples


def _warmup_tensors(call_spec: CallSpec, inputs: object, name: str) -> list[Any]:
    """The tensors of `warmup_inputs`, which are arguments as `run` takes them.

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
            f"model {name!r}: warmup_inputs is a {type(inputs).__name__}. Give the arguments of run() as a tuple, or a tuple and a "
            "dict: (args, kwargs)."
        )
    try:
        return call_spec.flatten(args, kwargs)
    except InputMismatchError as error:
        raise ConfigError(f"model {name!r}: warmup_inputs: {error}") from error


def _of_calls(check: Check) -> Check:
    """The check for a fake's calls: of the tensors among their arguments."""

    def check_calls(calls: Sequence[Any]) -> int:
        return check([tensor for call in calls for tensor in call.tensors()])

    return check_calls


def _sizes_found(specs: Sequence[TensorSpec] | None, found: Findings) -> list[str]:
    """What is to be said of least sizes that are larger than they might be, one sentence for each symbol."""
    notes, told = [], set()
    for spec in specs or ():
        for position, dim in enumerate(spec.shape):
            if isinstance(dim, DynamicDim) and dim.symbol in found.least and dim.symbol not in told:
                told.add(dim.symbol)
                if dim.reason:
                    notes.append(
                        f"Dimension {position} of input {spec.name!r} takes sizes from {dim.min}: {dim.reason.rstrip('.')}. If you "
                        "know better, declare them: load(..., inputs=[TensorSpec(...)])."
                    )
    return notes


def _literals_left_out(
    call_spec: CallSpec, specs: Sequence[TensorSpec] | None, own: ModelSpec | None
) -> list[str]:
    """A note where arguments that are no tensors were compiled in, and the package does not say with which values."""
    leaves = getattr(call_spec, "leaves", None)
    if own is not None or specs is None or leaves is None or leaves <= len(specs):
        return []
    more = leaves - len(specs)
    values = "is no tensor: its value was" if more == 1 else "are no tensors: their values were"
    note = f"{more} of its {leaves} arguments {values} compiled in, and the package does not say which. Other values are ignored"
    return [f"{note}; compile_package has them checked."]


def _find_specs(
    own: ModelSpec | None,
    declared: Sequence[TensorSpec] | None,
    wrapper: str | None,
    arity: int | None,
    name: str,
) -> tuple[tuple[TensorSpec, ...] | None, SpecSource]:
    """The input specs from the best source there is."""
    if declared is not None:
        if arity is not None and len(declared) != arity:
            raise LoadError(
                f"model {name!r}: {len(declared)} inputs were declared, the model takes {arity}"
            )
        return tuple(declared), SpecSource.DECLARED
    if own is not None:
        return tuple(
            leaf for leaf in own.inputs if isinstance(leaf, TensorSpec)
        ), SpecSource.PACKAGE
    if wrapper is not None:
        stated = specs_from_wrapper(wrapper)
        if stated is not None and (arity is None or len(stated) == arity):
            return stated, SpecSource.WRAPPER
    return None, SpecSource.ARITY


def _on(
    device: str, specs: tuple[TensorSpec, ...] | None, *, declared: bool
) -> tuple[TensorSpec, ...] | None:
    """The specs of inputs that come from this device. What is not on the host is on the model's: it was compiled on one of the same
    kind, perhaps of another number.

    Those that a user declared are all of this device: nobody who writes one says where.
    """
    if specs is None:
        return None
    return tuple(
        msgspec.structs.replace(spec, device=device) if declared or spec.device != "cpu" else spec
        for spec in specs
    )


def _check(
    name: str, specs: Sequence[TensorSpec] | None, arity: int | None, device: str, *, copies: bool
) -> Check:
    if specs is not None:
        return InputCheck(name, specs, copies=copies)
    return count_bytes if arity is None else ArityCheck(name, arity, device, copies=copies)


def _threads(
    cores: int, settings: ModelConfig, inspected: Inspected, instances: int
) -> tuple[int, list[str]]:
    """Intra-op threads per run, and what there is to say about them."""
    notes = []
    limit, own = inspected.thread_limit, inspected.own
    threads = settings.threads or (own.threads if own is not None else inspected.fixed_threads or 1)
    if limit is not None and threads > limit:
        notes.append(
            f"threads={threads} was lowered to {limit}: the model's kernels were compiled for that many, and with "
            "more they would write past their arrays."
        )
        threads = limit
    if threads > cores:
        notes.append(f"threads={threads} was lowered to {cores}, the cores there are.")
        threads = cores
    if threads > 1:
        notes.append(
            f"Its kernels run on {threads} threads, where an error (an index out of range, say) ends the process instead "
            "of raising RunError."
        )
    if instances * threads > cores:
        notes.append(
            f"{instances} instances of {threads} threads each are more than the {cores} cores there are; "
            f"{max(1, cores // threads)} of them run at once."
        )
    return threads, notes


def _placing(settings: ModelConfig, threads: int, *, allowed: bool) -> Placing:
    choice = Placement(settings.placement)
    if choice is Placement.INLINE and threads > 1:
        raise ConfigError(
            f"load({settings.path!r}): placement='inline' runs on the loop's own thread alone, and the model's runs use "
            f"{threads}; say threads=1, or placement='lane'"
        )
    if choice is Placement.AUTO and (threads > 1 or not allowed):
        choice = Placement.LANE
    return Placing(
        choice, settings.inline_limit, follow_limit=FOLLOW_LIMIT if allowed else 0.0, hop=HOP_OF_ONE
    )


def example_inputs(specs: Sequence[TensorSpec]) -> list[Any]:
    """Tensors of zeros that fit the specs, as small as their ranges allow but not empty."""
    return [tensor.zero_() for tensor in tensors_like(specs, _least_sizes(specs), seed=0)]


def _least_sizes(specs: Sequence[TensorSpec]) -> dict[str, int]:
    symbols: dict[str, int] = {}
    for spec in specs:
        for dim in spec.shape:
            if isinstance(dim, DynamicDim):
                least = -(-(max(dim.min, 1) - dim.offset) // dim.scale)
                symbols[dim.symbol] = max(symbols.get(dim.symbol, 0), least)
    return symbols


def _values(
    own: ModelSpec | None, specs: Sequence[TensorSpec], given: Sequence[Any] | None
) -> Callable[[], Sequence[Any]]:
    """Makes the inputs to warm up with: the user's; like the example that the model was compiled with; otherwise zeros."""
    if given is not None:
        return lambda: [tensor.clone() for tensor in given]
    examples = _examples(own, specs, None)
    sizes = _sizes_of(examples, specs) if examples else None
    if sizes is not None:
        return lambda: tensors_like(specs, sizes, examples, seed=0)
    return lambda: example_inputs(specs)


def _sizes_of(
    examples: Sequence[ExampleSpec], specs: Sequence[TensorSpec]
) -> dict[str, int] | None:
    """The values of the symbols in the examples' shapes."""
    sizes: dict[str, int] = {}
    for example, spec in zip(examples, specs, strict=True):
        if len(example.shape) != len(spec.shape):
            return None
        for size, dim in zip(example.shape, spec.shape, strict=True):
            if isinstance(dim, DynamicDim):
                sizes[dim.symbol] = (size - dim.offset) // dim.scale
    return sizes


def _warm_up(
    container: Container,
    name: str,
    make_inputs: Callable[[], Sequence[Any]],
    failure: str,
) -> list[str]:
    """Warm up. Values that are made up may be nonsense to a model: a failure is told, and is no reason to refuse it."""
    advice = "Give load() warmup_inputs= that it can be run on."
    if failure:  # it was tried apart
        log.warning("warm-up failed", runner=name, error=failure)
        return [
            f"Not warmed up, so the first requests may be slow: it fails on values made up for it: {failure}. {advice}"
        ]
    try:
        container.warm_up(make_inputs)
    except AotiSchedError as error:
        log.warning("warm-up failed", runner=name, error=first_line(error))
        return [f"Warm-up failed, so the first requests may be slow: {first_line(error)}. {advice}"]
    return []
