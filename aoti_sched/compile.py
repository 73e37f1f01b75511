"""`compile_package`: exports and compiles a module, and stores the specs of its inputs and outputs.

torch is slow to import, so the functions import torch when they are called. Compiling blocks for
many seconds: call `compile_package` from a build step or a worker thread, never from the event
loop.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.compile_stages import Progress, telling_compilation
from aoti_sched.errors import CompileError
from aoti_sched.model.input_check import lies_in_order
from aoti_sched.model.size_conditions import SizeGuards, mentioning
from aoti_sched.model.specs import (
    METADATA_KEY,
    BatchDim,
    BoolSpec,
    DynamicDim,
    FloatSpec,
    IntegerSpec,
    LeafSpec,
    LiteralSpec,
    ModelSpec,
    TensorSpec,
    row_symbols,
    spec_to_metadata,
    with_one_symbol,
)

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from aoti_sched.model.findings import Findings


def compile_package(
    module: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    example_kwargs: dict[str, Any] | None = None,
    dynamic: Any = None,
    threads: int = 1,
    freeze: bool = False,
    batch_dim: int | None = None,
    metadata: dict[str, str] | None = None,
    options: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Compile `module` into a `.pt2` package that `Scheduler.load` can check every request against.

    Args:
        module: The module, in the mode (`eval()`) and on the device in which it will run.
        example_inputs: Positional example arguments; their sizes are compiled in unless `dynamic`.
        path: Where to write the package; must end in `.pt2`.
        example_kwargs: Keyword example arguments.
        dynamic: Dynamic dimensions, in the form of `torch.export.export`'s `dynamic_shapes`, for
            example `{"x": {0: torch.export.Dim("batch", max=64)}}`. A `Dim` without `min`,
            `Dim.AUTO` and `Dim.DYNAMIC` admit 0 and 1, where running the module and the compiled
            code shows that both are right.
        threads: Intra-op threads per run that inductor compiles into its kernels. With 1, the
            default, a run uses one core, and the scheduler fills the other cores with other runs.
            More threads only pay for large models. An error inside a parallel kernel ends the
            process.
        freeze: Turn on inductor's freezing, which folds the weights into the code in the fastest
            layout. Runs are faster, but the weights can never be updated live.
        batch_dim: The dimension along which requests may be batched: dynamic, with the same `Dim`
            in every tensor input and output. By default 0 where that holds and running the module
            shows that rows do not influence each other, otherwise none.
        metadata: Further strings to store in the package.
        options: Further inductor options, which override the options that this function sets.
        progress: Called at the beginning of each stage with the stage's name: "exporting",
            "examining", "lowering", "compiling" (C++), "verifying" and "packaging".

    Returns:
        The package's path.

    Raises:
        CompileError: The module can't be exported or compiled; an example or an output can't be
            served; the exported program differs from the module; `freeze` is set for a module that
            writes to its buffers; or `batch_dim` is set for a module whose rows influence each
            other.
    """
    import torch

    from aoti_sched.model.findings import Findings, separated
    from aoti_sched.model.weight_names import names_of

    target = Path(path)
    if target.suffix != ".pt2":
        raise CompileError(f"{target}: a package's name must end in .pt2.")
    if threads < 1:
        raise CompileError(f"threads={threads}: a model runs on at least one thread.")
    target.parent.mkdir(parents=True, exist_ok=True)
    tell = progress or _tell_nobody
    tell("exporting")
    with torch.no_grad(), warnings.catch_warnings():
        # torch warns of its own use of pytree, which no caller could change.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        arguments = separated(example_inputs, example_kwargs or {}, module)
        try:
            program = torch.export.export(
                module, arguments[0], kwargs=arguments[1], dynamic_shapes=dynamic
            )
            functional = program.run_decompositions({})
        except (
            Exception
        ) as error:  # torch.export raises many kinds; each becomes one sentence with its cause
            advice = _advice(error, example_inputs, example_kwargs)
            raise CompileError(
                f"{type(module).__name__} could not be exported: {error}{advice}"
            ) from error
        _check_outputs(program)
        guards = SizeGuards(program, _Reader(program).named)
        spec = _described(program, functional, guards, threads=threads, freeze=freeze)
        spec = msgspec.structs.replace(spec, weights=names_of(module, program))
        if freeze and spec.mutates_buffers:
            raise CompileError(
                f"{type(module).__name__} writes to its own buffers, and freeze=True would fix "
                "their values. Compile it "
                "without freezing."
            )
        tell("examining")
        findings = Findings(module, arguments, program, functional, spec, dynamic)
        if difference := findings.disagreement():
            raise CompileError(
                f"{type(module).__name__}: the exported program differs from the module on inputs "
                "unlike the example "
                f"({difference}). What the module computes depends on the example; make it depend "
                "on its inputs alone."
            )
        spec = findings.merged()
        findings.try_sizes()
        spec = _with_batch(spec, findings, batch_dim)
        inductor = {
            "cpp.threads": threads,
            "freezing": freeze,
            # Otherwise constants of up to 8 elements (a small bias) would become code, which no
            # update could change.
            "always_keep_tensor_constants": not freeze,
            # Inductor replaces a buffer that has one value (a counter, say) by that value, even
            # where the module writes to the buffer.
            "joint_graph_constant_folding": not spec.mutates_buffers,
            "aot_inductor.metadata": {**(metadata or {}), **spec_to_metadata(spec)},
            **(options or {}),
        }
        tell("lowering")
        try:
            with telling_compilation(progress):
                files = _compile(program, inductor)
            added = guards.new()
        except Exception as error:
            raise CompileError(f"{type(module).__name__} could not be compiled: {error}") from error
        tell("verifying")
        spec = _verified(files, findings, spec, added)
        if batch_dim is not None and spec.batch is None:
            raise CompileError(
                f"batch_dim={batch_dim}: the compiled code is right for "
                f"{spec.conditions[-1]!r} only, which a batch may not meet. Leave batch_dim out."
            )
        tell("packaging")
        _package(files, target, spec)
    return target


