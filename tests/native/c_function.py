"""A function of Python as a model that C runs: through it the lanes are held to the same
contracts as Python's threads.
"""

import ctypes
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int32, c_size_t, c_void_p

from aoti_sched.backends.aoti.handles import handles_of, tensors_of
from aoti_sched.backends.contracts import CRun, HostContainer
from aoti_sched.backends.executors.batches import Staging

_Run = CFUNCTYPE(
    c_int32, c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_void_p), c_size_t, c_void_p, c_void_p
)
_LastError = CFUNCTYPE(c_int32, POINTER(c_char_p))


class CFunction(HostContainer):
    """A container whose run calls `function` with the tensors that C gives it.

    An exception is the runtime's failure.
    """

    def __init__(self, function, inputs, outputs, own):
        self.function = function
        self.detach_outputs = own
        self.staging = Staging("model 'rows'")
        self._error = b""
        self._run = _Run(self._call)
        self._last_error = _LastError(self._explain)
        self.c_run = CRun(
            name="model 'rows'",
            run=ctypes.cast(self._run, c_void_p).value,
            container=0,
            num_inputs=inputs,
            num_outputs=outputs,
            last_error=ctypes.cast(self._last_error, c_void_p).value,
        )

    def run_raw(self, inputs):
        return self.detach_outputs(self.function(*inputs))

    def _call(self, container, inputs, num_inputs, outputs, num_outputs, stream, proxy_executor):
        stolen = [inputs[i] for i in range(num_inputs)]
        for i in range(num_inputs):
            inputs[i] = None
        try:
            made = self.function(*tensors_of(stolen))
            # As the runtime does: a tensor that is several outputs has one handle.
            there = {id(tensor): tensor for tensor in made if tensor is not None}
            handles = dict(zip(there, handles_of([*there.values()]), strict=True))
            for i, tensor in enumerate(made):
                outputs[i] = handles.get(id(tensor))
        except Exception as error:  # noqa: BLE001 -- as the runtime does
            self._error = str(error).encode()
            return 1
        return 0

    def _explain(self, text):
        text[0] = self._error
        return 0
