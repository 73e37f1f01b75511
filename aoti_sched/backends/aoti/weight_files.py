"""Where new weights come from: a mapping, pairs, or a file. First names, dtypes and shapes, then the bytes that are wanted.

This room knows the formats. Which names a model has, and which tensors fit, is decided elsewhere, before a byte of
a tensor is read.

Files are read, never mapped: a mapped file that somebody truncates ends the process (SIGBUS) at the next touch,
and each tensor is to be copied anyway. The safetensors format (eight bytes of length, a JSON header, the data) is
therefore read here: its own library either maps the file, or, with `backend="pread"`, holds the GIL while it
reads. Measured on 320 MB in the page cache, 2 cores, safetensors 0.8: 2.0 GB/s here, and a thread that ticks every 0.5 ms was
at most 2 ms late; the library's mapping and a clone 2.0 GB/s and 4 ms; its pread 1.6 GB/s and 165 ms.
Headers are bounded in size, and parsed entry by entry: in one call, the GIL would be held for all of it.
"""

from __future__ import annotations

import functools
import io
import math
import os
import pickle
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import torch

from aoti_sched.backends.aoti.checkpoint import Checkpoint, NotReadableError, fill, reason
from aoti_sched.backends.aoti.json_scan import JsonScan
from aoti_sched.errors import WeightsFileError, WeightsTypeError, clipped

HEADER_LIMIT = 16 << 20
"""Bytes of a safetensors header or an index of shards. The format's own bound is 100 MB; an entry has about 100 bytes."""
_ENTRY_LIMIT = 4096
"""Bytes of what a header says of one tensor."""
_EXTRA_STATE = "_extra_state"
"""How the names of what `Module.get_extra_state` returns end: a state dict has it, and it need not be a tensor."""
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


class Offered(NamedTuple):
    """One named tensor, whose bytes may not have been read yet.

    Args:
        name: Its name.
        like: A tensor of its dtype, shape and layout: itself, or one on "meta". None for a module's extra state.
        read: Gives the tensor; only inside `open_weights`.
        place: Tells its bytes from others': two that are offered with equal places are one tensor.
        on_host: Whether it is read to the host's memory.
    """

    name: str
    like: torch.Tensor | None
    read: Callable[[], torch.Tensor]
    place: object
    on_host: bool = False


@contextmanager
def open_weights(weights: object, seen: Seen | None = None) -> Iterator[Iterator[Offered]]:
    """One pass over what a user gave as weights: names, dtypes and shapes. Bytes are read where `Offered.read` is called.

    `weights` is a mapping from names to tensors (a state dict), an iterable of (name, tensor) pairs
    (`module.named_parameters()`, a generator), or the path (str or os.PathLike) of a file: safetensors, a
    torch.save checkpoint, or a `*.index.json` that names shards of either, in its own directory. Which of them a
    file is, its content tells, not its name. A checkpoint that keeps the state dict under "state_dict",
    "model_state_dict" or "model" is unwrapped.

    What is read from a file is on the CPU, in a storage of its own; no code from it is run. The tensors of a mapping
    or an iterable are passed on as they are.

    A file is looked at when the block is entered, and again when it is left without an error: before that, nothing
    that was read may be used. With `seen`, it must be the file that was seen the first time.

    Raises:
        WeightsFileError: The file is missing, truncated, of no known format, holds anything but named tensors, or has
            changed (or been replaced) since it was opened.
        WeightsTypeError: `weights` is none of these, or one entry is no pair of a str and a tensor.
    """
    if isinstance(weights, (str, os.PathLike)):
        path, files = Path(os.fsdecode(weights)), _Files({} if seen is None else seen)
        try:
            files.look(path)
            yield _read_file(path, files)
            files.check()
        finally:
            files.close()
    else:
        yield _checked(_pairs(weights))


def _pairs(weights: object) -> Iterable[object]:
    if isinstance(weights, Mapping):
        return weights.items()
    if isinstance(weights, torch.nn.Module):
        raise WeightsTypeError(
            f"The weights are a module, {type(weights).__name__}. Pass its state_dict()."
        )
    if isinstance(weights, Iterable) and not isinstance(weights, (torch.Tensor, bytes, bytearray)):
        return weights
    raise WeightsTypeError(
        "Expected weights as a mapping from names to tensors, an iterable of (name, tensor), or a path, "
        f"got {_kind(weights)}."
    )


