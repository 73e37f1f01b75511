"""The call spec: how a model's args and kwargs flatten into tensors, and its outputs unflatten.

The spec comes from the compiled model as torch's pytree JSON and is read once. For tuples, lists
and dicts a plan of our own walks the arguments: it is several times faster than a general pytree
walk, and it can name the path of a fault. Other registered types go through torch's pytree.
"""

from __future__ import annotations

import inspect
import json
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from aoti_sched.errors import (
    ConfigError,
    InputMismatchError,
    LoadError,
    brief,
    clipped,
    shortened,
)
from aoti_sched.model.specs import COMPUTED, BoolSpec, FloatSpec, IntegerSpec, LeafSpec, LiteralSpec

if TYPE_CHECKING:
    import torch


class _Node:
    """One node of a call spec: a leaf, a tuple, a list or a dict."""

    __slots__ = ("children", "keys", "kind")

    def __init__(
        self, kind: str | None, children: list[_Node], keys: list[Any] | None = None
    ) -> None:
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
        return (
            f"[{inner}]"
            if self.kind == "list"
            else f"({inner}{',' if len(self.children) == 1 else ''})"
        )


def _parse(spec: dict[str, Any]) -> _Node | None:
    """Return a node for torch's JSON; None for types other than plain tuple, list and dict."""
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
    keys = [_key(key) for key in json.loads(spec["context"])] if kind == "builtins.dict" else None
    if keys is not None and any(isinstance(key, dict) for key in keys):
        return None  # members of enums, which torch knows how to read
    return _Node(kind.removeprefix("builtins."), children, keys)


def _count(spec: dict[str, Any]) -> int:
    """Return the leaves of torch's JSON."""
    return 1 if spec["type"] is None else sum(map(_count, spec["children_spec"]))


def _key(key: Any) -> Any:
    """Return a key as it was before it was JSON: only a tuple can have become a list."""
    return tuple(map(_key, key)) if isinstance(key, list) else key


def _is_flat(node: _Node) -> bool:
    return all(child.kind is None for child in node.children)


class CallSpec(Protocol):
    """How a model is called."""

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the container's inputs for these arguments; each has `nbytes`.

        Raises `InputMismatchError`.
        """

    def unflatten(self, outputs: list[Any]) -> Any:
        """Return what the caller gets for the container's outputs."""

    def takes(self) -> tuple[int, tuple[str, ...]] | None:
        """Return how many positional arguments a call has, and the names of its keyword arguments.

        None where any arguments are taken.
        """


def must_fit(what: str, function: Callable[..., Any], call_spec: CallSpec) -> None:
    """Check that a module's function can be called with a model's arguments.

    Args:
        what: The call that names the function, for the message.
        function: The function, `self` included.
        call_spec: How the model is called.

    Raises:
        ConfigError: It can't.
    """
    takes = call_spec.takes()
    if takes is None:
        return
    count, names = takes
    signature = inspect.signature(function)
    try:
        signature.bind(None, *[None] * count, **dict.fromkeys(names))
    except TypeError as error:
        named = clipped(getattr(function, "__qualname__", brief(function)))
        raise ConfigError(
            f"{what}: signature: the model is called with {call_spec}, and "
            f"{named}{clipped(signature)} does not take that: {error}. "
            "Give the forward of the module that was compiled."
        ) from None


