"""LoadSettings: the settings of `Scheduler.load` as a type, for functions that pass them on."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Union

from aoti_sched.config import Admission, Batching, Limits, OnFailure, Overflow, PlacementName

if TYPE_CHECKING:
    from aoti_sched.model.specs import TensorSpec

Package = Union[
    str,
    "os.PathLike[str]",
    "os.PathLike[bytes]",
    bytes,
    bytearray,
    memoryview,
    io.BytesIO,
]
"""A package: a path, or its content."""


class LoadSettings(TypedDict, total=False):
    """The settings of `Scheduler.load`, which describes them, except `signature`."""

    name: str | None
    model_name: str | None
    device: str
    devices: Sequence[str] | str | None
    instances: int
    threads: int | None
    share: float
    overflow: Overflow
    admission: Admission
    on_failure: OnFailure
    limits: Limits | None
    timeout: float | None
    placement: PlacementName
    inline_limit: float
    batching: Batching | bool | None
    warmup: bool
    copy_inputs: bool
    copy_outputs: Literal["cpu"] | None
    cuda_graphs: bool
    stream_priority: int
    sha256: str | None
    weights: str | os.PathLike[str] | Mapping[str, Any] | None
    weights_strict: bool
    inputs: Sequence[TensorSpec] | None
    warmup_inputs: object
