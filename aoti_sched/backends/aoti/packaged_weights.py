"""The weights of a load: those kept in the package, and those given by the caller."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aoti_sched.backends.aoti.constants import Names
from aoti_sched.backends.aoti.opened_files import Seen
from aoti_sched.backends.aoti.weight_check import choose
from aoti_sched.backends.aoti.weight_files import open_weights
from aoti_sched.backends.contracts import LoadRequest
from aoti_sched.backends.reading import Reading
from aoti_sched.errors import LoadError, MissingWeightsError, WeightsTypeError, clipped, shortened
from aoti_sched.model.specs import WeightName
from aoti_sched.package import Extracted

if TYPE_CHECKING:
    from aoti_sched.backends.aoti.raw_container import RawContainer


class GivenWeights:
    """The `weights=` of a load: a mapping, or a file, which is read again at each restore.

    Args:
        request: The load request, with the mapping or the path.
        names: The module's names, as the package records them.
    """

    def __init__(self, request: LoadRequest, names: Sequence[WeightName]) -> None:
        weights = request.weights
        if not isinstance(weights, (str, os.PathLike, Mapping)):
            raise WeightsTypeError(
                f"load({clipped(request.path)!r}): weights=: expected the path of a weights file, "
                f"or a mapping from names to tensors, got {type(weights).__name__}."
            )
        self._model, self._strict = request.name, request.weights_strict
        self._weights: object = weights
        self._reading = request.reading
        self._names = names
        self._seen: Seen = {}
        self.is_file = not isinstance(weights, Mapping)
        self.ignored: tuple[str, ...] = ()

    def write(self, raw: RawContainer, reading: Reading | None = None) -> None:
        """Write the weights into a container's active buffer, before its first run.

        Args:
            raw: The container.
            reading: Reads the weights; None for the one of the load.

        Raises:
            Abandoned: The owner of `reading` has abandoned it.
            ConstantMismatchError: The weights do not fit.
            WeightsFileError: The file can't be read, or has changed since the first time.
        """
        constants, active = raw.constants, raw.ready(inactive=False)
        unknown = [c.spec.fqn for c in constants if c.stride is None and not c.spec.folded]
        if unknown and not active:
            raise MissingWeightsError(
                f"{raw.name}: weights were given, but nothing says how "
                f"{shortened(map(repr, unknown))} lie in memory. Load the package itself, or the "
                "library with its generated sources beside it."
            )
        reading = reading or self._reading or Reading()
        # The file may block for ever, and others need the device meanwhile.
        with raw.away(), reading.source(open_weights(self._weights, self._seen)) as offers:
            chosen = choose(
                self._model,
                constants,
                Names(constants, self._names),
                offers,
                device_type=raw.device_type,
                partial=False,
                strict=self._strict,
                active=active,
            )
            with reading.foreign():
                chosen.read()
            values = chosen.values(check_finite=False)
        give_weights(raw, values)
        self.ignored = chosen.ignored

    def forget(self) -> None:
        """Release a mapping's tensors, whose values are in the container by now."""
        self._reading = None
        if not self.is_file:
            self._weights = None


def load_weights(
    raw: RawContainer,
    extracted: Extracted,
    given: GivenWeights | None = None,
    reading: Reading | None = None,
) -> None:
    """Write the caller's weights into a container, or else the package's weights.

    A container whose library has all weights keeps them.

    Args:
        raw: The container.
        extracted: The package's files.
        given: The caller's weights.
        reading: Reads the caller's weights; None for the one of the load.

    Raises:
        MissingWeightsError: Constants are left without values, so a run would be a segmentation
            fault.
        LoadError: A weights file is broken or does not fit.
        ConstantMismatchError, WeightsFileError: As `GivenWeights.write` raises them.
    """
    if raw.missing_constants():
        if extracted.weights_blob is not None:
            raw.update_from_blob(extracted.weights_blob)
        elif extracted.stored_weights:
            give_weights(raw, read_stored(raw.name, extracted))
    if given is not None:
        given.write(raw, reading)
    missing = raw.missing_constants()
    if missing:
        raise MissingWeightsError(
            f"{raw.name}: the package brings no weights for {shortened(missing)}. Give them: "
            "load(..., "
            'weights="model.safetensors"), or a state dict. Or compile it with '
            "package_constants_in_so=True (the default), or with package_constants_on_disk_format "
            "set."
        )


def give_weights(raw: RawContainer, weights: dict[str, torch.Tensor]) -> None:
    """Write weights into a container's active buffer. The tensors may be on the host."""
    from_cpu = (
        raw.device_type != "cpu" and raw.takes_from_cpu and all(t.is_cpu for t in weights.values())
    )
    if raw.device_type != "cpu" and not from_cpu:
        stay = raw.on_host if raw.ready(inactive=False) else ()
        weights = {fqn: t.cpu() if fqn in stay else t.to(raw.device) for fqn, t in weights.items()}
    raw.update(weights, inactive=False, from_cpu=from_cpu)


def read_stored(name: str, extracted: Extracted) -> dict[str, torch.Tensor]:
    """Return the pickled weights by FQN.

    Only tensors are unpickled (`weights_only`), each file once.

    Raises:
        LoadError: A file is no torch.save file of a tensor, or too small for the recorded view.
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
