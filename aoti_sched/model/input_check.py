"""The check of every request, on the caller's side, before a handle is made.

Native code checks nothing: a wrong dtype reads past a buffer, a wrong size returns garbage.
`InputCheck` compares a request's tensors with their specs; it is on the hot path, so the plan is
laid out once and the sentence that explains a fault is found by a slow twin. `ArityCheck` is all
that can be done without specs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from aoti_sched.arguments import checked_struct
from aoti_sched.errors import ConfigError, InputMismatchError, brief
from aoti_sched.model.size_conditions import read_conditions
from aoti_sched.model.specs import DynamicDim, TensorSpec

if TYPE_CHECKING:
    import torch

Check = Callable[[list["torch.Tensor"]], int]
"""The bytes of a request's tensors; raises InputMismatchError where they do not fit.

A subclass of tensors that has no behaviour of its own is replaced in the list by the plain tensor
that it is.
"""


def count_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Return the bytes of the inputs; the check of a model of which nothing is known."""
    total = 0
    for tensor in tensors:
        total += tensor.nbytes
    return total


def unwrap(tensors: list[Any], plain: Collection[type]) -> bool:
    """Replace what is a tensor by another name in the list: subclasses, and arrays.

    Return whether there were any.

    A subclass that overrides `__torch_function__` or `__torch_dispatch__` means something else than
    its storage holds, and stays. A NumPy array, or anything with `__dlpack__`, becomes a tensor
    that shares its memory, or has a copy of memory that must not be written to; where torch can't
    do that, it stays.
    """
    import torch

    found = False
    for index, tensor in enumerate(tensors):
        kind = type(tensor)
        if kind in plain:
            continue
        if not isinstance(tensor, torch.Tensor):
            shared = _sharing(tensor)
            if shared is not None:
                tensors[index] = shared
                found = True
            continue
        function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
        ordinary = function in (
            torch.Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
            torch._C._disabled_torch_function_impl,  # noqa: SLF001 -- what parameters have
        )
        if ordinary and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
            # Otherwise the result is of the subclass again.
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
                tensors[index] = tensor.as_subclass(torch.Tensor)
            found = True
    return found


def _sharing(array: Any) -> Any:
    """Return a tensor that shares the memory of an array; None where torch can't make one."""
    import torch

    try:
        if type(array).__module__ == "numpy" and hasattr(array, "flags"):
            # A model that changes its inputs would write to memory that must not be written to.
            return torch.from_numpy(array if array.flags.writeable else array.copy("K"))
        if hasattr(array, "__dlpack__"):
            return torch.utils.dlpack.from_dlpack(array)
    except Exception:  # noqa: BLE001 -- another library's code; the check names the array's type
        return None
    return None


