"""Weight check: whether a set of weights fits a container's constants, before any of it is written.

The runtime copies all bytes of a tensor's storage and checks nothing. A wrong dtype or shape
corrupts the heap. Strides that differ from the compiled ones are ignored, so elements are mixed up.
So each tensor is checked here and laid out as compiled before it goes to C.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from aoti_sched.backends.aoti.constants import Constant, Names, required
from aoti_sched.backends.aoti.weight_offer import Offered
from aoti_sched.errors import (
    ConstantMismatchError,
    LoadError,
    MissingWeightsError,
    clipped,
    shortened,
)
from aoti_sched.model.weight_names import DIGEST_LIMIT, digest_of

SURPLUS_LIMIT = 200_000
"""The most unused names that are read from one source.

The largest known checkpoints have 100,000 names in all.
"""


def select(
    model: str, constants: Sequence[Constant], tensors: Mapping[str, torch.Tensor], *, full: bool
) -> list[tuple[Constant, torch.Tensor]]:
    """Pair constants with the tensors given for them, by FQN or by the runtime's name.

    Raises:
        LoadError: A name is unknown, or belongs to a constant that is folded from others.
        MissingWeightsError: `full` is set and a parameter or buffer is missing.
    """
    by_name = {constant.spec.name: constant for constant in constants}
    by_name.update({constant.spec.fqn: constant for constant in constants})
    unknown = [name for name in tensors if name not in by_name]
    if unknown:
        raise LoadError(
            f"{model}: it has no constant {clipped(repr(unknown[0]))}. It has: "
            f"{shortened(repr(c.spec.fqn) for c in constants)}. Constants of at most 8 elements "
            "may have been compiled into the code."
        )
    pairs = [(by_name[name], tensor) for name, tensor in tensors.items()]
    for constant, _ in pairs:
        if constant.spec.folded:
            raise LoadError(
                f"{model}: {constant.spec.fqn!r} is computed from other constants; set those "
                "instead"
            )
    given = {constant.spec.name for constant, _ in pairs}
    missing = [c.spec.fqn for c in constants if c.spec.name not in given and required(c.spec)]
    if full and missing:
        raise MissingWeightsError(
            f"{model}: an update needs every parameter and buffer, and lacks "
            f"{shortened(map(repr, missing))}. A partial set, once swapped in, ends the process."
        )
    return pairs


class Chosen:
    """The offered tensors that go into a model's constants, by FQN. Their names and sizes fit.

    Attributes:
        ignored: The offered names for which the model has no use.
    """

    def __init__(
        self,
        model: str,
        offered: Mapping[str, Sequence[Offered]],
        compiled_in: Sequence[tuple[Offered, str]],
        ignored: tuple[str, ...],
    ) -> None:
        self._model = model
        self._offered = offered
        self._compiled_in = compiled_in
        self.ignored = ignored
        self._tensors: dict[str, list[tuple[str, torch.Tensor]]] = {}

    def read(self) -> None:
        """Read the bytes that lie in files, and copy tensors of users' own classes to plain ones.

        Each tensor that was offered for a constant is kept once, under the constant's FQN.

        Raises:
            WeightsFileError: The file can't be read.
            ConstantMismatchError: A value differs from the one that is part of the code.
        """
        faults = []
        for offered, digest in self._compiled_in:
            if not digest or digest_of(offered.read()) != digest:
                faults.append(
                    (
                        offered.name,
                        "is part of the compiled code, and this is another value. Compile again",
                    )
                )
        if faults:
            raise ConstantMismatchError(self._model, tuple(faults))
        for fqn, each in self._offered.items():
            places = {one.place: one for one in reversed(each)}
            self._tensors[fqn] = [
                (one.name, as_plain(one.read())) for one in reversed(places.values())
            ]

    def values(self, *, check_finite: bool) -> dict[str, torch.Tensor]:
        """Return the tensors that were read, by FQN.

        Args:
            check_finite: Refuse NaN and infinities.

        Raises:
            ConstantMismatchError: Tied names have different values, or `check_finite` found faults.
        """
        faults: list[tuple[str, str]] = []
        for fqn, ((first, tensor), *others) in self._tensors.items():
            if check_finite and not _is_finite(tensor):
                faults.append((fqn, "has values that are not finite"))
            for name, other in others:
                if not _is_same(tensor, other):
                    faults.append(
                        (
                            name,
                            (
                                f"is the same tensor as {clipped(repr(first), 100)}, and has other "
                                "values"
                            ),
                        )
                    )
        if faults:
            raise ConstantMismatchError(self._model, tuple(dict.fromkeys(faults)))
        return {fqn: tensor for fqn, ((_, tensor), *_) in self._tensors.items()}


def choose(
    model: str,
    constants: Sequence[Constant],
    names: Names,
    offers: Iterable[Offered],
    *,
    device_type: str,
    partial: bool,
    strict: bool,
    active: bool = True,
) -> Chosen:
    """Compare names, dtypes and shapes with a model's constants, before a byte of a file is read.

    Args:
        model: The model's name in errors.
        constants: All constants of the model.
        names: Maps names to constants.
        offers: The given tensors.
        device_type: The kind of device on which the model runs.
        partial: Whether constants may be left out.
        strict: Whether a name that neither the model nor its module has is a fault.
        active: Whether the model has values already. If so, the set may lack constants that were
            made by the compiler, and buffers that no state dict has.

    Raises:
        ConstantMismatchError: The set does not fit. The error lists every fault of the set.
    """
    fit: dict[str, list[Offered]] = {}
    compiled_in: list[tuple[Offered, str]] = []
    ignored: list[str] = []
    seen: set[str] = set()
    faults: list[tuple[str, str]] = []
    for offered in offers:
        name, like = offered.name, offered.like
        targets = names.constants(name)
        if targets and name in seen:
            faults.append((name, "is given twice"))
        elif targets:
            seen.add(name)
            faults += _place(targets, offered, fit, device_type)
        elif like is None or names.is_unused(name):
            ignored.append(name)
        elif (digest := names.digest(name)) is not None:
            if not digest or like.layout != torch.strided or like.nbytes > DIGEST_LIMIT:
                faults.append((name, "is part of the compiled code, where no update reaches it"))
            else:
                compiled_in.append((offered, digest))
        elif strict:
            faults.append((name, _UNKNOWN[names.recorded]))
        else:
            ignored.append(name)
        if len(faults) + len(ignored) + len(compiled_in) > SURPLUS_LIMIT:
            faults.append(
                (
                    name,
                    (
                        f"is one of more than {SURPLUS_LIMIT} names that fit nothing; no more were "
                        "read"
                    ),
                )
            )
            raise ConstantMismatchError(model, tuple(faults))
    if not (partial and active):
        for constant in constants:
            spec = constant.spec
            own = not required(spec) or names.keeps(spec.fqn)
            if spec.fqn not in fit and not spec.folded and not (active and own):
                hint = active and not names.recorded and spec.type == "buffer"
                faults.append((spec.fqn, "is missing" + (_OF_BUFFERS if hint else "")))
    if faults:
        raise ConstantMismatchError(model, tuple(dict.fromkeys(faults)))
    return Chosen(model, fit, compiled_in, tuple(ignored))


_UNKNOWN = {
    True: "is no constant of it, and no name of the module that was compiled",
    False: (
        "is no constant of it, or was small enough to be compiled into the code; strict=False "
        "(weights_strict at load) ignores such names"
    ),
}
_OF_BUFFERS = " (a buffer that state_dict() leaves out keeps its value with partial=True)"


def _place(
    targets: Sequence[Constant], offered: Offered, fit: dict[str, list[Offered]], device_type: str
) -> list[tuple[str, str]]:
    """Assign an offer to its constants, and return a text for each misfit."""
    faults = []
    for constant in targets:
        fqn = constant.spec.fqn
        if constant.spec.folded:
            wrong = "is computed from other constants; give those"
        elif offered.like is None:
            wrong = "is no tensor"
        else:
            wrong = problem(constant, offered.like, "meta" if offered.on_host else device_type)
        fit.setdefault(fqn, []).append(offered)  # a tensor that does not fit is not also missing
        if wrong:
            faults.append((offered.name if constant.spec.folded else fqn, wrong))
    return faults


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of one dtype and shape have the same values; NaN equals NaN."""
    one, other = one.detach(), other.detach()
    if one.device != other.device:
        one, other = one.cpu(), other.cpu()
    if one.is_floating_point() or one.is_complex():
        if one.element_size() == 1:  # float8 has no comparison
            one, other = one.float(), other.float()
        return bool(((one == other) | ((one != one) & (other != other))).all())  # noqa: PLR0124
    return torch.equal(one, other)


