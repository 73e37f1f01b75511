"""What running a module shows before it is compiled: least sizes, rows, and whether it was
exported right. Nothing is compiled.
"""

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from aoti_sched.child import can_fork
from aoti_sched.compile import _check_outputs, _with_batch, describe
from aoti_sched.errors import CompileError
from aoti_sched.model.findings import Findings, separated
from aoti_sched.model.specs import DynamicDim, TensorSpec

# torch's exporter copies call specs through a class that torch itself deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.skipif(not can_fork(), reason="trials run in forked children"),
]

ROWS, ANY = {0: Dim("rows")}, {0: Dim.AUTO}
X = torch.linspace(-1, 1, 12).reshape(4, 3)


def module(function):
    class Module(nn.Module):
        forward = staticmethod(function)

    return Module().eval()


def found(model, *args, dynamic=ROWS, batch_dim=None):
    """The spec that `compile_package` would store, but for what only the compiled code can show."""
    model = model if isinstance(model, nn.Module) else module(model)
    with torch.no_grad():
        arguments = separated(args, {}, model)
        shapes = dynamic if isinstance(dynamic, tuple) else tuple(dynamic for _ in args)
        program = export(model, arguments[0], dynamic_shapes=shapes)
        _check_outputs(program)
        functional = program.run_decompositions({})
        spec = describe(program)
        findings = Findings(model, arguments, program, functional, spec, shapes)
        assert findings.disagreement() == ""
        spec = findings.merged()
        findings.try_sizes()
        return findings.with_minima(_with_batch(spec, findings, batch_dim))


def rows_of(spec):
    return spec.inputs[0].shape[0]


# --- least sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "least", "why"),
    [
        (lambda x: x * 2, 0, ""),
        (lambda x: x.sum(1), 0, ""),
        (lambda x: x[:2] + 1, 2, "has size 1, and 2 is compiled in"),
        (lambda x: x[1] - x[0], 2, "the module itself raises IndexError"),
        (lambda x: x[-1] * 2, 1, "the module itself raises IndexError"),
        (lambda x: x.squeeze(0) * 2, 2, "is compiled in"),
        (lambda x: x.argmax(0), 1, "the module itself raises IndexError"),
    ],
    ids=["pointwise", "reduced", "sliced", "indexed", "last", "squeezed", "argmax"],
)
@pytest.mark.parametrize("dynamic", [ROWS, ANY], ids=["Dim", "AUTO"])
def test_a_size_is_admitted_where_running_it_shows_that_it_is_right(function, least, why, dynamic):
    dim = rows_of(found(function, X, dynamic=dynamic))
    assert dim.min == least
    assert why in dim.reason
    assert bool(dim.reason) == bool(why)


def test_a_multiple_has_its_least_from_what_it_is_a_multiple_of():
    spec = found(
        lambda x: x.reshape(-1, 2)[0] * 2, torch.ones(8), dynamic={0: 2 * Dim("half", max=9)}
    )
    assert (rows_of(spec).scale, rows_of(spec).min, rows_of(spec).max) == (2, 2, 18)


def test_what_the_user_says_a_size_is_at_least_stands():
    for dim in (Dim("rows", min=2), Dim.DYNAMIC(min=2)):
        assert rows_of(found(lambda x: x * 2, X, dynamic={0: dim})).min == 2


def test_trials_change_neither_the_module_nor_the_random_state():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("runs", torch.zeros(3))

        def forward(self, x):
            self.runs.add_(1)
            return nn.functional.dropout(x, 0.5, training=True) + self.runs

    counter, before = Counter(), torch.random.get_rng_state()
    spec = found(counter, X)
    assert counter.runs.tolist() == [0, 0, 0]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (rows_of(spec).min, spec.batch, spec.rows.independent) == (0, None, None)


def test_a_request_too_large_to_be_tried_gets_no_small_sizes(monkeypatch):
    monkeypatch.setattr("aoti_sched.model.findings.LARGEST", 16)
    dim = rows_of(found(lambda x: x * 2, X))
    assert dim.min == 2
    assert "were not tried: the example has" in dim.reason


# --- rows -----------------------------------------------------------------------------------------

ATTENTION = {"d_model": 16, "nhead": 2, "dim_feedforward": 32}


def block(dtype, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(**ATTENTION, **options).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_ordinary_models_are_independent(dtype):
    tokens = torch.linspace(-2, 2, 3 * 5 * 16).reshape(3, 5, 16).to(dtype)
    for model in (
        block(dtype, batch_first=True),
        nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4)).to(dtype),
    ):
        spec = found(model, tokens)
        assert spec.rows.independent, spec.rows.reason
        assert spec.batch is not None


def test_rows_of_convolutions_and_of_norms_that_serve_are_independent():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )
    assert (
        found(model.eval(), torch.linspace(-1, 1, 3 * 2 * 25).reshape(3, 2, 5, 5)).batch is not None
    )


