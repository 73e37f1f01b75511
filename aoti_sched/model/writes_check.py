"""Writes check: inputs that the model writes to must have memory of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoti_sched.errors import InputMismatchError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import torch

    from aoti_sched.model.input_check import Check


class WritesCheck:
    """Checks, after another check, that inputs which the model writes to have their own memory.

    What the model reads of an input that shares it would depend on the order of its kernels.

    Args:
        check: The other check.
        model: The model's name in errors.
        names: The names of the inputs.
        written: Which of them the model writes to.
    """

    def __init__(
        self, check: Check, model: str, names: Sequence[str], written: Collection[str]
    ) -> None:
        self._check = check
        self._model = model
        self._names = names
        self._written = [index for index, name in enumerate(names) if name in written]

    def __call__(self, tensors: list[torch.Tensor]) -> int:
        """Return the bytes of the tensors; raise `InputMismatchError` for the first fault."""
        total = self._check(tensors)
        places = [_place(tensor) for tensor in tensors]
        for index in self._written:
            begin, end = places[index]
            for other, (first, last) in enumerate(places):
                if other != index and first < end and begin < last:
                    raise InputMismatchError(
                        self._model,
                        self._names[index],
                        "memory of its own, because the model writes to it",
                        f"memory that input {self._names[other]!r} shares",
                        "Pass one of them as .clone().",
                    )
        return total


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and of the byte after its last one."""
    begin = tensor.data_ptr()
    if not tensor.numel():
        return begin, begin
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()
