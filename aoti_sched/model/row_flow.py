"""Row flow: whether an exported program computes a value of all rows that reaches an output.

Runs on random values do not show an influence that only some values have: a maximum that exceeds a
threshold, a mask that is True everywhere, an expert that gets more tokens than it takes. The graph
shows that a value of all rows is used at all. Nothing is run here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

_SHAPES = ("sym_", "new_", "zeros_like", "ones_like", "full_like", "empty_like", "rand")
"""The beginnings of operators that use a tensor's shape and none of its values."""

_SCANS = ("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
"""Operators that compute each element from those before it in a dimension."""


def where_rows_meet(functional: ExportedProgram, dim: int) -> str:
    """Return which operator computes a value of several rows that reaches an output; "" for none.

    Args:
        functional: The exported program after `run_decompositions`, which writes to nothing.
        dim: The dimension in which every tensor input has its rows.
    """
    given = {
        spec.arg.name
        for spec in functional.graph_signature.input_specs
        if spec.kind.name == "USER_INPUT"
    }
    graph = functional.graph_module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.name in given]
    symbols = {
        symbol
        for node in inputs
        for tensor in _tensors(node.meta.get("val"))
        if dim < tensor.dim()
        for symbol in _symbols(tensor.shape[dim])
    }
    return _meeting(functional.graph_module, set(inputs), symbols)


def _meeting(module: torch.fx.GraphModule, varying: set[Any], symbols: set[Any]) -> str:
    """Return which operator of a graph computes a value of several rows that reaches its output.

    Args:
        module: The graph.
        varying: The placeholders whose values depend on the inputs; the other nodes are added.
        symbols: The symbols of the number of rows.
    """
    import torch

    met: dict[Any, str] = {}
    for node in module.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "output":
            return next((met[source] for source in sources if source in met), "")
        if node.op == "get_attr":
            part = getattr(module, str(node.target), None)
            if isinstance(part, torch.fx.GraphModule):  # a branch or a body of control flow
                places = {n for n in part.graph.nodes if n.op == "placeholder"}
                if found := _meeting(part, places, symbols):
                    met[node] = found
            continue
        name = _name(node)
        if node.op != "call_function" or name.startswith(_SHAPES):
            continue
        if any(source in varying for source in sources):
            varying.add(node)
        known = next((met[source] for source in sources if source in met), "")
        if known or _meets(node, name, varying, symbols):
            met[node] = known or name
    return ""


def _meets(node: Any, name: str, varying: set[Any], symbols: set[Any]) -> bool:
    """Return whether an operator computes a value of several rows."""
    rows = [
        source
        for source in node.all_input_nodes
        if source in varying and any(_rows(t, symbols) for t in _tensors(source.meta.get("val")))
    ]
    if not rows:
        return False
    made = list(_tensors(node.meta.get("val")))
    if name in _SCANS:
        dims = _rows(next(_tensors(rows[0].meta["val"])), symbols)
        wanted = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return wanted % max(made[0].dim(), 1) in dims
    return bool(made) and all(len(_rows(tensor, symbols)) != 1 for tensor in made)


def _rows(tensor: torch.Tensor, symbols: set[Any]) -> list[int]:
    """Return the dimensions whose size depends on the number of rows, or on the data."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return [
        dim
        for dim, size in enumerate(tensor.shape)
        if not _symbols(size).isdisjoint(symbols) or free_unbacked_symbols(size)
    ]


def _symbols(size: Any) -> set[Any]:
    return set() if isinstance(size, int) else set(size.node.expr.free_symbols)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)


def _name(node: Any) -> str:
    """Return the operator's name without its namespace and overload, such as "amax"."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))
