"""The weights a package keeps beside its library: one blob, or files written by torch.save."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from aoti_sched.backends.raw_container import RawContainer
from aoti_sched.errors import LoadError, MissingWeightsError
from aoti_sched.package import Extracted


def load_weights(raw: RawContainer, extracted: Extracted) -> None:
    """Give a container the weights that its package brings, if it has not got them from its library.

    Raises:
        MissingWeightsError: constants are left without values; a run would be a segmentation fault.
        LoadError: a weights file is broken or does not fit.
    """
    if not raw.missing_constants():
        return
    if extracted.weights_blob is not None:
        raw.update_from_blob(extracted.weights_blob)
    elif extracted.stored_weights:
        give_weights(raw, read_stored(raw.name, extracted))
    missing = raw.missing_constants()
    if missing:
        listed = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise MissingWeightsError(
            f"{raw.name}: the package brings no weights for {listed}. Compile it with package_constants_in_so=True "
            "(the default), or with package_constants_on_disk_format set."
        )


def give_weights(raw: RawContainer, weights: dict[str, torch.Tensor]) -> None:
    """Write weights that lie on the host into a container's active buffer."""
    from_cpu = raw.device_type != "cpu" and raw.takes_from_cpu
    if raw.device_type != "cpu" and not from_cpu:
        stay = raw.on_host if raw.ready(inactive=False) else ()
        weights = {fqn: t if fqn in stay else t.to(raw.device) for fqn, t in weights.items()}
    raw.update(weights, inactive=False, from_cpu=from_cpu)


def read_stored(name: str, extracted: Extracted) -> dict[str, torch.Tensor]:
    """The pickled weights by FQN. Only tensors are unpickled (`weights_only`), each file once.

    Raises:
        LoadError: A file is no torch.save file of a tensor, or smaller than the view that is asked of it.
    """
    files: dict[Path, torch.Tensor] = {}
    weights = {}
    fqn = ""
    try:
        for fqn, stored in extracted.stored_weights.items():
            if stored.file not in files:
                files[stored.file] = torch.load(stored.file, weights_only=True, map_location="cpu")
            weights[fqn] = files[stored.file].as_strided(stored.shape, stored.stride, stored.offset)
    except (RuntimeError, AttributeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise LoadError(f"{name}: the weights file of {fqn!r} is broken: {error}") from error
    return weights
