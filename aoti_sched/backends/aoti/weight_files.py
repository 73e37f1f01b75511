"""Sources of new weights: a mapping, pairs, or a file.

Names, dtypes and shapes are read first. Only wanted bytes are read, later. This file has the
formats. `constants.py` decides which names a model has and which tensors fit, before a byte of
a tensor is read.

Files are read, never mapped: when a mapped file is truncated, the next access ends the
process (SIGBUS), and each tensor is copied anyway. The safetensors format (eight bytes of length, a
JSON header, the data) is therefore read here. Its own library either maps the file, or, with
`backend="pread"`, holds the GIL while it reads. Measured on 320 MB in the page cache, 2 cores,
safetensors 0.8, with the delay of a thread that ticks every 0.5 ms:

- here: 2.0 GB/s, at most 2 ms late;
- the library's mapping and a clone: 2.0 GB/s, 4 ms;
- the library's pread: 1.6 GB/s, 165 ms.

Headers are bounded in size and parsed entry by entry. One call would hold the GIL for the whole
header.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from aoti_sched.backends.aoti.checkpoint import Checkpoint, NotReadableError, reason
from aoti_sched.backends.aoti.json_scan import JsonScan
from aoti_sched.backends.aoti.opened_files import OpenFiles, Seen, fault, unreadable
from aoti_sched.backends.aoti.safetensors_file import read_safetensors
from aoti_sched.backends.aoti.weight_offer import ENTRY_LIMIT, HEADER_LIMIT, Offered
from aoti_sched.errors import WeightsTypeError, clipped

_EXTRA_STATE = "_extra_state"
"""The end of the names under which a state dict has the results of `Module.get_extra_state`.

Such a result need not be a tensor.
"""
_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""The keys under which training programs put a state dict beside their optimizer's."""


@contextmanager
def open_weights(weights: object, seen: Seen | None = None) -> Iterator[Iterator[Offered]]:
    """Open a user's weights for one pass over names, dtypes and shapes.

    `Offered.read` reads the bytes of a tensor. Tensors of a file are on the CPU, each in a storage
    of its own, and no code of the file runs. Tensors of a mapping or an iterable are passed on
    unchanged.

    A file is checked for changes when the block is entered, and again when the block ends without
    an error. Use nothing that was read before that.

    Args:
        weights: A mapping from names to tensors (a state dict), an iterable of (name, tensor) pairs
            (`module.named_parameters()`, a generator), or the path (str or os.PathLike) of a file.
            A file is a safetensors file, a torch.save checkpoint, or a `*.index.json` that names
            shards of either in its own directory. The file's content decides, not its name. A
            checkpoint with the state dict under "state_dict", "model_state_dict" or "model" is
            unwrapped.
        seen: The files of an earlier pass, which must not have changed since.

    Raises:
        WeightsFileError: The file is missing, truncated, of no known format, holds anything but
            named tensors, or has changed (or been replaced) since it was opened.
        WeightsTypeError: `weights` is none of these, or one entry is no pair of a str and a tensor.
    """
    if isinstance(weights, (str, os.PathLike)):
        path, files = Path(os.fsdecode(weights)), OpenFiles({} if seen is None else seen)
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
        "Expected weights as a mapping from names to tensors, an iterable of (name, tensor), or a "
        f"path, got {_kind(weights)}."
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
                f"Entry {clipped(repr(name))} of the weights: expected a tensor, got "
                f"{_kind(tensor)}."
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


# --- files ----------------------------------------------------------------------------------------


def _read_file(path: Path, files: OpenFiles, *, shard: bool = False) -> Iterator[Offered]:
    """Yield the tensors of one file, or of the shards that the file names."""
    try:
        file = files.open(path)
        head = file.peek(9)[:9]
        if (
            head[8:] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000
        ):  # the format's own bound
            yield from read_safetensors(path, file, files)
        elif head.startswith(
            (b"PK\3\4", b"\x80")
        ):  # a zip; a pickle, as torch wrote them before 1.6
            yield from _read_checkpoint(path, file, files)
        elif not shard and head.lstrip().startswith(b"{"):
            yield from _read_shards(path, _read_index(path, file), files)
        else:
            raise fault(
                path,
                "is neither a safetensors file nor a torch.save checkpoint, nor an index of such "
                "files.",
            )
    except OSError as error:
        raise unreadable(path, error) from error


# --- torch.save -----------------------------------------------------------------------------------