class ExportedCallSpec:
    """The call spec of an exported module.

    Flattens a call's arguments into the container's tensors and rebuilds its outputs.

    As torch's own loader does, it takes a list or a deque for a tuple and the other way round, an
    `OrderedDict` or a `defaultdict` for a dict, and keywords and keys in any order. Other than
    there, the structure must be the exported one, and keys are matched by name.

    `in_spec` and `out_spec` are the JSON texts of `AOTInductorModelContainerGetCallSpec`. `inputs`
    and `outputs` are the leaves where known (see `ModelSpec`), else None: then, as torch's own
    loader does, the leaves that are tensors count. `parameters` lets positional parameters be given
    by name.
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
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise LoadError(
                f"model {model!r}: its call spec is not torch's pytree JSON ({error}). "
                "Compile the model again with the torch that runs here."
            ) from error
        self._torch_spec: Any = (
            None if self._root is not None else _torch_spec(model, "inputs", in_spec)
        )
        self._literals = None
        if inputs is not None and any(isinstance(leaf, LiteralSpec) for leaf in inputs):
            self._literals = tuple(
                leaf if isinstance(leaf, LiteralSpec) else None for leaf in inputs
            )
        self._all_tensors = inputs is not None and self._literals is None
        self._keys = frozenset(self._names)
        self._flat = self._root is not None and _is_flat(self._root.children[0]) and not self._keys
        self._unflatten = self._make_unflatten(out, outputs)

    def __str__(self) -> str:
        names = [self._path(index) for index in range(self._positional)]
        if self._root is None:
            return f"({', '.join([*names, *(f'{name}=' for name in self._names)])})"
        args, kwargs = self._root.children
        parts = [
            f"{n}={child}" if child.kind else n
            for n, child in zip(names, args.children, strict=True)
        ]
        parts += [f"{n}={child}" for n, child in zip(self._names, kwargs.children, strict=True)]
        return f"({', '.join(parts)})"

    def takes(self) -> tuple[int, tuple[str, ...]]:
        """Return how many positional arguments there are, and the names of the keyword ones."""
        return self._positional, self._names

    # --- flatten ----------------------------------------------------------------------------------

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """Return the tensors of a call in the container's order.

        Raises `InputMismatchError` naming the path.
        """
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
            # Equal by construction.
            for key, child in zip(self._names, named.children):  # noqa: B905
                self._walk(child, kwargs[key], key, leaves)
        if self._all_tensors:
            return leaves
        if self._literals is not None:
            return self._drop_literals(leaves)
        # An array becomes a tensor in the check of inputs.
        return [
            leaf for leaf in leaves if isinstance(leaf, self._tensor) or hasattr(leaf, "__dlpack__")
        ]

    def _path(self, index: int) -> str:
        return self._parameters[index] if index < len(self._parameters) else f"args[{index}]"

    def _walk(self, node: _Node, value: Any, path: str, leaves: list[Any]) -> None:
        kind = node.kind
        if kind is None:
            leaves.append(value)
            return
        if (type(value).__name__ != kind or type(value).__module__ != "builtins") and not _passes(
            kind, value
        ):
            raise self._misfit(path, f"a {kind} of {len(node.children)}: {node}", _describe(value))
        if kind == "dict":
            if value.keys() != set(node.keys or ()):
                raise self._misfit(path, f"the keys {_listed(node.keys or ())}", _listed(value))
            for key, child in zip(node.keys or (), node.children):  # noqa: B905
                self._walk(child, value[key], f"{path}[{key!r}]", leaves)
            return
        if len(value) != len(node.children):
            raise self._misfit(path, f"{len(node.children)} elements: {node}", f"{len(value)}")
        for index, child in enumerate(node.children):
            self._walk(child, value[index], f"{path}[{index}]", leaves)

    def _bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put positional parameters that were given by name in their places; refuse all else."""
        kwargs = dict(kwargs)
        names = self._parameters[len(args) : self._positional]
        if len(args) + len(names) == self._positional and all(name in kwargs for name in names):
            args = (*args, *(kwargs.pop(name) for name in names))
        if len(args) == self._positional and kwargs.keys() == self._keys:
            return args, kwargs
        got = [f"{len(args)} positional", *(f"{name}=" for name in list(kwargs)[:20])]
        if len(kwargs) > 20:
            got.append(f"and {len(kwargs) - 20} more")
        hint = self._bind_hint(len(args), kwargs)
        raise InputMismatchError(self.model, "", f"the arguments {self}", ", ".join(got), hint)

    def _bind_hint(self, given: int, kwargs: dict[str, Any]) -> str:
        """Return which arguments are missing and which are too many, by name as far as known."""
        known = set(self._parameters[: self._positional])
        missing = [
            self._path(index)
            for index in range(given, self._positional)
            if index >= len(self._parameters) or self._parameters[index] not in kwargs
        ]
        missing += [name for name in self._names if name not in kwargs]
        unknown = [name for name in kwargs if name not in self._keys and name not in known]
        twice = [name for name in self._parameters[:given] if name in kwargs]
        parts = []
        if missing:
            parts.append(f"Missing: {shortened(missing)}.")
        if given > self._positional:
            parts.append(f"It takes {self._positional} positional arguments.")
        if unknown:
            parts.append(f"Unknown: {shortened(map(brief, unknown))}.")
        if twice:
            parts.append(f"Given twice: {shortened(twice)}.")
        return " ".join(parts)

    def _drop_literals(self, leaves: list[Any]) -> list[torch.Tensor]:
        tensors = []
        for leaf, literal in zip(leaves, self._literals or (), strict=True):
            if literal is None:
                tensors.append(leaf)
            elif not _same(leaf, literal.value):
                raise self._misfit(
                    literal.name,
                    f"{literal.value!r}, the value the model was compiled with",
                    brief(leaf),
                )
        return tensors

    def _flatten_by_torch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        spec = self._torch_spec
        try:
            return spec.flatten_up_to((args, kwargs))  # type: ignore[no-any-return]
        except ValueError as error:
            leaves: list[Any] = []
            if _collect(spec, (args, kwargs), leaves):
                return leaves
            expected = f"arguments of the structure {' '.join(str(spec).split())}"
            raise self._misfit("", expected, " ".join(str(error).split()).rstrip(".")) from error

    def _misfit(self, path: str, expected: str, got: str) -> InputMismatchError:
        return InputMismatchError(self.model, path, expected, got)

    # --- unflatten --------------------------------------------------------------------------------

    def unflatten(self, outputs: list[Any]) -> Any:
        """Return the outputs in the structure that the exported module returned."""
        return self._unflatten(outputs)

    def _make_unflatten(
        self, node: _Node | None, outputs: Sequence[LeafSpec] | None
    ) -> Callable[[list[Any]], Any]:
        rebuild: Callable[[list[Any]], Any]
        if node is None:
            rebuild = _torch_spec(self.model, "outputs", self._out_text).unflatten
        elif node.kind is None:
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
    """Return whether a leaf is the compiled value, of the same type (1 is not True); NaN is NaN."""
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
    """Put back the values of non-tensor outputs, which the runtime returns as None or 0-dim."""

    def unflatten(values: list[Any]) -> Any:
        values = list(values)
        for index, leaf in fixed:
            if isinstance(leaf, LiteralSpec):
                values[index] = leaf.value
            else:
                values[index] = COMPUTED[type(leaf)](values[index].item())
        return rebuild(values)

    return unflatten


