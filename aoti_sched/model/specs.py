"""Specs: descriptions of a model's inputs, outputs and constants.

Specs come from the first of these sources that exists (`SpecSource`):

1. Metadata that `compile_package` wrote into the package.
2. The user's declaration at load.
3. The packaged wrapper source.
4. The number of inputs alone.

Specs are msgspec Structs, so they can be stored in a package and cross a wire.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec

METADATA_KEY = "aoti_sched"
"""The key under which `compile_package` stores a `ModelSpec` as JSON in the package's metadata."""


class SpecSource(str, enum.Enum):
    """The origin of a runner's specs, as `runner.info` states it.

    Attributes:
        PACKAGE: Metadata that `compile_package` wrote into the package.
        DECLARED: The user's declaration at load.
        WRAPPER: The generated wrapper source in the package.
        ARITY: No source: only the number of inputs is known.
    """

    PACKAGE = "package"
    DECLARED = "declared"
    WRAPPER = "wrapper source"
    ARITY = "arity only"


class DynamicDim(msgspec.Struct, frozen=True, tag="dynamic"):
    """A dimension whose size may differ between requests: `scale * symbol + offset`.

    Attributes:
        symbol: Dimensions with the same symbol agree within a request.
        min: The least size of the dimension.
        max: The greatest size of the dimension; None without a bound.
        scale: The factor of the symbol.
        offset: The summand, in elements.
        reason: Why `min` is not less, where running the model showed it; otherwise "".
    """

    symbol: str
    min: int = 0
    max: int | None = None
    scale: int = 1
    offset: int = 0
    reason: str = ""

    def __str__(self) -> str:
        size = self.symbol if self.scale == 1 else f"{self.scale}*{self.symbol}"
        size += f"{self.offset:+d}" if self.offset else ""
        return f"{size}:{self.min}..{'' if self.max is None else self.max}"


class TensorSpec(msgspec.Struct, frozen=True, tag="tensor"):
    """One tensor input or output.

    Attributes:
        name: The parameter's name, or the path of the leaf in the arguments.
        dtype: Torch's name without the prefix, such as "float32".
        shape: For each dimension, a number for a static size or a `DynamicDim`.
        device: The kind of the device, such as "cpu" or "cuda".
        order: The dimensions of a dense tensor from the outermost to the innermost in memory.
            (0, 1, 2, 3) is contiguous, (0, 2, 3, 1) is channels-last. None is not checked.
        strides: Strides in elements of a tensor that is not dense (expanded, sliced or
            overlapping); compiled code uses exactly these. A `DynamicDim` is a stride that depends
            on a size. None for a dense tensor, and where strides are not known.
    """

    name: str
    dtype: str
    shape: tuple[int | DynamicDim, ...]
    device: str = "cpu"
    order: tuple[int, ...] | None = None
    strides: tuple[int | DynamicDim, ...] | None = None

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(dim) for dim in self.shape)}]"


class LiteralSpec(msgspec.Struct, frozen=True, tag="literal"):
    """A leaf that was no tensor when the model was exported.

    Attributes:
        name: The path of the leaf.
        value: The value, which is part of the compiled code.
    """

    name: str
    value: bool | int | float | str | None


class IntegerSpec(msgspec.Struct, frozen=True, tag="integer"):
    """An int output that is computed from dynamic sizes. The runtime returns a 0-dim tensor.

    Attributes:
        name: The path of the leaf.
    """

    name: str


class FloatSpec(msgspec.Struct, frozen=True, tag="float"):
    """A float output that is computed from dynamic sizes or a tensor's value (`.item()`).

    Attributes:
        name: The path of the leaf.
    """

    name: str


class BoolSpec(msgspec.Struct, frozen=True, tag="bool"):
    """A bool output: a condition on dynamic sizes or a tensor's value.

    Attributes:
        name: The path of the leaf.
    """

    name: str


LeafSpec = TensorSpec | LiteralSpec | IntegerSpec | FloatSpec | BoolSpec

_Leaf = TypeVar("_Leaf", bound=LeafSpec)

COMPUTED: dict[type, type[int | float | bool]] = {
    IntegerSpec: int,
    FloatSpec: float,
    BoolSpec: bool,
}
"""The specs of computed outputs, with the type that replaces the runtime's 0-dim tensor."""