def _tell_nobody(stage: object) -> None:
    """Do nothing: no caller wants to know of the stages."""


def _compile(program: ExportedProgram, options: dict[str, Any]) -> list[Any]:
    """Compile a program and return the files for its package."""
    import torch._inductor

    args, kwargs = program.example_inputs
    options = {**options, "aot_inductor.package": True}
    files = torch._inductor.aot_compile(  # noqa: SLF001 -- its public home
        program.module(check_guards=False),
        args,
        kwargs,
        options=options,
    )
    return list(files)  # type: ignore[arg-type]


def _verified(
    files: list[Any], findings: Findings, spec: ModelSpec, added: Sequence[str]
) -> ModelSpec:
    """Return the spec with the sizes for which running the compiled code shows it to be right.

    Args:
        files: The compiled files.
        findings: Runs the code.
        spec: The spec that the exported program states.
        added: The conditions on sizes that lowering added. Most are about speed.
    """
    for file in files:
        if isinstance(file, str) and file.endswith(".so"):
            findings.try_compiled(Path(file))
            needed = findings.needed(Path(file), added)
            spec = msgspec.structs.replace(
                spec, conditions=tuple(dict.fromkeys((*spec.conditions, *needed)))
            )
            if spec.batch is not None and mentioning(needed, spec.batch.symbol):
                spec = msgspec.structs.replace(spec, batch=None)
    return findings.with_minima(spec)


def _package(files: list[Any], target: Path, spec: ModelSpec) -> None:
    """Write the package, whole or not at all. Its metadata has the spec."""
    from torch._inductor.package.package import package_aoti

    for path in (Path(file) for file in files if isinstance(file, str)):
        if path.name.endswith("wrapper_metadata.json"):
            stored = json.loads(path.read_text())
            if METADATA_KEY in stored:
                path.write_text(json.dumps({**stored, **spec_to_metadata(spec)}))
    with tempfile.TemporaryDirectory(prefix=f".{target.stem}-", dir=target.parent) as folder:
        made = Path(folder, target.name)
        package_aoti(os.fspath(made), files)
        made.replace(target)


