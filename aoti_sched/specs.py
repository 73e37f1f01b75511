"""What a model takes and gives: specs of inputs, outputs and constants, and the check of every request.

Native code checks nothing: a wrong dtype reads past a buffer, a wrong size returns garbage. So each
request's tensors are compared with their specs here, on the caller's side, before a handle is made.

Where the specs come from, in this order (`SpecSource`): metadata that `compile_package` wrote into the
package; what the user declared at load; what the packaged wrapper source states; otherwise nothing but
the number of inputs. Specs are msgspec Structs, so they can be stored in a package and cross a wire.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from aoti_sched.errors import InputMismatchError

if TYPE_CHECKING:
    import torch

METADATA_KEY = "aoti_sched"
"""The key under which `compile_package` stores a `ModelSpec` as JSON in the package's metadata."""


class SpecSource(str, enum.Enum):
    """Where a runner's specs come from; said in `runner.info`."""

    PACKAGE = "package"
    DECLARED = "declared"
    WRAPPER = "wrapper source"
    ARITY = "arity only"


class DynamicDim(msgspec.Struct, frozen=True, tag="dynamic"):
    """A dimension whose size may differ between requests: `scale * symbol + offset`.

    Dimensions with the same symbol agree within a request. `min` and `max` bound the size itself
    (`max` None: unbounded).
    """

    symbol: str
    min: int = 0
    max: int | None = None
    scale: int = 1
    offset: int = 0

    def __str__(self) -> str:
        size = self.symbol if self.scale == 1 else f"{self.scale}*{self.symbol}"
        size += f"+{self.offset}" if self.offset else ""
        return f"{size}:{self.min}..{'' if self.max is None else self.max}"


class TensorSpec(msgspec.Struct, frozen=True, tag="tensor"):
    """One tensor input or output.

    `dtype` is torch's name without the prefix ("float32"). `shape` holds a number for a static size.
    `order` lists the dimensions from the outermost to the innermost in memory of a dense tensor:
    (0, 1, 2, 3) is contiguous, (0, 2, 3, 1) is channels-last; None when unknown (nothing is checked).
    """

    name: str
    dtype: str
    shape: tuple[int | DynamicDim, ...]
    device: str = "cpu"
    order: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(dim) for dim in self.shape)}]"


class LiteralSpec(msgspec.Struct, frozen=True, tag="literal"):
    """A leaf that was no tensor when the model was exported; its value is compiled in."""

    name: str
    value: bool | int | float | str | None


class IntegerSpec(msgspec.Struct, frozen=True, tag="integer"):
    """An output computed from dynamic sizes; the runtime returns a 0-dim tensor, the caller gets an int."""

    name: str


LeafSpec = TensorSpec | LiteralSpec | IntegerSpec


class BatchDim(msgspec.Struct, frozen=True):
    """The dimension along which requests may be put together: every input and output carries it."""

    dim: int
    symbol: str
    max: int | None


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that `compile_package` knows of a model; stored as JSON in the package.

    `inputs` and `outputs` are the leaves of the call spec in flattening order. `parameters` names the
    module's positional parameters. `threads` is the number of intra-op threads compiled in. `frozen`
    says that inductor's freezing folded the weights into the code, so they can't be updated live.
    `mutates_buffers` says that instances share state and must run one at a time.
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


class ConstantSpec(msgspec.Struct, frozen=True):
    """One constant of a container: a parameter, a buffer, a tensor constant, or one folded from others.

    `name` is the runtime's internal name, `fqn` the module's own. `bytes` counts the data. `shape` is
    None where the model's C ABI cannot tell it.
    """

    name: str
    fqn: str
    dtype: str
    shape: tuple[int, ...] | None
    bytes: int
    type: str
    folded: bool


