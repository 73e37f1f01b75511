"""What observers see of evictions, updates and batches, and why a request waited for them."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest

from aoti_sched import (
    Batching,
    BlockingScheduler,
    ConfigError,
    DeadlineExceededError,
    DeviceConfig,
    Observer,
    SchedulerConfig,
    explain,
)
from aoti_sched.testing import FakeBackend, ManualClock, fake_scheduler, settle
from tests.inside import container_of
from tests.unit.engine.support import Held, until


@pytest.fixture
def clock():
    return ManualClock()


class Notes(Observer):
    def __init__(self):
        self.changes, self.pauses, self.threads, self.ends = [], [], set(), []

    def memory_changed(self, use):
        self.changes.append((use.runner, use.change, use.time, use.used))

    def paused(self, pause):
        self.pauses.append(pause)

    def finished(self, trace):
        self.threads.add(threading.current_thread())
        self.ends.append((trace.state, trace.tag))


def causes(trace):
    return {wait.cause: wait.seconds for wait in trace.waits}


def shelf(clock):
    """A device with room for the weights of one of two models."""
    backend = FakeBackend(
        {"a": len, "b": len}, weights={"a": {"w": 1}, "b": {"w": 1}}, auto=True, clock=clock
    )
    config = SchedulerConfig(devices={"cpu": DeviceConfig(memory_limit=1, evict="lru")})
    return fake_scheduler(backend, clock=clock, config=config)


# --- evictions ------------------------------------------------------------------------------------


async def test_an_observer_sees_weights_that_are_evicted_and_restored(clock):
    notes = Notes()
    async with shelf(clock) as scheduler:
        scheduler.add_observer(notes)
        a = await scheduler.load("a.pt2")
        clock.advance(1.0)
        await scheduler.load("b.pt2")
        clock.advance(1.0)
        assert await a.run("ab") == 2
        await settle()
    begin = notes.changes[0][2]
    seen = [(runner, change, time - begin, used) for runner, change, time, used in notes.changes]
    # A load measures twice. What is evicted has given its byte to another model already.
    changes = list(dict.fromkeys(seen))
    assert changes[:5] == [
        ("a", "measured", 0.0, 1),
        ("a", "evicted", 1.0, 1),
        ("b", "measured", 1.0, 1),
        ("b", "evicted", 2.0, 1),
        ("a", "restored", 2.0, 1),
    ]
    # The scheduler closes both at once: either may be freed first.
    assert changes[5:] in (
        [("a", "freed", 2.0, 0), ("b", "freed", 2.0, 0)],
        [("b", "freed", 2.0, 1), ("a", "freed", 2.0, 0)],
    )


@pytest.mark.parametrize("from_the_start", [True, False])
async def test_a_request_that_waited_for_evicted_weights_is_explained(clock, from_the_start):
    """A recording that begins after the eviction knows of it as well."""
    async with shelf(clock) as scheduler:
        recorded = [scheduler.record()] if from_the_start else []
        for one in recorded:
            one.__enter__()
        a = await scheduler.load("a.pt2")
        await scheduler.load("b.pt2")
        clock.advance(1.0)
        with scheduler.record() as recording:
            coming = Held(a, "unpark")
            kept, late = a.submit("ab"), a.options(timeout=1.0).submit("abc")
            await coming.reached()
            clock.advance(2.0)
            with pytest.raises(DeadlineExceededError):
                await late
            assert causes(late.trace) == {"eviction": 1.0}
            coming.go_on()
            assert await kept == 2
            assert causes(kept.trace) == {"eviction": 2.0}
            assert "2 s for evicted weights to be restored" in explain(kept.trace)
        for one in recorded:
            one.__exit__(None, None, None)
    assert [causes(trace) for trace in recording.requests] == [{"eviction": 1.0}, {"eviction": 2.0}]


# --- updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("succeeds", [True, False])
async def test_a_request_that_waited_for_an_update_is_explained(clock, succeeds):
    notes = Notes()
    backend = FakeBackend({"m": len}, weights={"m": {"w": 1}}, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        scheduler.add_observer(notes)
        runner = await scheduler.load("m.pt2")
        if not succeeds:
            container_of(runner).faults["swap"] = RuntimeError("no swap")
        with scheduler.record() as recording:
            running = runner.submit("a")
            update = asyncio.ensure_future(runner.update({"w": 2}))
            await until(lambda: runner.stats().updating)
            clock.advance(0.5)
            waits, late = runner.submit("ab"), runner.options(timeout=1.0).submit("abc")
            clock.advance(1.5)
            with pytest.raises(DeadlineExceededError):
                await late
            assert causes(late.trace) == {"update": 1.0}, "the pause is not over"
            await backend.step()
            await asyncio.wait({update})
            await backend.step()
            assert [await running, await waits] == [1, 2]
            trace = waits.trace
        assert (update.exception() is None) == succeeds
        await settle()
    assert (causes(trace), trace.epoch) == ({"update": 1.5}, 1 + succeeds)
    assert explain(trace).startswith("waited 1.5 s: 1.5 s for an update of the weights")
    assert "did not run; expired after 1 s" in explain(recording.requests[0])
    assert [causes(one) for one in recording.requests] == [
        {"update": 1.0},
        {"lane": 2.0},  # a fake run begins when the test takes a step
        {"update": 1.5},
    ]
    (pause,) = notes.pauses
    assert pause.opened - pause.closed == 2.0
    assert (pause.runner, pause.device) == ("m", "cpu")
    assert (pause.epoch, pause.published) == ((2, True) if succeeds else (1, False))


# --- batches --------------------------------------------------------------------------------------


async def test_a_request_that_waited_for_others_to_join_its_batch_is_explained(clock):
    def model(text):
        clock.advance(0.5)
        return [len(text)]

    backend = FakeBackend({"m": model}, lanes=2, clock=clock)
    batching = Batching(max_size=8, max_delay=1.0, max_seconds=math.inf)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2", batching=batching)
        with scheduler.record() as recording:
            first = runner.submit("ab")
            await settle()
            clock.advance(0.25)
            second = runner.submit("abc")
            await settle()
            clock.advance(0.75)
            await backend.step()
            assert [await first, await second] == [[2], [3]]
            assert first.trace.batch_size == 2
            assert [causes(one.trace) for one in (first, second)] == [
                {"batch": 1.0},
                {"batch": 0.75},
            ]
            assert "1 s for others to join its batch" in explain(first.trace)
            assert "in a batch of 2" in recording.explain(first.trace)


# --- without an event loop ------------------------------------------------------------------------


def test_a_blocking_scheduler_tells_observers_on_its_own_thread():
    notes = Notes()
    with BlockingScheduler(devices={"cpu": FakeBackend({"m": len}, auto=True)}) as scheduler:
        scheduler.add_observer(notes)
        with pytest.raises(ConfigError, match="expected an Observer"):
            scheduler.add_observer(print)
        runner = scheduler.load("m.pt2")
        assert runner.options(tag="seen").run("ab") == 2
        scheduler.remove_observer(notes)
        assert runner.options(tag="not seen").run("ab") == 2
    assert notes.ends == [("DONE", "seen")]
    (thread,) = notes.threads
    assert thread is not threading.current_thread()


def test_a_blocking_scheduler_records_for_the_duration_of_a_block(tmp_path):
    with BlockingScheduler(devices={"cpu": FakeBackend({"m": len}, auto=True)}) as scheduler:
        runner = scheduler.load("m.pt2")
        runner.options(tag="before").run("ab")
        with scheduler.record(limit=2) as recording:
            for number in range(3):
                runner.options(tag=str(number)).run("ab")
        runner.options(tag="after").run("ab")
        with pytest.raises(ConfigError, match="record"), scheduler.record(limit=0):
            pass
    assert [trace.tag for trace in recording.requests] == ["1", "2"]
    recording.save(tmp_path / "timeline.json")
    assert (tmp_path / "timeline.json").stat().st_size > 100
