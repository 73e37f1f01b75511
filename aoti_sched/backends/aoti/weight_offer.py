"""`Offered`: one named tensor of a set of weights, whose bytes may not have been read yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

HEADER_LIMIT = 16 << 20
"""The most bytes of a safetensors header or an index of shards.

The format's own bound is 100 MB. An entry has about 100 bytes.
"""
ENTRY_LIMIT = 4096
"""The most bytes of a header's entry for one tensor."""


class Offered(NamedTuple):
    """One named tensor, whose bytes may not have been read yet.

    Args:
        name: The tensor's name.
        like: The tensor itself, or a tensor on "meta" with its dtype, shape and layout. None for a
            module's extra state.
        read: Returns the tensor. Call this only inside `open_weights`.
        place: A key of the tensor's bytes. Two offers with equal keys are the same tensor.
        on_host: Whether `read` returns a tensor in the host's memory.
    """

    name: str
    like: torch.Tensor | None
    read: Callable[[], torch.Tensor]
    place: object
    on_host: bool = False
