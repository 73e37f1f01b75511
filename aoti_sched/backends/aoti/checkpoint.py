"""Checkpoint: reads a torch.save file, first the tensors without bytes, later the wanted bytes.

`torch.load` reads all storages before it returns a name. Here torch's own restricted unpickler
(`weights_only`) makes the tensors without memory (device "meta"), and the place of each storage in
the file is recorded. A tensor's bytes are read from the file when they are asked for. Nothing is
mapped, and no code of the file runs. Two formats are read: the zip that torch writes since 1.6
(`torch.serialization._load`), and the pickles before that (`_legacy_load`).

The work before a refusal is bounded. The limits below bound the pickle, the zip's directory, and
the growth of a deflated member.
"""

from __future__ import annotations

import ctypes
import io
import math
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple

import torch
from torch import _weights_only_unpickler

from aoti_sched.errors import clipped

_unpickling: Any = _weights_only_unpickler
_storages: Any = torch.storage

PICKLE_LIMIT = 16 << 20
"""The most bytes of the pickle that names the tensors; 50,000 tensors take about 8 MB.

A byte of the pickle may take 64 bytes of memory.
"""
DEFLATED_PICKLE_LIMIT = 2 << 20
DIRECTORY_LIMIT = 16 << 20
"""The most bytes of a zip's directory, which has about 100 bytes for each storage."""
GROWTH_LIMIT = 100
"""The most times by which a deflated storage may grow. Torch itself does not compress storages."""
_SLACK = 1 << 20
_BLOCK = 1 << 20


class NotReadableError(Exception):
    """The checkpoint is damaged, implausible or foreign. The text continues a file's name."""


class Record(NamedTuple):
    """The place of one storage in a file.

    Attributes:
        offset: Where the storage begins, in bytes.
        size: The bytes of the storage.
        member: The deflated member of a zip that holds the storage; None for one stored as it is.
    """

    offset: int
    size: int
    member: zipfile.ZipInfo | None = None


