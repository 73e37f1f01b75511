"""Inputs of a model: from files, from values, or random by the model's specs.

An input is written as NAME=VALUE. NAME is the input's name or its number. VALUE is `@FILE`,
`@FILE:KEY`, or a number or nested list in JSON. `@FILE` alone has a tensor for each name in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoti_sched.cli.failures import UsageError
from aoti_sched.cli.tensors import SUFFIXES, one_tensor, read_tensors
from aoti_sched.errors import brief, shortened
from aoti_sched.model.specs import DynamicDim, LiteralSpec, TensorSpec, spec_from_metadata

if TYPE_CHECKING:
    import torch

    from aoti_sched.stats import RunnerInfo

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model."""

_SPEC = re.compile(r'\bin_spec_ = R"(\w*)\((.*?)\)\1";', re.DOTALL)


class Inputs:
    """The inputs that a user states for a model, and the rest made up.

    Args:
        info: The loaded model.
        wrapper: The generated source of the package, which states the structure of the arguments;
            None without one.
        given: What the user states, each as NAME=VALUE or @FILE.
        sizes: The values of symbols, each as SYMBOL=NUMBER.

    Raises:
        UsageError: A name or a value is wrong, or an input is missing that can't be made up.
    """

    def __init__(
        self, info: RunnerInfo, wrapper: str | None, given: Sequence[str], sizes: Sequence[str]
    ) -> None:
        self._info = info
        self._wrapper = wrapper
        self.specs = [leaf for leaf in info.inputs if isinstance(leaf, TensorSpec)]
        self.given = self._read(given)
        """The tensors that the user states, by number."""
        own = spec_from_metadata(info.metadata)
        self._examples = own.examples if own and len(own.examples) == len(self.specs) else ()
        self._sizes = self._all_sizes(_numbers(sizes))

    def tensors(self, seed: int) -> list[torch.Tensor]:
        """Return the tensors of a request; the same seed gives the same."""
        from aoti_sched.model.evidence import tensors_like

        if not self.specs:
            return [self.given[index] for index in sorted(self.given)]
        try:
            made = tensors_like(self.specs, self._sizes, self._examples, seed=seed)
        except KeyError as error:
            raise UsageError(
                f"no random inputs can be made for the size {error.args[0]}. Give every input with "
                "--input."
            ) from None
        return [self.given.get(index, tensor) for index, tensor in enumerate(made)]

    def arguments(self, seed: int) -> Arguments:
        """Return a request's arguments in the structure that the model takes.

        Raises:
            UsageError: The package does not state the structure.
        """
        tensors = iter(self.tensors(seed))
        values = [
            leaf.value if isinstance(leaf, LiteralSpec) else next(tensors)
            for leaf in self._info.inputs
        ]
        values += tensors
        found = None if self._wrapper is None else _SPEC.search(self._wrapper)
        if found is None:
            return tuple(values), {}
        from torch.utils import _pytree as pytree

        structure = pytree.treespec_loads(found[2])
        if structure.num_leaves != len(values):
            raise UsageError(
                f"model {self._info.name!r} takes {structure.num_leaves} values, and the package "
                f"describes {len(values)} of them. Compile it with aoti_sched."
            )
        args, kwargs = pytree.tree_unflatten(values, structure)
        return tuple(args), dict(kwargs)

    def name(self, index: int) -> str:
        """Return the name of an input."""
        return self.specs[index].name if index < len(self.specs) else str(index)

    def _read(self, given: Sequence[str]) -> dict[int, torch.Tensor]:
        tensors: dict[int, torch.Tensor] = {}
        for text in given:
            if text.startswith("@"):
                for name, tensor in read_tensors(Path(text[1:])).items():
                    tensors[self._index(name, text)] = tensor
                continue
            name, equals, value = text.partition("=")
            if not equals:
                raise UsageError(f"--input {text}: write NAME=@FILE, NAME=VALUE or @FILE.")
            index = self._index(name, text)
            dtype = self.specs[index].dtype if index < len(self.specs) else None
            tensors[index] = tensor_from(value, dtype, f"--input {text}")
        if not self.specs and sorted(tensors) != list(range(len(tensors))):
            raise UsageError("--input: the inputs are not numbered 0, 1 and so on.")
        if not self.specs and not tensors and self._info.spec_source.value == "arity only":
            raise UsageError(
                f"the package does not state the inputs of model {self._info.name!r}, so none can "
                "be made up. Give them with --input 0=@FILE."
            )
        return tensors

    def _index(self, name: str, text: str) -> int:
        names = [spec.name for spec in self.specs]
        if name in names:
            return names.index(name)
        if name.isdigit() and (int(name) < len(names) or not names):
            return int(name)
        if not name and len(names) == 1:
            return 0
        for leaf in self._info.inputs:
            if isinstance(leaf, LiteralSpec) and leaf.name == name:
                raise UsageError(
                    f"--input {text}: {name!r} is part of the compiled code, and always "
                    f"{leaf.value!r}. Leave it out."
                )
        raise UsageError(
            f"--input {text}: no input {name!r}. The inputs are {shortened(map(repr, names))}."
        )

    def _all_sizes(self, stated: dict[str, int]) -> dict[str, int]:
        """Return a value for each symbol.

        The first that there is: the stated one, that of a given input, the example's, the least.
        """
        dims = [dim for spec in self.specs for dim in spec.shape if isinstance(dim, DynamicDim)]
        symbols = {dim.symbol for dim in dims}
        for name in stated:
            if name not in symbols:
                known = shortened(sorted(symbols)) or "none"
                raise UsageError(f"--size {name}: no such size. The model's sizes are {known}.")
        sizes: dict[str, int] = {}
        for dim in dims:
            sizes[dim.symbol] = max(sizes.get(dim.symbol, 0), _least(dim))
        for spec, example in zip(self.specs, self._examples, strict=False):
            sizes.update(_symbols(spec, example.shape))
        for index, tensor in self.given.items():
            if index < len(self.specs):
                sizes.update(_symbols(self.specs[index], tensor.shape))
        return sizes | stated


