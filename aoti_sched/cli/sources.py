"""What `compile` compiles: a module of Python code, or an exported program in a file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import operator
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from aoti_sched.cli.failures import UsageError
from aoti_sched.cli.inputs import tensor_from
from aoti_sched.errors import CompileError, brief, first_line, shortened

if TYPE_CHECKING:
    import torch

_TENSOR = re.compile(r"(\w+)\[([\d, ]*)\](?::(-?\d+)\.\.(-?\d+))?")
_RANGE = re.compile(r"(\w+)=(\d*)\.\.(\d*)(?::(.+))?")


class Source(NamedTuple):
    """A module to compile, with its example arguments and its dynamic sizes."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic: dict[str, Any] | None


def read_source(source: str, examples: Sequence[str], dynamic: Sequence[str]) -> Source:
    """Return what to compile.

    Args:
        source: "package.module:factory", "file.py:factory", or an exported program in a .pt2 file.
            The factory is a module, or a function or class that returns one, alone or in a tuple
            with the example arguments and keyword arguments.
        examples: Example arguments, as `example_from` takes them, with or without a name.
        dynamic: Dynamic sizes, as NAME=MIN..MAX or NAME=MIN..MAX:PLACES.

    Raises:
        UsageError: The source, an example or a size is none of these.
        CompileError: The code of the factory fails.
    """
    if source.endswith(".pt2"):
        return _exported(Path(source), examples, dynamic)
    made = _made(source)
    module, args, kwargs = made[0], *(*made[1:], (), {})[:2]
    if isinstance(args, dict):
        args, kwargs = (), args
    args = args if isinstance(args, tuple) else (args,)
    if examples:
        args, kwargs = _named_arguments(module, examples)
    module.eval()
    sizes = _dynamic_sizes(module, args, kwargs, dynamic) if dynamic else None
    return Source(module, args, kwargs, sizes)


# --- Python code ----------------------------------------------------------------------------------


def _made(source: str) -> tuple[Any, ...]:
    """Return the module that a factory makes, in a tuple with the examples that it may give."""
    import torch

    place, colon, name = source.rpartition(":")
    if not colon or not name:
        raise UsageError(
            f"{source}: write MODULE:FACTORY, FILE.py:FACTORY, or an exported program in a .pt2 "
            "file."
        )
    thing: Any = _imported(place)
    try:
        thing = operator.attrgetter(name)(thing)
    except AttributeError:
        raise UsageError(f"{source}: {place} has no {name!r}.") from None
    if not isinstance(thing, torch.nn.Module):
        if not callable(thing):
            raise UsageError(f"{source}: expected a module or a function, got {brief(thing)}.")
        try:
            thing = thing()
        except Exception as error:
            raise CompileError(f"{source} fails: {first_line(error)}.") from error
    made = thing if isinstance(thing, tuple) else (thing,)
    if not 1 <= len(made) <= 3 or not isinstance(made[0], torch.nn.Module):
        raise UsageError(
            f"{source}: returned {brief(thing)}. Return a torch.nn.Module, or a tuple of the "
            "module, its example arguments and its example keyword arguments."
        )
    return made


def _imported(place: str) -> ModuleType:
    path = Path(place)
    spec = None
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise UsageError(f"{place}: no such file.")
    sys.path.insert(0, str(Path.cwd() if spec is None else path.absolute().parent))
    try:
        if spec is None or spec.loader is None:
            return importlib.import_module(place)
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{place}.".startswith(f"{error.name}."):
            raise UsageError(
                f"{place}: there is no such module. Modules are looked up in the current folder, "
                "too."
            ) from error
        raise CompileError(f"importing {place} fails: {first_line(error)}.") from error
    except Exception as error:
        raise CompileError(f"importing {place} fails: {first_line(error)}.") from error
    return module


# --- examples -------------------------------------------------------------------------------------


