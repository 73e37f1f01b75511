"""`BareModel`: one executable copy of a model on the CPU, without a container, locks or folding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import byref, c_size_t, c_void_p

import torch

from aoti_sched.backends.aoti.c_abi import handle_array
from aoti_sched.backends.aoti.constant_map import entries
from aoti_sched.backends.aoti.handles import free, handles_of, tensors_of
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.errors import (
    InputMismatchError,
    LoadError,
    MissingWeightsError,
    RunError,
    RunnerClosedError,
)


class BareModel:
    """A model beside a container of the same library, from which the constants' layout is known.

    The model has its own set of constants: a copy of the container's, or `tensors`, a full set by
    FQN, which the model keeps. Only one call may go on at a time.

    Raises:
        LoadError: The model needs folding or is not for the CPU, a tensor does not fit, or the
            runtime refused.
        MissingWeightsError: The container has no weights, or `tensors` is not a full set.
    """

    def __init__(
        self, container: RawContainer, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self._container = container
        self._library = container.library
        self._handle: int | None = None
        if container.device_type != "cpu":
            raise LoadError(
                f"{container.name}: a bare model runs on the CPU, and this is for "
                f"{container.device_type}"
            )
        folded = [c.spec.fqn for c in container.constants if c.spec.folded]
        if folded:
            raise LoadError(
                f"{container.name}: a bare model never folds, and {folded[0]!r} must be folded"
            )
        if missing := container.missing_constants():
            raise MissingWeightsError(
                f"{container.name}: give the container its weights first, which tells their "
                f"shapes; {missing[0]!r} is missing"
            )
        handle = c_void_p()
        # The constants could be given here, but the runtime then finds none of them when it runs.
        self._library.call("AOTInductorModelCreateV2", byref(handle), None, 0)
        self._handle = handle.value
        try:
            self.update(container.extract() if tensors is None else tensors)
        except BaseException:
            self.close()
            raise

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Run once. Only the number of inputs is checked.

        Raises:
            InputMismatchError, RunError: As `RawContainer.run` raises them.
        """
        wanted = self._container.num_inputs
        if len(tensors) != wanted:
            raise InputMismatchError(
                self._container.name, "", f"{wanted} tensors", f"{len(tensors)}"
            )
        run = self._library.function("AOTInductorModelRun")
        model = self._open()
        outputs = handle_array(self.num_outputs())()
        inputs = handle_array(wanted)(*handles_of(list(tensors)))
        if run(model, inputs, outputs):
            free(inputs)
            free(outputs)
            raise RunError(f"{self._container.name}: the run failed: {self._library.root_cause()}")
        return tensors_of(outputs)

    def num_outputs(self) -> int:
        count = c_size_t()
        self._library.call("AOTInductorModelGetNumOutputs", self._open(), byref(count))
        return count.value

    def update(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the whole set of constants.

        The model reads the tensors' own memory where they lie as compiled.

        Raises:
            LoadError, MissingWeightsError: As `RawContainer.update` raises them.
        """
        ready = self._container.prepared(
            {**self._container.made_by_compiler(), **tensors}, full=True
        )
        update = self._library.function("AOTInductorModelUpdateConstantsMapV2")
        model = self._open()
        handles = handles_of([tensor for _, tensor in ready])
        if update(model, entries(ready, handles), len(ready)):  # which steals the handles
            raise LoadError(
                f"{self._container.name}: the update failed: {self._library.root_cause()}"
            )

    def close(self) -> None:
        """Free the model. Closing twice does nothing."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            self._library.call("AOTInductorModelDelete", handle)

    def _open(self) -> int:
        if self._handle is None:
            raise RunnerClosedError(f"{self._container.name}: the bare model is closed")
        return self._handle
