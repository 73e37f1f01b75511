"""Where new weights come from: a mapping, pairs, or a file; one pass over them, each tensor read when asked for.

This room knows the formats. Which names a model has, and which tensors fit, is decided elsewhere.

Files are read, never mapped: a mapped file that somebody truncates ends the process (SIGBUS) at the next touch,
and each tensor is to be copied anyway. The safetensors format (eight bytes of length, a JSON header, the data) is
therefore read here: its own library either maps the file, or, with `backend="pread"`, holds the GIL while it
reads. Measured on 320 MB in the page cache, 2 cores, safetensors 0.8: 2.0 GB/s here, and a thread that ticks every 0.5 ms was
at most 2 ms late; the library's mapping and a clone 2.0 GB/s and 4 ms; its pread 1.6 GB/s and 165 ms.
"""

from __future__ import annotations

import ctypes
import io
import math
import os
import pickle
import re
import stat
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import torch

from aoti_sched.errors import WeightsFileError, WeightsTypeError

Named = tuple[str, torch.Tensor]

_HEADER_LIMIT = 100_000_000  # bytes; the format's own bound for a safetensors header
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
_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""The keys under which training programs put a state dict beside their optimizer's."""


@contextmanager
def open_weights(weights: object) -> Iterator[Iterator[Named]]:
    """One pass over (name, tensor) of what a user gave as weights.

    `weights` is a mapping from names to tensors (a state dict), an iterable of (name, tensor) pairs
    (`module.named_parameters()`, a generator), or the path (str or os.PathLike) of a file: safetensors, a
    torch.save checkpoint, or a `*.index.json` that names shards of either, in its own directory. Which of them a
    file is, its content tells, not its name. A checkpoint that keeps the state dict under "state_dict",
    "model_state_dict" or "model" is unwrapped.

    What comes from a file is on the CPU. From safetensors each tensor has a storage of its own, and one is in memory
    at a time unless the caller keeps more. A checkpoint is read whole, without running code from it; its tensors
    share what they shared when they were saved. The tensors of a mapping or an iterable are passed on as they are.

    A file is looked at when the block is entered, and again after its last tensor and when the block is left without
    an error: before that, nothing that was read may be used.

    Raises:
        WeightsFileError: The file is missing, truncated, of no known format, holds anything but named tensors, or has
            changed (or been replaced) since it was opened.
        WeightsTypeError: `weights` is none of these, or one entry is no pair of a str and a tensor.
    """
    if isinstance(weights, (str, os.PathLike)):
        path, watched = Path(os.fsdecode(weights)), _Watched()
        watched.look(path)
        with closing(_read_file(path, watched)) as tensors:
            yield tensors
        watched.check()  # the caller may have stopped before the last
    else:
        yield _checked(_pairs(weights))


def _pairs(weights: object) -> Iterable[object]:
    if isinstance(weights, Mapping):
        return weights.items()
    if isinstance(weights, torch.nn.Module):
        raise WeightsTypeError(f"The weights are a module, {type(weights).__name__}. Pass its state_dict().")
    if isinstance(weights, Iterable) and not isinstance(weights, (torch.Tensor, bytes, bytearray)):
        return weights
    raise WeightsTypeError(
        "Expected weights as a mapping from names to tensors, an iterable of (name, tensor), or a path, "
        f"got {_kind(weights)}."
    )


def _checked(pairs: Iterable[object]) -> Iterator[Named]:
    for place, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise WeightsTypeError(
                f"Entry {place} of the weights: expected (name, tensor), got {_kind(pair)}."
            )
        name, tensor = pair
        if not isinstance(name, str):
            raise WeightsTypeError(
                f"Entry {place} of the weights: expected a str as name, got {_kind(name)} {name!r}."
            )
        if not isinstance(tensor, torch.Tensor):
            raise WeightsTypeError(f"Entry {name!r} of the weights: expected a tensor, got {_kind(tensor)}.")
        yield name, tensor


def _kind(thing: object) -> str:
    kind = type(thing)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


# --- files ------------------------------------------------------------------------------------------


