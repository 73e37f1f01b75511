"""`RawContainer`: a container behind the C ABI, with Python's types, that can't end the process.

Every call blocks and releases the GIL. Runs may come from as many threads as there are instances.
`raw_constants.py` states which calls on the constants are allowed meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_char_p
from typing import Any

import torch

from aoti_sched.backends.aoti.c_abi import handle_array
from aoti_sched.backends.aoti.handles import free, handles_of, tensors_of
from aoti_sched.backends.aoti.raw_constants import RawConstants
from aoti_sched.backends.aoti.raw_handle import PREFIX
from aoti_sched.backends.contracts import CRun
from aoti_sched.errors import InputMismatchError, MissingWeightsError, RunError, shortened


class RawContainer(RawConstants):
    """A container of `instances` executable copies of one model.

    Args:
        library: The model's library.
        instances: How many runs may go on at once; at least 1.
        device: "cpu", "cuda:0", "xpu:0" or "mps".
        resources: The directory with the model's device code, where it has any.

    Raises:
        LoadError: The runtime could not make the container. The text is the root cause.
    """

    def _inspect(self) -> None:
        super()._inspect()
        self.input_names = self._names("GetNumInputs", "GetInputName")
        self.output_names = self._names("GetNumOutputs", "GetOutputName")
        self.num_inputs, self.num_outputs = len(self.input_names), len(self.output_names)
        self._inputs = handle_array(self.num_inputs)
        self._outputs = handle_array(self.num_outputs)
        self._run = self.library.function(PREFIX + "Run")

    def run(
        self, tensors: Sequence[torch.Tensor], *, stream: int | None = None
    ) -> list[torch.Tensor | None]:
        """Run once; None stands where an output is left out.

        Output tensors may be the inputs themselves.

        Only the number of inputs is checked here: a wrong dtype or size reads past buffers. Blocks
        while every instance is busy. The first run after an update also folds, alone.

        Raises:
            InputMismatchError: The number of tensors is wrong.
            MissingWeightsError: The active buffer lacks constants.
            RunError: The model failed. The text is the root cause. The caller keeps the inputs.
        """
        return self._run_with(self._run, tensors, stream)

    def c_run(self) -> CRun:
        """Return what C needs to run the model, for lanes that never touch Python.

        C checks nothing.
        """
        return CRun(
            name=self.name,
            run=self.library.address(PREFIX + "Run"),
            container=self._open(),
            num_inputs=self.num_inputs,
            num_outputs=self.num_outputs,
            last_error=self.library.address("AOTInductorGetLastError"),
            proxy_executor=self._proxy_executor() or 0,
        )

    def run_single_threaded(
        self, tensors: Sequence[torch.Tensor], *, stream: int | None = None
    ) -> list[torch.Tensor | None]:
        """Run on the first instance, without locks or events. No other call may go on meanwhile."""
        function = self.library.function(PREFIX + "RunSingleThreaded")
        return self._run_with(function, tensors, stream)

    def _run_with(
        self, function: Any, tensors: Sequence[torch.Tensor], stream: int | None
    ) -> list[torch.Tensor | None]:
        # The runtime throws across the C boundary for a wrong count, and reads null for a missing
        # constant.
        if len(tensors) != self.num_inputs:
            raise InputMismatchError(self.name, "", f"{self.num_inputs} tensors", f"{len(tensors)}")
        if not self._complete[0]:
            raise MissingWeightsError(
                f"{self.name}: {shortened(self.missing_constants())} have no values: the model was "
                "compiled without its weights, and none were loaded. Load it with weights=."
            )
        container = self._open()
        inputs = self._inputs(*handles_of(list(tensors)))
        outputs = self._outputs()
        proxy = self._proxy_executor()
        if function(container, inputs, self.num_inputs, outputs, self.num_outputs, stream, proxy):
            # What was stolen is null now; the rest is ours.
            free(inputs)
            free(outputs)
            raise RunError(f"{self.name}: the run failed: {self.library.root_cause()}")
        return tensors_of(outputs)

    def call_spec(self) -> tuple[str, str]:
        """Return the pytree specs of arguments and results as torch serializes them; "" if none."""
        in_spec, out_spec = c_char_p(), c_char_p()
        self._call("GetCallSpec", byref(in_spec), byref(out_spec))
        return (in_spec.value or b"").decode(), (out_spec.value or b"").decode()
