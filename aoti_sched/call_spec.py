"""The call spec: how a model's args and kwargs flatten into tensors, and its outputs unflatten.

The spec comes from the compiled model as torch's pytree JSON and is read once. For tuples, lists and
dicts a plan of our own walks the arguments: it is several times faster than a general pytree walk, and it can
name the path of a fault. Other registered types go through torch's pytree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from aoti_sched.errors import InputMismatchError, LoadError
from aoti_sched.specs import COMPUTED, BoolSpec, FloatSpec, IntegerSpec, LeafSpec, LiteralSpec

if TYPE_CHECKING:
    import torch


class _Node:
    """One node of a call spec: a leaf, a tuple, a list or a dict."""

    __slots__ = ("children", "keys", "kind")

    def __init__(self, kind: str | None, children: list[_Node], keys: list[Any] | None = None) -> None:
        self.kind = kind
        self.children = children
        self.keys = keys

    def __str__(self) -> str:
        if self.kind is None:
            return "*"
        if self.kind == "dict":
            pairs = zip(self.keys or (), self.children, strict=True)
            return "{" + ", ".join(f"{key!r}: {child}" for key, child in pairs) + "}"
        inner = ", ".join(map(str, self.children))
        return f"[{inner}]" if self.kind == "list" else f"({inner}{',' if len(self.children) == 1 else ''})"


def _parse(spec: dict[str, Any]) -> _Node | None:
    """A node for torch's JSON; None when some type in it is not a plain tuple, list or dict."""
    kind = spec["type"]
    if kind is None:
        return _Node(None, [])
    if kind not in ("builtins.tuple", "builtins.list", "builtins.dict"):
        return None
    children = []
    for child_spec in spec["children_spec"]:
        child = _parse(child_spec)
        if child is None:
            return None
        children.append(child)
    keys = json.loads(spec["context"]) if kind == "builtins.dict" else None
    return _Node(kind.removeprefix("builtins."), children, keys)


def _count(spec: dict[str, Any]) -> int:
    """The leaves of torch's JSON."""
    return 1 if spec["type"] is None else sum(map(_count, spec["children_spec"]))


def _is_flat(node: _Node) -> bool:
    return all(child.kind is None for child in node.children)


class CallSpec(Protocol):
    """How a model is called."""

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The container's inputs for these arguments; each has `nbytes`. Raises `InputMismatchError`."""

    def unflatten(self, outputs: list[Any]) -> Any:
        """What the caller gets for the container's outputs."""


