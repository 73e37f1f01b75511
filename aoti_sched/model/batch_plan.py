"""The plan of a batch: how inputs are put together, and outputs taken apart again."""

from __future__ import annotations

import msgspec


class InputPlan(msgspec.Struct, frozen=True):
    """How one input of several requests becomes one: rows one after the other along `dim`.

    `order` is the memory order of the dense tensor, as in `TensorSpec`. The dimensions in `ragged`
    may differ between requests; they are as long as the longest, and what that leaves of the
    shorter ones is `pad`.
    """

    dim: int
    order: tuple[int, ...]
    ragged: tuple[int, ...] = ()
    pad: float | bool = 0


class RaggedOut(msgspec.Struct, frozen=True):
    """An output's dimension `dim` is cut back to the size of a request's `input_dim`."""

    dim: int
    input: int
    input_dim: int


class OutputPlan(msgspec.Struct, frozen=True):
    """How one output becomes each request's own: its rows along `dim`."""

    dim: int
    ragged: tuple[RaggedOut, ...] = ()


class BatchPlan(msgspec.Struct, frozen=True):
    """How a model's requests are batched.

    `detach_rows` gives each request copies and not views of a common output.
    """

    inputs: tuple[InputPlan, ...]
    outputs: tuple[OutputPlan, ...]
    detach_rows: bool = False
