"""The names of a module's weights: what of its state a program uses, and which names are of one
tensor.
"""

from __future__ import annotations

import torch
from torch import nn

from aoti_sched.model.specs import spec_from_metadata, spec_to_metadata
from aoti_sched.model.weight_names import digest_of, names_of


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.tied = self.weight
        self.part = nn.Parameter(self.weight.data[:2])
        self.unused = nn.Parameter(torch.randn(4))
        self.register_buffer("runs", torch.zeros(1))
        self.register_buffer("scale", torch.randn(4), persistent=False)
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("none", None)

    def forward(self, x):
        self.runs.add_(1)  # an effect, though no output depends on it
        (x * self.unused).sum()
        return x * self.weight + self.scale


def names():
    module = Counting().eval()
    return {
        one.name: one for one in names_of(module, torch.export.export(module, (torch.randn(4),)))
    }


def test_what_reaches_no_output_and_has_no_effect_is_unused():
    assert {name for name, one in names().items() if one.used} == {
        "weight",
        "tied",
        "runs",
        "scale",
    }


def test_names_of_one_tensor_are_told_and_those_of_a_part_are_not():
    assert {name: one.same_as for name, one in names().items() if one.same_as} == {"tied": "weight"}


def test_what_a_state_dict_leaves_out_is_told():
    assert {name for name, one in names().items() if not one.persistent} == {"scale"}
    assert "none" not in names()


def test_a_digest_is_of_dtype_shape_and_values_and_of_no_layout():
    value = torch.randn(3, 4)
    assert digest_of(value) == digest_of(value.t().contiguous().t())
    others = [
        value.double(),
        value.reshape(4, 3),
        value + 1,
        value.view(torch.int32),
        torch.zeros(0),
        torch.zeros(0, 2),
    ]
    assert len({digest_of(one) for one in [value, *others]}) == 7
    assert digest_of(torch.zeros(1 << 20)) == digest_of(value.to_sparse()) == ""


def test_a_spec_brings_the_names_back():
    import msgspec

    from aoti_sched.model.specs import ModelSpec

    spec = ModelSpec(inputs=(), outputs=(), parameters=(), weights=tuple(names().values()))
    assert spec_from_metadata(spec_to_metadata(spec)) == spec
    old = {
        key: text.replace('"weights"', '"unknown"') for key, text in spec_to_metadata(spec).items()
    }
    assert spec_from_metadata(old) == msgspec.structs.replace(spec, weights=())
