"""Files of tensors: .npy, .npz and .safetensors, read and written whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoti_sched.cli.failures import UsageError
from aoti_sched.errors import first_line, shortened
from aoti_sched.whole_file import whole_file

if TYPE_CHECKING:
    import torch

SUFFIXES = (".npy", ".npz", ".safetensors")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by name. The one of a .npy file has the name "".

    Raises:
        UsageError: The file is of another kind, or damaged, or a package is missing.
        OSError: The operating system refuses to read the file.
    """
    import torch

    kind = _kind(path)
    with path.open("rb"):  # the error of a missing file is that of any other command
        pass
    try:
        if kind == ".safetensors":
            return dict(_safetensors().load_file(path))
        import numpy as np

        loaded = np.load(path, allow_pickle=False)
        arrays = {"": loaded} if kind == ".npy" else dict(loaded)
        return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    except UsageError:
        raise
    except Exception as error:  # each library has errors of its own for a damaged file
        raise UsageError(
            f"{path}: no {kind[1:]} file that can be read: {first_line(error)}."
        ) from error


def one_tensor(path: Path, key: str) -> torch.Tensor:
    """Return one tensor of a file.

    Args:
        path: The file.
        key: The tensor's name; "" for the only one.

    Raises:
        UsageError: There is no such tensor, or several and none is named.
    """
    tensors = read_tensors(path)
    if key in tensors:
        return tensors[key]
    if not key and len(tensors) == 1:
        return next(iter(tensors.values()))
    names = shortened(map(repr, tensors))
    asked = f"no tensor {key!r}" if key else "several tensors, and none is named"
    raise UsageError(f"{path}: {asked}. It has {names}; write @{path}:NAME.")


def check_writable(path: Path) -> None:
    """Refuse a file that `write_tensors` could not write, before anything else is done.

    Raises:
        UsageError: The suffix is no known one, the folder is missing, or a package is.
    """
    if _kind(path) == ".safetensors":
        _safetensors()
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: the folder {path.absolute().parent} does not exist.")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to a file, whole or not at all.

    Raises:
        UsageError: The file's kind can't hold them.
        OSError: The operating system refuses to write the file.
    """
    kind = _kind(path)
    if kind == ".npy" and len(tensors) != 1:
        raise UsageError(
            f"{path}: .npy holds one tensor, there are {len(tensors)}. Write a .npz file."
        )
    if kind == ".safetensors":
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        _write(path, lambda file: file.write(_safetensors().save(own)))
        return
    import numpy as np

    arrays = {name: _array(path, name, tensor) for name, tensor in tensors.items()}
    if kind == ".npy":
        (array,) = arrays.values()
        _write(path, lambda file: np.save(file, array, allow_pickle=False))
    else:
        _write(path, lambda file: np.savez(file, **arrays))


def _write(path: Path, write: Callable[[Any], object]) -> None:
    with whole_file(path) as beside:
        file = beside.open("wb")
        with file:
            write(file)


def _array(path: Path, name: str, tensor: torch.Tensor) -> Any:
    try:
        return tensor.detach().cpu().resolve_conj().resolve_neg().numpy()
    except TypeError as error:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise UsageError(
            f"{path}: NumPy has no {dtype}, which output {name!r} has. Write a .safetensors file."
        ) from error


def _kind(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: no known kind of file. Use one of {', '.join(SUFFIXES)}.")
    return path.suffix


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise UsageError(
            "a .safetensors file needs the package safetensors. Run: pip install safetensors"
        ) from error
    return safetensors.torch
