"""`compile_package`: export and compile a module, with the specs of its inputs and outputs in the package.

torch is slow to import and to compile; nothing here is imported until it is called. Compiling blocks
for many seconds: call it from a build step or a worker thread, never from the event loop.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.errors import CompileError
from aoti_sched.specs import (
    BatchDim,
    DynamicDim,
    IntegerSpec,
    LeafSpec,
    LiteralSpec,
    ModelSpec,
    TensorSpec,
    spec_to_metadata,
)
from aoti_sched.validation import lies_in_order
from aoti_sched.weight_names import names_of

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


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
) -> Path:
    """Compile `module` into a `.pt2` package that `Scheduler.load` can check every request against.

    Args:
        module: The module, in the mode (`eval()`) and on the device it shall run in.
        example_inputs: Positional example arguments; their sizes are compiled in unless `dynamic`.
        path: Where to write the package; must end in `.pt2`.
        example_kwargs: Keyword example arguments.
        dynamic: Dynamic dimensions, in the form of `torch.export.export`'s `dynamic_shapes`, for
            example `{"x": {0: torch.export.Dim("batch", max=64)}}`. A `Dim` without `min` admits 0 rows.
        threads: Intra-op threads per run that inductor compiles into its kernels. With 1, the default, a run uses one core and
            the scheduler fills the others with other runs. More only pays for large models, and it costs safety:
            an error inside a parallel kernel ends the process.
        freeze: Turn on inductor's freezing: weights are folded into the code in the layout the
            kernels like best. Faster, but the weights can never be updated live.
        batch_dim: The dimension along which requests may be batched: dynamic, with the same `Dim` in every
            tensor input and output. By default 0 where that holds, otherwise none.
        metadata: Further strings to store in the package.
        options: Further inductor options; they win over the ones set here.

    Returns:
        The package's path.

    Raises:
        CompileError: The module can't be exported or compiled, an example can't be served, or `freeze` is
            asked for a module that writes to its buffers.
    """
    import torch
    import torch._inductor

    target = Path(path)
    if target.suffix != ".pt2":
        raise CompileError(f"{target}: a package's name ends in .pt2")
    if threads < 1:
        raise CompileError(f"threads={threads}: at least one thread runs a model")
    target.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings():
        # torch warns itself, of its own pytree; nothing a caller could mend
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        try:
            program = torch.export.export(
                module, example_inputs, kwargs=example_kwargs or {}, dynamic_shapes=dynamic
            )
        except Exception as error:  # torch.export raises many kinds; each becomes one sentence with its cause
            advice = _advice(error, example_inputs, example_kwargs)
            raise CompileError(f"{type(module).__name__} could not be exported: {error}{advice}") from error
        spec = describe(program, batch_dim=batch_dim, threads=threads, freeze=freeze)
        spec = msgspec.structs.replace(spec, weights=names_of(module, program))
        _check_examples(spec)
        if freeze and spec.mutates_buffers:
            raise CompileError(
                f"{type(module).__name__} writes to its own buffers, and freeze=True would fix their values. Compile it "
                "without freezing."
            )
        inductor = {
            "cpp.threads": threads,
            "freezing": freeze,
            # Else constants of up to 8 elements (a small bias) would become code, and no update could reach them.
            "always_keep_tensor_constants": not freeze,
            # Inductor takes a buffer of one value (a counter, say) for that value even where the module writes to it.
            "joint_graph_constant_folding": not spec.mutates_buffers,
            "aot_inductor.metadata": {**(metadata or {}), **spec_to_metadata(spec)},
            **(options or {}),
        }
        try:
            torch._inductor.aoti_compile_and_package(  # noqa: SLF001 -- its public home
                program, package_path=os.fspath(target), inductor_configs=inductor
            )
        except Exception as error:
            raise CompileError(f"{type(module).__name__} could not be compiled: {error}") from error
    return target


def _advice(error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> str:
    """What to say about the commonest mistake of all: an example of one row in a dynamic dimension."""
    from torch.utils import _pytree as pytree

    sizes = [size for leaf in pytree.tree_leaves((args, kwargs)) for size in getattr(leaf, "shape", ())]
    if "specialized" in str(error) and 1 in sizes:
        return "\nAn example has size 1, which torch.export takes for a constant: give at least 2 in a dynamic dimension."
    return ""


def describe(
    program: ExportedProgram, *, batch_dim: int | None = None, threads: int = 1, freeze: bool = False
) -> ModelSpec:
    """The specs of an exported program's inputs and outputs.

    Raises:
        CompileError: An input is a dynamic integer, which AOTInductor can't take, or not every tensor
            input and output has the same dynamic dimension at `batch_dim`.
    """
    from torch.export.graph_signature import InputKind, OutputKind

    reader = _Reader(program)
    signature = program.graph_signature
    inputs = tuple(
        reader.leaf(spec.arg, "input") for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT
    )
    outputs = tuple(
        reader.leaf(spec.arg, "output")
        for spec in signature.output_specs
        if spec.kind == OutputKind.USER_OUTPUT
    )
    batch = _batch_dim(inputs, outputs, batch_dim or 0)
    if batch is None and batch_dim is not None:
        raise CompileError(
            f"batch_dim={batch_dim}: not every tensor input and output has the same dynamic dimension there"
        )
    return ModelSpec(
        inputs=inputs,
        outputs=outputs,
        parameters=reader.parameters(),
        batch=batch,
        threads=threads,
        frozen=freeze,
        mutates_buffers=_mutates_buffers(program),
        torch_version=_torch_version(),
    )


def _mutates_buffers(program: ExportedProgram) -> bool:
    """Whether the module writes to its own buffers or parameters."""
    if not program.graph_signature.buffers and not program.graph_signature.parameters:
        return False
    # The signature tells only once in-place operators, views of buffers included, have been made functional.
    outputs = program.run_decompositions({}).graph_signature.output_specs
    return any(spec.kind.name in ("BUFFER_MUTATION", "PARAMETER_MUTATION") for spec in outputs)


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
                    # Names make better messages; where torch keeps none, its symbols do.
                    debug_names = getattr(environment, "source_name_to_debug_name", {})
                    variables = getattr(environment, "source_to_var", {})
                    self.names = {
                        str(variables[s]): name for s, name in debug_names.items() if s in variables
                    }
                    return

    def parameters(self) -> tuple[str, ...]:
        """Names of the positional parameters, where torch kept them."""
        call = self.program.call_spec.in_spec
        positional = call.children()[0].num_children if call is not None else 0
        top = next((entry for entry in self.program.module_call_graph if entry.fqn == ""), None)
        names = getattr(top.signature, "forward_arg_names", None) if top is not None else None
        return tuple(names[:positional]) if names else ()

    def leaf(self, arg: Any, side: str) -> LeafSpec:
        kind = type(arg).__name__
        if kind == "ConstantArgument":
            plain = isinstance(arg.value, (bool, int, float, str, type(None)))
            return LiteralSpec(arg.name, arg.value if plain else repr(arg.value))
        if kind == "SymIntArgument" and side == "output":
            return IntegerSpec(arg.name)
        if kind != "TensorArgument":
            raise CompileError(
                f"{side} {arg.name!r} is a {kind.removesuffix('Argument')}, which AOTInductor can't pass. "
                "Make it a 0-dim tensor."
            )
        value = self.values[arg.name]
        return TensorSpec(
            name=arg.name,
            dtype=str(value.dtype).removeprefix("torch."),
            shape=tuple(self.dim(size) for size in value.shape),
            device=str(value.device),
            order=_order(value),
        )

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
        if len(symbols) == 1:  # scale * symbol + offset is all that a torch.export.Dim can express
            symbol = symbols[0]
            scale, offset = expression.coeff(symbol, 1), expression.coeff(symbol, 0)
            if scale.is_Integer and scale > 0 and expression == scale * symbol + offset:
                return DynamicDim(self.named(symbol), low, high, int(scale), int(offset))
        return DynamicDim(self.named(expression), low, high)

    def named(self, expression: Any) -> str:
        return re.sub(r"\w+", lambda symbol: self.names.get(symbol[0], symbol[0]), str(expression))


def _order(value: Any) -> tuple[int, ...] | None:
    """The memory order of a dense tensor; None when it is not dense."""
    # Hints stand in for dynamic sizes: the order is a property of the example, and asking symbols would guard.
    sizes = [_hint(size) for size in value.shape]
    strides = [_hint(stride) for stride in value.stride()]
    usual = tuple(range(len(sizes)))
    # Outermost first: the larger stride, and of equal strides the larger size, comes first.
    by_stride = tuple(sorted(usual, key=lambda dim: (-strides[dim], -sizes[dim], dim)))
    return next((order for order in (usual, by_stride) if lies_in_order(sizes, strides, order)), None)


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    node = size.node
    hint = node.hint if node.hint is not None else 8191  # data-dependent: a prime no product repeats
    return int(hint)


def _batch_dim(inputs: Sequence[LeafSpec], outputs: Sequence[LeafSpec], dim: int) -> BatchDim | None:
    """The dimension `dim`, if every tensor has the same dynamic size there, and nothing else depends on it."""
    leaves = [leaf for leaf in (*inputs, *outputs) if isinstance(leaf, TensorSpec)]
    if not any(isinstance(leaf, TensorSpec) for leaf in inputs):
        return None
    if any(not 0 <= dim < len(leaf.shape) for leaf in leaves):
        return None
    first = leaves[0].shape[dim]
    if not isinstance(first, DynamicDim) or first.scale != 1 or first.offset:
        return None
    if any(isinstance(leaf, IntegerSpec) for leaf in outputs):
        return None  # it may well be the size of the batch, which is not one request's
    mentions = re.compile(rf"\b{re.escape(first.symbol)}\b")
    for leaf in leaves:
        for position, size in enumerate(leaf.shape):
            if position == dim:
                if not isinstance(size, DynamicDim) or str(size).split(":")[0] != first.symbol:
                    return None
            elif isinstance(size, DynamicDim) and mentions.search(size.symbol):
                return None  # x @ x.T would have each request's rows meet the others'
    return BatchDim(dim, first.symbol, first.max)


def _check_examples(spec: ModelSpec) -> None:
    for leaf in spec.inputs:
        if isinstance(leaf, TensorSpec) and leaf.order is None:
            raise CompileError(
                f"example input {leaf.name!r} is not dense (an expanded or strided view); the compiled code would "
                "fix its strides. Pass example.contiguous()."
            )