def as_plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a host tensor of a user's own class as a plain copy; other tensors unchanged.

    The class's code runs here, where the reading of a source can be abandoned, and not in later
    steps.
    """
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or not tensor.is_cpu:
        return tensor
    plain = torch.empty(tensor.shape, dtype=tensor.dtype)
    with torch.no_grad():
        plain.copy_(tensor)
    return plain


def _is_finite(tensor: torch.Tensor) -> bool:
    values = tensor.detach()
    if not (values.is_floating_point() or values.is_complex()):
        return True
    if values.element_size() == 1:  # float8 has no test of its own
        values = values.float()
    return bool(values.isfinite().all())


def check(model: str, constant: Constant, tensor: torch.Tensor, device_type: str) -> None:
    """Raise LoadError unless the tensor can be the value of the constant."""
    wrong = problem(constant, tensor, device_type)
    if wrong:
        raise LoadError(f"{model}: constant {constant.spec.fqn!r} {wrong}")


def problem(constant: Constant, tensor: torch.Tensor, device_type: str) -> str:
    """Return why the tensor can't be the constant's value; "" when it can.

    A CPU tensor fits on every device.
    """
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


def with_layout(model: str, constant: Constant, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in the compiled strides, alone in its storage; a copy where it is not.

    Raises:
        LoadError: The tensor has more bytes than the runtime reserves for the constant.
    """
    tensor = tensor.detach().resolve_conj().resolve_neg()
    stride = tensor.stride() if constant.stride is None else constant.stride
    own_bytes = tensor.numel() * tensor.element_size()
    if tensor.stride() != stride or tensor.untyped_storage().nbytes() != own_bytes:
        if constant.stride is None:
            tensor = tensor.clone()  # keeps the strides of a dense tensor
        else:
            copy = torch.empty_strided(
                tensor.shape, stride, dtype=tensor.dtype, device=tensor.device
            )
            tensor = copy.copy_(tensor)
    if tensor.untyped_storage().nbytes() > constant.capacity:
        raise LoadError(
            f"{model}: constant {constant.spec.fqn!r} wants at most {constant.capacity} bytes, "
            f"got {tensor.untyped_storage().nbytes()}"
        )
    return tensor
