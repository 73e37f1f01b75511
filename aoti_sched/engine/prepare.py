"""Preparing: from an inspected package to everything that a replica needs, off the event loop.

Every function blocks, and is called in a worker thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.engine.probe_plan import Model, batch_layout, examined, written_inputs
from aoti_sched.engine.probe_values import Findings
from aoti_sched.engine.warmup import tensors_given, values_for, warm_up
from aoti_sched.errors import ConfigError, LoadError
from aoti_sched.model.batch_layout import Grouping, as_requests
from aoti_sched.model.call_spec import CallSpec, ExportedCallSpec
from aoti_sched.model.input_check import ArityCheck, Check, InputCheck, count_bytes
from aoti_sched.model.specs import (
    DynamicDim,
    LeafSpec,
    ModelSpec,
    SpecSource,
    TensorSpec,
    specs_from_wrapper,
)
from aoti_sched.model.wrapper_source import MAY_WRITE, writes_to_buffers
from aoti_sched.model.writes_check import WritesCheck
from aoti_sched.queue.selection.placement import (
    AHEAD_LIMIT,
    FOLLOW_LIMIT,
    HOP,
    HOP_OF_ONE,
    Placement,
    Placing,
)
from aoti_sched.stats import RunnerInfo

if TYPE_CHECKING:
    from aoti_sched.backends.contracts import Container, Device, Inspected, LoadRequest
    from aoti_sched.backends.reading import Reading
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
    """Why its weights must stay in memory; "" where they may be evicted."""


def inspect(device: Device, request: LoadRequest, reading: Reading) -> Inspected:
    """Read and check one model, so that memory can be reserved for it.

    Its file may be on a network that is dead, so all of this can be left behind.

    Raises:
        PackageError, LoadError: As in `Scheduler.load`. Nothing is loaded yet.
    """
    if request.cuda_graphs and not device.records_runs:
        raise ConfigError(
            f"load({str(request.path)!r}): cuda_graphs=True, but {device.name!r} has no such "
            "thing; it is for 'cuda'"
        )
    if request.stream_priority and not device.records_runs:
        raise ConfigError(
            f"load({str(request.path)!r}): stream_priority={request.stream_priority}, but "
            f"{device.name!r} has no such thing; it is for 'cuda'"
        )
    with reading.foreign():
        return device.inspect(request)


def prepare(
    device: Device,
    inspected: Inspected,
    settings: ModelConfig,
    declared: Sequence[TensorSpec] | None,
    executor: str,
    cores: int,
    warmup_inputs: object = None,
    *,
    reading: Reading | None = None,
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
        reading: Reads the weights file of the settings, so that it can be left behind.

    Raises:
        PackageError, LoadError: As in `Scheduler.load`. Nothing stays inspected.
    """
    request = msgspec.structs.replace(inspected.request, reading=reading)
    inspected = msgspec.structs.replace(inspected, request=request)
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
    # A runner on several devices takes its inputs from the host; "cpu:0" is for torch's devices the
    # CPU.
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
    given = None if warmup_inputs is None else tensors_given(call_spec, warmup_inputs, name)
    model = Model(name, settings, inspected, container, specs, source, state, given)
    grouping = batch_layout(model)
    specs, found = examined(device, model, grouping)
    # With batching, a request may have fewer rows than a run; the model itself is never run with
    # fewer than it takes.
    of_requests = specs
    if grouping is not None and specs is not None and inspected.call_spec is None:
        of_requests = as_requests(specs, grouping)
    threads, notes = _threads(cores, settings, inspected, facts.instances)
    placing = _placing(settings, threads, allowed=facts.inline)
    check = _check(
        name,
        of_requests,
        facts.num_inputs,
        place,
        copies=settings.copy_inputs,
        conditions=own.conditions if own is not None and source is SpecSource.PACKAGE else (),
    )
    written = written_inputs(model, specs or (), found.mutated or ())
    if written:
        check = WritesCheck(check, name, [spec.name for spec in specs or ()], written)
    if inspected.call_spec is not None and of_requests is not None:
        check = _of_calls(check)
    notes.extend(_sizes_found(specs, found))
    notes.extend(_literals_left_out(call_spec, specs, own))
    if settings.warmup and specs is not None and not state:
        # A fake's runs are no native code.
        on_cpu = device.name.partition(":")[0] == "cpu" and inspected.call_spec is None
        values = values_for(own, specs, given)
        notes.extend(warm_up(container, name, values, found.failure, threads if on_cpu else None))
        facts = container.info  # a warm container knows more of itself
    if source is SpecSource.ARITY and inspected.call_spec is None:
        notes.append(
            "Only the number of inputs is checked: the package states no specs. A wrong dtype or "
            "size can corrupt memory. "
            "Compile with aoti_sched.compile_package, or declare them: load(..., "
            "inputs=[TensorSpec(...)])."
        )
    if facts.reason:
        notes.append(facts.reason)
    notes.extend(facts.notes)
    if not facts.verified:
        notes.append(
            f"What runs models on {device.name.partition(':')[0]} was tested on a simulated device "
            "only, not on a real one."
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
    """Return the leaves of the inputs, with the specs that tensors are checked against."""
    tensors = iter(specs or ())
    return tuple(
        next(tensors, leaf) if isinstance(leaf, TensorSpec) else leaf for leaf in own.inputs
    )


def _of_calls(check: Check) -> Check:
    """Return the check for a fake's calls: of the tensors among their arguments."""

    def check_calls(calls: Sequence[Any]) -> int:
        return check([tensor for call in calls for tensor in call.tensors()])

    return check_calls


def _sizes_found(specs: Sequence[TensorSpec] | None, found: Findings) -> list[str]:
    """Return a note for each symbol whose least size is larger than it might be."""
    notes, told = [], set()
    for spec in specs or ():
        for position, dim in enumerate(spec.shape):
            if isinstance(dim, DynamicDim) and dim.symbol in found.least and dim.symbol not in told:
                told.add(dim.symbol)
                if dim.reason:
                    notes.append(
                        f"Dimension {position} of input {spec.name!r} takes sizes from {dim.min}: "
                        f"{dim.reason.rstrip('.')}. If you "
                        "know better, declare them: load(..., inputs=[TensorSpec(...)])."
                    )
    return notes


def _literals_left_out(
    call_spec: CallSpec, specs: Sequence[TensorSpec] | None, own: ModelSpec | None
) -> list[str]:
    """Return a note where arguments that are no tensors were compiled in with unknown values.

    A package that `compile_package` made states the values.
    """
    leaves = getattr(call_spec, "leaves", None)
    if own is not None or specs is None or leaves is None or leaves <= len(specs):
        return []
    more = leaves - len(specs)
    values = "is no tensor: its value was" if more == 1 else "are no tensors: their values were"
    note = (
        f"{more} of its {leaves} arguments {values} compiled in, and the package does not say "
        "which. Other values are ignored; compile_package has them checked."
    )
    return [note]


def _find_specs(
    own: ModelSpec | None,
    declared: Sequence[TensorSpec] | None,
    wrapper: str | None,
    arity: int | None,
    name: str,
) -> tuple[tuple[TensorSpec, ...] | None, SpecSource]:
    """Return the input specs, and where they come from: the best source there is.

    The order is: what the user declared, the package, the wrapper's source, the number of inputs.
    """
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
    """Return the specs for a model on this device.

    An input that is not on the host is on the model's device. The model was compiled on a device of
    the same kind, perhaps of another number. Declared specs are all on this device, since a user
    who declares them does not state where.
    """
    if specs is None:
        return None
    return tuple(
        msgspec.structs.replace(spec, device=device) if declared or spec.device != "cpu" else spec
        for spec in specs
    )


def _check(
    name: str,
    specs: Sequence[TensorSpec] | None,
    arity: int | None,
    device: str,
    *,
    copies: bool,
    conditions: Sequence[str],
) -> Check:
    if specs is not None:
        return InputCheck(name, specs, copies=copies, conditions=conditions)
    return count_bytes if arity is None else ArityCheck(name, arity, device, copies=copies)


def _threads(
    cores: int, settings: ModelConfig, inspected: Inspected, instances: int
) -> tuple[int, list[str]]:
    """Return the intra-op threads per run, and notes about them."""
    notes = []
    limit, own = inspected.thread_limit, inspected.own
    threads = settings.threads or (own.threads if own is not None else inspected.fixed_threads or 1)
    if limit is not None and threads > limit:
        notes.append(
            f"threads={threads} was lowered to {limit}: the model's kernels were compiled for that "
            "many, and with "
            "more they would write past their arrays."
        )
        threads = limit
    if threads > cores:
        notes.append(f"threads={threads} was lowered to {cores}, the cores there are.")
        threads = cores
    if threads > 1:
        notes.append(
            f"Its kernels run on {threads} threads, where an error (an index out of range, say) "
            "ends the process instead "
            "of raising RunError."
        )
    if instances * threads > cores:
        notes.append(
            f"{instances} instances of {threads} threads each are more than the {cores} cores "
            "there are; "
            f"{max(1, cores // threads)} of them run at once."
        )
    return threads, notes


def _placing(settings: ModelConfig, threads: int, *, allowed: bool) -> Placing:
    choice = Placement(settings.placement)
    if choice is Placement.INLINE and threads > 1:
        raise ConfigError(
            f"load({settings.path!r}): placement='inline' runs on the loop's own thread alone, and "
            "the model's runs use "
            f"{threads}; say threads=1, or placement='lane'"
        )
    if choice is Placement.AUTO and (threads > 1 or not allowed):
        choice = Placement.LANE
    # A lane of a device may be two threads, so that a job handed ahead would run beside the job it
    # is behind, on the same slot.
    return Placing(
        choice,
        settings.inline_limit,
        follow_limit=FOLLOW_LIMIT if allowed else 0.0,
        ahead_limit=AHEAD_LIMIT,
        hop=HOP_OF_ONE,
        backlog_limit=HOP,
    )