class BatchDim(msgspec.Struct, frozen=True):
    """The dimension along which requests may be put together. Every input and output has it.

    Attributes:
        dim: The dimension's index.
        symbol: The symbol of its size.
        max: The most rows that the model takes; None without a bound.
    """

    dim: int
    symbol: str
    max: int | None


class ExampleSpec(msgspec.Struct, frozen=True):
    """A description of one example tensor, from which similar tensors are made.

    Attributes:
        shape: The tensor's shape.
        low: The least value; None without one (empty, NaN, complex).
        high: The greatest value; None without one.
        values: All values in flattening order, if they are few integers or booleans (lengths,
            indices) that random values can't replace; otherwise None.
    """

    shape: tuple[int, ...]
    low: float | None = None
    high: float | None = None
    values: tuple[int, ...] | None = None


class RowEvidence(msgspec.Struct, frozen=True):
    """The outcome of running rows alone, together and in another order.

    Attributes:
        independent: Whether rows do not influence each other; None if that was not found out.
        reason: What was compared, or why nothing was found out.
    """

    independent: bool | None
    reason: str


class WeightName(msgspec.Struct, frozen=True, omit_defaults=True):
    """One name of a module's state: a parameter, a buffer, or other content of `state_dict()`.

    Attributes:
        name: The name.
        same_as: The first name of the same tensor, if that is another name (tied weights); or "".
        persistent: False for a buffer that `state_dict()` leaves out.
        used: Whether the compiled graph computes with the value.
        digest: The digest of a used value that is small enough to be part of the code; or "".
    """

    name: str
    same_as: str = ""
    persistent: bool = True
    used: bool = True
    digest: str = ""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The whole description that `compile_package` makes of a model, stored as JSON in the package.

    Attributes:
        version: The version of this format.
        inputs: The leaves of the arguments in flattening order.
        outputs: The leaves of the results in flattening order.
        parameters: The names of the module's positional parameters.
        batch: The dimension of the rows; None if the model has none.
        threads: The number of intra-op threads that is compiled in.
        frozen: Whether freezing made the weights part of the code, so no update can change them.
        mutates_buffers: Whether instances share state, so that they must run one at a time.
        torch_version: The torch that compiled the model.
        mutated_inputs: The names of the inputs that a run writes to; None if that is not known.
        rows: Whether rows influence each other; None if that was not probed.
        examples: An entry for each tensor input.
        sizes_probed: Whether the least sizes of dynamic dimensions were found by running the model.
        weights: All names of the module's state; () if they were not recorded.
        conditions: What the code requires of the dynamic sizes of a request, besides their ranges,
            such as "b <= a".
    """

    version: int = 1
    inputs: tuple[LeafSpec, ...]
    outputs: tuple[LeafSpec, ...]
    parameters: tuple[str, ...]
    batch: BatchDim | None = None
    threads: int = 1
    frozen: bool = False
    mutates_buffers: bool = False
    torch_version: str = ""
    mutated_inputs: tuple[str, ...] | None = None
    rows: RowEvidence | None = None
    examples: tuple[ExampleSpec, ...] = ()
    sizes_probed: bool = False
    weights: tuple[WeightName, ...] = ()
    conditions: tuple[str, ...] = ()


class ConstantSpec(msgspec.Struct, frozen=True):
    """One constant of a container: a parameter, a buffer, or a tensor that the compiler made.

    Attributes:
        name: The runtime's internal name.
        fqn: The module's own name (fully qualified).
        dtype: Torch's name without the prefix, such as "float32".
        shape: The shape; None where the model's C ABI can't tell it.
        bytes: Bytes of the data.
        type: "parameter", "buffer", "constant", "folded" or "unknown".
        folded: Whether the value is computed from other constants.
    """

    name: str
    fqn: str
    dtype: str
    shape: tuple[int, ...] | None
    bytes: int
    type: str
    folded: bool


def row_symbols(specs: Iterable[LeafSpec], dim: int) -> list[str]:
    """Return the symbols that alone are a tensor's size in this dimension, in order."""
    sizes = [
        spec.shape[dim]
        for spec in specs
        if isinstance(spec, TensorSpec) and 0 <= dim < len(spec.shape)
    ]
    plain = [
        size
        for size in sizes
        if isinstance(size, DynamicDim) and size.scale == 1 and not size.offset
    ]
    return list(dict.fromkeys(size.symbol for size in plain))


