"""Runs of a module, of its exported program and of its compiled code, on inputs of given sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoti_sched.model.evidence import example_of, guarded, tensors_like
from aoti_sched.model.specs import ExampleSpec, LeafSpec, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


class ProgramRuns:
    """One module and its exported program, with the arguments that they run on.

    Args:
        module: The module.
        arguments: The module's example arguments and keyword arguments, as exported.
        program: The exported program.
        functional: The program after `run_decompositions`, which writes to nothing.
        inputs: The specs of the leaves of the arguments.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        program: ExportedProgram,
        functional: ExportedProgram,
        inputs: Sequence[LeafSpec],
    ) -> None:
        from torch.utils import _pytree as pytree

        args, kwargs = arguments
        if program.call_spec.in_spec is not None:
            names = program.call_spec.in_spec.children()[1].context
            kwargs = {name: kwargs[name] for name in names}
        self._leaves, self._structure = pytree.tree_flatten((args, kwargs))
        self._places = [i for i, leaf in enumerate(inputs) if isinstance(leaf, TensorSpec)]
        self.module = module
        self.functional = functional
        self.specs = [leaf for leaf in inputs if isinstance(leaf, TensorSpec)]
        self.examples = tuple(example_of(self._leaves[place]) for place in self._places)
        self._runner: Any = None

    def example_bytes(self) -> int:
        """Return the bytes of the example's tensors."""
        return sum(self._leaves[place].nbytes for place in self._places)

    def _variants(self) -> Iterator[tuple[ExampleSpec, ...]]:
        """Yield the examples, then variants with all integers at their least value, 0 and 1."""
        yield self.examples
        discrete = [
            not spec.dtype.startswith(("float", "bfloat", "complex")) for spec in self.specs
        ]
        if any(discrete):
            for value in (None, 0.0, 1.0):
                yield tuple(
                    ExampleSpec(
                        e.shape,
                        e.low if value is None else value,
                        e.low if value is None else value,
                    )
                    if whole
                    else e
                    for e, whole in zip(self.examples, discrete, strict=True)
                )

    def run_module(self, sizes: dict[str, int], seed: int) -> tuple[list[torch.Tensor], list[Any]]:
        """Return inputs of these sizes that the module takes, and the module's outputs.

        Where the module takes no variant of the inputs, its error on the first one is raised.
        """
        failure: Exception | None = None
        for examples in self._variants():
            inputs = tensors_like(self.specs, sizes, examples, seed=seed)
            try:
                return inputs, self.eager(copies(inputs))
            except Exception as error:  # noqa: BLE001 -- the first variant's error is raised
                failure = failure or error
        raise failure or RuntimeError("no inputs")

    def eager(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        import torch
        from torch.utils import _pytree as pytree

        leaves = list(self._leaves)
        for place, tensor in zip(self._places, inputs, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        with torch.no_grad():
            outputs = pytree.tree_leaves(self.module(*args, **kwargs))
        return [out.detach().clone() if isinstance(out, torch.Tensor) else out for out in outputs]

    def interpret(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        import torch

        leaves = list(self._leaves)
        for place, tensor in zip(self._places, inputs, strict=True):
            leaves[place] = tensor
        program = self.functional
        given, left = [], iter(leaves)
        for spec in program.graph_signature.input_specs:
            if spec.kind.name == "USER_INPUT":
                given.append(next(left))
            else:
                held = (
                    program.state_dict if spec.target in program.state_dict else program.constants
                )
                given.append(held[spec.target])
        with torch.no_grad():
            outputs = _interpreter(program).run(*given)
        kinds = [spec.kind.name for spec in program.graph_signature.output_specs]
        return [out for out, kind in zip(outputs, kinds, strict=True) if kind == "USER_OUTPUT"]

    def run_library(self, library: Path, inputs: list[torch.Tensor], *, high: bool) -> list[Any]:
        from torch._C import _aoti

        if self._runner is None:
            self._runner = _aoti.AOTIModelContainerRunnerCpu(str(library), 1)
        return list(self._runner.run(guarded(inputs, high=high)))


class OtherShapeError(Exception):
    """A value has another shape than the compiled one."""


def _interpreter(program: ExportedProgram) -> Any:
    """Return an interpreter of a program's graph that compares shapes with the compiled ones.

    A value of another shape raises `OtherShapeError`.

    Export fixes shapes for sizes of 2 and more. A smaller size may give another shape, such as a
    shortened slice or a squeezed dimension. The compiled code computes the shape of a larger size
    even then.
    """
    import torch

    class Checked(torch.fx.Interpreter):
        def __init__(self) -> None:
            super().__init__(program.graph_module)
            self.symbols: dict[Any, int] = {}

        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            meant = n.meta.get("val")
            if isinstance(value, torch.Tensor) and isinstance(meant, torch.Tensor):
                for size, stated in zip(value.shape, meant.shape, strict=False):
                    self._compare(n, size, stated)
                if value.dim() != meant.dim():
                    raise OtherShapeError(
                        f"{n.name!r} has {value.dim()} dimensions, and {meant.dim()} are compiled "
                        "in"
                    )
            return value

        def _compare(self, node: torch.fx.Node, size: int, stated: Any) -> None:
            if isinstance(stated, int):
                expected: Any = stated
            else:
                expression = stated.node.expr
                if node.op == "placeholder":
                    self._bind(expression, size)
                expected = expression.subs(self.symbols)
                if expected.free_symbols:
                    return
            if int(expected) != size:
                raise OtherShapeError(
                    f"{node.name!r} has size {size}, and {expected} is compiled in"
                )

        def _bind(self, expression: Any, size: int) -> None:
            if len(expression.free_symbols) == 1:
                (symbol,) = expression.free_symbols
                scale, offset = expression.coeff(symbol, 1), expression.coeff(symbol, 0)
                if scale.is_Integer and scale > 0:
                    self.symbols.setdefault(symbol, (size - int(offset)) // int(scale))

    return Checked()


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy with the same strides."""
    if tensor.is_contiguous():
        return tensor.clone()
    memory = tensor.new_empty(0).set_(tensor.untyped_storage())
    return memory.clone().as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return a copy of each tensor with the same strides."""
    return [copy_of(tensor) for tensor in tensors]