class Checkpoint:
    """The objects of a checkpoint, its tensors without memory."""

    def __init__(self, file: io.BufferedReader) -> None:
        """Read the pickle.

        Raises:
            NotReadableError: The file is no checkpoint, or exceeds a limit.
            pickle.UnpicklingError: The pickle would run code.
            Exception: The file is damaged; the unpickler raises nearly any error.
        """
        self._keys: dict[int, object] = {}  # of storages, by the address of their C++ side
        self._storages: dict[object, Any] = {}
        self._records: Mapping[object, Record]
        if file.peek(4)[:4] == b"PK\3\4":
            self.content, self._records = self._read_zip(file)
        else:
            self.content, self._records = self._read_legacy(file)

    def place(self, tensor: torch.Tensor) -> object:
        """Return a key of a tensor's bytes in this file, equal for tensors with the same bytes."""
        # Torch has no public identity of a storage.
        key = self._keys[tensor.untyped_storage()._cdata]  # noqa: SLF001
        return key, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride()

    def read(self, file: io.BufferedReader, like: torch.Tensor) -> torch.Tensor:
        """Read the bytes of one of the checkpoint's tensors.

        Raises:
            NotReadableError: The file lacks the bytes.
        """
        key = self._keys.get(like.untyped_storage()._cdata)  # noqa: SLF001
        record = self._records.get(key)
        if record is None:
            raise NotReadableError("lacks the data of a tensor")
        start = int(like.storage_offset()) * like.element_size()
        if start + _span(like.shape, like.stride()) * like.element_size() > record.size:
            raise NotReadableError("has a tensor that reaches beyond its data")
        tensor = torch.empty_strided(like.shape, _dense_strides(like), dtype=like.dtype)
        if tensor.numel():
            read = (
                _Inflated(file, record.member).read
                if record.member
                else _stored(file, record.offset)
            )
            _fill(tensor, like.stride(), start, read)
        if like.is_conj():
            tensor = tensor.conj()
        return torch._neg_view(tensor) if like.is_neg() else tensor  # noqa: SLF001

    # --- the zip ----------------------------------------------------------------------------------

    def _read_zip(self, file: io.BufferedReader) -> tuple[Any, Mapping[object, Record]]:
        with zipfile.ZipFile(_Bounded(file, DIRECTORY_LIMIT)) as archive:
            members = {info.filename: info for info in archive.infolist()}
            root = next(iter(members), "").partition("/")[0] + "/"
            if root + "constants.pkl" in members:
                raise NotReadableError(
                    "is a TorchScript archive. Load it with torch.jit.load, and pass its "
                    "state_dict()"
                )
            pickled = members.get(root + "data.pkl")
            if pickled is None:
                raise NotReadableError("is a zip that torch.save did not write")
            order = members.get(root + "byteorder")
            if (
                order is not None
                and archive.open(order).read(16).decode("ascii", "replace") != sys.byteorder
            ):
                raise NotReadableError(
                    "was saved on a machine of another byte order. Save it again on this one"
                )
            stored = pickled.compress_type == zipfile.ZIP_STORED
            limit = PICKLE_LIMIT if stored else DEFLATED_PICKLE_LIMIT
            if pickled.file_size > limit:
                raise NotReadableError(
                    f"names its tensors in {pickled.file_size} bytes, where at most {limit} are "
                    "plausible"
                )
            content = self._unpickle(io.BytesIO(archive.open(pickled).read(limit)))
        records: dict[object, Record] = {}
        for key in self._storages:
            info = members.get(f"{root}data/{key}")
            if info is not None:
                records[key] = _record(file, info)
        return content, records

    # --- the format before it ---------------------------------------------------------------------

    def _read_legacy(self, file: io.BufferedReader) -> tuple[Any, Mapping[object, Record]]:
        bounded = _Bounded(file, PICKLE_LIMIT, once=True)
        load = _unpickling.load
        if load(bounded) != 0x1950A86A20F9469CFC6C:
            raise NotReadableError("is a pickle that torch.save did not write")
        load(bounded)  # the version of the protocol
        system = load(bounded)
        if isinstance(system, dict) and system.get("little_endian") is (sys.byteorder == "big"):
            raise NotReadableError(
                "was saved on a machine of another byte order. Save it again on this one"
            )
        content = self._unpickle(bounded)
        end = _size(file)
        records: dict[object, Record] = {}
        keys = load(bounded)
        position = file.tell()
        for key in keys:
            storage = self._storages[key]
            file.seek(position)
            count = int.from_bytes(file.read(8), "little", signed=True)
            size = count * storage.dtype.itemsize
            if count < 0 or position + 8 + size > end:
                raise NotReadableError("is truncated, or damaged")
            records[key] = Record(position + 8, size)
            position += 8 + size
        return content, records

    def _unpickle(self, file: Any) -> Any:
        unpickler: Any = _unpickling.Unpickler(file, encoding="utf-8")
        unpickler.persistent_load = self._storage
        return unpickler.load()

    def _storage(self, saved: tuple[Any, ...]) -> Any:
        """Return a storage without memory for the pickle's record of a storage."""
        kind, storage_type, key, _location, count, *view = saved
        if kind not in ("storage", b"storage") or any(part is not None for part in view):
            raise NotReadableError(
                "has storages of a kind that torch.save no longer writes. Save it again"
            )
        if key not in self._storages:
            dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
            untyped = _storages.UntypedStorage(count * dtype.itemsize, device="meta")
            self._keys[untyped._cdata] = key  # noqa: SLF001
            self._storages[key] = _storages.TypedStorage(
                wrap_storage=untyped, dtype=dtype, _internal=True
            )
        return self._storages[key]


def _record(file: io.BufferedReader, info: zipfile.ZipInfo) -> Record:
    if info.compress_type == zipfile.ZIP_STORED:
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\3\4") or info.flag_bits & 1:
            raise NotReadableError("is damaged: a member is not where its directory puts it")
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return Record(info.header_offset + 30 + names, info.compress_size)
    if info.compress_type != zipfile.ZIP_DEFLATED:
        raise NotReadableError(
            f"has members of compression method {info.compress_type}. Save it again with torch.save"
        )
    if info.file_size > max(_SLACK, GROWTH_LIMIT * info.compress_size):
        raise NotReadableError(
            f"has a member that claims to grow from {info.compress_size} to {info.file_size} "
            f"bytes, more than {GROWTH_LIMIT} times. Save it again with torch.save, which "
            "compresses nothing"
        )
    return Record(0, info.file_size, info)


