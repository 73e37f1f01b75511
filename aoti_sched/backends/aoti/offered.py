"""`Offered`: one named tensor of a set of weights, whose bytes may not have been read yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

HEADER_LIMIT = 16 << 20
"""Bytes of a safetensors header or an index of shards.

The format's own bound is 100 MB; an entry has about 100 bytes.
"""
ENTRY_LIMIT = 4096
"""Bytes of what a header says of one tensor."""


class Offered(NamedTuple):
    """One named tensor, whose bytes may not have been read yet.

    Args:
        name: Its name.
        like: A tensor of its dtype, shape and layout: itself, or one on "meta". None for a module's
            extra state.
        read: Gives the tensor; only inside `open_weights`.
        place: Tells its bytes from others': two that are offered with equal places are one tensor.
        on_host: Whether it is read to the host's memory.
    """

    name: str
    like: torch.Tensor | None
    read: Callable[[], torch.Tensor]
    place: object
    on_host: bool = False