def with_one_symbol(leaves: Sequence[_Leaf], old: str, new: str) -> tuple[_Leaf, ...]:
    """Return the leaves with the symbol `new` in place of `old`, and the narrower bounds."""
    mentions = re.compile(rf"\b{re.escape(old)}\b")
    both = [
        dim
        for leaf in leaves
        if isinstance(leaf, TensorSpec)
        for dim in leaf.shape
        if isinstance(dim, DynamicDim)
        and dim.symbol in (old, new)
        and dim.scale == 1
        and not dim.offset
    ]
    low = max((dim.min for dim in both), default=0)
    high = min((dim.max for dim in both if dim.max is not None), default=None)

    def renamed(dim: int | DynamicDim) -> int | DynamicDim:
        if isinstance(dim, int):
            return dim
        if dim in both:
            return msgspec.structs.replace(dim, symbol=new, min=low, max=high)
        return msgspec.structs.replace(dim, symbol=mentions.sub(new, dim.symbol))

    return tuple(
        msgspec.structs.replace(
            leaf,
            shape=tuple(map(renamed, leaf.shape)),
            strides=leaf.strides if leaf.strides is None else tuple(map(renamed, leaf.strides)),
        )
        if isinstance(leaf, TensorSpec)
        else leaf
        for leaf in leaves
    )


def spec_to_metadata(spec: ModelSpec) -> dict[str, str]:
    """Return the strings to store in a package, for `spec_from_metadata` to read."""
    # msgspec's own encoder would write null for a literal that is infinite or NaN.
    return {METADATA_KEY: json.dumps(msgspec.to_builtins(spec))}