class _Watched:
    """The files of one pass, as they were when first looked at."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[int, ...]] = {}

    def open(self, path: Path) -> io.BufferedReader:
        """Open the file that was looked at first."""
        self.look(path)
        file = path.open("rb")
        if _identity(os.fstat(file.fileno())) != self._seen[path]:
            file.close()
            raise _changed(path)
        return file

    def look(self, path: Path) -> None:
        """Note what the file is now, unless that is known already; refuse what is no plain file."""
        try:
            found = path.stat()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise _unreadable(path, error) from error
        if not stat.S_ISREG(found.st_mode):
            what = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
            raise _fault(path, f"is {what}. Give the weights file itself, or its *.index.json.")
        self._seen.setdefault(path, _identity(found))

    def check(self) -> None:
        """Raise unless every file is still the one it was."""
        for path, seen in self._seen.items():
            try:
                unchanged = _identity(path.stat()) == seen
            except OSError:
                unchanged = False
            if not unchanged:
                raise _changed(path)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_file(path: Path, watched: _Watched, *, shard: bool = False) -> Generator[Named, None, None]:
    """The tensors of one file, or of those it names; a shard names no further ones."""
    try:
        with watched.open(path) as file:
            head = file.peek(9)[:9]
            if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _HEADER_LIMIT:
                yield from _read_safetensors(path, file)
            elif head.startswith((b"PK\3\4", b"\x80")):  # a zip; a pickle, as torch wrote them before 1.6
                yield from _read_checkpoint(path, file)
            elif not shard and head.lstrip().startswith(b"{"):
                yield from _read_shards(path, _read_index(path, file), watched)
            else:
                raise _fault(
                    path,
                    "is neither a safetensors file nor a torch.save checkpoint, nor an index of such files.",
                )
        watched.check()
    except OSError as error:
        raise _unreadable(path, error) from error


# --- safetensors ------------------------------------------------------------------------------------

_Size = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct):
    """One tensor in a safetensors header; offsets in bytes from the header's end."""

    dtype: str
    shape: list[_Size]
    data_offsets: tuple[_Size, _Size]


def _read_safetensors(path: Path, file: io.BufferedReader) -> Iterator[Named]:
    # The header promises data without a gap, so the file is read from front to end.
    for name, dtype, shape in _safetensors_layout(path, file):
        # No variable here keeps the tensor: it is the caller's.
        yield name, _read_tensor(path, file, name, dtype, shape)


def _read_tensor(
    path: Path, file: io.BufferedReader, name: str, dtype: torch.dtype, shape: list[int]
) -> torch.Tensor:
    try:
        tensor = torch.empty(shape, dtype=dtype)
    except (RuntimeError, TypeError) as error:
        raise _fault(path, f"has a tensor {name!r} of a shape that cannot be made: {shape}.") from error
    if tensor.nbytes:
        # By its address: NumPy, the usual way to a tensor's memory, is no dependency of this package.
        buffer = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        if file.readinto(buffer) != tensor.nbytes:
            raise _fault(path, f"ended within {name!r}: it was cut while being read.")
    return tensor


def _safetensors_layout(path: Path, file: io.BufferedReader) -> list[tuple[str, torch.dtype, list[int]]]:
    """Name, dtype and shape of each tensor in the order of their data; the header is consumed and all of it checked."""
    total = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if total < 8 + length:
        raise _fault(path, f"is truncated: its header wants {length} bytes, {total - 8} are there.")
    try:
        raw = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _fault(path, f"has a broken safetensors header: {error}.") from error
    layout = []
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        dtype = getattr(torch, _DTYPES.get(entry.dtype, ""), None)
        if dtype is None:
            raise _fault(path, f"has a tensor {name!r} of dtype {entry.dtype}, which torch has not.")
        start, stop = entry.data_offsets
        wanted = math.prod(entry.shape) * dtype.itemsize
        if start != end or stop - start != wanted:
            raise _fault(
                path,
                f"has a broken safetensors header: {name!r} ({entry.dtype} {entry.shape}, {wanted} bytes) is said to "
                f"lie at {start} to {stop}, where {end} bytes came before it.",
            )
        end = stop
        layout.append((name, dtype, entry.shape))
    if 8 + length + end != total:
        what = "is truncated" if 8 + length + end > total else "has bytes that belong to no tensor"
        raise _fault(path, f"{what}: its header promises {8 + length + end} bytes, it has {total}.")
    return layout


