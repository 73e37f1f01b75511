"""Constants: a container's constants, and the names by which a set of weights gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from aoti_sched.model.specs import ConstantSpec, WeightName

TYPES = ("unknown", "parameter", "buffer", "constant", "folded")
"""`torch::aot_inductor::ConstantType`, in its order.

A "constant" is a tensor that tracing made or found.
"""


class Constant(NamedTuple):
    """One constant of a container.

    Attributes:
        spec: The constant's description.
        capacity: Bytes that the runtime reserves: on a CPU the data, rounded up to 64.
        stride: The compiled strides; None, like the shape, while the container has no weights.
    """

    spec: ConstantSpec
    capacity: int
    stride: tuple[int, ...] | None

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.spec.dtype)
        return dtype


def required(spec: ConstantSpec) -> bool:
    """Return whether a full set must have the constant: a parameter or a buffer of the module."""
    return spec.type not in ("folded", "constant")


class Names:
    """Maps the names of a module's state to the constants of its compiled model.

    Args:
        constants: The model's constants.
        weights: The names as the package records them; () for packages that record none, such as
            torch's own.
    """

    def __init__(self, constants: Sequence[Constant], weights: Sequence[WeightName]) -> None:
        self.recorded = bool(weights)
        self._constants: dict[str, list[Constant]] = {}
        for constant in constants:
            for name in {constant.spec.name, constant.spec.fqn}:
                self._constants.setdefault(name, []).append(constant)
        by_fqn: dict[str, list[Constant]] = {}
        for constant in constants:
            by_fqn.setdefault(constant.spec.fqn, []).append(constant)
        groups: dict[str, list[WeightName]] = {}
        for weight in weights:
            groups.setdefault(weight.same_as or weight.name, []).append(weight)
        self._unused: set[str] = set()
        self._digests: dict[str, str] = {}
        self._kept: set[str] = set()
        for group in groups.values():
            tied = [constant for weight in group for constant in by_fqn.get(weight.name, ())]
            for weight in group:
                if tied:
                    self._constants[weight.name] = tied
                elif weight.used:
                    self._digests[weight.name] = weight.digest
                else:
                    self._unused.add(weight.name)
            if not any(weight.persistent for weight in group):
                self._kept.update(constant.spec.fqn for constant in tied)

    def constants(self, name: str) -> Sequence[Constant]:
        """Return the constants that a name stands for; () for none."""
        return self._constants.get(name, ())

    def is_unused(self, name: str) -> bool:
        """Return whether the module has the name but the compiled model does not use its value."""
        return name in self._unused

    def digest(self, name: str) -> str | None:
        """Return the digest of a value that is part of the compiled code; None for other names.

        The digest is "" for a value that has none.
        """
        return self._digests.get(name)

    def keeps(self, fqn: str) -> bool:
        """Return whether a set may lack the constant, since `state_dict()` has it under no name."""
        return fqn in self._kept