def _advice(error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> str:
    """Return advice on mistakes of which torch's own words do not say what to do."""
    from torch.utils import _pytree as pytree

    if isinstance(error, SyntaxError):
        return (
            "\ntorch writes the names of submodules and the keys of arguments into Python code. "
            "Rename those that are keywords of Python or contain quotes."
        )
    sizes = [
        size for leaf in pytree.tree_leaves((args, kwargs)) for size in getattr(leaf, "shape", ())
    ]
    if "specialized" in str(error) and 1 in sizes:
        return (
            "\nAn example has size 1, which torch.export takes for a constant. Give at least 2 in "
            "a dynamic dimension."
        )
    return ""


def describe(
    program: ExportedProgram,
    *,
    batch_dim: int | None = None,
    threads: int = 1,
    freeze: bool = False,
) -> ModelSpec:
    """Return the specs that an exported program states of its inputs and outputs, without a run.

    Args:
        program: The exported program.
        batch_dim: The dimension along which requests may be batched. By default 0 where every
            tensor has the same dynamic dimension there, otherwise none.
        threads: Intra-op threads per run.
        freeze: Whether the weights are folded into the code.

    Raises:
        CompileError: AOTInductor can't pass an input or an output, or not every tensor input and
            output has the same dynamic dimension at `batch_dim`.
    """
    functional = program.run_decompositions({})
    guards = SizeGuards(program, _Reader(program).named)
    spec = _described(program, functional, guards, threads=threads, freeze=freeze)
    return _with_batch(spec, None, batch_dim)


def _described(
    program: ExportedProgram,
    functional: ExportedProgram,
    guards: SizeGuards,
    *,
    threads: int,
    freeze: bool,
) -> ModelSpec:
    """Return the specs without a batch dimension.

    Args:
        program: The exported program.
        functional: The decomposed program. Only its signature states all writes, since in-place
            operators and views of buffers are functional there.
        guards: What export has noted of the sizes.
        threads: Intra-op threads per run.
        freeze: Whether the weights are folded into the code.
    """
    from torch.export.graph_signature import InputKind, OutputKind

    reader = _Reader(program)
    signature = program.graph_signature
    inputs = tuple(
        reader.leaf(spec.arg, "input")
        for spec in signature.input_specs
        if spec.kind == InputKind.USER_INPUT
    )
    outputs = tuple(
        reader.leaf(spec.arg, "output")
        for spec in signature.output_specs
        if spec.kind == OutputKind.USER_OUTPUT
    )
    written = functional.graph_signature.output_specs
    try:
        conditions = guards.new()
    except ValueError as error:
        raise CompileError(
            f"what the module requires of its dynamic sizes can't be stored: {error}. Give the "
            "sizes in `dynamic` ranges for which the module takes one branch."
        ) from error
    return ModelSpec(
        inputs=inputs,
        outputs=outputs,
        parameters=reader.parameters(),
        threads=threads,
        frozen=freeze,
        mutates_buffers=any(
            s.kind.name in ("BUFFER_MUTATION", "PARAMETER_MUTATION") for s in written
        ),
        torch_version=_torch_version(),
        mutated_inputs=tuple(
            s.target or "" for s in written if s.kind.name == "USER_INPUT_MUTATION"
        ),
        conditions=conditions,
    )


def _with_batch(spec: ModelSpec, findings: Findings | None, wanted: int | None) -> ModelSpec:
    """Return the spec with its batch dimension, the evidence on rows, and the examples.

    Args:
        spec: The spec without a batch dimension.
        findings: Runs the module; None to run nothing and add no evidence.
        wanted: The dimension that the user asks for; None for dimension 0 where rows are shown not
            to influence each other.

    Raises:
        CompileError: The dimension that the user asks for can't be the batch dimension.
    """
    # With `Dim.AUTO`, the rows of each input have a symbol of their own. Requests can be batched if
    # all inputs of a request have equally many rows.
    first, *others = row_symbols(spec.inputs, wanted or 0) or [""]
    if findings is None or not all(map(findings.stated.leaves_open, (first, *others))):
        others = []
    inputs, outputs = spec.inputs, spec.outputs
    for other in others:
        inputs, outputs = (
            with_one_symbol(inputs, other, first),
            with_one_symbol(outputs, other, first),
        )
    batch = _batch_dim(inputs, outputs, wanted or 0)
    if batch is None and wanted is not None:
        raise CompileError(
            f"batch_dim={wanted}: not every tensor input and output has the same dynamic dimension "
            "there. Name a dimension that all have, or leave batch_dim out."
        )
    for symbol in (first, *others):
        if batch is not None and (condition := mentioning(spec.conditions, symbol)):
            if wanted is not None:
                raise CompileError(
                    f"batch_dim={wanted}: the code is right for {condition!r} only, which a batch "
                    "of other requests' rows may not meet. Leave batch_dim out."
                )
            batch = None
    if batch is not None and spec.mutated_inputs:
        if wanted is not None:
            raise CompileError(
                f"batch_dim={wanted}: the module writes to its input {spec.mutated_inputs[0]!r}, "
                "and in a batch it would write to a copy. Return the new value instead."
            )
        batch = None
    if findings is None:
        return msgspec.structs.replace(spec, batch=batch)
    rows = None
    if batch is not None:
        rows = findings.rows(batch.dim, [first, *others])
        if rows.independent is False and wanted is not None:
            raise CompileError(f"batch_dim={wanted}: requests can't be batched. {rows.reason}")
        if not rows.independent and wanted is None:
            batch = None
    return msgspec.structs.replace(spec, batch=batch, rows=rows, examples=findings.examples)


def _check_outputs(program: ExportedProgram) -> None:
    """Refuse a structure of outputs that a package can't store.

    Without this check, only the compiled package would fail.

    Raises:
        CompileError: The structure has a type of torch's own (`torch.return_types`), or torch can't
            serialize it.
    """
    from torch.utils import _pytree as pytree

    def kinds(node: Any) -> set[str]:
        own = (
            {f"{node.type.__module__}.{node.type.__qualname__}"} if node.type is not None else set()
        )
        return own.union(*(kinds(child) for child in node.children()))

    out_spec = program.call_spec.out_spec
    foreign = sorted(kind for kind in kinds(out_spec) if kind.startswith("torch.return_types."))
    if foreign:
        raise CompileError(
            f"the module returns {foreign[0]}, which a package can't store. Return a tuple or a "
            "dict, for example tuple(result)."
        )
    try:
        pytree.treespec_dumps(out_spec)
    except Exception as error:
        raise CompileError(
            f"the structure of the module's outputs can't be stored in a package: {error}. Return "
            "tuples, lists and dicts."
        ) from error


def _torch_version() -> str:
    import torch

    return str(torch.__version__)


class _Reader:
    """Reads leaves from an exported program's graph."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.values = {node.name: node.meta.get("val") for node in program.graph.nodes}
        self.names: dict[str, str] = {}  # symbol -> the name of the user's Dim
        for value in self.values.values():
            for size in getattr(value, "shape", ()):
                if not isinstance(size, int):
                    environment = size.node.shape_env
                    # Names make better messages. Without names, torch's symbols are used.
                    debug_names = getattr(environment, "source_name_to_debug_name", {})
                    variables = getattr(environment, "source_to_var", {})
                    self.names = {
                        str(variables[s]): name for s, name in debug_names.items() if s in variables
                    }
                    return

    def parameters(self) -> tuple[str, ...]:
        """Return the names of the positional parameters, where torch kept them."""
        call = self.program.call_spec.in_spec
        positional = call.children()[0].num_children if call is not None else 0
        top = next((entry for entry in self.program.module_call_graph if entry.fqn == ""), None)
        names = getattr(top.signature, "forward_arg_names", None) if top is not None else None
        return tuple(names[:positional]) if names else ()

    def leaf(self, arg: Any, side: str) -> LeafSpec:
        kind = type(arg).__name__
        if kind == "ConstantArgument":
            plain = isinstance(arg.value, (bool, int, float, str, type(None)))
            if side == "output" and not isinstance(arg.value, (bool, int, type(None))):
                raise CompileError(
                    f"an output is the constant {arg.value!r:.60}, which AOTInductor can't pass. "
                    "Leave it out, or return torch.tensor(...)."
                )
            return LiteralSpec(arg.name, arg.value if plain else repr(arg.value))
        computed: dict[str, Callable[[str], LeafSpec]] = {
            "SymIntArgument": IntegerSpec,
            "SymFloatArgument": FloatSpec,
            "SymBoolArgument": BoolSpec,
        }
        if kind in computed and side == "output":
            return computed[kind](arg.name)
        if kind != "TensorArgument":
            raise CompileError(
                f"{side} {arg.name!r} is a {kind.removesuffix('Argument')}, which AOTInductor "
                "can't pass. Make it a 0-dim tensor."
            )
        value = self.values[arg.name]
        order = _order(value)
        return TensorSpec(
            name=arg.name,
            dtype=str(value.dtype).removeprefix("torch."),
            shape=tuple(self.dim(size) for size in value.shape),
            device=str(value.device),
            order=order,
            strides=self.strides(arg.name, value) if order is None and side == "input" else None,
        )

    def strides(self, name: str, value: Any) -> tuple[int | DynamicDim, ...]:
        """Return the strides of an input that is not dense, which are compiled in."""
        own = {dim.symbol for dim in map(self.dim, value.shape) if isinstance(dim, DynamicDim)}
        strides = tuple(self.dim(stride) for stride in value.stride())
        if any(isinstance(step, DynamicDim) and step.symbol not in own for step in strides):
            raise CompileError(
                f"example input {name!r} is not dense, and its strides {tuple(value.stride())} "
                "depend on several dynamic sizes, which no request can be checked for. Pass "
                "example.contiguous()."
            )
        return strides

    def dim(self, size: Any) -> int | DynamicDim:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression.is_number:
            return int(expression)
        bounds = self.program.range_constraints.get(expression)
        low = int(bounds.lower) if bounds is not None else 0
        high = int(bounds.upper) if bounds is not None and bounds.upper.is_Integer else None
        symbols = sorted(expression.free_symbols, key=str)
        if len(symbols) == 1:  # a torch.export.Dim can express only scale * symbol + offset
            symbol = symbols[0]
            scale, offset = expression.coeff(symbol, 1), expression.coeff(symbol, 0)
            if scale.is_Integer and scale > 0 and expression == scale * symbol + offset:
                return DynamicDim(self.named(symbol), low, high, int(scale), int(offset))
        return DynamicDim(self.named(expression), low, high)

    def named(self, expression: Any) -> str:
        return re.sub(r"\w+", lambda symbol: self.names.get(symbol[0], symbol[0]), str(expression))


def _order(value: Any) -> tuple[int, ...] | None:
    """Return the memory order of a dense tensor; None when it is not dense."""
    # Use hints for dynamic sizes: the order is a property of the example, and to compare symbols
    # would add guards.
    sizes = [_hint(size) for size in value.shape]
    strides = [_hint(stride) for stride in value.stride()]
    usual = tuple(range(len(sizes)))
    # Outermost first: the larger stride, and of equal strides the larger size, comes first.
    by_stride = tuple(sorted(usual, key=lambda dim: (-strides[dim], -sizes[dim], dim)))
    return next(
        (order for order in (usual, by_stride) if lies_in_order(sizes, strides, order)), None
    )


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    node = size.node
    # A data-dependent size has no hint. 8191 is a prime, which no product of other sizes equals.
    return int(node.hint if node.hint is not None else 8191)


def _batch_dim(
    inputs: Sequence[LeafSpec], outputs: Sequence[LeafSpec], dim: int
) -> BatchDim | None:
    """Return the batch dimension `dim`; None where `dim` can't be one.

    Every tensor must have the same dynamic size at `dim`, and no other size may depend on that
    size.
    """
    leaves = [leaf for leaf in (*inputs, *outputs) if isinstance(leaf, TensorSpec)]
    if not any(isinstance(leaf, TensorSpec) for leaf in inputs):
        return None
    if any(not 0 <= dim < len(leaf.shape) for leaf in leaves):
        return None
    if any(leaf.strides is not None for leaf in leaves):
        return None  # batches are dense
    first = leaves[0].shape[dim]
    if not isinstance(first, DynamicDim) or first.scale != 1 or first.offset:
        return None
    if any(isinstance(leaf, (IntegerSpec, FloatSpec, BoolSpec)) for leaf in outputs):
        return None  # the number may be the size of the batch instead of one request's size
    mentions = re.compile(rf"\b{re.escape(first.symbol)}\b")
    for leaf in leaves:
        for position, size in enumerate(leaf.shape):
            if position == dim:
                if not isinstance(size, DynamicDim) or str(size).split(":")[0] != first.symbol:
                    return None
            elif isinstance(size, DynamicDim) and mentions.search(size.symbol):
                return None  # as in x @ x.T, where rows of different requests would meet
    return BatchDim(dim, first.symbol, first.max)
