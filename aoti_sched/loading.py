"""Loading, off the loop: from a package to all that a runner needs. Blocking; called in a worker thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.batching import Grouping, group, of_calls
from aoti_sched.call_spec import CallSpec, ExportedCallSpec
from aoti_sched.config import Batching
from aoti_sched.errors import AotiSchedError, ConfigError, LoadError
from aoti_sched.queue.placement import FOLLOW_LIMIT, HOP_OF_ONE, Placement, Placing
from aoti_sched.specs import (
    ConstantSpec,
    DynamicDim,
    ModelSpec,
    SpecSource,
    TensorSpec,
    spec_from_metadata,
    specs_from_wrapper,
)
from aoti_sched.telemetry import RunnerInfo, log
from aoti_sched.validation import ArityCheck, Check, InputCheck, count_bytes

if TYPE_CHECKING:
    from aoti_sched.backends.base import Container, Device, Loaded, LoadRequest
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


def prepare(
    device: Device,
    request: LoadRequest,
    settings: ModelConfig,
    declared: Sequence[TensorSpec] | None,
    executor: str,
    cores: int,
) -> Prepared:
    """Load one model, find its specs and warm it up. Its runs may use so many `cores`.

    Raises:
        PackageError, LoadError: as `Scheduler.load` tells them; nothing stays loaded.
    """
    if request.cuda_graphs and not device.records_runs:
        raise ConfigError(
            f"load({str(request.path)!r}): cuda_graphs=True, but {device.name!r} has no such thing; it is for 'cuda'"
        )
    loaded = device.load(request)
    try:
        own = spec_from_metadata(loaded.metadata)
        return _prepare(device, request, settings, declared, executor, cores, loaded, own)
    except BaseException:
        loaded.container.close()
        raise


def _prepare(
    device: Device,
    request: LoadRequest,
    settings: ModelConfig,
    declared: Sequence[TensorSpec] | None,
    executor: str,
    cores: int,
    loaded: Loaded,
    own: ModelSpec | None,
) -> Prepared:
    container, name = loaded.container, request.name
    facts = container.info
    specs, source = _find_specs(own, declared, loaded.wrapper_source, facts.num_inputs, name)
    # A runner on several devices takes its inputs from the host; "cpu:0" is for torch's devices the CPU.
    place = "cpu" if request.replicated or device.name.startswith("cpu") else device.name
    specs = _on(place, specs, declared=source is SpecSource.DECLARED)
    leaves_known = own is not None and source is SpecSource.PACKAGE
    call_spec = loaded.call_spec or ExportedCallSpec(
        name,
        facts.in_spec,
        facts.out_spec,
        inputs=own.inputs if own is not None and leaves_known else None,
        outputs=own.outputs if own is not None and leaves_known else None,
        parameters=own.parameters if own is not None else (),
    )
    # With batching, a request may have fewer rows than a run; the model itself is never run with fewer than it takes.
    grouping, of_requests = _grouping(settings, loaded, own, specs, name)
    threads, notes = _threads(cores, settings, own, loaded)
    placing = _placing(settings, threads, allowed=facts.inline)
    check = _check(name, of_requests, facts.num_inputs, place, copies=settings.copy_inputs)
    if settings.warmup and specs is not None and not (own is not None and own.mutates_buffers):
        notes.extend(_warm_up(container, specs, name))
        facts = container.info  # a warm container knows more of itself
    if source is SpecSource.ARITY and loaded.call_spec is None:
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
        notes.append("Compiled with freeze=True: the weights are part of the code and can't be updated live.")
    if own is not None and own.mutates_buffers:
        notes.append("The model writes to its buffers; its runs go one at a time, on one instance.")
    if facts.missing:
        notes.append(f"Compiled by an older torch; missing in its C ABI: {', '.join(facts.missing)}.")
    info = RunnerInfo(
        name=name,
        path=str(request.path),
        sha256=loaded.sha256,
        device=device.name,
        executor=executor,
        runtime=facts.runtime,
        gil=facts.gil,
        instances=facts.instances,
        threads=threads,
        epoch=1,
        signature=str(call_spec),
        inputs=own.inputs if own is not None and leaves_known else tuple(of_requests or ()),
        outputs=own.outputs if own is not None and leaves_known else (),
        spec_source=source,
        batch=own.batch if own is not None else None,
        max_batch=1 if grouping is None else grouping.rule.max_rows,
        frozen=own.frozen if own is not None else None,
        verified=facts.verified,
        constants=facts.constants,
        metadata=loaded.metadata,
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
        fixed=_fixed(own, facts.constants),
    )


def _fixed(own: ModelSpec | None, constants: Sequence[ConstantSpec]) -> str:
    """A model that writes to its buffers would forget what it wrote. Only our own packages say whether it does."""
    if own is not None:
        return "it writes to its buffers" if own.mutates_buffers else ""
    if any(constant.type == "buffer" for constant in constants):
        return "it has buffers, and its package does not say whether it writes to them"
    return ""


def _grouping(
    settings: ModelConfig,
    loaded: Loaded,
    own: ModelSpec | None,
    specs: tuple[TensorSpec, ...] | None,
    name: str,
) -> tuple[Grouping | None, tuple[TensorSpec, ...] | None]:
    """How requests are batched, if that is wanted, and the specs that they are checked against then."""
    wanted = Batching() if settings.batching is True else settings.batching
    if not wanted:
        return None, specs
    if loaded.call_spec is not None:
        return of_calls(wanted), specs
    return group(name, wanted, specs, own, loaded.container.info.num_outputs)


def _find_specs(
    own: ModelSpec | None,
    declared: Sequence[TensorSpec] | None,
    wrapper: str | None,
    arity: int | None,
    name: str,
) -> tuple[tuple[TensorSpec, ...] | None, SpecSource]:
    """The input specs from the best source there is."""
    if own is not None:
        return tuple(leaf for leaf in own.inputs if isinstance(leaf, TensorSpec)), SpecSource.PACKAGE
    if declared is not None:
        if arity is not None and len(declared) != arity:
            raise LoadError(f"model {name!r}: {len(declared)} inputs were declared, the model takes {arity}")
        return tuple(declared), SpecSource.DECLARED
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
    cores: int, settings: ModelConfig, own: ModelSpec | None, loaded: Loaded
) -> tuple[int, list[str]]:
    """Intra-op threads per run, and what there is to say about them."""
    notes = []
    limit, instances = loaded.thread_limit, loaded.container.info.instances
    threads = settings.threads or (own.threads if own is not None else loaded.fixed_threads or 1)
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
    import torch

    symbols: dict[str, int] = {}
    for spec in specs:
        for dim in spec.shape:
            if isinstance(dim, DynamicDim):
                least = -(-(max(dim.min, 1) - dim.offset) // dim.scale)
                symbols[dim.symbol] = max(symbols.get(dim.symbol, 0), least)
    tensors = []
    for spec in specs:
        shape = [
            dim if isinstance(dim, int) else dim.scale * symbols[dim.symbol] + dim.offset
            for dim in spec.shape
        ]
        order = spec.order or tuple(range(len(shape)))
        dense = torch.zeros(
            [shape[dim] for dim in order], dtype=getattr(torch, spec.dtype), device=spec.device
        )
        inverse = sorted(range(len(order)), key=order.__getitem__)
        tensors.append(dense.permute(inverse))
    return tensors


def _warm_up(container: Container, specs: Sequence[TensorSpec], name: str) -> list[str]:
    """Warm up on zeros. They may be nonsense to a model: a failure is told, and is no reason to refuse it."""
    try:
        container.warm_up(lambda: example_inputs(specs))
    except AotiSchedError as error:
        log.warning("warm-up failed", runner=name, error=str(error))
        return [f"Warm-up on zeros failed, so the first requests may be slow: {error}"]
    return []
