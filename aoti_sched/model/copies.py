"""Copies of a request's inputs, laid out in memory as the inputs are."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def copied(inputs: Sequence[Any]) -> list[Any]:
    """Return copies of inputs that a check has accepted. Those that are one object stay one.

    A copy has the strides of its tensor, overlapping ones too, since compiled code relies on them.
    """
    torch = sys.modules.get("torch")  # nothing is a tensor before it is imported
    copies: dict[int, Any] = {}
    for one in inputs:
        if id(one) not in copies:
            copies[id(one)] = (
                _copy(one) if torch and isinstance(one, torch.Tensor) else copy.deepcopy(one)
            )
    return [copies[id(one)] for one in inputs]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_contiguous() or not tensor.numel():
        return tensor.clone()
    # A clone of other tensors may be laid out anew.
    extent = sum(
        (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    memory = tensor.as_strided((extent + 1,), (1,)).clone()
    return memory.as_strided(tensor.shape, tensor.stride())
