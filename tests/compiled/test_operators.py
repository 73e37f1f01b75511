"""Operators without a C function, torch's own and custom ones: such models run as all others
do, without the GIL.
"""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest
import torch
from torch.testing import assert_close

from aoti_sched import Batching, LoadError, RunError, Scheduler, UpdateError
from aoti_sched.backends.aoti import operators, proxy_executor
from tests.compiled.conftest import EXECUTORS, NATIVE
from tests.inside import container_of
from tests.models import build

needs_native = pytest.mark.skipif(not NATIVE, reason="no native module was built")

ALGEBRA = (
    "Calls aten::_linalg_svd, aten::linalg_inv_ex, aten::_linalg_check_errors through torch's "
    "dispatcher"
)


@pytest.fixture(params=EXECUTORS)
def executor(request, monkeypatch):
    monkeypatch.setenv("AOTI_SCHED_EXECUTOR", request.param)
    return request.param


@pytest.fixture
def without_an_executor(monkeypatch):
    """As where nothing was compiled at installation."""
    monkeypatch.setattr(proxy_executor, "_empty_model", lambda: None)


def matrices(count):
    return torch.rand(count, 24, 24)


@torch.no_grad()
def eager(built, *args):
    return built.module()(*args)


async def load(scheduler, name, **settings):
    built = build(name)
    return built, await scheduler.load(built.path, name=name, **settings)


@needs_native
@pytest.mark.parametrize("placement", ["lane", "inline"])
async def test_torchs_own_operators_run_through_the_c_abi_and_give_what_eager_gives(
    executor, placement
):
    async with Scheduler() as scheduler:
        built, runner = await load(scheduler, "linear_algebra", instances=2, placement=placement)
        assert (runner.info.runtime, runner.info.gil) == ("c_abi", "released")
        (note,) = (note for note in runner.info.notes if "dispatcher" in note)
        assert note.startswith(ALGEBRA)
        assert "custom" not in note
        inputs = [matrices(1 + count % 3) for count in range(8)]
        results = await asyncio.gather(*(runner.run(x) for x in inputs))
        for x, result in zip(inputs, results, strict=True):
            assert_close(result, eager(built, x), atol=1e-4, rtol=1e-4)


@needs_native
async def test_they_do_not_hold_the_loop(executor):
    """Were the GIL held for the run, no turn of the loop would be between its beginning and its
    end.
    """
    async with Scheduler() as scheduler:
        _, runner = await load(scheduler, "linear_algebra", placement="lane")
        x = matrices(1024)
        shares = []
        for _ in range(10):  # another process may have the core for a while
            stamps = [time.monotonic()]
            future = runner.submit(x)
            while not future.done():
                await asyncio.sleep(0)
                stamps.append(time.monotonic())
            trace = future.trace
            longest = max(later - earlier for earlier, later in itertools.pairwise(stamps))
            shares.append(longest / (trace.finished - trace.started))
            if shares[-1] < 0.5:
                return
        raise AssertionError(f"the loop stood still for these shares of a run: {shares}")


@needs_native
@pytest.mark.parametrize("placement", ["lane", "inline"])
async def test_they_are_batched_and_what_fails_in_a_batch_fails_alone(executor, placement):
    async with Scheduler() as scheduler:
        built, runner = await load(
            scheduler, "linear_algebra", placement=placement, batching=Batching(dim=0)
        )
        inputs = [matrices(1) for _ in range(12)]
        futures = [runner.submit(x) for x in inputs]
        for x, result in zip(inputs, await asyncio.gather(*futures), strict=True):
            assert_close(result, eager(built, x), atol=1e-4, rtol=1e-4)
        assert max(future.trace.batch_size for future in futures) > 1
        inputs[5] = -10 * torch.eye(24)[None]  # which has no inverse
        results = await asyncio.gather(*(runner.submit(x) for x in inputs), return_exceptions=True)
        error = results.pop(5)
        del inputs[5]
        assert isinstance(error, RunError)
        assert "the input matrix is singular" in str(error)
        assert "API call failed" not in str(error)
        for x, result in zip(inputs, results, strict=True):
            assert_close(result, eager(built, x), atol=1e-4, rtol=1e-4)


