"""What users test their applications with: the pytest fixtures in a suite of their own, the
clock, the fake backend.
"""

import asyncio
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import structlog

import aoti_sched
from aoti_sched.testing import FakeBackend, ManualClock, fake_scheduler, settle

pytest_plugins = ["pytester"]

# Installed for development, our plugin is imported through a hook that pytest can't look at; it
# says so.
EDITABLE = "ignore:Module already imported so cannot be rewritten:pytest.PytestAssertRewriteWarning"
LOOP_SCOPE = "asyncio_default_fixture_loop_scope=function"
STRICT = ("-o", "asyncio_mode=auto", "-o", LOOP_SCOPE, "-W", "error", "-W", EDITABLE)
ROOT = Path(__file__).resolve().parents[2]


# --- a user's own suite ---------------------------------------------------------------------------


@pytest.fixture
def run_suite(pytester, monkeypatch):
    """Run a test file as a user would, in a process of its own; returns pytest's outcomes."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Installed, the package brings its plugin by itself; from a checkout it has to be named.
    installed = any(point.value == "aoti_sched.testing" for point in entry_points(group="pytest11"))
    plugin = () if installed else ("-p", "aoti_sched.testing")

    def run(text, *options):
        pytester.makepyfile(textwrap.dedent(text))
        return pytester.runpytest_subprocess(*plugin, "-p", "no:cacheprovider", *options)

    return run


SUITE = """
    import asyncio
    import pytest
    import aoti_sched

    async def search(encoder, text):
        return (await encoder.run(text))[0]

    {mark}
    async def test_the_fake_model_answers(aoti_backend, aoti_scheduler):
        aoti_backend.models["encoder"] = lambda text: [len(text)]
        encoder = await aoti_scheduler.load("encoder.pt2")
        answer = asyncio.ensure_future(search(encoder, "query"))
        await aoti_backend.running(1)
        assert not answer.done()
        await aoti_backend.step()
        assert await answer == 5

    {mark}
    async def test_time_passes_only_when_it_is_told_to(aoti_backend, aoti_clock, aoti_scheduler):
        aoti_backend.models["encoder"] = len
        encoder = await aoti_scheduler.load("encoder.pt2", timeout=3600)
        answer = asyncio.ensure_future(encoder.run("query"))
        await aoti_backend.running(1)
        aoti_clock.advance(3599)
        assert not answer.done()
        aoti_clock.advance(1)
        with pytest.raises(aoti_sched.DeadlineExceededError):
            await answer

    {mark}
    async def test_what_still_runs_at_the_end_is_cleared_away(aoti_backend, aoti_scheduler):
        aoti_backend.models["encoder"] = len
        encoder = await aoti_scheduler.load("encoder.pt2")
        encoder.submit("query")

    def test_the_fixtures_share_one_clock(aoti_backend, aoti_clock):
        assert aoti_backend._clock is aoti_clock
"""


def test_a_users_suite_finds_the_fixtures_and_passes(run_suite):
    result = run_suite(SUITE.format(mark=""), *STRICT)
    result.assert_outcomes(passed=4)


def test_a_users_suite_may_mark_each_asyncio_test(run_suite):
    result = run_suite(SUITE.format(mark="@pytest.mark.asyncio"), "-o", "asyncio_mode=strict")
    result.assert_outcomes(passed=4)


def test_a_users_suite_may_run_by_anyios_plugin(run_suite):
    text = SUITE.format(mark="@pytest.mark.anyio") + ANYIO
    run_suite(text, "-p", "no:asyncio").assert_outcomes(passed=4)


ANYIO = """
    @pytest.fixture
    def anyio_backend():
        return "asyncio"
"""


def test_a_users_suite_may_run_by_anyios_plugin_beside_pytest_asyncio(run_suite):
    text = SUITE.format(mark="@pytest.mark.anyio") + ANYIO
    run_suite(text, "-o", "asyncio_mode=strict", "-o", LOOP_SCOPE).assert_outcomes(passed=4)


def test_the_example_in_the_documentation_runs(run_suite):
    lines = aoti_sched.testing.__doc__.splitlines()
    example = textwrap.dedent(
        "\n".join(line for line in lines if line.startswith("    ") or not line)
    )
    text = """
import asyncio
import pytest
import aoti_sched

async def my_search(encoder, query):
    return await encoder.run(query)