def _checked(pairs: Iterable[object]) -> Iterator[Offered]:
    for place, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise WeightsTypeError(
                f"Entry {place} of the weights: expected (name, tensor), got {_kind(pair)}."
            )
        name, tensor = pair
        if not isinstance(name, str):
            raise WeightsTypeError(
                f"Entry {place} of the weights: expected a str as name, got {_kind(name)} "
                f"{clipped(_shown(name))}."
            )
        if isinstance(tensor, torch.Tensor):
            yield Offered(name, tensor, functools.partial(_itself, tensor), _place(tensor))
        elif name.endswith(_EXTRA_STATE):
            yield Offered(name, None, functools.partial(_itself, torch.empty(0)), None)
        else:
            raise WeightsTypeError(
                f"Entry {clipped(repr(name))} of the weights: expected a tensor, got {_kind(tensor)}."
            )


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _place(tensor: torch.Tensor) -> object:
    if tensor.layout != torch.strided or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device


def _kind(thing: object) -> str:
    kind = type(thing)
    return clipped(
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )


def _shown(thing: object) -> str:
    return repr(thing) if isinstance(thing, (int, float, bytes, type(None))) else ""


# --- files ------------------------------------------------------------------------------------------


Seen = dict[Path, tuple[int, ...]]
"""Files as they were when first looked at."""


class _Files:
    """The files of one pass; one is open at a time."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._looked: set[Path] = set()
        self._open: tuple[Path, io.BufferedReader] | None = None

    def open(self, path: Path) -> io.BufferedReader:
        """The file that was looked at first, open until another one is."""
        if self._open is not None and self._open[0] == path:
            return self._open[1]
        self.close()
        self.look(path)
        try:
            file = path.open("rb")
        except OSError as error:
            raise _unreadable(path, error) from error
        self._open = (path, file)
        if _identity(os.fstat(file.fileno())) != self._seen[path]:
            raise _changed(path)
        return file

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

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
        self._looked.add(path)

    def check(self) -> None:
        """Raise unless every file is still the one it was."""
        for path in self._looked:
            try:
                unchanged = _identity(path.stat()) == self._seen[path]
            except OSError:
                unchanged = False
            if not unchanged:
                raise _changed(path)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_file(path: Path, files: _Files, *, shard: bool = False) -> Iterator[Offered]:
    """The tensors of one file, or of those it names; a shard names no further ones."""
    try:
        file = files.open(path)
        head = file.peek(9)[:9]
        if (
            head[8:] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000
        ):  # the format's own bound
            yield from _read_safetensors(path, file, files)
        elif head.startswith(
            (b"PK\3\4", b"\x80")
        ):  # a zip; a pickle, as torch wrote them before 1.6
            yield from _read_checkpoint(path, file, files)
        elif not shard and head.lstrip().startswith(b"{"):
            yield from _read_shards(path, _read_index(path, file), files)
        else:
            raise _fault(
                path,
                "is neither a safetensors file nor a torch.save checkpoint, nor an index of such files.",
            )
    except OSError as error:
        raise _unreadable(path, error) from error


# --- safetensors ------------------------------------------------------------------------------------

_Size = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct):
    """One tensor in a safetensors header; offsets in bytes from the header's end."""

    dtype: str
    shape: list[_Size]
    data_offsets: tuple[_Size, _Size]


def _read_safetensors(path: Path, file: io.BufferedReader, files: _Files) -> Iterator[Offered]:
    for name, like, start in _safetensors_layout(path, file):
        read = functools.partial(_read_tensor, path, files, name, like, start)
        yield Offered(name, like, read, (path, start, name), on_host=True)


