"""Pinned memory: how much a slot needs for the largest tensors of its model."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

import torch

from aoti_sched.model.specs import DynamicDim, TensorSpec

MOST_BYTES = 16 << 20
"""The most bytes of pinned memory that a slot gets at load, for inputs and for outputs.

Pinned memory can't be swapped out. What exceeds this is made when a run needs it.
"""

ALIGNMENT = 64
"""Bytes: copies begin at multiples of this (`kAlignment` in `native/stream.cpp`)."""


def pinned_bytes(specs: Iterable[TensorSpec]) -> int:
    """Return the bytes of pinned memory that tensors of the largest sizes take together.

    0 where a size has no bound.
    """
    total = 0
    for spec in specs:
        elements = _span(spec)
        if elements is None:
            return 0
        size = elements * getattr(torch, spec.dtype).itemsize
        total += -(-size // ALIGNMENT) * ALIGNMENT
    return min(total, MOST_BYTES)


def _span(spec: TensorSpec) -> int | None:
    """Return the elements from the first to the last of the largest tensor, and all between."""
    dense, last = 1, 0
    for dim, stride in zip_longest(spec.shape, spec.strides or ()):
        size = _most(dim)
        step = 0 if stride is None else _most(stride)
        if size is None or step is None:
            return None
        dense *= size
        last += max(0, size - 1) * step
    return dense if spec.strides is None or dense == 0 else last + 1


def _most(size: int | DynamicDim) -> int | None:
    return size.max if isinstance(size, DynamicDim) else size