def spec_from_metadata(metadata: dict[str, str]) -> ModelSpec | None:
    """Return the `ModelSpec` in a package's metadata; None without one, or for a newer format."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        spec = msgspec.convert(json.loads(text), ModelSpec)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return spec if spec.version == 1 else None


# --- what the packaged wrapper source states ------------------------------------------------------

_CHECK = re.compile(
    r"static void check_input_(\d+)\(\s*AtenTensorHandle\* input_handles\s*\)\s*\{(.*?)\n\}",
    re.DOTALL,
)
_DTYPE = re.compile(r"expected: \" << \w+_expected_dtype << \"\(at::k(\w+)\)")
_STATIC = re.compile(r"if \((\d+) != \w+_size\[(\d+)\]\)")
_LOW = re.compile(r"if \(\w+_size\[(\d+)\] < (\d+)\)")
_HIGH = re.compile(r"if \(\w+_size\[(\d+)\] > (\d+)\)")
_NAME = re.compile(r"ConstantHandle (\w+) = ConstantHandle\(input_handles\[\d+\]\)")
_SIZES = re.compile(r"assert_size_stride\((\w+), \{([^}]*)\}, \{([^}]*)\}, \"input\"\)")
_DEVICE = re.compile(r"_expected_device_type << \"\d+\((\w+)")
_DTYPES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16",
    "Byte": "uint8",
    "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64", "Bool": "bool",
    "UInt16": "uint16", "UInt32": "uint32", "UInt64": "uint64",
    "ComplexHalf": "complex32", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
    "Float8_e5m2": "float8_e5m2", "Float8_e4m3fn": "float8_e4m3fn",
    "Float8_e5m2fnuz": "float8_e5m2fnuz", "Float8_e4m3fnuz": "float8_e4m3fnuz",
}  # fmt: skip


def specs_from_wrapper(source: str) -> tuple[TensorSpec, ...] | None:
    """Return the input specs that a generated `*.wrapper.cpp` states.

    The specs are read from `check_input_N` and `assert_size_stride`. Least sizes are taken from the
    source. A least size of 2 may come from the exporter's 0/1 specialization, and the code may not
    need it (pytorch/pytorch#196131 and #169430). Only running the model shows that.

    Returns:
        The specs; None unless all inputs are understood, because a partial check would be
        misleading.
    """
    sizes = {name: (shape, strides) for name, shape, strides in _SIZES.findall(source)}
    specs: dict[int, TensorSpec] = {}
    for index, body in _CHECK.findall(source):
        dtype, name = _DTYPE.search(body), _NAME.search(body)
        if dtype is None or name is None or dtype[1] not in _DTYPES or name[1] not in sizes:
            return None
        shape_text, stride_text = sizes[name[1]]
        names = [part.strip() for part in shape_text.split(",") if part.strip()]
        static = {int(dim): int(size) for size, dim in _STATIC.findall(body)}
        low = {int(dim): int(size) for dim, size in _LOW.findall(body)}
        high = {int(dim): int(size) for dim, size in _HIGH.findall(body)}
        shape = tuple(
            static[dim]
            if dim in static
            else _wrapper_dim(expression, low.get(dim, 0), high.get(dim))
            for dim, expression in enumerate(names)
        )
        strides = [part.strip() for part in stride_text.split(",") if part.strip()]
        device = _DEVICE.search(body)
        specs[int(index)] = TensorSpec(
            name=name[1],
            dtype=_DTYPES[dtype[1]],
            shape=shape,
            device=device[1] if device else "cpu",
            order=_wrapper_order(names, strides),
            strides=_wrapper_strides(names, strides),
        )
    if not specs or sorted(specs) != list(range(len(specs))):
        return None
    return tuple(specs[index] for index in range(len(specs)))


_NUMBER = re.compile(r"^\(?(-?\d+)L?\)?$")
_TERM = re.compile(r"^(?:(\d+)L?\*)?([a-zA-Z_]\w*)$")


def _wrapper_dim(expression: str, low: int, high: int | None) -> DynamicDim:
    symbol, scale, offset = "", 1, 0
    for part in expression.split(" + "):
        number, term = _NUMBER.match(part.strip()), _TERM.match(part.strip())
        if number is not None:
            offset += int(number[1])
        elif term is not None and not symbol:
            symbol, scale = term[2], int(term[1] or 1)
        else:  # an expression of several symbols, which only its bounds can be checked for
            return DynamicDim(symbol=expression, min=low, max=high)
    return DynamicDim(symbol=symbol or expression, min=low, max=high, scale=scale, offset=offset)


_FACTOR = re.compile(r"^(?:(\d+)L?|([a-zA-Z_]\w*))$")
_Product = tuple[int, tuple[str, ...]]  # a number times symbols, in alphabetic order


def _wrapper_order(sizes: list[str], strides: list[str]) -> tuple[int, ...] | None:
    """Return the memory order in which the stated strides make a dense tensor.

    The order is found from the innermost dimension outwards.

    Returns:
        The order; None for strides that are not dense, and where an expression is no plain product.
    """
    order: list[int] = []
    left = list(range(len(sizes)))
    step: _Product | None = (1, ())
    while left:
        # Take the last of several candidates. A size of 1 fits any stride, and then the usual order
        # is preferred.
        fits = [dim for dim in left if sizes[dim] in ("1", "1L") or _product(strides[dim]) == step]
        if step is None or not fits:
            return None
        order.append(fits[-1])
        left.remove(fits[-1])
        size = _product(sizes[fits[-1]])
        step = None if size is None else (step[0] * size[0], tuple(sorted(step[1] + size[1])))
    return tuple(reversed(order))


def _wrapper_strides(sizes: list[str], strides: list[str]) -> tuple[int, ...] | None:
    """Return the stated strides of a tensor that is not dense, where all of them are numbers."""
    numbers = [_NUMBER.match(stride) for stride in strides]
    if _wrapper_order(sizes, strides) is not None or not all(numbers):
        return None
    return tuple(int(number[1]) for number in numbers if number is not None)


_GROUPING = re.compile(r"static_cast<\w+>|[()]")


def _product(expression: str) -> _Product | None:
    """Return the number and the symbols that are multiplied.

    Torch casts the square of a symbol: `16L*(static_cast<int64_t>(s27*s27))`.
    """
    number = 1
    symbols = []
    # Brackets do not change a product. A sum is no factor, with or without its brackets.
    for factor in _GROUPING.sub("", expression).split("*"):
        match = _FACTOR.match(factor.strip())
        if match is None:
            return None
        if match[1]:
            number *= int(match[1])
        else:
            symbols.append(match[2])
    return number, tuple(sorted(symbols))