def example_from(text: str, what: str, seed: int = 0) -> Any:
    """Return an example argument.

    Args:
        text: DTYPE[SIZES] for random values, DTYPE[SIZES]:LOW..HIGH for whole numbers of a range,
            @FILE or @FILE:KEY for a tensor, and otherwise a value in JSON, which is compiled in.
        what: The option, for messages.
        seed: The seed of random values.

    Raises:
        UsageError: The text is none of these.
    """
    import torch

    if text.startswith("@"):
        return tensor_from(text, None, what)
    found = _TENSOR.fullmatch(text)
    if found is None:
        try:
            return json.loads(text)
        except ValueError:
            raise UsageError(
                f"{what}: write DTYPE[SIZES] such as float32[8,16], int64[2,8]:0..99, @FILE, or a "
                "value in JSON."
            ) from None
    dtype = getattr(torch, found[1], None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"{what}: {found[1]!r} is no dtype of torch.")
    shape = [int(size) for size in found[2].split(",") if size.strip()]
    generator = torch.Generator().manual_seed(seed)
    if found[3] is not None:
        low, high = int(found[3]), int(found[4])
        if high < low:
            raise UsageError(f"{what}: the range {low}..{high} is empty.")
        return torch.randint(low, high + 1, shape, generator=generator).to(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _named_arguments(
    module: torch.nn.Module, examples: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the examples as `forward` takes them: by position where that is possible."""
    args, kwargs = [], {}
    for index, text in enumerate(examples):
        name, equals, value = text.partition("=")
        if equals and name.isidentifier():
            kwargs[name] = example_from(value, f"--example {text}", index)
        else:
            args.append(example_from(text, f"--example {text}", index))
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        signature = inspect.signature(module.forward)
        raise UsageError(f"--example: forward{signature} does not take these: {error}.") from error
    return bound.args, bound.kwargs


def _dynamic_sizes(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Sequence[str],
) -> dict[str, Any]:
    """Return `dynamic_shapes` as torch.export takes it, by the parameters of `forward`."""
    import torch
    from torch.utils import _pytree as pytree

    try:
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise UsageError(f"--dynamic: the examples do not fit forward: {error}.") from error
    places: dict[str, dict[int, Any]] = {}
    for name, value in arguments.items():
        for path, leaf in pytree.tree_leaves_with_path(value):
            if isinstance(leaf, torch.Tensor):
                places[name + pytree.keystr(path)] = {}
    for text in dynamic:
        found = _RANGE.fullmatch(text)
        if found is None:
            raise UsageError(
                f"--dynamic {text}: write NAME=MIN..MAX, such as batch=1..64, or with places: "
                "tokens=2..128:ids.1,mask.1."
            )
        low, high = (int(part) if part else None for part in (found[2], found[3]))
        try:
            dim = torch.export.Dim(found[1], min=low, max=high)
        except (AssertionError, ValueError) as error:
            raise UsageError(f"--dynamic {text}: {first_line(error)}.") from error
        for place, index in _places(text, found[4] or "0", list(places)):
            places[place][index] = dim

    def of(name: str, value: Any) -> Any:
        return pytree.tree_map_with_path(
            lambda path, _: places.get(name + pytree.keystr(path)) or None, value
        )

    return {name: of(name, value) for name, value in arguments.items()}


def _places(text: str, places: str, names: list[str]) -> list[tuple[str, int]]:
    """Return the inputs and dimensions that "1" or "ids.1,mask.1" names."""
    found = []
    for place in places.split(","):
        name, _, dim = place.strip().rpartition(".")
        if not dim.isdigit() or (name and name not in names):
            raise UsageError(
                f"--dynamic {text}: no place {place!r}. Write a dimension, or INPUT.DIMENSION; the "
                f"inputs are {shortened(names)}."
            )
        found += [(one, int(dim)) for one in ([name] if name else names)]
    return found


# --- exported programs ----------------------------------------------------------------------------


def _exported(path: Path, examples: Sequence[str], dynamic: Sequence[str]) -> Source:
    """Return the module of an exported program, with its own examples and dynamic sizes."""
    import torch

    if examples or dynamic:
        raise UsageError(
            f"{path}: an exported program has its own examples and dynamic sizes. Leave out "
            "--example and --dynamic."
        )
    with path.open("rb"):  # the error of a missing file is that of any other command
        pass
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise UsageError(
            f"{path}: no exported program that torch.export.load can read: {first_line(error)}."
        ) from error
    if program.example_inputs is None:
        raise UsageError(f"{path}: the program has no example inputs. Export it anew.")
    args, kwargs = program.example_inputs
    return Source(program.module(), tuple(args), dict(kwargs), _program_sizes(program))


def _program_sizes(program: torch.export.ExportedProgram) -> dict[str, Any] | None:
    """Return the dynamic sizes of a program, for exporting its module again."""
    import torch
    from torch.export.graph_signature import InputKind
    from torch.utils import _pytree as pytree

    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    leaves = []
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.USER_INPUT:
            continue
        value = values.get(spec.arg.name)
        dims = {
            index: _auto(program, size)
            for index, size in enumerate(getattr(value, "shape", ()))
            if isinstance(size, torch.SymInt)
        }
        leaves.append(dims or None)
    if not any(leaves):
        return None
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    names = list(inspect.signature(program.module().forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _auto(program: torch.export.ExportedProgram, size: Any) -> Any:
    import torch

    bounds = program.range_constraints.get(size.node.expr)
    low = int(bounds.lower) if bounds is not None else None
    high = int(bounds.upper) if bounds is not None and bounds.upper.is_Integer else None
    return torch.export.Dim.AUTO(min=low, max=high)