def _read_checkpoint(path: Path, file: io.BufferedReader, files: OpenFiles) -> Iterator[Offered]:
    try:
        checkpoint = Checkpoint(file)
    except NotReadableError as error:
        raise fault(path, f"is no readable torch checkpoint: it {error}.") from error
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"{clipped(refused[1])}, which is no tensor"
            if refused
            else "something that is no tensor, or is damaged"
        )
        raise fault(
            path,
            f"holds {what}; it was not read, because reading it could run any code. Save the "
            "state dict alone (torch.save(module.state_dict(), path), or safetensors). Or, if "
            "you trust the file: torch.load(path, weights_only=False), and pass the state dict "
            "that is in it.",
        ) from error
    except Exception as error:  # a damaged checkpoint makes torch raise nearly anything
        raise fault(path, f"is no readable torch checkpoint: {reason(error)}") from error
    for name, like in _state_dict(path, checkpoint.content).items():
        try:
            place: object = (path, checkpoint.place(like))
        except Exception:  # noqa: BLE001 -- sparse, or without data: reading it raises
            place = (path, name)
        read = functools.partial(_read_stored, path, files, name, checkpoint, like)
        yield Offered(name, like, read, place, on_host=True)


def _read_stored(
    path: Path, files: OpenFiles, name: str, checkpoint: Checkpoint, like: torch.Tensor
) -> torch.Tensor:
    try:
        return checkpoint.read(files.open(path), like)
    except NotReadableError as error:
        raise fault(
            path, f"is no readable torch checkpoint: at {clipped(repr(name))}, it {error}."
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    # NotImplementedError is zipfile's word for an unsupported compression method.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise fault(path, f"is damaged at {clipped(repr(name))}: {reason(error)}") from error


def _state_dict(path: Path, loaded: object) -> dict[str, torch.Tensor]:
    """Return the one state dict in what a checkpoint holds."""
    if not isinstance(loaded, Mapping):
        raise fault(path, f"holds {_kind(loaded)}, not a state dict.")
    wrapped = [key for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)]
    if len(wrapped) > 1:
        raise fault(
            path,
            f"holds several state dicts, {wrapped}. Load it with torch.load, and pass the one that "
            "is meant.",
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
            raise fault(
                path,
                f"holds {_kind(value)} as {clipped(_shown(name) or repr(str(name)))}, where a "
                "state dict has only names and tensors. Load it with torch.load, and pass the "
                "tensors that are meant.",
            )
    return state


# --- shards ---------------------------------------------------------------------------------------


def _read_index(path: Path, file: io.BufferedReader) -> dict[str, set[str]]:
    """Return the names that each shard holds, by the shard's file name.

    The format is Hugging Face's `weight_map`.
    """
    if os.fstat(file.fileno()).st_size > HEADER_LIMIT:
        raise fault(path, f"is no index of weights files: it has more than {HEADER_LIMIT} bytes.")
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
                shard = msgspec.json.decode(scan.value(ENTRY_LIMIT), type=str)
                shards.setdefault(shard, set()).add(name)
        scan.end()
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise fault(path, f"is no index of weights files: {reason(error)}") from error
    if not known:
        raise fault(path, "is no index of weights files: it has no 'weight_map'.")
    return shards


def _read_shards(path: Path, shards: Mapping[str, set[str]], files: OpenFiles) -> Iterator[Offered]:
    for shard in shards:  # all are there before the first is read
        quoted = clipped(repr(shard))
        if Path(shard).name != shard or shard in ("", "..") or "\0" in shard:
            raise fault(
                path, f"names a shard {quoted} that is not the name of a file in its directory."
            )
        try:
            is_there = (path.parent / shard).exists()
        except OSError:  # a name that is too long
            is_there = False
        if not is_there:
            raise fault(path, f"names a shard {quoted} that is not beside it.")
        files.look(path.parent / shard)
    for shard, names in shards.items():
        left = set(names)
        for offered in _read_file(path.parent / shard, files, shard=True):
            if offered.name not in left:
                raise fault(
                    path,
                    f"does not list {clipped(repr(offered.name))} for the shard "
                    f"{clipped(repr(shard))}, which holds it. Take the index and the shards of "
                    "one set.",
                )
            left.remove(offered.name)
            yield offered
        if left:
            raise fault(
                path,
                f"lists {clipped(repr(min(left)))} for the shard {clipped(repr(shard))}, which "
                "lacks it. Take the index and the shards of one set.",
            )