def spec_from_metadata(metadata: dict[str, str]) -> ModelSpec | None:
    """The `ModelSpec` in a package's metadata; None where there is none, or one of a newer format."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        spec = msgspec.json.decode(text, type=ModelSpec)
    except msgspec.MsgspecError:
        return None
    return spec if spec.version == 1 else None


# --- what the packaged wrapper source states ---------------------------------------------------------

_CHECK = re.compile(
    r"static void check_input_(\d+)\(\s*AtenTensorHandle\* input_handles\s*\)\s*\{(.*?)\n\}", re.DOTALL
)
_DTYPE = re.compile(r"expected: \" << \w+_expected_dtype << \"\(at::k(\w+)\)")
_STATIC = re.compile(r"if \((\d+) != \w+_size\[(\d+)\]\)")
_LOW = re.compile(r"if \(\w+_size\[(\d+)\] < (\d+)\)")
_HIGH = re.compile(r"if \(\w+_size\[(\d+)\] > (\d+)\)")
_STRIDE = re.compile(r"if \((\d+) != \w+_stride\[(\d+)\]\)")
_NAME = re.compile(r"ConstantHandle (\w+) = ConstantHandle\(input_handles\[\d+\]\)")
_SIZES = re.compile(r"assert_size_stride\((\w+), \{([^}]*)\}, \{([^}]*)\}, \"input\"\)")
_DEVICE = re.compile(r"_expected_device_type << \"\d+\((\w+)")
_DTYPES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Byte": "uint8",
    "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64", "Bool": "bool",
    "UInt16": "uint16", "UInt32": "uint32", "UInt64": "uint64",
    "ComplexHalf": "complex32", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
    "Float8_e5m2": "float8_e5m2", "Float8_e4m3fn": "float8_e4m3fn",
    "Float8_e5m2fnuz": "float8_e5m2fnuz", "Float8_e4m3fnuz": "float8_e4m3fnuz",
}  # fmt: skip


def specs_from_wrapper(source: str) -> tuple[TensorSpec, ...] | None:
    """Input specs as the generated `*.wrapper.cpp` states them in `check_input_N` and `assert_size_stride`.

    A lower bound of 2 is read as 1: it is the exporter's 0/1 specialization, not a need of the code
    (pytorch/pytorch#196131 and #169430 tell of bounds judged wrongly). Returns None when the source
    states nothing that is understood; a partly understood one would check partly and so lull.
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
            static[dim] if dim in static else _wrapper_dim(expression, low.get(dim, 0), high.get(dim))
            for dim, expression in enumerate(names)
        )
        strides = [part.strip() for part in stride_text.split(",") if part.strip()]
        device = _DEVICE.search(body)
        specs[int(index)] = TensorSpec(
            name=name[1],
            dtype=_DTYPES[dtype[1]],
            shape=shape,
            device=device[1] if device else "cpu",
            order=_wrapper_order(strides, shape),
        )
    if not specs or sorted(specs) != list(range(len(specs))):
        return None
    return tuple(specs[index] for index in range(len(specs)))


_LINEAR = re.compile(r"^(?:(\d+)L?\*)?([a-zA-Z_]\w*)(?: ?\+ ?(\d+)L?)?$")


def _wrapper_dim(expression: str, low: int, high: int | None) -> DynamicDim:
    low = 1 if low == 2 else low
    linear = _LINEAR.match(expression)
    if linear is None:  # an expression of several symbols: bounded, but bound to nothing
        return DynamicDim(symbol=expression, min=low, max=high)
    return DynamicDim(
        symbol=linear[2], min=low, max=high, scale=int(linear[1] or 1), offset=int(linear[3] or 0)
    )


def _wrapper_order(strides: list[str], shape: Sequence[int | DynamicDim]) -> tuple[int, ...] | None:
    """Contiguous when the stated strides say so for every static part; otherwise unknown."""
    expected = 1
    for dim in reversed(range(len(shape))):
        size = shape[dim]
        if strides[dim].rstrip("L") != str(expected) and size != 1:
            return None
        if not isinstance(size, int):
            # Left of a dynamic size the strides are expressions. They belong to a dense tensor when
            # each one mentions the symbol; that much is checked, the arithmetic is the compiler's.
            return tuple(range(len(shape))) if all(size.symbol in text for text in strides[:dim]) else None
        expected *= size
    return tuple(range(len(shape)))