"""
    run_suite(text + example, *STRICT).assert_outcomes(passed=1)


def test_the_plugin_is_declared_for_pytest_to_find():
    assert 'aoti_sched = "aoti_sched.testing"' in (ROOT / "pyproject.toml").read_text()


def test_the_plugin_leaves_torch_alone(run_suite):
    text = """
        import sys

        def test_torch_is_not_there(aoti_backend, aoti_clock):
            assert "torch" not in sys.modules
    """
    run_suite(text).assert_outcomes(passed=1)


# --- the clock ------------------------------------------------------------------------------------


def test_a_manual_clock_stands_still():
    clock = ManualClock(5.0)
    assert clock.time() == clock.time() == 5.0


def test_timers_are_called_in_the_order_of_their_times_and_at_them():
    clock, calls = ManualClock(0.0), []
    for when in (3.0, 1.0, 2.0):
        clock.call_at(when, lambda when=when: calls.append((when, clock.time())))
    clock.advance(2.5)
    assert calls == [(1.0, 1.0), (2.0, 2.0)]
    assert clock.time() == 2.5
    clock.advance(0.5)
    assert calls[2:] == [(3.0, 3.0)]


def test_timers_of_one_time_are_called_in_the_order_they_were_set():
    clock, calls = ManualClock(0.0), []
    for name in "abc":
        clock.call_at(1.0, lambda name=name: calls.append(name))
    clock.advance(1.0)
    assert calls == ["a", "b", "c"]


def test_a_timer_is_called_once():
    clock, calls = ManualClock(0.0), []
    clock.call_at(1.0, lambda: calls.append(1))
    clock.advance(1.0)
    clock.advance(1.0)
    assert calls == [1]


def test_a_cancelled_timer_is_not_called():
    clock, calls = ManualClock(0.0), []
    clock.call_at(1.0, lambda: calls.append(1)).cancel()
    clock.advance(2.0)
    assert calls == []


def test_a_timer_may_cancel_another():
    clock, calls = ManualClock(0.0), []
    second = clock.call_at(2.0, lambda: calls.append(2))
    clock.call_at(1.0, second.cancel)
    clock.advance(3.0)
    assert calls == []


def test_a_timer_set_by_a_timer_is_called_in_the_same_advance_if_it_falls_due():
    clock, calls = ManualClock(0.0), []

    def again():
        calls.append(clock.time())
        clock.call_at(clock.time() + 1.0, again)

    clock.call_at(1.0, again)
    clock.advance(3.5)
    assert calls == [1.0, 2.0, 3.0]


def test_a_timer_of_the_past_is_called_now():
    clock, calls = ManualClock(10.0), []
    clock.call_at(3.0, lambda: calls.append(clock.time()))
    clock.advance(0.0)
    assert calls == [10.0]


# --- the fake backend -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quiet_logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


async def test_a_model_is_found_by_the_runners_name_or_the_packages(aoti_backend, aoti_scheduler):
    aoti_backend.models.update(encoder=len, other=sorted)
    by_package = await aoti_scheduler.load("models/encoder.pt2", name="first")
    by_name = await aoti_scheduler.load("models/encoder.pt2", name="other")
    aoti_backend.finish_all()
    assert (await by_package.run("ba"), await by_name.run("ba")) == (2, ["a", "b"])


async def test_an_unknown_model_is_told_with_those_that_there_are(aoti_backend, aoti_scheduler):
    aoti_backend.models.update(encoder=len, ranker=len)
    with pytest.raises(aoti_sched.PackageNotFoundError) as caught:
        await aoti_scheduler.load("models/classifier.pt2")
    assert str(caught.value) == (
        "the fake backend has no model 'classifier'; it has ['encoder', 'ranker']. "
        "Add one: backend.models['classifier'] = function"
    )
    assert caught.value.path == "models/classifier.pt2"


async def test_a_model_gets_the_arguments_as_they_were_given(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda *args, **kwargs: (args, kwargs)
    aoti_backend.finish_all()
    runner = await aoti_scheduler.load("m.pt2")
    assert await runner.run(1, [2], key={"three": 3}) == ((1, [2]), {"key": {"three": 3}})


async def test_steps_finish_runs_in_the_order_they_were_submitted(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = str.upper
    runner = await aoti_scheduler.load("m.pt2", instances=2)
    first, second = runner.submit("a"), runner.submit("b")
    assert aoti_backend.running == 2
    await aoti_backend.step()
    assert (first.done(), second.done()) == (True, False)
    await aoti_backend.step()
    assert (await first, await second) == ("A", "B")


async def test_a_step_may_fail_a_run(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = str.upper
    runner = await aoti_scheduler.load("m.pt2")
    future = runner.submit("a")
    await aoti_backend.step(aoti_sched.RunError("out of memory"))
    with pytest.raises(aoti_sched.RunError, match="out of memory"):
        await future


async def test_a_model_that_raises_fails_its_own_run_only(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda x: 1 / x
    runner = await aoti_scheduler.load("m.pt2", instances=2)
    bad, good = runner.submit(0), runner.submit(2)
    await aoti_backend.step()
    await aoti_backend.step()
    with pytest.raises(ZeroDivisionError):
        await bad
    assert await good == 0.5


async def test_a_step_lets_other_tasks_go_on_until_there_is_something_to_finish(
    aoti_backend, aoti_scheduler
):
    aoti_backend.models["m"] = len
    runner = await aoti_scheduler.load("m.pt2")
    answer = asyncio.ensure_future(runner.run("abc"))
    await aoti_backend.step()
    assert answer.done()
    assert await answer == 3


async def test_a_step_that_nothing_comes_for_ends_in_words(aoti_backend, aoti_scheduler):
    with pytest.raises(LookupError, match="1 runs were expected to wait for a step, 0 do"):
        await aoti_backend.step(patience=0.0)
    aoti_backend.models["m"] = len
    await aoti_scheduler.load("m.pt2")
    with pytest.raises(LookupError, match="1 runs were expected"):
        await aoti_backend.step(patience=0.0)


async def test_waiting_for_runs_that_never_come_ends_in_words(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = len
    runner = await aoti_scheduler.load("m.pt2")
    future = runner.submit("abc")
    with pytest.raises(LookupError, match="2 runs were expected to wait for a step, 1 do"):
        await aoti_backend.running(2, patience=0.0)
    await aoti_backend.step()
    assert await future == 3


async def test_an_automatic_backend_finishes_runs_by_itself():
    backend = FakeBackend({"m": len}, auto=True)
    async with fake_scheduler(backend) as scheduler:
        runner = await scheduler.load("m.pt2")
        assert await runner.run("abc") == 3
        assert backend.running == 0


async def test_a_backend_may_stand_for_another_device():
    backend = FakeBackend({"m": len}, auto=True, name="cuda:0")
    async with fake_scheduler(backend) as scheduler:
        future = (await scheduler.load("m.pt2", device="cuda:0")).submit("abc")
        await future
        assert future.trace.device == "cuda:0"


async def test_runs_take_their_times_from_the_clock(aoti_backend, aoti_clock, aoti_scheduler):
    aoti_backend.models["m"] = len
    runner = await aoti_scheduler.load("m.pt2")
    future = runner.submit("abc")
    aoti_clock.advance(2.0)
    await aoti_backend.step()
    await future
    assert (future.trace.queued, future.trace.finished) == (1000.0, 1002.0)


async def test_leaving_finishes_what_runs_and_fails_what_is_queued():
    backend = FakeBackend({"m": len}, lanes=1)
    async with fake_scheduler(backend) as scheduler:
        runner = await scheduler.load("m.pt2")
        running, queued = runner.submit("abc"), runner.submit("abcd")
    assert await running == 3
    with pytest.raises(aoti_sched.RunnerClosedError):
        await queued
    assert [container.closed for container in backend.containers] == [True]


async def test_a_failing_test_leaves_too_and_its_own_error_comes_out():
    backend = FakeBackend({"m": len}, lanes=1)
    running = []

    async def failing_test():
        async with fake_scheduler(backend) as scheduler:
            runner = await scheduler.load("m.pt2")
            running.append(runner.submit("abc"))
            raise AssertionError("the user's")

    with pytest.raises(AssertionError, match="the user's"):
        await failing_test()
    assert await running[0] == 3
    assert backend.containers[0].closed


async def test_a_held_lease_does_not_keep_the_scheduler_from_leaving_once_it_is_released():
    backend = FakeBackend({"m": len}, lanes=1)
    async with fake_scheduler(backend) as scheduler:
        runner = await scheduler.load("m.pt2")
        async with runner.lease() as lease:
            future = lease.submit("abc")
            await backend.step()
            assert await future == 3


async def test_settling_lets_callbacks_of_callbacks_run():
    seen = []
    loop = asyncio.get_running_loop()
    loop.call_soon(lambda: loop.call_soon(lambda: loop.call_soon(seen.append, 1)))
    await settle()
    assert seen == [1]


async def test_declared_inputs_are_checked_under_the_fake_backend(aoti_backend, aoti_scheduler):
    torch = pytest.importorskip("torch")
    aoti_backend.models["encoder"] = lambda x, *, scale: x * scale["by"]
    aoti_backend.finish_all()
    rows = aoti_sched.DynamicDim("batch", min=1)
    specs = [
        aoti_sched.TensorSpec("x", "float32", (rows, 4)),
        aoti_sched.TensorSpec("by", "float32", ()),
    ]
    encoder = await aoti_scheduler.load("encoder.pt2", inputs=specs)
    x, two = torch.ones(3, 4), torch.tensor(2.0)
    assert torch.equal(await encoder.run(x, scale={"by": two}), x * 2)
    for wrong in (
        torch.ones(3, 5),
        torch.ones(0, 4),
        torch.ones(3, 4, dtype=torch.float64),
        [1.0] * 4,
    ):
        with pytest.raises(aoti_sched.InputMismatchError):
            await encoder.run(wrong, scale={"by": two})
