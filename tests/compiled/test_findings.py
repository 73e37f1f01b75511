"""What running the compiled code beside its module shows: the sizes for which both agree."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from aoti_sched.child import can_fork
from aoti_sched.compile import describe
from aoti_sched.model.findings import Findings
from tests.models import build

# torch's exporter copies call specs through a class that torch itself deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.skipif(not can_fork(), reason="trials run in forked children"),
]


class OtherForOneRow(nn.Module):
    """A module whose compiled code is right except for one row."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) + (x.shape[0] == 1)


def of_compiled(module, library):
    """Return the dimension of rows that is found for a module beside code compiled from `mlp`."""
    model = build("mlp")
    shapes = {"x": {0: Dim("batch", max=64)}}
    with torch.no_grad():
        program = export(model.module(), model.args, dynamic_shapes=shapes)
        functional = program.run_decompositions({})
        spec = describe(program)
        findings = Findings(module, (model.args, {}), program, functional, spec, shapes)
        findings.try_sizes() if library is None else findings.try_compiled(library)
        return findings.with_minima(spec).inputs[0].shape[0]


def test_what_the_compiled_code_does_decides():
    library = build("mlp").library()
    assert of_compiled(build("mlp").module(), library).min == 0
    dim = of_compiled(OtherForOneRow(build("mlp").module()), library)
    assert (dim.min, dim.reason) == (
        2,
        "With 1 for 'batch', the compiled code is wrong: output 0 has other values.",
    )


def test_what_was_not_tried_is_not_admitted(tmp_path):
    dim = of_compiled(build("mlp").module(), tmp_path / "no such library.so")
    assert (dim.min, dim.reason) == (2, "With 1 for 'batch', no run was tried.")