# --- the check of a request ---------------------------------------------------------------------------


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor of `shape` whose dimensions lie in memory in `order` (outermost first)."""
    strides = [0] * len(shape)
    step = 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


class InputCheck:
    """Checks a request's tensors against their specs; built once per runner, called once per request."""

    def __init__(self, model: str, specs: Sequence[TensorSpec]) -> None:
        import torch

        self.model = model
        self.specs = tuple(specs)
        self._strided = torch.strided
        self._tensor = torch.Tensor
        self._plain = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
        self._plain_dispatch = torch.Tensor.__torch_dispatch__
        self._symbols = sorted({dim.symbol for s in specs for dim in s.shape if isinstance(dim, DynamicDim)})
        index = {symbol: i for i, symbol in enumerate(self._symbols)}
        # Per input, in the order in which they are compared: dtype, the whole shape if it is static,
        # the static sizes, the dynamic ones, rank, device type, device index, contiguous or the order.
        self._plans = []
        for spec in specs:
            device = torch.device(spec.device)
            static = tuple((i, dim) for i, dim in enumerate(spec.shape) if isinstance(dim, int))
            dynamic = tuple(
                (
                    i,
                    index[dim.symbol],
                    dim.min,
                    dim.max if dim.max is not None else 1 << 62,
                    dim.scale,
                    dim.offset,
                )
                for i, dim in enumerate(spec.shape)
                if isinstance(dim, DynamicDim)
            )
            contiguous = spec.order is not None and spec.order == tuple(range(len(spec.shape)))
            self._plans.append(
                (
                    getattr(torch, spec.dtype),
                    torch.Size(size for _, size in static) if not dynamic else None,
                    static,
                    dynamic,
                    len(spec.shape),
                    device.type,
                    device.index,
                    contiguous,
                    None if contiguous else spec.order,
                )
            )
        self._unbound = [-1] * len(self._symbols)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise `InputMismatchError` for the first tensor that does not fit; return None when all fit."""
        if len(tensors) != len(self._plans):
            raise InputMismatchError(
                self.model, "", f"{len(self._plans)} tensor inputs", f"{len(tensors)}", self._names_hint()
            )
        bound = self._unbound.copy() if self._unbound else None
        plain = self._plain
        for tensor, plan in zip(tensors, self._plans):  # noqa: B905 -- lengths are equal, this is hot
            dtype, fixed, static, dynamic, rank, device, device_index, contiguous, order = plan
            if type(tensor) not in plain:
                break
            shape = tensor.shape
            if fixed is not None:
                if shape != fixed:
                    break
            else:
                if len(shape) != rank:
                    break
                for dim, size in static:
                    if shape[dim] != size:
                        break
                else:
                    for dim, symbol, low, high, scale, offset in dynamic:
                        size = shape[dim]
                        if size < low or size > high:
                            break
                        if scale != 1 or offset:
                            size, rest = divmod(size - offset, scale)
                            if rest:
                                break
                        seen = bound[symbol]  # type: ignore[index]
                        if seen < 0:
                            bound[symbol] = size  # type: ignore[index]
                        elif seen != size:
                            break
                    else:
                        dynamic = ()
                if dynamic:
                    break
            if tensor.dtype is not dtype or tensor.layout is not self._strided:
                break
            if device == "cpu":
                if not tensor.is_cpu:
                    break
            elif tensor.device.type != device or (
                device_index is not None and tensor.device.index != device_index
            ):
                break
            if contiguous:
                if not tensor.is_contiguous():
                    break
            elif order is not None and not _lies_in_order(tensor, order):
                break
            if tensor.is_neg() or tensor.is_conj():
                break
        else:
            return
        self._explain(tensors)

    def _names_hint(self) -> str:
        return "The inputs are " + ", ".join(f"{s.name}: {s}" for s in self.specs) + "."

    def _explain(self, tensors: Sequence[torch.Tensor]) -> None:
        """The slow twin of `__call__`: finds the fault again and says it in a sentence."""
        bound: dict[str, tuple[int, str]] = {}
        for spec, tensor, plan in zip(self.specs, tensors, self._plans, strict=True):
            self._explain_kind(spec, tensor)
            shape = tuple(tensor.shape)
            if len(shape) != len(spec.shape):
                self._fail(spec, f"{len(spec.shape)} dimensions, {spec}", f"{len(shape)}: shape {shape}")
            for dim, (size, wanted) in enumerate(zip(shape, spec.shape, strict=True)):
                self._explain_size(spec, dim, size, wanted, bound)
            if tensor.dtype is not plan[0]:
                self._fail(
                    spec, f"dtype {spec.dtype}", str(tensor.dtype).removeprefix("torch."),
                    f"Convert it with .to(torch.{spec.dtype}).",
                )  # fmt: skip
            if tensor.layout is not self._strided:
                self._fail(spec, "a strided tensor", f"layout {tensor.layout}", "Call .to_dense() first.")
            if tensor.device.type != plan[5] or (plan[6] is not None and tensor.device.index != plan[6]):
                self._fail(
                    spec, f"device {spec.device}", f"{tensor.device}", f"Move it with .to({spec.device!r})."
                )
            if spec.order is not None and not _lies_in_order(tensor, spec.order):
                strides = dense_strides(shape, spec.order)
                hint = (
                    "Pass .contiguous()."
                    if plan[7]
                    else f"Its dimensions must lie in the order {spec.order}."
                )
                self._fail(spec, f"strides {strides}", f"{tensor.stride()}", hint)
            if tensor.is_neg() or tensor.is_conj():
                self._fail(
                    spec,
                    "plain values",
                    "a lazily negated or conjugated view",
                    "Call .resolve_neg().resolve_conj().",
                )

    def _explain_kind(self, spec: TensorSpec, tensor: object) -> None:
        if not isinstance(tensor, self._tensor):
            self._fail(
                spec,
                f"a tensor {spec}",
                f"{type(tensor).__name__} {tensor!r:.60}",
                "Wrap it with torch.tensor(...).",
            )
        if type(tensor) not in self._plain:
            self._fail(
                spec, "a plain torch.Tensor", f"the subclass {type(tensor).__name__}",
                "Unwrap it, for example with .as_subclass(torch.Tensor) or torch.Tensor.detach.",
            )  # fmt: skip

    def _explain_size(
        self,
        spec: TensorSpec,
        dim: int,
        size: int,
        wanted: int | DynamicDim,
        bound: dict[str, tuple[int, str]],
    ) -> None:
        if isinstance(wanted, int):
            if size != wanted:
                self._fail(spec, f"size {wanted} at dimension {dim} of {spec}", f"{size}")
            return
        if size < wanted.min or (wanted.max is not None and size > wanted.max):
            top = "at least" if wanted.max is None else f"{wanted.min} to {wanted.max}"
            expected = f"{top} {wanted.min}" if wanted.max is None else top
            self._fail(
                spec, f"size {expected} at dimension {dim} of {spec}", f"{size}",
                "The range was fixed when the model was compiled; beyond it the code reads past its buffers.",
            )  # fmt: skip
        value, rest = divmod(size - wanted.offset, wanted.scale)
        if rest:
            self._fail(spec, f"a size of the form {wanted} at dimension {dim}", f"{size}")
        seen, where = bound.setdefault(wanted.symbol, (value, f"{spec.name!r} dimension {dim}"))
        if seen != value:
            self._fail(
                spec,
                f"size {wanted.scale * seen + wanted.offset} at dimension {dim}, as {where} has it",
                f"{size}",
            )

    def _fail(self, spec: TensorSpec, expected: str, got: str, hint: str = "") -> None:
        raise InputMismatchError(self.model, spec.name, expected, got, hint)


def _lies_in_order(tensor: torch.Tensor, order: Sequence[int]) -> bool:
    """Whether a tensor is dense with its dimensions in `order`; strides of sizes 0 and 1 don't matter."""
    shape = tensor.shape
    if 0 in shape:
        return True
    wanted = dense_strides(shape, order)
    return all(
        size == 1 or stride == want for size, stride, want in zip(shape, tensor.stride(), wanted, strict=True)
    )
