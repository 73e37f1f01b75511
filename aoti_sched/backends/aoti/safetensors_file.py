"""The safetensors format: checks the whole header, then reads single tensors."""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import torch

from aoti_sched.backends.aoti.checkpoint import NotReadableError, fill, reason
from aoti_sched.backends.aoti.json_scan import JsonScan
from aoti_sched.backends.aoti.opened_files import OpenFiles, fault, unreadable
from aoti_sched.backends.aoti.weight_offer import ENTRY_LIMIT, HEADER_LIMIT, Offered
from aoti_sched.errors import clipped

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


_Size = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct):
    """One tensor in a safetensors header. Offsets are bytes from the end of the header."""

    dtype: str
    shape: list[_Size]
    data_offsets: tuple[_Size, _Size]


def read_safetensors(path: Path, file: io.BufferedReader, files: OpenFiles) -> Iterator[Offered]:
    """Yield the tensors of a file, after all of its header is checked.

    Args:
        path: The file's path.
        file: The file, at its beginning.
        files: Opens the file again when a tensor is read.

    Raises:
        WeightsFileError: The header is broken, or the file's size does not fit the header.
    """
    for name, like, start in _safetensors_layout(path, file):
        read = functools.partial(_read_tensor, path, files, name, like, start)
        yield Offered(name, like, read, (path, start, name), on_host=True)


def _read_tensor(
    path: Path, files: OpenFiles, name: str, like: torch.Tensor, start: int
) -> torch.Tensor:
    tensor = torch.empty(like.shape, dtype=like.dtype)
    try:
        if tensor.nbytes:
            file = files.open(path)
            file.seek(start)
            fill(file, tensor)
    except NotReadableError as error:
        raise fault(
            path, f"ended within {clipped(repr(name))}: it was cut while being read."
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    return tensor


def _safetensors_layout(path: Path, file: io.BufferedReader) -> list[tuple[str, torch.Tensor, int]]:
    """Check the whole header. Return the name, "meta" tensor and offset of each tensor."""
    total = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if total < 8 + length:
        raise fault(path, f"is truncated: its header wants {length} bytes, {total - 8} are there.")
    if length > HEADER_LIMIT:
        raise fault(
            path,
            f"has a header of {length} bytes, where at most {HEADER_LIMIT} are plausible. Save the "
            "model in shards.",
        )
    try:
        entries = _entries(JsonScan(file.read(length)))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise fault(path, f"has a broken safetensors header: {reason(error)}.") from error
    starts: dict[int, list[tuple[str, _Entry]]] = {}
    for name, entry in entries.items():
        starts.setdefault(entry.data_offsets[0], []).append((name, entry))
    layout = []
    end = 0
    # Go from each tensor to the tensor that begins at its end. To sort many tensors would keep the
    # GIL for long.
    while starts:
        here = starts.pop(end, None) or starts.pop(min(starts))
        for name, entry in sorted(here, key=lambda item: item[1].data_offsets[1]):
            quoted = clipped(repr(name), 100)
            dtype = getattr(torch, _DTYPES.get(entry.dtype, ""), None)
            if dtype is None:
                raise fault(
                    path,
                    f"has a tensor {quoted} of dtype {clipped(entry.dtype, 40)}, which torch "
                    "lacks.",
                )
            start, stop = entry.data_offsets
            wanted = math.prod(entry.shape) * dtype.itemsize
            if start != end or stop - start != wanted:
                raise fault(
                    path,
                    f"has a broken safetensors header: {quoted} ({entry.dtype} "
                    f"{clipped(entry.shape)}, {clipped(wanted, 40)} bytes) has the offsets "
                    f"{start} to {stop}, but {end} bytes come before it.",
                )
            try:
                like = torch.empty(entry.shape, dtype=dtype, device="meta")
            except (RuntimeError, TypeError) as error:
                raise fault(
                    path,
                    f"has a tensor {quoted} of a shape that cannot be made: "
                    f"{clipped(entry.shape)}.",
                ) from error
            end = stop
            layout.append((name, like, 8 + length + start))
    if 8 + length + end != total:
        what = "is truncated" if 8 + length + end > total else "has bytes that belong to no tensor"
        raise fault(path, f"{what}: its header promises {8 + length + end} bytes, it has {total}.")
    return layout


def _entries(scan: JsonScan) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for name in scan.members():
        if name == "__metadata__":
            scan.skip()
        elif name in entries:
            raise ValueError(f"{clipped(repr(name), 100)} comes twice")
        else:
            entries[name] = msgspec.json.decode(scan.value(ENTRY_LIMIT), type=_Entry)
    scan.end()
    return entries
