"""Scripted C models as containers, and what C holds of tensors."""

from aoti_sched.backends.contracts import CRun, Work
from tests.native.library import Container, library


class CModel:
    """A container that C runs as its script says; `own` is what becomes of its outputs."""

    def __init__(
        self, inputs=1, outputs=1, *, function="model_run", own=lambda outputs: outputs, **script
    ):
        self.script = Container(**{"stolen": 2**inputs - 1, "passes_on": 1, **script})
        self.detach_outputs = own
        self.c_run = CRun(
            name="model 'scripted'",
            run=library().address(function),
            container=self.script.address,
            num_inputs=inputs,
            num_outputs=outputs,
            last_error=library().address("model_last_error"),
        )

    def work(self, *inputs, token=None, threads=1):
        return Work(self, inputs, threads, token)


class Gated(CModel):
    def __init__(self):
        super().__init__(0, 0, gated=1)

    def wait_until_inside(self, runs=1):
        library().wait_until_inside(self.script, runs)

    def open_gate(self):
        library().open_gate(self.script)


def handles(tensor):
    """How many references to a tensor C holds."""
    return tensor._use_count() - 1