# --- torch.save -------------------------------------------------------------------------------------


def _read_checkpoint(path: Path, file: io.BufferedReader) -> Iterator[Named]:
    try:
        loaded = torch.load(file, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"{refused[1]}, which is no tensor" if refused else "something that is no tensor, or is damaged"
        )
        raise _fault(
            path,
            f"holds {what}; it was not read, because reading it could run any code. Save the state dict alone "
            "(torch.save(module.state_dict(), path), or safetensors). Or, if you trust the file: "
            "torch.load(path, weights_only=False), and pass the state dict that is in it.",
        ) from error
    except Exception as error:  # a damaged checkpoint makes torch raise nearly anything
        raise _fault(path, f"is no readable torch checkpoint: {_first_line(error)}") from error
    state = _state_dict(path, loaded)
    del loaded
    for name in list(state):
        yield name, state.pop(name)  # each is freed as soon as the caller is done with it


def _state_dict(path: Path, loaded: object) -> dict[str, torch.Tensor]:
    """The one state dict in what a checkpoint holds."""
    if not isinstance(loaded, Mapping):
        raise _fault(path, f"holds {_kind(loaded)}, not a state dict.")
    wrapped = [key for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)]
    if len(wrapped) > 1:
        raise _fault(
            path,
            f"holds several state dicts, {wrapped}. Load it with torch.load, and pass the one that is meant.",
        )
    state = dict(loaded[wrapped[0]] if wrapped else loaded)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise _fault(
                path,
                f"holds {_kind(value)} as {name!r}, where a state dict has names and tensors alone. Load it with "
                "torch.load, and pass the tensors that are meant.",
            )
    return state


# --- shards -----------------------------------------------------------------------------------------


class _Index(msgspec.Struct):
    """What Hugging Face writes beside a checkpoint in several files: which file holds which tensor."""

    weight_map: dict[str, str]


def _read_index(path: Path, file: io.BufferedReader) -> dict[str, set[str]]:
    """The names each shard is to hold, by the shard's file name."""
    try:
        index = msgspec.json.decode(file.read(_HEADER_LIMIT), type=_Index)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _fault(path, f"is no index of weights files: {error}") from error
    shards: dict[str, set[str]] = {}
    for name, shard in index.weight_map.items():
        shards.setdefault(shard, set()).add(name)
    return shards


def _read_shards(path: Path, shards: Mapping[str, set[str]], watched: _Watched) -> Iterator[Named]:
    for shard in shards:  # all are there before the first is read
        if Path(shard).name != shard or shard in ("", ".."):
            raise _fault(path, f"names a shard {shard!r} that is no file of its own directory.")
        if not (path.parent / shard).exists():
            raise _fault(path, f"names a shard {shard!r} that is not beside it.")
        watched.look(path.parent / shard)
    for shard, names in shards.items():
        left = set(names)
        for name, tensor in _read_file(path.parent / shard, watched, shard=True):
            if name not in left:
                raise _fault(path, f"does not say that {shard!r} holds {name!r}; they are of different sets.")
            left.remove(name)
            yield name, tensor
        if left:
            raise _fault(path, f"says that {shard!r} holds {min(left)!r}, which it does not.")


# --- faults -----------------------------------------------------------------------------------------


def _fault(path: Path, what: str) -> WeightsFileError:
    return WeightsFileError(f"{path} {what}", path=str(path))


def _unreadable(path: Path, error: Exception) -> WeightsFileError:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return WeightsFileError(f"There is no weights file at {path}.", path=str(path))
    reason = error.strerror if isinstance(error, OSError) else None
    return WeightsFileError(f"Cannot read {path}: {reason or error}.", path=str(path))


def _changed(path: Path) -> WeightsFileError:
    return _fault(
        path,
        "changed while it was being read, so nothing of it was used. Write a new file, rename it into place, and then "
        "update from it.",
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