def _torch_spec(model: str, what: str, text: str) -> Any:
    """Return torch's own spec of the inputs or outputs.

    Raises:
        LoadError: A class in it is not registered in this process.
    """
    from torch.utils import _pytree as pytree

    try:
        return _with_tuple_keys(pytree.treespec_loads(text))
    except Exception as error:
        unknown = _unregistered(json.loads(text))
        if not unknown:
            raise LoadError(
                f"model {model!r}: the structure of its {what} can't be read ({error})"
            ) from error
        names = ", ".join(unknown)
        verb = "is" if len(unknown) == 1 else "are"
        raise LoadError(
            f"model {model!r}: its {what} contain {names}, which {verb} not registered with "
            "torch's pytree in this process. Before loading, import the module that registers it "
            "(torch.utils._pytree.register_pytree_node, register_dataclass or the like, with the "
            "serialized name that it had when the model was exported)."
        ) from error


def _with_tuple_keys(spec: Any) -> Any:
    """Return torch's spec with the keys as they were before they were JSON, which has no tuples."""
    from torch.utils import _pytree as pytree

    kind, context = spec.type, spec.context
    if kind is None:
        return spec
    if kind in (dict, OrderedDict):
        context = [_key(key) for key in context]
    elif kind is defaultdict:
        context = [context[0], [_key(key) for key in context[1]]]
    return pytree.TreeSpec(kind, context, [_with_tuple_keys(child) for child in spec.children()])


def _unregistered(spec: list[Any]) -> list[str]:
    """Return the classes in torch's JSON that this process can't read, each once."""
    from torch.utils import _pytree as pytree

    version, root = spec
    unknown: dict[str, None] = {}
    nodes = [root]
    while nodes:
        node = nodes.pop()
        nodes += reversed(node["children_spec"])
        if node["type"] is None:
            continue
        try:
            pytree.treespec_loads(json.dumps([version, {**node, "children_spec": []}]))
        # Whatever torch or the class's own reader says, it can't be read.
        except Exception:  # noqa: BLE001
            is_named = node["type"] == "collections.namedtuple"
            unknown[str(node["context"]).strip('"') if is_named else node["type"]] = None
    return list(unknown)


def _passes(kind: str, value: Any) -> bool:
    """Return whether torch's own loader takes the value for one of this kind of container."""
    if kind == "dict":
        return type(value) in (dict, OrderedDict, defaultdict)
    return type(value) in (tuple, list, deque) or _is_named_tuple(value)


def _is_named_tuple(value: Any) -> bool:
    return (
        isinstance(value, tuple) and type(value).__bases__ == (tuple,) and hasattr(value, "_fields")
    )


def _collect(spec: Any, value: Any, leaves: list[Any]) -> bool:
    """Append the leaves of a value whose containers pass for those of torch's spec.

    Return whether it fits.
    """
    kind = spec.type
    if kind is None:
        leaves.append(value)
        return True
    children = spec.children()
    if kind in (dict, OrderedDict, defaultdict):
        keys = spec.context[1] if kind is defaultdict else spec.context
        if not _passes("dict", value) or value.keys() != set(keys):
            return False
        values = [value[key] for key in keys]
    elif kind in (tuple, list, deque, namedtuple):  # noqa: PYI024 -- as torch names their kind
        fields = getattr(spec.context, "_fields", None)  # of a named tuple's class
        if not _passes("tuple", value) or (fields and getattr(value, "_fields", fields) != fields):
            return False
        values = list(value)
    else:
        try:
            leaves += spec.flatten_up_to(value)
        except ValueError:
            return False
        return True
    return len(values) == len(children) and all(
        map(_collect, children, values, [leaves] * len(values))
    )


def _describe(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, (tuple, list, dict)) else ""
    return f"{type(value).__name__}{size}"


def _listed(keys: Iterable[Any]) -> str:
    return f"[{shortened(map(brief, keys), rest=', ... and {} more')}]"