INFLUENCE = {
    "mean": lambda x: x - x.mean(0),
    "cumsum": lambda x: x.cumsum(0),
    "flip": lambda x: x.flip(0),
    "softmax": lambda x: x.softmax(0),
    "scale": lambda x: x / x.abs().max(),
    "batch norm": lambda x: nn.functional.batch_norm(x, None, None, training=True),
    "position": lambda x: x + torch.arange(x.shape[0])[:, None],
}


@pytest.mark.parametrize("function", INFLUENCE.values(), ids=INFLUENCE)
def test_rows_that_influence_each_other_are_no_batch(function):
    spec = found(function, X)
    assert (spec.batch, spec.rows.independent) == (None, False)
    with pytest.raises(
        CompileError, match=r"batch_dim=0: requests can't be batched\. Rows influence each other"
    ):
        found(function, X, batch_dim=0)


class Capacity(nn.Module):
    """Experts that take eight rows each; other rows are dropped."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(3, 2)

    def forward(self, x):
        chosen = nn.functional.one_hot(self.gate(x).argmax(-1), 2)
        place = (chosen.cumsum(0) * chosen).sum(-1, keepdim=True)
        return x * (place <= 8)


SELDOM = {
    "max": lambda x: torch.where(x.max() > 100, 0.0, x),
    "any": lambda x: torch.where(x.isnan().any(), 0.0, x),
    "linalg_vector_norm": lambda x: x * (50 / x.norm().clamp(min=50)),
    "select": lambda x: torch.where(x[0] > 100, 0.0, x),
    "cumsum": Capacity(),
    "eq": lambda x: x * (x[:, None, 0] == x[:, 0]).sum(1, keepdim=True),
    "sum": lambda x: torch.cond(x.shape[0] > 30, lambda x: x - x.sum(0), lambda x: x * 2, (x,)),
    "amax": lambda x: x * (x[x[:, 0] > 100].new_zeros(1) + (x[x[:, 0] > 0] - 1).amax(0) < 100),
}


@pytest.mark.parametrize(("operator", "function"), SELDOM.items(), ids=SELDOM)
def test_rows_that_influence_each_other_for_few_values_only_are_no_batch(operator, function):
    spec = found(function, X)
    assert (spec.batch, spec.rows.independent) == (None, False)
    with pytest.raises(
        CompileError,
        match=rf"can't be batched\. Rows may influence each other: '{operator}' computes a value",
    ):
        found(function, X, batch_dim=0)


ROW_BY_ROW = {
    "shape": lambda x: x + torch.zeros_like(x[0]) + x.new_ones(x.shape[0], 3).all(),
    "unused": lambda x: (x.sum(), x * 2)[1],
    "scan": lambda x: x.cumsum(1) + x.cumsum(-1),
    "index": lambda x: x[torch.arange(x.shape[0]), x.argmax(1)],
    "flattened": lambda x: (x.reshape(-1, 1) * torch.ones(1, 3)).sum(1).reshape(x.shape),
    "chosen": lambda x: torch.zeros_like(x).index_add(
        0, (x[:, 0] > 0).nonzero()[:, 0], x[(x[:, 0] > 0).nonzero()[:, 0]] * 2
    ),
    "cond": lambda x: torch.cond(x.shape[0] > 3, lambda x: x + 1, lambda x: x + 1, (x,)),
}


@pytest.mark.parametrize("function", ROW_BY_ROW.values(), ids=ROW_BY_ROW)
def test_rows_that_only_look_as_if_they_met_are_a_batch(function):
    spec = found(function, X)
    assert spec.batch is not None, spec.rows.reason


@pytest.mark.parametrize("mask", [torch.ones(4, 1, dtype=torch.bool), torch.ones(4, 1).long()])
def test_a_mask_of_which_the_example_has_one_value_hides_nothing(mask):
    spec = found(lambda x, mask: torch.where(mask > 0, x, x.flip(0)), X, mask)
    assert (spec.batch, spec.rows.independent) == (None, False)


def test_a_faint_influence_shows_in_half_precision_too():
    assert found(lambda x: x + 1e-2 * x.mean(0), X.bfloat16()).rows.independent is False


def test_attention_over_the_batch_is_found():
    assert (
        found(block(torch.float32, batch_first=False), torch.rand(3, 5, 16)).rows.independent
        is False
    )


def test_equal_rows_of_an_example_hide_nothing():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(8, 4)

        def forward(self, ids):
            vectors = self.table(ids)
            return vectors - vectors.mean(0)

    assert found(Tokens(), torch.zeros(3, 5, dtype=torch.long)).rows.independent is False


def test_inputs_that_are_written_to_are_named_and_no_batch():
    spec = found(lambda cache, x: cache.add_(x), X.clone(), X)
    assert (spec.mutated_inputs, spec.batch) == (("cache",), None)
    with pytest.raises(CompileError, match="writes to its input 'cache'"):
        found(lambda cache, x: cache.add_(x), X.clone(), X, batch_dim=0)


def test_two_inputs_with_rows_of_their_own_are_a_batch_of_pairs():
    spec = found(lambda x, y: (x * 2, y + 1), X, torch.rand(4, 5), dynamic=ANY)
    first, second = (leaf.shape[0] for leaf in spec.inputs)
    assert first.symbol != second.symbol
    assert (spec.batch.dim, spec.batch.symbol) == (0, first.symbol)


def test_two_inputs_that_only_work_with_as_many_rows_have_one_symbol():
    @torch.library.custom_op("aoti_sched_findings::paired", mutates_args=())
    def paired(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    paired.register_fake(lambda x, y: torch.empty_like(x))
    spec = found(lambda x, y: paired(x, y) + 0, X, X + 1, dynamic=ANY)
    first, second = (leaf.shape[0] for leaf in spec.inputs)
    assert first.symbol == second.symbol == spec.batch.symbol


# --- examples -------------------------------------------------------------------------------------


def test_one_tensor_given_twice_is_two_inputs():
    args, kwargs = separated((X, [X, X[1:]]), {"again": {"x": X.t()}}, nn.Identity())
    tensors = [args[0], *args[1], kwargs["again"]["x"]]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 4
    assert [t.stride() for t in tensors] == [X.stride(), X.stride(), X.stride(), X.t().stride()]
    assert all(torch.equal(t, like) for t, like in zip(tensors, [X, X, X[1:], X.t()], strict=True))
    found(lambda x, y: x - 2 * y, X, X)


def test_an_example_that_is_a_weight_of_the_module_is_copied():
    linear = nn.Linear(3, 3)
    (weight,), _ = separated((linear.weight,), {}, linear)
    assert weight.data_ptr() != linear.weight.data_ptr()


def test_a_program_that_is_not_the_module_is_refused():
    model = module(lambda x: x * 2)
    with torch.no_grad():
        other = export(module(lambda x: x * 3), (X,), dynamic_shapes=(ROWS,))
        functional = other.run_decompositions({})
        spec = describe(other)
        assert (
            Findings(model, ((X,), {}), other, functional, spec, (ROWS,)).disagreement()
            == "output 0 has other values"
        )


def test_examples_are_kept_as_far_as_making_another_takes():
    spec = found(lambda x, lengths: x * lengths[:, None], X, torch.tensor([3, 1, 2, 3]))
    floats, lengths = spec.examples
    assert (floats.shape, floats.low, floats.high, floats.values) == ((4, 3), -1.0, 1.0, None)
    assert (lengths.low, lengths.high, lengths.values) == (1.0, 3.0, (3, 1, 2, 3))


# --- outputs and inputs of other kinds ------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "name"), [(lambda x: x.topk(2), "topk"), (lambda x: x.max(1), "max")]
)
def test_a_structure_of_torchs_own_is_refused_with_what_to_do(function, name):
    with pytest.raises(CompileError, match=rf"torch.return_types.{name}.*Return a tuple or a dict"):
        found(function, X)


@pytest.mark.parametrize(
    ("example", "strides"),
    [
        (torch.ones(4, 8)[:, :3], (8, 1)),
        (torch.ones(8, 3)[::2], (6, 1)),
        (torch.ones(1, 3).expand(4, 3), (0, 1)),
        (torch.ones(20).as_strided((4, 3), (2, 1)), (2, 1)),
    ],
    ids=["columns", "every second", "expanded", "overlapping"],
)
def test_strides_of_an_example_that_is_not_dense_are_stored(example, strides):
    spec = found(lambda x: x + 1, example)
    assert (spec.inputs[0].order, spec.inputs[0].strides) == (None, strides)
    assert spec.batch is None


def test_a_stride_that_is_a_multiple_of_a_size_is_stored_as_one():
    both = {0: Dim("rows"), 1: Dim("length")}
    leaf = found(lambda x: x + 1, torch.ones(4, 5, 8)[..., :6], dynamic=both).inputs[0]
    assert isinstance(leaf, TensorSpec)
    step = leaf.strides[0]
    assert isinstance(step, DynamicDim)
    assert (step.symbol, step.scale, leaf.strides[1:]) == ("length", 8, (8, 1))


def test_strides_that_depend_on_several_sizes_are_refused():
    all_three = {0: Dim("a"), 1: Dim("b"), 2: Dim("c")}
    with pytest.raises(
        CompileError, match=r"is not dense, and its strides.*Pass example\.contiguous"
    ):
        found(lambda x: x + 1, torch.ones(4, 5, 6, 8)[..., :6], dynamic=all_three)