def _read_tensor(
    path: Path, files: _Files, name: str, like: torch.Tensor, start: int
) -> torch.Tensor:
    tensor = torch.empty(like.shape, dtype=like.dtype)
    try:
        if tensor.nbytes:
            file = files.open(path)
            file.seek(start)
            fill(file, tensor)
    except NotReadableError as error:
        raise _fault(
            path, f"ended within {clipped(repr(name))}: it was cut while being read."
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    return tensor


def _safetensors_layout(path: Path, file: io.BufferedReader) -> list[tuple[str, torch.Tensor, int]]:
    """Name, dtype and shape (as a "meta" tensor) and place of each tensor; all of the header is checked."""
    total = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if total < 8 + length:
        raise _fault(path, f"is truncated: its header wants {length} bytes, {total - 8} are there.")
    if length > HEADER_LIMIT:
        raise _fault(
            path,
            f"has a header of {length} bytes, where at most {HEADER_LIMIT} are plausible. Save the model in shards.",
        )
    try:
        entries = _entries(JsonScan(file.read(length)))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _fault(path, f"has a broken safetensors header: {reason(error)}.") from error
    starts: dict[int, list[tuple[str, _Entry]]] = {}
    for name, entry in entries.items():
        starts.setdefault(entry.data_offsets[0], []).append((name, entry))
    layout = []
    end = 0
    while starts:  # from each tensor to the one that begins where it ends; sorting many would hold the GIL for long
        here = starts.pop(end, None) or starts.pop(min(starts))
        for name, entry in sorted(here, key=lambda item: item[1].data_offsets[1]):
            quoted = clipped(repr(name), 100)
            dtype = getattr(torch, _DTYPES.get(entry.dtype, ""), None)
            if dtype is None:
                raise _fault(
                    path,
                    f"has a tensor {quoted} of dtype {clipped(entry.dtype, 40)}, which torch has not.",
                )
            start, stop = entry.data_offsets
            wanted = math.prod(entry.shape) * dtype.itemsize
            if start != end or stop - start != wanted:
                raise _fault(
                    path,
                    f"has a broken safetensors header: {quoted} ({entry.dtype} {clipped(entry.shape)}, "
                    f"{clipped(wanted, 40)} bytes) has the offsets {start} to {stop}, but "
                    f"{end} bytes come before it.",
                )
            try:
                like = torch.empty(entry.shape, dtype=dtype, device="meta")
            except (RuntimeError, TypeError) as error:
                raise _fault(
                    path,
                    f"has a tensor {quoted} of a shape that cannot be made: {clipped(entry.shape)}.",
                ) from error
            end = stop
            layout.append((name, like, 8 + length + start))
    if 8 + length + end != total:
        what = "is truncated" if 8 + length + end > total else "has bytes that belong to no tensor"
        raise _fault(path, f"{what}: its header promises {8 + length + end} bytes, it has {total}.")
    return layout


def _entries(scan: JsonScan) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for name in scan.members():
        if name == "__metadata__":
            scan.skip()
        elif name in entries:
            raise ValueError(f"{clipped(repr(name), 100)} comes twice")
        else:
            entries[name] = msgspec.json.decode(scan.value(_ENTRY_LIMIT), type=_Entry)
    scan.end()
    return entries


# --- torch.save -------------------------------------------------------------------------------------


def _read_checkpoint(path: Path, file: io.BufferedReader, files: _Files) -> Iterator[Offered]:
    try:
        checkpoint = Checkpoint(file)
    except NotReadableError as error:
        raise _fault(path, f"is no readable torch checkpoint: it {error}.") from error
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"{clipped(refused[1])}, which is no tensor"
            if refused
            else "something that is no tensor, or is damaged"
        )
        raise _fault(
            path,
            f"holds {what}; it was not read, because reading it could run any code. Save the state dict alone "
            "(torch.save(module.state_dict(), path), or safetensors). Or, if you trust the file: "
            "torch.load(path, weights_only=False), and pass the state dict that is in it.",
        ) from error
    except Exception as error:  # a damaged checkpoint makes torch raise nearly anything
        raise _fault(path, f"is no readable torch checkpoint: {reason(error)}") from error
    for name, like in _state_dict(path, checkpoint.content).items():
        try:
            place: object = (path, checkpoint.place(like))
        except Exception:  # noqa: BLE001 -- sparse, or made without data: who wants it, hears of it
            place = (path, name)
        read = functools.partial(_read_stored, path, files, name, checkpoint, like)
        yield Offered(name, like, read, place, on_host=True)