class ExportedCallSpec:
    """The call spec of an exported module. Flattens a call's arguments into the container's tensors and rebuilds its outputs.

    `in_spec` and `out_spec` are the JSON texts of `AOTInductorModelContainerGetCallSpec`. `inputs` and
    `outputs` are the leaves where known (see `ModelSpec`), else None: then, as torch's own loader does,
    the leaves that are tensors count. `parameters` lets positional parameters be given by name.
    """

    def __init__(
        self,
        model: str,
        in_spec: str,
        out_spec: str,
        *,
        inputs: Sequence[LeafSpec] | None = None,
        outputs: Sequence[LeafSpec] | None = None,
        parameters: Sequence[str] = (),
    ) -> None:
        import torch

        self.model = model
        self._tensor = torch.Tensor
        self._parameters = tuple(parameters)
        self._in_text, self._out_text = in_spec, out_spec
        try:
            arguments = json.loads(in_spec)[1]
            positional, named = arguments["children_spec"]
            self._positional = len(positional["children_spec"])
            self._names = tuple(json.loads(named["context"]))  # of the keyword arguments
            self._root = _parse(arguments)
            self.leaves = _count(arguments)
            out = _parse(json.loads(out_spec)[1])
        except (ValueError, LookupError, TypeError) as error:
            raise LoadError(f"model {model!r}: its call spec is not torch's pytree JSON ({error})") from error
        self._literals = None
        if inputs is not None and any(isinstance(leaf, LiteralSpec) for leaf in inputs):
            self._literals = tuple(leaf if isinstance(leaf, LiteralSpec) else None for leaf in inputs)
        self._all_tensors = inputs is not None and self._literals is None
        self._keys = frozenset(self._names)
        self._flat = self._root is not None and _is_flat(self._root.children[0]) and not self._keys
        self._unflatten = self._make_unflatten(out, outputs)

    def __str__(self) -> str:
        names = [self._path(index) for index in range(self._positional)]
        if self._root is None:
            return f"({', '.join([*names, *(f'{name}=' for name in self._names)])})"
        args, kwargs = self._root.children
        parts = [f"{n}={child}" if child.kind else n for n, child in zip(names, args.children, strict=True)]
        parts += [f"{n}={child}" for n, child in zip(self._names, kwargs.children, strict=True)]
        return f"({', '.join(parts)})"

    # --- flatten ---------------------------------------------------------------------------------------

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call in the container's order. Raises `InputMismatchError` naming the path."""
        if len(args) != self._positional or kwargs.keys() != self._keys:
            args, kwargs = self._bind(args, kwargs)
        root = self._root
        if root is None:
            leaves = self._flatten_by_torch(args, kwargs)
        elif self._flat:
            leaves = list(args)
        else:
            leaves = []
            positional, named = root.children
            for index, child in enumerate(positional.children):
                self._walk(child, args[index], self._path(index), leaves)
            for key, child in zip(self._names, named.children):  # noqa: B905 -- equal by construction
                self._walk(child, kwargs[key], key, leaves)
        if self._all_tensors:
            return leaves
        if self._literals is not None:
            return self._drop_literals(leaves)
        return [leaf for leaf in leaves if isinstance(leaf, self._tensor)]

    def _path(self, index: int) -> str:
        return self._parameters[index] if index < len(self._parameters) else f"args[{index}]"

    def _walk(self, node: _Node, value: Any, path: str, leaves: list[Any]) -> None:
        kind = node.kind
        if kind is None:
            leaves.append(value)
            return
        if type(value).__name__ != kind or type(value).__module__ != "builtins":
            raise self._misfit(path, f"a {kind} of {len(node.children)}: {node}", _describe(value))
        if kind == "dict":
            if value.keys() != set(node.keys or ()):
                raise self._misfit(path, f"the keys {node.keys}", f"{list(value)}")
            for key, child in zip(node.keys or (), node.children):  # noqa: B905
                self._walk(child, value[key], f"{path}[{key!r}]", leaves)
            return
        if len(value) != len(node.children):
            raise self._misfit(path, f"{len(node.children)} elements: {node}", f"{len(value)}")
        for index, child in enumerate(node.children):
            self._walk(child, value[index], f"{path}[{index}]", leaves)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional parameters given by name are put in their places; anything else is a misfit."""
        kwargs = dict(kwargs)
        names = self._parameters[len(args) : self._positional]
        if len(args) + len(names) == self._positional and all(name in kwargs for name in names):
            args = (*args, *(kwargs.pop(name) for name in names))
        if len(args) == self._positional and kwargs.keys() == self._keys:
            return args, kwargs
        got = [f"{len(args)} positional", *(f"{name}=" for name in kwargs)]
        raise self._misfit("", f"the arguments {self}", ", ".join(got))

    def _drop_literals(self, leaves: list[Any]) -> list[torch.Tensor]:
        tensors = []
        for leaf, literal in zip(leaves, self._literals or (), strict=True):
            if literal is None:
                tensors.append(leaf)
            elif not _same(leaf, literal.value):
                raise self._misfit(
                    literal.name, f"{literal.value!r}, the value the model was compiled with", f"{leaf!r:.60}"
                )
        return tensors

    def _flatten_by_torch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        from torch.utils import _pytree as pytree

        if not hasattr(self, "_torch_spec"):
            self._torch_spec = pytree.treespec_loads(self._in_text)
        try:
            return self._torch_spec.flatten_up_to((args, kwargs))
        except ValueError as error:
            expected = f"arguments of the structure {self._torch_spec}"
            raise self._misfit("", expected, str(error).rstrip(".")) from error

    def _misfit(self, path: str, expected: str, got: str) -> InputMismatchError:
        return InputMismatchError(self.model, path, expected, got)

    # --- unflatten -------------------------------------------------------------------------------------

    def unflatten(self, outputs: list[Any]) -> Any:
        """The outputs in the structure that the exported module returned."""
        return self._unflatten(outputs)

    def _make_unflatten(
        self, node: _Node | None, outputs: Sequence[LeafSpec] | None
    ) -> Callable[[list[Any]], Any]:
        if node is None:
            return _by_torch(self._out_text)
        rebuild: Callable[[list[Any]], Any]
        if node.kind is None:
            rebuild = _only
        elif node.kind == "tuple" and _is_flat(node):
            rebuild = tuple
        elif node.kind == "list" and _is_flat(node):
            rebuild = list
        else:
            rebuild = lambda values: _rebuild(node, iter(values))  # noqa: E731
        kinds = LiteralSpec, IntegerSpec, FloatSpec, BoolSpec
        fixed = [(i, leaf) for i, leaf in enumerate(outputs or ()) if isinstance(leaf, kinds)]
        return _with_fixed(fixed, rebuild) if fixed else rebuild


def _same(leaf: Any, value: Any) -> bool:
    """Whether a leaf is the value compiled in: of the same type (1 is not True), and NaN is NaN."""
    return type(leaf) is type(value) and (leaf == value or repr(leaf) == repr(value))


def _only(values: list[Any]) -> Any:
    return values[0]


def _rebuild(node: _Node, values: Iterator[Any]) -> Any:
    if node.kind is None:
        return next(values)
    parts = [_rebuild(child, values) for child in node.children]
    if node.kind == "dict":
        return dict(zip(node.keys or (), parts, strict=True))
    return parts if node.kind == "list" else tuple(parts)


def _with_fixed(
    fixed: list[tuple[int, LiteralSpec | IntegerSpec | FloatSpec | BoolSpec]],
    rebuild: Callable[[list[Any]], Any],
) -> Callable[[list[Any]], Any]:
    """The runtime returns non-tensor outputs as None or 0-dim tensors; put the values back."""

    def unflatten(values: list[Any]) -> Any:
        values = list(values)
        for index, leaf in fixed:
            if isinstance(leaf, LiteralSpec):
                values[index] = leaf.value
            else:
                values[index] = COMPUTED[type(leaf)](values[index].item())
        return rebuild(values)

    return unflatten


def _by_torch(text: str) -> Callable[[list[Any]], Any]:
    from torch.utils import _pytree as pytree

    spec = pytree.treespec_loads(text)
    return lambda values: pytree.tree_unflatten(values, spec)


def _describe(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, (tuple, list, dict)) else ""
    return f"{type(value).__name__}{size}"