class _Bounded:
    """A file that returns at most `limit` bytes in one read or, if `once`, in all reads."""

    def __init__(self, file: IO[bytes], limit: int, *, once: bool = False) -> None:
        self._file = file
        self._left = limit
        self._once = once
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > self._left:
            raise NotReadableError(
                f"wants {size} bytes read at once, where at most {self._left} are plausible"
            )
        data = self._file.read(self._left if size < 0 else size)
        if self._once:
            self._left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self._file.readline(self._left)
        if self._once:
            self._left -= len(data)
        return data


# --- bytes ----------------------------------------------------------------------------------------

_Read = Callable[[torch.Tensor, int], None]
"""A function that fills a dense tensor with a storage's bytes from an offset."""


def _stored(file: io.BufferedReader, base: int) -> _Read:
    def read(tensor: torch.Tensor, start: int) -> None:
        file.seek(base + start)
        fill(file, tensor)

    return read


class _Inflated:
    """A deflated storage. Each read continues the last one, or begins at the front again."""

    def __init__(self, file: io.BufferedReader, member: zipfile.ZipInfo) -> None:
        # The caller closes the file.
        self._stream = zipfile.ZipFile(_Bounded(file, DIRECTORY_LIMIT)).open(member)  # noqa: SIM115

    def read(self, tensor: torch.Tensor, start: int) -> None:
        self._stream.seek(start)
        fill(self._stream, tensor)


def fill(file: IO[bytes], tensor: torch.Tensor) -> None:
    """Read bytes into a tensor that fills its storage.

    Raises:
        NotReadableError: The file ends too early.
    """
    # Use the address, because NumPy, the usual access to a tensor's memory, is no dependency here.
    view = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
    done = 0
    while done < len(view):
        got = file.readinto(view[done : done + _BLOCK * 64])  # type: ignore[attr-defined]
        if not got:
            raise NotReadableError("ended within a tensor: it was cut while being read")
        done += got


def _fill(tensor: torch.Tensor, stride: tuple[int, ...], start: int, read: _Read) -> None:
    """Read a tensor that has these strides in its storage.

    Bytes between its elements are read only where that costs less than many small reads.
    """
    size = tensor.element_size()
    span = _span(tensor.shape, stride)
    alone = tensor.untyped_storage().nbytes() == tensor.nbytes == span * size
    if alone and tensor.stride() == stride:
        read(tensor, start)
        return
    if span * size <= max(4 * tensor.nbytes, _SLACK) or tensor.dim() == 0:
        whole = torch.empty(span, dtype=tensor.dtype)
        read(whole, start)
        tensor.copy_(whole.as_strided(tensor.shape, stride))
        return
    outer = max(range(tensor.dim()), key=lambda dim: stride[dim] * (tensor.shape[dim] > 1))
    inner = (*stride[:outer], *stride[outer + 1 :])
    for index in range(tensor.shape[outer]):
        _fill(tensor.select(outer, index), inner, start + index * stride[outer] * size, read)


def _span(shape: torch.Size, stride: tuple[int, ...]) -> int:
    """Return the number of elements from the first to the last of a strided tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _dense_strides(like: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of a dense tensor in memory order; contiguous ones if it is not dense."""
    if _span(like.shape, like.stride()) == math.prod(like.shape) and 0 not in like.stride():
        return like.stride()
    strides = []
    step = 1
    for size in reversed(like.shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _size(file: io.BufferedReader) -> int:
    here = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(here)
    return size


def reason(error: Exception) -> str:
    """Return the first line of an error, for a message."""
    return clipped(str(error).partition("\n")[0] or type(error).__name__, 200)