def _read_stored(
    path: Path, files: _Files, name: str, checkpoint: Checkpoint, like: torch.Tensor
) -> torch.Tensor:
    try:
        return checkpoint.read(files.open(path), like)
    except NotReadableError as error:
        raise _fault(
            path, f"is no readable torch checkpoint: at {clipped(repr(name))}, it {error}."
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    # NotImplementedError is zipfile's word for an unsupported compression method.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise _fault(path, f"is damaged at {clipped(repr(name))}: {reason(error)}") from error


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
    for name, value in list(state.items()):
        if (
            isinstance(name, str)
            and name.endswith(_EXTRA_STATE)
            and not isinstance(value, torch.Tensor)
        ):
            del state[name]
        elif not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise _fault(
                path,
                f"holds {_kind(value)} as {clipped(_shown(name) or repr(str(name)))}, where a state dict has names and tensors alone. Load it with "
                "torch.load, and pass the tensors that are meant.",
            )
    return state


# --- shards -----------------------------------------------------------------------------------------


def _read_index(path: Path, file: io.BufferedReader) -> dict[str, set[str]]:
    """The names each shard is to hold, by the shard's file name, as Hugging Face's `weight_map` tells them."""
    if os.fstat(file.fileno()).st_size > HEADER_LIMIT:
        raise _fault(path, f"is no index of weights files: it has more than {HEADER_LIMIT} bytes.")
    shards: dict[str, set[str]] = {}
    known = False
    try:
        scan = JsonScan(file.read())
        for key in scan.members():
            if key != "weight_map":
                scan.skip()
                continue
            known = True
            for name in scan.members():
                shard = msgspec.json.decode(scan.value(_ENTRY_LIMIT), type=str)
                shards.setdefault(shard, set()).add(name)
        scan.end()
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _fault(path, f"is no index of weights files: {reason(error)}") from error
    if not known:
        raise _fault(path, "is no index of weights files: it has no 'weight_map'.")
    return shards


def _read_shards(path: Path, shards: Mapping[str, set[str]], files: _Files) -> Iterator[Offered]:
    for shard in shards:  # all are there before the first is read
        quoted = clipped(repr(shard))
        if Path(shard).name != shard or shard in ("", "..") or "\0" in shard:
            raise _fault(path, f"names a shard {quoted} that is no file of its own directory.")
        try:
            is_there = (path.parent / shard).exists()
        except OSError:  # a name that is too long
            is_there = False
        if not is_there:
            raise _fault(path, f"names a shard {quoted} that is not beside it.")
        files.look(path.parent / shard)
    for shard, names in shards.items():
        left = set(names)
        for offered in _read_file(path.parent / shard, files, shard=True):
            if offered.name not in left:
                raise _fault(
                    path,
                    f"does not say that {clipped(repr(shard))} holds {clipped(repr(offered.name))}; "
                    "they are of different sets.",
                )
            left.remove(offered.name)
            yield offered
        if left:
            raise _fault(
                path,
                f"says that {clipped(repr(shard))} holds {clipped(repr(min(left)))}, which it does not.",
            )


# --- faults -----------------------------------------------------------------------------------------


def _fault(path: Path, what: str) -> WeightsFileError:
    return WeightsFileError(f"{clipped(path, 400)} {what}", path=str(path))


def _unreadable(path: Path, error: Exception) -> WeightsFileError:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return WeightsFileError(
            f"There is no weights file at {clipped(path, 400)}.", path=str(path)
        )
    why = error.strerror if isinstance(error, OSError) else None
    return WeightsFileError(f"Cannot read {clipped(path, 400)}: {why or error}.", path=str(path))


def _changed(path: Path) -> WeightsFileError:
    return _fault(
        path,
        "changed while it was being read, or since its weights were loaded, so nothing of it was used. Write a new file, "
        "rename it into place, and then update from it.",
    )
