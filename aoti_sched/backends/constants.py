"""What a container's constants are, and whether tensors may take their place.

The runtime copies as many bytes as the caller's tensor has storage, with the caller's strides, and checks
nothing: a wrong dtype or shape smashes the heap, and other strides than the compiled ones are read as if they
were those. So each tensor is checked here, and laid out as the compiled code expects it, before C sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from aoti_sched.errors import ConstantMismatchError, LoadError, MissingWeightsError
from aoti_sched.specs import ConstantSpec

TYPES = ("unknown", "parameter", "buffer", "constant", "folded")
"""`torch::aot_inductor::ConstantType`, in its order. A "constant" is a tensor that tracing made or found."""


class Constant(NamedTuple):
    """One constant of a container.

    `capacity` is what the runtime reserves for it, in bytes: on a CPU the data rounded up to 64. `stride` is
    the one compiled in; None, like the shape, while the container has no weights.
    """

    spec: ConstantSpec
    capacity: int
    stride: tuple[int, ...] | None

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.spec.dtype)
        return dtype


def select(
    model: str, constants: Sequence[Constant], tensors: Mapping[str, torch.Tensor], *, full: bool
) -> list[tuple[Constant, torch.Tensor]]:
    """Pair constants with the tensors given for them, by the module's own names (FQNs) or the runtime's.

    Raises:
        LoadError: a name is unknown, or belongs to a constant that is folded from others.
        MissingWeightsError: `full` is asked for and a parameter or buffer is left out.
    """
    by_name = {constant.spec.name: constant for constant in constants}
    by_name.update({constant.spec.fqn: constant for constant in constants})
    unknown = [name for name in tensors if name not in by_name]
    if unknown:
        raise LoadError(
            f"{model} has no constant {unknown[0]!r}. It has: {_listed(c.spec.fqn for c in constants)}. "
            "Constants of at most 8 elements may have been compiled into the code."
        )
    pairs = [(by_name[name], tensor) for name, tensor in tensors.items()]
    for constant, _ in pairs:
        if constant.spec.folded:
            raise LoadError(
                f"{model}: {constant.spec.fqn!r} is computed from other constants; set those instead"
            )
    given = {constant.spec.name for constant, _ in pairs}
    missing = [c.spec.fqn for c in constants if c.spec.name not in given and required(c.spec)]
    if full and missing:
        raise MissingWeightsError(
            f"{model}: an update needs every parameter and buffer, and lacks {_listed(missing)}. A partial set, "
            "once swapped in, ends the process."
        )
    return pairs


def required(spec: ConstantSpec) -> bool:
    """Whether a full set must have it: a module's parameters and buffers, and not what the compiler made."""
    return spec.type not in ("folded", "constant")


def fitting(
    model: str,
    constants: Sequence[Constant],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    device_type: str,
    partial: bool,
    check_finite: bool,
) -> dict[str, torch.Tensor]:
    """New values by FQN, checked as a whole set, or as a part of one.

    Raises:
        ConstantMismatchError: with everything that is wrong with the set, and not just the first.
    """
    by_name = {constant.spec.name: constant for constant in constants}
    by_name.update({constant.spec.fqn: constant for constant in constants})
    fit: dict[str, torch.Tensor] = {}
    faults: list[tuple[str, str]] = []
    for name, tensor in tensors:
        constant = by_name.get(name)
        if constant is None:
            faults.append((name, "is no constant of it, or was small enough to be compiled into the code"))
        elif constant.spec.folded:
            faults.append((name, "is computed from other constants; give those"))
        elif constant.spec.fqn in fit:
            faults.append((name, "is given twice"))
        else:
            fit[constant.spec.fqn] = tensor
            wrong = problem(constant, tensor, device_type)
            if not wrong and check_finite and not _is_finite(tensor):
                wrong = "has values that are not finite"
            if wrong:
                faults.append((constant.spec.fqn, wrong))
    if not partial:
        missing = [c.spec.fqn for c in constants if required(c.spec) and c.spec.fqn not in fit]
        faults += [(fqn, "is missing") for fqn in missing]
    if faults:
        raise ConstantMismatchError(model, tuple(faults))
    return fit


def _is_finite(tensor: torch.Tensor) -> bool:
    values = tensor.detach()
    return not (values.is_floating_point() or values.is_complex()) or bool(values.isfinite().all())


def check(model: str, constant: Constant, tensor: torch.Tensor, device_type: str) -> None:
    """Raise LoadError unless the tensor can be this constant."""
    wrong = problem(constant, tensor, device_type)
    if wrong:
        raise LoadError(f"{model}: constant {constant.spec.fqn!r} {wrong}")


def problem(constant: Constant, tensor: torch.Tensor, device_type: str) -> str:
    """Why the tensor can't be this constant; "" when it can. A CPU tensor may be one on any device."""
    spec = constant.spec
    problem = ""
    if tensor.layout != torch.strided or tensor.is_quantized:
        problem = f"wants a dense tensor, got {tensor.layout}"
    elif tensor.device.type not in (device_type, "cpu"):
        problem = f"wants a tensor on {device_type}, got one on {tensor.device}"
    elif tensor.dtype != constant.dtype:
        problem = f"wants {spec.dtype}, got {str(tensor.dtype).removeprefix('torch.')}"
    elif spec.shape is not None and tuple(tensor.shape) != spec.shape:
        problem = f"wants shape {spec.shape}, got {tuple(tensor.shape)}"
    return problem


def laid_out(model: str, constant: Constant, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the compiled strides, at offset 0 of a storage that holds nothing else: itself, or a copy.

    Raises LoadError when that is more than the runtime has room for.
    """
    tensor = tensor.detach().resolve_conj().resolve_neg()
    stride = tensor.stride() if constant.stride is None else constant.stride
    own_bytes = tensor.numel() * tensor.element_size()
    if tensor.stride() != stride or tensor.untyped_storage().nbytes() != own_bytes:
        if constant.stride is None:
            tensor = tensor.clone()  # keeps the strides of a dense tensor
        else:
            copy = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
            tensor = copy.copy_(tensor)
    if tensor.untyped_storage().nbytes() > constant.capacity:
        raise LoadError(
            f"{model}: constant {constant.spec.fqn!r} wants at most {constant.capacity} bytes, "
            f"got {tensor.untyped_storage().nbytes()}"
        )
    return tensor


def _listed(names: object) -> str:
    listed = [repr(name) for name in names]  # type: ignore[attr-defined]
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return ", ".join(listed[:8]) + more