def tensor_from(value: str, dtype: str | None, what: str) -> torch.Tensor:
    """Return a tensor from @FILE, @FILE:KEY, or a number or nested list in JSON.

    Args:
        value: The text.
        dtype: The dtype of a number or list; None for torch's choice. A file's is not changed.
        what: The option, for messages.

    Raises:
        UsageError: The text is none of them, or the file can't be read.
    """
    import torch

    if value.startswith("@"):
        path, key = _file_and_key(value[1:])
        return one_tensor(path, key)
    try:
        parsed = json.loads(value)
        return torch.tensor(parsed, dtype=None if dtype is None else getattr(torch, dtype))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"{what}: {brief(value)} is neither @FILE nor a number or list in JSON."
        ) from error


def _file_and_key(text: str) -> tuple[Path, str]:
    path, colon, key = text.rpartition(":")
    if colon and path.endswith(SUFFIXES):
        return Path(path), key
    return Path(text), ""


def _least(dim: DynamicDim) -> int:
    """Return the least value of a dimension's symbol whose size is not zero."""
    return max(0, -(-(max(dim.min, 1) - dim.offset) // dim.scale))


def _symbols(spec: TensorSpec, shape: Sequence[int]) -> Mapping[str, int]:
    """Return the values of the symbols in a tensor's shape, as far as it fits the spec."""
    if len(shape) != len(spec.shape):
        return {}
    return {
        dim.symbol: (size - dim.offset) // dim.scale
        for dim, size in zip(spec.shape, shape, strict=True)
        if isinstance(dim, DynamicDim)
    }


def _numbers(sizes: Sequence[str]) -> dict[str, int]:
    found = {}
    for text in sizes:
        name, _, number = text.partition("=")
        if not number.isdigit():
            raise UsageError(f"--size {text}: write SYMBOL=NUMBER, such as batch=8.")
        found[name] = int(number)
    return found