class ArityCheck:
    """Checks the number of inputs, and that each is a plain dense tensor on the model's device.

    With `copies` it may be on the host, too.
    """

    def __init__(self, model: str, arity: int, device: str, *, copies: bool = False) -> None:
        import torch

        self.model = model
        self.arity = arity
        self._device = torch.device(device)
        self._copies = copies
        self._plain = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
        self._strided = torch.strided

    def __call__(self, tensors: list[torch.Tensor]) -> int:
        if len(tensors) != self.arity:
            raise InputMismatchError(
                self.model, "", f"{self.arity} tensor inputs", f"{len(tensors)}"
            )
        for index, tensor in enumerate(tensors):
            if type(tensor) not in self._plain:
                if unwrap(tensors, self._plain):
                    return self(tensors)
                expected, got = "a plain torch.Tensor", f"the subclass {type(tensor).__name__}"
            elif tensor.layout is not self._strided:
                expected, got = "a strided tensor", f"layout {tensor.layout}"
            elif tensor.is_nested:
                expected, got = "a strided tensor", "a nested tensor"
            elif self._lies_elsewhere(tensor) and not (self._copies and tensor.is_cpu):
                hint = _move_hint(str(self._device), tensor)
                raise InputMismatchError(
                    self.model, f"input {index}", f"device {self._device}", f"{tensor.device}", hint
                )
            elif tensor.is_neg() or tensor.is_conj():
                expected, got = "plain values", "a lazily negated or conjugated view"
            else:
                continue
            raise InputMismatchError(self.model, f"input {index}", expected, got)
        return count_bytes(tensors)

    def _lies_elsewhere(self, tensor: torch.Tensor) -> bool:
        there, wanted = tensor.device, self._device
        return there.type != wanted.type or (
            wanted.index is not None and there.index != wanted.index
        )


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a dense tensor whose dimensions lie in `order`, outermost first."""
    strides = [0] * len(shape)
    step = 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


def lies_in_order(shape: Sequence[int], strides: Sequence[int], order: Sequence[int]) -> bool:
    """Return whether a tensor is dense with its dimensions in `order`.

    Strides of sizes 0 and 1 don't matter.
    """
    if 0 in shape:
        return True
    wanted = dense_strides(shape, order)
    return all(
        size == 1 or stride == want
        for size, stride, want in zip(shape, strides, wanted, strict=True)
    )


def _has_strides(
    tensor: torch.Tensor, wanted: Sequence[tuple[int, int, int]], bound: Sequence[int] | None
) -> bool:
    """Return whether a tensor has these strides.

    Each is an offset, a symbol's index (-1: none) and a scale.

    Those of sizes 0 and 1 don't matter.
    """
    shape = tensor.shape
    if 0 in shape:
        return True
    for size, stride, (offset, symbol, scale) in zip(shape, tensor.stride(), wanted, strict=True):
        want = offset if symbol < 0 else offset + scale * bound[symbol]  # type: ignore[index]
        if size != 1 and stride != want:
            return False
    return True


def _move_hint(device: str, tensor: torch.Tensor) -> str:
    hint = f"Move it with .to({device!r})"
    return f"{hint}, or load the model with copy_inputs=True." if tensor.is_cpu else f"{hint}."


class InputCheck:
    """Checks a request's tensors against their specs; made once per runner, called per request.

    With `copies`, inputs of a device may be on the host, too. `conditions` are those of a
    `ModelSpec`.

    Raises:
        ConfigError: A spec (which a user may have declared) means nothing: no such dtype or device,
            an order that is none of its dimensions.
        LoadError: A condition can't be read, or is on a size that no input has.
    """

    def __init__(
        self,
        model: str,
        specs: Sequence[TensorSpec],
        *,
        copies: bool = False,
        conditions: Sequence[str] = (),
    ) -> None:
        import torch

        self.model = model
        self.specs = tuple(specs)
        self._copies = copies
        self._strided = torch.strided
        self._tensor = torch.Tensor
        self._plain = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
        self._symbols = sorted(
            {dim.symbol for s in specs for dim in s.shape if isinstance(dim, DynamicDim)}
        )
        index = {symbol: i for i, symbol in enumerate(self._symbols)}
        # Per input, in the order in which they are compared: dtype, the whole shape if it is
        # static, the static sizes, the dynamic ones, rank, device type, device index, contiguous or
        # the order, strides.
        self._plans = []
        for spec in specs:
            dtype, device = _understood(model, spec)
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
            strides = None
            if spec.strides is not None:
                strides = tuple(
                    (step, -1, 0)
                    if isinstance(step, int)
                    else (step.offset, index[step.symbol], step.scale)
                    for step in spec.strides
                )
            contiguous = spec.order is not None and spec.order == tuple(range(len(spec.shape)))
            self._plans.append(
                (
                    dtype,
                    torch.Size(size for _, size in static) if not dynamic else None,
                    static,
                    dynamic,
                    len(spec.shape),
                    device.type,
                    device.index,
                    contiguous,
                    None if contiguous else spec.order,
                    strides,
                )
            )
        self._unbound = [-1] * len(self._symbols)
        self._conditions = read_conditions(model, conditions, self._symbols)
        self._bytes: int | None = None
        """Of all, where they are always the same."""
        if not self._symbols:
            sizes = [math.prod(size for _, size in static) for _, _, static, *_ in self._plans]
            self._bytes = sum(
                plan[0].itemsize * size for plan, size in zip(self._plans, sizes, strict=True)
            )

    def __call__(self, tensors: list[torch.Tensor]) -> int:
        """Return the bytes of the tensors; raise `InputMismatchError` for the first fault."""
        if len(tensors) != len(self._plans):
            raise InputMismatchError(
                self.model,
                "",
                f"{len(self._plans)} tensor inputs",
                f"{len(tensors)}",
                self._names_hint(),
            )
        bound = self._unbound.copy() if self._unbound else None
        plain = self._plain
        # Lengths are equal, this is hot.
        for tensor, plan in zip(tensors, self._plans):  # noqa: B905
            (
                dtype,
                fixed,
                static,
                dynamic,
                rank,
                device,
                device_index,
                contiguous,
                order,
                strides,
            ) = plan
            if (
                type(tensor) not in plain or tensor.is_nested
            ):  # a nested one says that it is strided, and has no sizes
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
                            if rest or size < 0:
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
            elif (
                tensor.device.type != device
                or (device_index is not None and tensor.device.index != device_index)
            ) and not (self._copies and tensor.is_cpu):
                break
            if contiguous:
                if not tensor.is_contiguous():
                    break
            elif (order is not None and not lies_in_order(shape, tensor.stride(), order)) or (
                strides is not None and not _has_strides(tensor, strides, bound)
            ):
                break
            if tensor.is_neg() or (dtype.is_complex and tensor.is_conj()):
                break
        else:
            if self._conditions:
                self._must_hold(dict(zip(self._symbols, bound or (), strict=True)))
            return count_bytes(tensors) if self._bytes is None else self._bytes
        if unwrap(tensors, plain):
            return self(tensors)
        self._explain(tensors)
        return count_bytes(tensors)

    def _must_hold(self, sizes: dict[str, int]) -> None:
        for condition in self._conditions:
            if not condition.holds(sizes):
                got = ", ".join(f"{name}={sizes[name]}" for name in sorted(condition.symbols))
                raise InputMismatchError(
                    self.model,
                    "",
                    f"sizes with {condition.text}",
                    got,
                    f"The model was compiled for such sizes only. {self._names_hint()}",
                )

    def _names_hint(self) -> str:
        more = f", and {len(self.specs) - 10} more" if len(self.specs) > 10 else ""
        return "The inputs are " + ", ".join(f"{s.name}: {s}" for s in self.specs[:10]) + f"{more}."

    def _explain(self, tensors: Sequence[torch.Tensor]) -> None:
        """Find the fault of `__call__` again, slowly, and return it as an error."""
        bound: dict[str, tuple[int, str]] = {}
        for spec, tensor, plan in zip(self.specs, tensors, self._plans, strict=True):
            self._explain_kind(spec, tensor)
            shape = tuple(tensor.shape)
            if len(shape) != len(spec.shape):
                self._fail(
                    spec, f"{len(spec.shape)} dimensions, {spec}", f"{len(shape)}: shape {shape}"
                )
            for dim, (size, wanted) in enumerate(zip(shape, spec.shape, strict=True)):
                self._explain_size(spec, dim, size, wanted, bound)
            if tensor.dtype is not plan[0]:
                self._fail(
                    spec, f"dtype {spec.dtype}", str(tensor.dtype).removeprefix("torch."),
                    f"Convert it with .to(torch.{spec.dtype}).",
                )  # fmt: skip
            if tensor.layout is not self._strided:
                self._fail(
                    spec, "a strided tensor", f"layout {tensor.layout}", "Call .to_dense() first."
                )
            elsewhere = tensor.device.type != plan[5] or (
                plan[6] is not None and tensor.device.index != plan[6]
            )
            if elsewhere and not (self._copies and tensor.is_cpu):
                self._fail(
                    spec,
                    f"device {spec.device}",
                    f"{tensor.device}",
                    _move_hint(spec.device, tensor),
                )
            if spec.order is not None and not lies_in_order(shape, tensor.stride(), spec.order):
                strides = dense_strides(shape, spec.order)
                hint = (
                    "Pass .contiguous()."
                    if plan[7]
                    else f"Its dimensions must lie in the order {spec.order}."
                )
                self._fail(spec, f"strides {strides}", f"{tensor.stride()}", hint)
            self._explain_strides(spec, tensor, bound)
            if tensor.is_neg() or tensor.is_conj():
                self._fail(
                    spec,
                    "plain values",
                    "a lazily negated or conjugated view",
                    "Call .resolve_neg().resolve_conj().",
                )

    def _explain_strides(
        self, spec: TensorSpec, tensor: torch.Tensor, bound: dict[str, tuple[int, str]]
    ) -> None:
        if spec.strides is None:
            return
        shape, given = tuple(tensor.shape), tensor.stride()
        wanted = tuple(
            step if isinstance(step, int) else step.scale * bound[step.symbol][0] + step.offset
            for step in spec.strides
        )
        if 0 in shape or all(
            s == 1 or g == w for s, g, w in zip(shape, given, wanted, strict=True)
        ):
            return
        hint = (
            f"The model was compiled for such a view: torch.empty_strided({shape}, "
            f"{wanted}).copy_(tensor)."
        )
        if 0 in wanted:
            single = ", ".join(":1" if step == 0 else ":" for step in wanted)
            hint = f"The model was compiled for an expanded view: tensor[{single}].expand({shape})."
        self._fail(spec, f"strides {wanted}", f"{given}", hint)

    def _explain_kind(self, spec: TensorSpec, tensor: Any) -> None:
        if not isinstance(tensor, self._tensor):
            self._fail(
                spec,
                f"a tensor {spec}",
                f"{type(tensor).__name__} {brief(tensor)}",
                "Wrap it with torch.tensor(...).",
            )
        if type(tensor) not in self._plain:
            self._fail(
                spec, "a plain torch.Tensor", f"the subclass {type(tensor).__name__}",
                "It overrides what torch does with it; pass the plain tensor that it stands for.",
            )  # fmt: skip
        if tensor.is_nested:
            self._fail(
                spec, f"a tensor {spec}", "a nested tensor", "Pad it with .to_padded_tensor(...)."
            )

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
            why = (
                "The range was fixed when the model was compiled; beyond it the code reads past "
                "its buffers."
            )
            if wanted.reason and size < wanted.min:
                why = f"{wanted.reason[0].upper()}{wanted.reason[1:].rstrip('.')}."
            self._fail(spec, f"size {expected} at dimension {dim} of {spec}", f"{size}", why)
        value, rest = divmod(size - wanted.offset, wanted.scale)
        if rest or value < 0:
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


def declared(what: str, inputs: object) -> tuple[TensorSpec, ...]:
    """Return the specs that a user declares, each field checked by its type.

    Raises:
        ConfigError: They are no specs, or no tensor could be like one.
    """
    if not isinstance(inputs, (list, tuple)):
        raise ConfigError(f"{what}: expected a list of TensorSpec, got {brief(inputs)}.")
    specs = []
    for index, spec in enumerate(inputs):
        if not isinstance(spec, TensorSpec):
            raise ConfigError(f"{what}[{index}]: expected a TensorSpec, got {brief(spec)}.")
        # The same, as plain values.
        spec = checked_struct(spec, f"{what}[{index}].")  # noqa: PLW2901
        for dim in spec.shape:
            least, most = (dim, dim) if isinstance(dim, int) else (dim.min, dim.max)
            if least < 0 or (most is not None and not least <= most < 1 << 62):
                raise ConfigError(
                    f"{what}[{index}].shape: expected sizes of at least 0, got {dim}."
                )
        specs.append(spec)
    return tuple(specs)


def _understood(model: str, spec: TensorSpec) -> tuple[torch.dtype, torch.device]:
    import torch

    what = f"model {model!r}, input {spec.name!r}"
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(
            f"{what}: {spec.dtype!r} is no dtype. Use torch's names, such as 'float32'."
        )
    if spec.order is not None and sorted(spec.order) != list(range(len(spec.shape))):
        raise ConfigError(
            f"{what}: the order {spec.order} is not one of {len(spec.shape)} dimensions. "
            f"Name each of 0 to {len(spec.shape) - 1} once."
        )
    if spec.strides is not None:
        own = {dim.symbol for dim in spec.shape if isinstance(dim, DynamicDim)}
        if len(spec.strides) != len(spec.shape):
            raise ConfigError(
                f"{what}: expected a stride for each of {len(spec.shape)} dimensions, "
                f"got {len(spec.strides)}."
            )
        if any(isinstance(step, DynamicDim) and step.symbol not in own for step in spec.strides):
            raise ConfigError(
                f"{what}: a dynamic stride has a symbol that no size of this input has. "
                "Use the symbol of one of its dimensions."
            )
    if any(isinstance(dim, DynamicDim) and dim.scale < 1 for dim in spec.shape):
        raise ConfigError(f"{what}: expected that a dynamic dimension's scale is at least 1.")
    try:
        return dtype, torch.device(spec.device)
    except RuntimeError as error:
        raise ConfigError(
            f"{what}: {spec.device!r} is no device. Use a name such as 'cpu' or 'cuda:0'."
        ) from error
