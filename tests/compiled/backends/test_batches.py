"""Batches of really compiled models give each request what it gets alone, on each executor."""

import contextlib
import importlib.util

import pytest
import torch

from aoti_sched.backends.contracts import LoadRequest, Work
from aoti_sched.backends.cpu import CpuDevice
from aoti_sched.backends.executors.batches import Batch
from aoti_sched.backends.executors.choose import CHOICE
from aoti_sched.errors import RunError
from aoti_sched.model.batch_plan import BatchPlan, InputPlan, OutputPlan, RaggedOut
from tests.compiled.backends.conftest import heap_bytes
from tests.compiled.backends.executor_contract import collect

BUILT = importlib.util.find_spec("aoti_sched.backends.native._native") is not None

MATRIX, VECTOR = InputPlan(0, (0, 1)), InputPlan(0, (0,))
ROWS = OutputPlan(0)


def floats(width):
    return lambda rows: [torch.randn(rows, width)]


def of_each_dtype(rows):
    return [
        torch.randint(-9, 9, (rows,)),
        torch.rand(rows) < 0.5,
        torch.randn(rows, dtype=torch.bfloat16),
        torch.randn(rows, dtype=torch.float16),
        torch.randn(rows, dtype=torch.float64),
    ]


MODELS = {
    "mlp": (BatchPlan((MATRIX,), (ROWS,)), floats(8), 64),
    "unbounded": (BatchPlan((MATRIX,), (ROWS,)), floats(3), 100),
    "zero_rows": (BatchPlan((MATRIX,), (ROWS,)), floats(3), 16),
    "frozen": (BatchPlan((MATRIX,), (ROWS,)), floats(32), 32),
    "dtypes": (BatchPlan((VECTOR,) * 5, (ROWS,) * 5), of_each_dtype, 70),
    "failing": (BatchPlan((VECTOR,), (ROWS,)), lambda rows: [torch.randint(0, 10, (rows,))], 64),
}
"""How requests of each model that has a dimension of rows are put together, how one is made,
and the most rows.
"""


@pytest.fixture(
    params=[
        "threads",
        pytest.param("native", marks=pytest.mark.skipif(not BUILT, reason="not built")),
    ]
)
def executor(request, monkeypatch):
    monkeypatch.setenv(CHOICE, request.param)
    with contextlib.closing(CpuDevice().open_executor(2)) as executor:
        yield executor


@pytest.fixture
def load(built, tmp_path):
    with contextlib.ExitStack() as stack:

        def load(name):
            path = built(name).path
            request = LoadRequest(
                name=name, path=path, model_name=None, instances=2, sha256=None, cache_dir=tmp_path
            )
            device = CpuDevice()
            container = device.load(device.inspect(request))
            return stack.enter_context(contextlib.closing(container))

        yield load


def run_everywhere(executor, container, batch):
    """What a batch gives on each lane and on the calling thread."""
    for lane in range(executor.lanes):
        executor.submit(lane, Work(container, (), 1, lane, batch))
        (completion,) = collect(executor, 1)
        yield completion
    yield executor.run_here(Work(container, (), 1, None, batch))


def alone(container, inputs):
    return container.run_raw(inputs)


def close(one, other):
    """A batch may be computed by another kernel than one request: the last bits may differ."""
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("detach", [False, True])
def test_each_request_of_a_batch_gets_what_it_gets_alone(executor, load, name, detach):
    plan, make, most = MODELS[name]
    plan = BatchPlan(plan.inputs, plan.outputs, detach)
    container = load(name)
    for rows in ([1], [1, 1], [2, 1, 3], [1] * (most - 2), [most // 2, 1, most - most // 2 - 1]):
        members = [make(count) for count in rows]
        expected = [alone(container, inputs) for inputs in members]
        for padded in {sum(rows), min(most, sum(rows) + 2)}:
            for completion in run_everywhere(
                executor, container, Batch(plan, members, rows, padded, 0)
            ):
                assert completion.error is None
                for outputs, wanted in zip(completion.outputs, expected, strict=True):
                    close(outputs, wanted)


def test_requests_of_different_lengths_are_padded_and_masked(executor, load):
    container = load("attention")
    plan = BatchPlan(
        (InputPlan(0, (0, 1, 2), ragged=(1,)), InputPlan(0, (0, 1), ragged=(1,), pad=False)),
        (OutputPlan(0, ragged=(RaggedOut(dim=1, input=0, input_dim=1),)),),
    )
    members = [
        [torch.randn(rows, length, 16), torch.ones(rows, length, dtype=torch.bool)]
        for rows, length in ((1, 7), (2, 3), (1, 12), (1, 1))
    ]
    expected = [alone(container, inputs) for inputs in members]
    for padded in (5, 8):
        for completion in run_everywhere(
            executor, container, Batch(plan, members, [1, 2, 1, 1], padded, 0)
        ):
            assert completion.error is None
            for outputs, wanted in zip(completion.outputs, expected, strict=True):
                close(outputs, wanted)


def test_a_request_that_the_model_fails_on_fails_its_batch_with_torchs_reason(executor, load):
    container = load("failing")
    plan, make, _ = MODELS["failing"]
    bad = Batch(plan, [make(1), [torch.tensor([11])], make(1)], [1, 1, 1], 3, 0)
    for completion in run_everywhere(executor, container, bad):
        assert isinstance(completion.error, RunError)
        assert "index out of bounds" in str(completion.error)
    good = Batch(plan, [make(1), make(2)], [1, 2], 3, 0)
    assert all(completion.error is None for completion in run_everywhere(executor, container, good))


def test_an_output_that_is_of_no_batch_fails_it(executor, load):
    container = load(
        "folded_output"
    )  # its first output is as large as a weight is, whatever comes in
    plan = BatchPlan((MATRIX,), (ROWS, ROWS))
    batch = Batch(plan, [[torch.randn(1, 4)], [torch.randn(2, 4)]], [1, 2], 3, 0)
    for completion in run_everywhere(executor, container, batch):
        assert str(completion.error) == (
            "model 'folded_output': the run failed: output 0 of a batch has 4 rows in dimension "
            "0, expected 3"
        )


def test_custom_operators_run_in_batches(executor, load):
    container = load("custom_op")
    plan = BatchPlan((VECTOR,), (ROWS,))
    members = [[torch.randn(1)], [torch.randn(3)]]
    expected = alone(container, [torch.cat([one for (one,) in members])])[0]
    for completion in run_everywhere(executor, container, Batch(plan, members, [1, 3], 4, 0)):
        assert completion.error is None
        close([output for (output,) in completion.outputs], list(expected.split([1, 3])))


def test_closing_a_container_gives_the_memory_of_its_batches_back(executor, load):
    container = load("unbounded")
    plan = BatchPlan((MATRIX,), (ROWS,), detach_rows=True)
    one = torch.zeros(1 << 20, 3)
    before = heap_bytes()
    for slot in range(2):
        for completion in run_everywhere(
            executor, container, Batch(plan, [[one]], [one.shape[0]], one.shape[0], slot)
        ):
            assert completion.error is None
    del completion
    assert heap_bytes() - before > 20 << 20
    container.close()
    assert heap_bytes() - before < 4 << 20
