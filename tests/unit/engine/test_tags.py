"""Tags, copies and slow requests: what `options(tag=, copy=)` and `SchedulerConfig(slow=)` do."""

import asyncio
import copy
import pickle

import pytest
import structlog

import aoti_sched
from aoti_sched import SchedulerConfig
from aoti_sched.testing import FakeBackend, ManualClock, fake_scheduler, settle


@pytest.fixture(autouse=True)
def logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


def entries(logs, event):
    return [entry for entry in logs if entry["event"] == event]


def fails(*_):
    raise aoti_sched.RunError("model 'm': no")


# --- tags -----------------------------------------------------------------------------------------


async def test_a_tag_is_in_the_trace_and_stays_with_the_view(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = len
    runner = await aoti_scheduler.load("m.pt2")
    aoti_backend.finish_all()
    view = runner.options(tag="request 7")
    for one in (view, view.options(timeout=9.0)):
        future = one.submit("abc")
        assert await future == 3
        assert future.trace.tag == "request 7"
    for one in (runner, view.options(tag="")):
        future = one.submit("abc")
        await future
        assert future.trace.tag == ""


@pytest.mark.parametrize("tag", [7, b"x", "x" * 201])
def test_what_is_no_tag_is_refused(tag):
    from aoti_sched.handle import _tag

    with pytest.raises(aoti_sched.ConfigError, match="at most 200 characters"):
        _tag(tag)


async def test_a_tag_can_forge_no_line_of_a_log(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = len
    runner = await aoti_scheduler.load("m.pt2")
    future = runner.options(tag="a\nb").submit("abc")
    assert future.trace.tag == "a\\nb"


async def test_an_error_names_the_request_that_met_it(aoti_backend, aoti_clock, aoti_scheduler):
    aoti_backend.models["m"] = fails
    runner = await aoti_scheduler.load("m.pt2", limits=aoti_sched.Limits(jobs=1))
    tagged = runner.options(tag="r7", timeout=1.0)
    running, late = tagged.submit(1), tagged.submit(1)
    with pytest.raises(aoti_sched.QueueFullError) as refused:
        tagged.submit(1)
    aoti_clock.advance(2.0)
    with pytest.raises(aoti_sched.DeadlineExceededError) as expired:
        await late
    with pytest.raises(aoti_sched.DeadlineExceededError):
        await running
    aoti_backend.finish_all()
    with pytest.raises(aoti_sched.RunError) as failed:
        await runner.options(tag="r8").run(1)
    assert (refused.value.tag, expired.value.tag, failed.value.tag) == ("r7", "r7", "r8")
    assert str(failed.value) == "model 'm': no (request 'r8')"


async def test_an_untagged_error_is_as_it_was(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = fails
    aoti_backend.finish_all()
    runner = await aoti_scheduler.load("m.pt2")
    with pytest.raises(aoti_sched.RunError) as failed:
        await runner.run(1)
    assert (failed.value.tag, str(failed.value)) == ("", "model 'm': no")


async def test_requests_of_one_batch_do_not_share_a_tag(aoti_backend, aoti_scheduler):
    error = aoti_sched.DeviceLostError("gone", device="cpu")
    aoti_backend.models["m"] = len
    runner = await aoti_scheduler.load("m.pt2", batching=True)
    blocking = runner.submit("a")
    futures = [runner.options(tag=tag).submit("abc") for tag in ("a", "b", "")]
    await aoti_backend.step()
    assert await blocking == 1
    await aoti_backend.step(error)
    while aoti_backend.running:  # alone again, one after the other
        await aoti_backend.step(error)
    ends = await asyncio.gather(*futures, return_exceptions=True)
    assert [end.tag for end in ends] == ["a", "b", ""]


async def test_a_lease_keeps_the_tag_and_its_refusal_has_it(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = len
    runner = await aoti_scheduler.load("m.pt2")
    aoti_backend.finish_all()
    view = runner.options(tag="r7")
    async with view.lease() as lease:
        future = lease.submit("abc")
        await future
        assert future.trace.tag == "r7"

        async def another():
            async with view.options(timeout=0.0).lease():
                pass

        with pytest.raises(aoti_sched.DeadlineExceededError) as late:
            await asyncio.create_task(another())
    assert late.value.tag == "r7"


async def test_a_blocking_call_has_its_tag(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = fails
    aoti_backend.finish_all()
    runner = await aoti_scheduler.load("m.pt2")
    with pytest.raises(aoti_sched.RunError) as failed:
        await asyncio.to_thread(runner.options(tag="r7").run_blocking, 1)
    assert failed.value.tag == "r7"


ERRORS = [
    aoti_sched.RunError("no"),
    aoti_sched.InputMismatchError("m", "x", "this", "that"),
    aoti_sched.DeadlineUnreachableError("m", 2.0, 1.0),
    aoti_sched.DeviceLostError("gone", device="cuda:0"),
    aoti_sched.ConstantMismatchError("m", (("w", "is missing"),)),
    aoti_sched.PackageNotFoundError("none", path="m.pt2"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("copied", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_a_tag_crosses_a_wire(error, copied):
    error = copy.copy(error)
    error.tag = "r7"
    assert (copied(error).tag, str(copied(error))) == ("r7", str(error))


# --- the log of requests --------------------------------------------------------------------------


async def requests(config, clock, logs, *, seconds):
    """Run one request of so many seconds on the clock, and return what was logged of it."""
    backend = FakeBackend({"m": len}, clock=clock)
    async with fake_scheduler(backend, clock, config=config) as scheduler:
        runner = await scheduler.load("m.pt2")
        future = runner.options(tag="r7").submit("abc")
        clock.advance(seconds)
        await backend.step()
        await future
        await settle()
    return entries(logs, "request"), entries(logs, "slow request")


async def test_a_slow_request_is_a_warning_with_its_times(logs):
    _, slow = await requests(SchedulerConfig(slow=0.5), ManualClock(), logs, seconds=0.75)
    (entry,) = slow
    assert entry["log_level"] == "warning"
    assert (entry["runner"], entry["device"], entry["state"]) == ("m", "cpu", "DONE")
    assert (entry["seconds"], entry["tag"], entry["batch_size"]) == (0.75, "r7", 1)


@pytest.mark.parametrize(("slow", "told"), [(0.5, 1), (0.51, 0), (0.0, 1), (None, 0)])
async def test_a_request_is_slow_from_the_limit_on(slow, told, logs):
    plain, late = await requests(SchedulerConfig(slow=slow), ManualClock(0.0), logs, seconds=0.5)
    assert (len(plain), len(late)) == (0, told)


async def test_a_slow_request_is_logged_once_where_all_are_logged(logs):
    config = SchedulerConfig(slow=0.5, log_requests=True)
    plain, slow = await requests(config, ManualClock(), logs, seconds=0.75)
    assert (len(plain), len(slow)) == (0, 1)


async def test_a_slow_request_that_expires_or_is_cancelled_is_logged(logs):
    clock = ManualClock()
    backend = FakeBackend({"m": len}, clock=clock, lanes=1)
    async with fake_scheduler(backend, clock, config=SchedulerConfig(slow=0.5)) as scheduler:
        runner = await scheduler.load("m.pt2")
        running = runner.submit("abc")
        late = runner.options(timeout=0.6, tag="late").submit("abc")
        gone = runner.options(tag="gone").submit("abc")
        quick = runner.options(tag="quick").submit("abc")
        quick.cancel()
        clock.advance(1.0)
        gone.cancel()
        await backend.step()
        await running
        with pytest.raises(aoti_sched.DeadlineExceededError):
            await late
        await settle()
        told = [(entry.get("tag"), entry["state"]) for entry in entries(logs, "slow request")]
    assert sorted(told, key=str) == [("gone", "CANCELLED"), ("late", "EXPIRED"), (None, "DONE")]


async def test_a_failed_run_is_logged_with_its_tags(aoti_backend, aoti_scheduler, logs):
    aoti_backend.models["m"] = fails
    aoti_backend.finish_all()
    runner = await aoti_scheduler.load("m.pt2")
    for one in (runner, runner.options(tag="r7")):
        with pytest.raises(aoti_sched.RunError):
            await one.run(1)
    await settle()
    assert [entry.get("tags") for entry in entries(logs, "run failed")] == [None, ["r7"]]


def test_a_limit_that_is_no_time_is_refused():
    with pytest.raises(aoti_sched.ConfigError, match="slow: Expected `float` >= 0"):
        aoti_sched.Scheduler(SchedulerConfig(slow=-1.0))


# --- copies ---------------------------------------------------------------------------------------


async def test_a_copied_input_may_be_written_to_while_it_is_queued(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = sum
    runner = await aoti_scheduler.load("m.pt2")
    values = [1, 2]
    kept, live = runner.options(copy=True).submit(values), runner.submit(values)
    values.append(10)
    aoti_backend.finish_all()
    assert (await kept, await live) == (3, 13)


async def test_copying_is_on_or_off(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = sum
    runner = await aoti_scheduler.load("m.pt2")
    with pytest.raises(aoti_sched.ConfigError, match=r"options\(copy=\)"):
        runner.options(copy=1)
