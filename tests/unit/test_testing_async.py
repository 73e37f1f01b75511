"""The fake backend: waiting for what runs and is queued, async models, specs, configurations."""

import asyncio
import json
import time

import pytest
import structlog

import aoti_sched
from aoti_sched import Batching, ModelConfig, SchedulerConfig
from aoti_sched.testing import FakeBackend, ManualClock, fake_scheduler, settle
from tests.unit.package.files import metadata, model_members, zipped


@pytest.fixture(autouse=True)
def quiet_logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


# --- times ----------------------------------------------------------------------------------------


async def test_a_backend_without_a_clock_takes_the_schedulers():
    clock = ManualClock()

    def slow(text):
        clock.advance(0.5)
        return len(text)

    async with fake_scheduler(FakeBackend({"m": slow}, auto=True), clock) as scheduler:
        future = (await scheduler.load("m.pt2")).submit("ab")
        assert await future == 2
    assert (future.trace.queue_seconds, future.trace.run_seconds) == (0.0, 0.5)


async def test_without_any_clock_runs_have_real_times():
    def slow(text):
        time.sleep(0.01)
        return len(text)

    async with fake_scheduler(FakeBackend({"m": slow}, auto=True)) as scheduler:
        future = (await scheduler.load("m.pt2")).submit("ab")
        assert await future == 2
    trace = future.trace
    assert trace.queued <= trace.started < trace.finished <= trace.ended
    assert trace.run_seconds >= 0.01
    assert "; ran " in aoti_sched.explain(trace)


# --- running and queued ---------------------------------------------------------------------------