@needs_native
async def test_weights_are_replaced_and_rolled_back_while_they_serve(executor):
    async with Scheduler() as scheduler:
        built, runner = await load(scheduler, "linear_algebra", instances=2, placement="lane")
        x = matrices(3)
        before = await runner.run(x)
        scale = built.module().scale.detach()
        running = [runner.submit(x) for _ in range(6)]
        await runner.update({"scale": scale * 3})
        after, _ = await runner.run(x)
        assert_close(after, before[0] * 3, atol=1e-4, rtol=1e-4)
        for values, _ in await asyncio.gather(*running):
            assert any(torch.allclose(values, before[0] * factor, atol=1e-3) for factor in (1, 3))
        await runner.rollback()
        assert_close(await runner.run(x), before)
        assert_close((await runner.extract())["scale"], scale)


@needs_native
async def test_a_container_that_is_parked_or_built_anew_calls_them_still(executor):
    async with Scheduler() as scheduler:
        _, runner = await load(scheduler, "linear_algebra", placement="lane")
        x = matrices(2)
        expected = await runner.run(x)
        container = container_of(runner)
        for again in (container.park, container.unpark, container.rebuild):
            await asyncio.to_thread(again)
        assert_close(await runner.run(x), expected)


@needs_native
@pytest.mark.parametrize("placement", ["lane", "inline"])
async def test_an_operator_that_is_written_in_python_runs_on_lanes_and_takes_the_gil_itself(
    executor, placement
):
    async with Scheduler() as scheduler:
        built, runner = await load(scheduler, "custom_op", instances=2, placement=placement)
        assert (runner.info.runtime, runner.info.gil) == ("c_abi", "held")
        (note,) = (note for note in runner.info.notes if "dispatcher" in note)
        assert (
            "Calls custom operators through torch's dispatcher: aoti_sched_tests::twice_plus_one."
            in note
        )
        assert "Written in Python" in note
        inputs = [torch.randn(4) for _ in range(64)]
        results = await asyncio.gather(*(runner.run(x) for x in inputs))
        assert_close(results, [eager(built, x) for x in inputs])


@needs_native
@pytest.mark.parametrize("placement", ["lane", "inline"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_such_an_operator_raises_fails_its_own_run(python, placement, executor):
    process = python(
        """
        import asyncio, sys, torch, aoti_sched

        @torch.library.custom_op("aoti_sched_tests::twice_plus_one", mutates_args=())
        def twice_plus_one(x: torch.Tensor) -> torch.Tensor:
            if x[0] < 0:
                raise ValueError("the operator's own words")
            return x * 2 + 1

        async def main():
            async with aoti_sched.Scheduler() as scheduler:
                runner = await scheduler.load(sys.argv[1], placement=sys.argv[2])
                x = torch.tensor([1.0, 2.0, 3.0, 4.0])
                before = await runner.run(x)
                for _ in range(100):
                    fails, works = runner.submit(-x), runner.submit(x)
                    try:
                        await fails
                    except aoti_sched.RunError as error:
                        text = str(error)
                    assert torch.equal(before, await works)
                print(text)
                print("served on")

        asyncio.run(main())
        """,
        build("custom_op").path,
        placement,
        AOTI_SCHED_EXECUTOR=executor,
    )
    assert process.returncode == 0, process.stderr
    assert "ValueError: the operator's own words" in process.stdout
    assert "served on" in process.stdout


@needs_native
@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_interpreter_ends_while_such_an_operator_runs_on_a_lane(python, executor):
    process = python(
        """
        import asyncio, atexit, os, sys, threading, torch, aoti_sched

        entered, ends = threading.Event(), threading.Event()
        atexit.register(ends.set)  # later than the package's own handler, so called before it

        @torch.library.custom_op("aoti_sched_tests::twice_plus_one", mutates_args=())
        def twice_plus_one(x: torch.Tensor) -> torch.Tensor:
            entered.set()
            assert ends.wait(60)
            for _ in range(1000):
                x = x + 0  # the GIL goes to and fro
            return x * 2 + 1

        async def main():
            scheduler = await aoti_sched.Scheduler().__aenter__()
            runner = await scheduler.load(sys.argv[1], placement="lane", warmup=False)
            runner.submit(torch.ones(4))
            await asyncio.to_thread(entered.wait)
            return scheduler

        loop = asyncio.new_event_loop()
        kept = loop.run_until_complete(main())
        print("the end", flush=True)
        """,
        build("custom_op").path,
        AOTI_SCHED_EXECUTOR=executor,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "the end"
    assert "Fatal" not in process.stderr


async def test_without_the_native_module_torchs_own_runner_calls_them_which_is_said(
    without_an_executor, executor
):
    async with Scheduler() as scheduler:
        built, runner = await load(scheduler, "linear_algebra", instances=2)
        assert runner.info.runtime == "torch runner"
        (note,) = (note for note in runner.info.notes if "runner" in note)
        assert note.startswith(ALGEBRA)
        assert (
            "torch's proxy executor can't be had alone (it was installed without the native module)"
            in note
        )
        x = matrices(2)
        assert_close(await runner.run(x), eager(built, x), atol=1e-4, rtol=1e-4)
        with pytest.raises(
            UpdateError, match="it runs through torch's own runner, which can't undo"
        ):
            await runner.update({"scale": torch.ones(16)})


@needs_native
def test_torchs_runner_has_nothing_to_say_of_the_empty_model(capfd):
    """It warns of functions that a model lacks, on stderr."""
    made, why_not = proxy_executor.open_proxy_executor(
        "model 'm'", "cpu", build("linear_algebra").library()
    )
    assert (made.address > 0, why_not) == (True, "")
    assert capfd.readouterr() == ("", "")


@needs_native
def test_where_no_temporary_directory_can_be_made_torchs_own_runner_is_left(monkeypatch):
    monkeypatch.setattr(proxy_executor.tempfile, "tempdir", "/nonexistent")
    made, why_not = proxy_executor.open_proxy_executor(
        "model 'm'", "cpu", build("linear_algebra").library()
    )
    assert made is None
    assert "no temporary directory can be used" in why_not


@needs_native
def test_an_operator_of_torchs_own_that_is_not_there_means_another_torch(tmp_path):
    library = tmp_path / "model.so"
    (tmp_path / "model.json").write_text(
        '{"nodes": [{"name": "b", "node": {"target": "aten::no_such", "inputs": [], "outputs": '
        '[], "metadata": {}}}]}'
    )
    with pytest.raises(
        LoadError,
        match=r"can't call its operators: .*aten::no_such\. Compile it again with this torch",
    ):
        proxy_executor.open_proxy_executor("model 'm'", "cpu", library)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"nodes": [{"node": {"target": "a::b"}}, {"node": {"target": "a::b"}}]}', ("a::b",)),
        ("{", ()),
        ('{"nodes": 7}', ()),
        ("[]", ()),
        (None, ()),
    ],
)
def test_the_list_of_operators_may_be_anything(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "model.json").write_text(content)
    assert operators.operators_of(tmp_path / "model.so") == expected


def test_a_note_names_few_operators_and_counts_the_others():
    own = [f"aten::a{number}" for number in range(20)]
    assert operators.sentence(own).startswith(
        "Calls aten::a0, aten::a1, aten::a2, aten::a3, aten::a4, aten::a5, aten::a6, aten::a7 and "
        "12 more through"
    )
    assert (
        operators.sentence(["my::own"])
        == "Calls custom operators through torch's dispatcher: my::own."
    )
    assert operators.sentence([]) == ""


def test_an_operator_is_in_python_when_a_function_of_python_does_its_work():
    build("custom_op")  # registers it
    library = torch.library.Library("aoti_sched_tests_more", "DEF")
    library.define("shapes_only(Tensor x) -> Tensor")
    library.impl("shapes_only", lambda x: x, "Meta")
    library.define("work.out(Tensor x) -> Tensor")
    library.impl("work.out", lambda x: x, "CPU")
    asked = [
        "aten::_linalg_svd",
        "aoti_sched_tests::twice_plus_one",
        "aoti_sched_tests_more::shapes_only",
        "aoti_sched_tests_more::work.out",
    ]
    assert operators.in_python(asked) == asked[1::2]