async def test_running_and_queued_are_numbers_and_waits(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = len
    runner = await aoti_scheduler.load("m.pt2")
    assert (aoti_backend.running, aoti_backend.queued) == (0, 0)
    tasks = [asyncio.ensure_future(runner.run("abc")) for _ in range(3)]
    await aoti_backend.running(1)
    await aoti_backend.queued(2)
    assert (aoti_backend.running, aoti_backend.queued) == (1, 2)
    await aoti_backend.step()
    assert (aoti_backend.running, aoti_backend.queued) == (1, 1)
    aoti_backend.finish_all()
    assert await asyncio.gather(*tasks) == [3, 3, 3]


async def test_waiting_for_requests_that_never_come_ends_in_words(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = len
    runner = await aoti_scheduler.load("m.pt2")
    future = runner.submit("abc")
    with pytest.raises(LookupError, match="1 requests were expected to be queued, 0 are"):
        await aoti_backend.queued(1, patience=0.0)
    await aoti_backend.step()
    assert await future == 3


async def test_a_backend_that_watches_no_scheduler_says_so():
    backend = FakeBackend({"m": len}, auto=True)
    with pytest.raises(LookupError, match=r"backend\.watch\(scheduler\)"):
        _ = backend.queued
    async with aoti_sched.Scheduler(devices={"cpu": backend}) as scheduler:
        backend.watch(scheduler)
        assert backend.queued == 0


# --- async models ---------------------------------------------------------------------------------


async def test_an_async_function_is_a_model():
    async def shout(text):
        await asyncio.sleep(0)
        return text.upper()

    async with fake_scheduler(FakeBackend({"m": shout}, auto=True)) as scheduler:
        runner = await scheduler.load("m.pt2")
        assert await runner.run("abc") == "ABC"


async def test_an_async_model_holds_its_lane_until_it_ends():
    gate = asyncio.Event()

    async def waits(text):
        await gate.wait()
        return text

    backend = FakeBackend({"m": waits}, auto=True, lanes=1)
    async with fake_scheduler(backend) as scheduler:
        runner = await scheduler.load("m.pt2", instances=2)
        first, second = runner.submit("a"), runner.submit("b")
        await backend.queued(1)
        assert (backend.running, first.done()) == (1, False)
        gate.set()
        assert [await first, await second] == ["a", "b"]
        assert backend.running == 0


async def test_a_step_starts_an_async_function_and_waits_for_its_end(aoti_backend, aoti_scheduler):
    seen = []

    async def model(x):
        seen.append(x)
        await asyncio.sleep(0)
        return x

    aoti_backend.models["m"] = model
    future = (await aoti_scheduler.load("m.pt2")).submit(1)
    await settle()
    assert seen == []
    await aoti_backend.step()
    assert (seen, future.done(), await future) == ([1], True, 1)


async def test_a_step_of_an_async_function_that_never_ends_says_so(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda: asyncio.get_running_loop().create_future()
    future = (await aoti_scheduler.load("m.pt2")).submit()
    with pytest.raises(LookupError, match="an async model was expected to end within"):
        await aoti_backend.step(patience=0.01)
    future.cancel()


async def test_an_async_function_that_raises_fails_its_own_run(aoti_backend, aoti_scheduler):
    async def fails(x):
        await asyncio.sleep(0)
        raise aoti_sched.RunError(f"no {x}")

    aoti_backend.models["m"] = fails
    future = (await aoti_scheduler.load("m.pt2")).submit(7)
    await aoti_backend.step()
    with pytest.raises(aoti_sched.RunError, match="no 7"):
        await future


async def test_a_batch_of_async_calls_gets_each_its_own_result():
    async def double(x):
        await asyncio.sleep(0)
        return 2 * x

    backend = FakeBackend({"m": double}, auto=True, lanes=1)
    async with fake_scheduler(backend) as scheduler:
        runner = await scheduler.load("m.pt2", batching=Batching(max_size=8))
        futures = [runner.submit(x) for x in range(6)]
        assert [await future for future in futures] == [0, 2, 4, 6, 8, 10]
        assert max(future.trace.batch_size for future in futures) > 1


async def test_a_batch_with_a_failing_async_call_is_retried_one_by_one():
    async def odd(x):
        await asyncio.sleep(0)
        if x == 2:
            raise aoti_sched.RunError("not two")
        return x

    backend = FakeBackend({"m": odd}, auto=True, lanes=1)
    async with fake_scheduler(backend) as scheduler:
        runner = await scheduler.load("m.pt2", batching=Batching(max_size=8))
        ends = await asyncio.gather(*map(runner.submit, range(4)), return_exceptions=True)
    assert [type(end) for end in ends] == [int, int, aoti_sched.RunError, int]


async def test_leaving_cancels_the_async_models_that_have_not_ended():
    cancelled = []

    async def forever():
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async with fake_scheduler(FakeBackend({"m": forever}, auto=True)) as scheduler:
        future = (await scheduler.load("m.pt2")).submit()
        await settle()
    assert cancelled == [True]
    with pytest.raises(aoti_sched.RunError, match="CancelledError"):
        await future


# --- configurations -------------------------------------------------------------------------------


async def test_a_fake_scheduler_takes_a_configuration():
    config = SchedulerConfig(models={"encoder": ModelConfig(path="e.pt2", timeout=3.0)})
    clock = ManualClock()
    backend = FakeBackend({"encoder": len}, clock=clock)
    async with fake_scheduler(backend, clock, config=config) as scheduler:
        future = scheduler.runners["encoder"].submit("abc")
        clock.advance(4.0)
        with pytest.raises(aoti_sched.DeadlineExceededError):
            await future


async def test_a_fake_scheduler_takes_a_file(tmp_path):
    file = tmp_path / "scheduler.toml"
    file.write_text('[models.encoder]\npath = "e.pt2"\n')
    backend = FakeBackend({"encoder": len}, auto=True)
    async with fake_scheduler(backend, config=file) as scheduler:
        assert await scheduler.runners["encoder"].run("abc") == 3


async def test_from_config_takes_devices_and_a_clock(tmp_path):
    file = tmp_path / "scheduler.toml"
    file.write_text('[models.encoder]\npath = "e.pt2"\ntimeout = "3 s"\n')
    clock = ManualClock()
    backend = FakeBackend({"encoder": len}, clock=clock)
    scheduler = aoti_sched.Scheduler.from_config(file, devices={"cpu": backend}, clock=clock)
    async with scheduler:
        future = scheduler.runners["encoder"].submit("abc")
        clock.advance(4.0)
        with pytest.raises(aoti_sched.DeadlineExceededError):
            await future
        backend.finish_all()


# --- specs ----------------------------------------------------------------------------------------


def tensor(name, dtype="float32"):
    return aoti_sched.TensorSpec(name, dtype, (aoti_sched.DynamicDim("rows", min=1, max=8), 4))


@pytest.fixture
def package(tmp_path):
    """A package whose metadata has the specs that `compile_package` stores; no code is in it."""
    pytest.importorskip("torch")
    from aoti_sched.model.specs import ModelSpec, spec_to_metadata

    leaves = tensor("x"), tensor("mask", "int64")
    own = ModelSpec(inputs=leaves, outputs=(), parameters=("x", "mask"))
    path = tmp_path / "encoder.pt2"
    files = {"abc.wrapper_metadata.json": metadata(**spec_to_metadata(own))}
    path.write_bytes(zipped(model_members(files=files)))
    return path


async def test_the_specs_of_a_package_are_checked(package, aoti_backend, aoti_scheduler):
    torch = pytest.importorskip("torch")
    aoti_backend.models["encoder"] = lambda *args, **kwargs: len(args) + len(kwargs)
    aoti_backend.finish_all()
    encoder = await aoti_scheduler.load(package)
    x, mask = torch.ones(3, 4), torch.ones(3, 4, dtype=torch.int64)
    assert await encoder.run(x, mask) == 2
    assert await encoder.run(mask=mask, x=x) == 2
    assert await encoder.run(x.numpy(), mask.numpy()) == 2
    for wrong in ((x,), (mask, x), (torch.ones(3, 5), mask), (torch.ones(2, 4), mask)):
        with pytest.raises(aoti_sched.InputMismatchError):
            await encoder.run(*wrong)


async def test_a_file_that_is_no_package_stands_for_one(tmp_path, aoti_backend, aoti_scheduler):
    (tmp_path / "encoder.pt2").write_text(json.dumps("no package"))
    aoti_backend.models["encoder"] = len
    aoti_backend.finish_all()
    encoder = await aoti_scheduler.load(tmp_path / "encoder.pt2")
    assert await encoder.run("abc") == 3
