"""Observers and recordings: what they see, and that they do no harm."""

from __future__ import annotations

import asyncio
import gc
import heapq
import json
import random
from dataclasses import dataclass, field

import msgspec
import pytest
import structlog

from aoti_sched import (
    Batching,
    CallerObserver,
    ConfigError,
    DeviceConfig,
    Limits,
    Observer,
    Priority,
    QueueFullError,
    SchedulerConfig,
    explain,
)
from aoti_sched.engine import observers
from aoti_sched.engine.traces import loaded_of, run_of, trace_of
from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.commands import Launch, WakeAt
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.job import Job, JobState
from aoti_sched.recording import Recording
from aoti_sched.simulation.recorded import read_recording
from aoti_sched.testing import FakeBackend, ManualClock, fake_scheduler, settle


class Notes(Observer):
    def __init__(self):
        self.seen = []

    def loaded(self, model):
        self.seen.append(("loaded", model.runner))

    def finished(self, trace):
        self.seen.append((trace.state, trace.tag))

    def ran(self, run):
        self.seen.append(("ran", run.runner, run.ok))

    def held(self, held):
        self.seen.append(("held", held.runner))


@pytest.fixture
def clock():
    return ManualClock()


async def test_each_request_is_seen_once_however_it_ends(clock):
    backend = FakeBackend({"m": len}, lanes=1, clock=clock)
    notes = Notes()
    async with fake_scheduler(backend, clock=clock) as scheduler:
        scheduler.add_observer(notes)
        runner = await scheduler.load("m.pt2")
        done, left, late, failed = (
            runner.options(tag=tag, timeout=timeout).submit("ab")
            for tag, timeout in (("done", None), ("left", None), ("late", 1.0), ("failed", None))
        )
        left.cancel()
        clock.advance(1.0)
        await backend.step()
        await backend.step(ValueError("broken"))
        await asyncio.wait({done, late, failed})
        async with runner.lease():
            pass
        await settle()
        scheduler.remove_observer(notes)
        last = runner.submit("a")
        await backend.step()
        await last
    assert notes.seen == [
        ("loaded", "m"),
        ("CANCELLED", "left"),
        ("EXPIRED", "late"),
        ("ran", "m", True),
        ("DONE", "done"),
        ("ran", "m", False),
        ("FAILED", "failed"),
        ("DONE", ""),
        ("held", "m"),
    ]


async def _sees(*_):
    """See nothing."""


async def _yields(*_):
    yield


@pytest.mark.parametrize("method", [_sees, _yields])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((Observer, name) for name in ("finished", "ran", "loaded", "memory_changed")),
        *((CallerObserver, name) for name in ("held", "caller", "finished_for", "log_values")),
    ],
)
async def test_an_observer_that_would_have_to_be_awaited_is_refused(kind, name, method):
    later = type("Later", (kind,), {name: method})()
    async with fake_scheduler(FakeBackend({"m": len})) as scheduler:
        with pytest.raises(ConfigError) as caught:
            scheduler.add_observer(later)
    assert str(caught.value) == (
        f"add_observer(): Later.{name} is an async def, and an observer is never awaited. Write it "
        "as def."
    )


async def test_an_observer_that_raises_is_logged_once_and_dropped(clock):
    class Broken(Observer):
        calls = 0

        def finished(self, trace):
            self.calls += 1
            raise KeyError("broken")

    broken, notes = Broken(), Notes()
    backend = FakeBackend({"m": len}, auto=True, clock=clock)
    with structlog.testing.capture_logs() as logs:
        async with fake_scheduler(backend, clock=clock) as scheduler:
            runner = await scheduler.load("m.pt2")
            scheduler.add_observer(broken)
            scheduler.add_observer(notes)
            assert [await runner.run("a" * n) for n in range(3)] == [0, 1, 2]
            await settle()
    assert broken.calls == 1
    assert [log["observer"] for log in logs if log["event"] == "observer dropped"] == ["Broken"]
    assert [state for state, *_ in notes.seen].count("DONE") == 3


async def test_an_observer_without_the_method_that_it_should_have_is_dropped(clock):
    class Broken(CallerObserver):
        @property
        def caller(self):
            raise KeyError("broken")

        loaded = finished = caller

    broken, notes = Broken(), Notes()
    backend = FakeBackend({"m": len}, auto=True, clock=clock)
    with structlog.testing.capture_logs() as logs:
        async with fake_scheduler(backend, clock=clock) as scheduler:
            scheduler.add_observer(broken)
            scheduler.add_observer(notes)
            runner = await scheduler.load("m.pt2")
            scheduler.add_observer(Broken())  # its `loaded` is called at once
            assert await runner.run("ab") == 2
            await settle()
    assert [log["observer"] for log in logs if log["event"] == "observer dropped"] == ["Broken"] * 2
    assert notes.seen == [("loaded", "m"), ("ran", "m", True), ("DONE", "")]


class Saying(CallerObserver):
    """Adds something to log events."""

    def __init__(self, says):
        self.says = says

    def caller(self):
        return "a caller"

    def log_values(self, caller):
        return self.says


def broken(_):
    raise ValueError("broken")


async def events_of_a_failed_request(clock, observer):
    backend = FakeBackend({"m": broken}, auto=True, clock=clock)
    config = SchedulerConfig(log_requests=True)
    with structlog.testing.capture_logs() as logs:
        async with fake_scheduler(backend, clock=clock, config=config) as scheduler:
            runner = await scheduler.load("m.pt2")
            scheduler.add_observer(observer)
            with pytest.raises(ValueError, match="broken"):
                await asyncio.wait_for(runner.options(tag="t").run("ab"), 20)
            await settle()
    return {log.pop("event"): log for log in logs}


@pytest.mark.parametrize("says", [5, "ab", ["ab"], {1: 2}])
async def test_an_observer_that_adds_no_names_to_log_events_is_dropped(clock, says):
    logs = await events_of_a_failed_request(clock, Saying(says))
    assert (logs["observer dropped"]["observer"], logs["run failed"]["runner"]) == ("Saying", "m")


async def test_a_log_event_keeps_its_own_values(clock):
    says = {"user": "ada", "runner": 1, "tag": 2, "tags": 3, "event": "x", "seconds": 4}
    logs = await events_of_a_failed_request(clock, Saying(says))
    for name, own in (("run failed", {"tags": ["t"]}), ("request", {"tag": "t", "seconds": 0.0})):
        kept = {"user": "ada", "runner": "m", "event_": "x", **own}
        assert {each: logs[name][each] for each in kept} == kept


@dataclass
class Equal(Observer):
    """An observer that equals another one which has seen the same."""

    seen: list[str] = field(default_factory=list)

    def finished(self, trace):
        self.seen.append(trace.tag)


async def test_an_observer_that_equals_another_is_not_the_other(clock):
    one, other = Equal(), Equal()
    backend = FakeBackend({"m": len}, auto=True, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2")
        scheduler.add_observer(one)
        scheduler.add_observer(other)
        scheduler.remove_observer(other)
        scheduler.remove_observer(Equal())
        await runner.options(tag="a").run("ab")
        await settle()
    assert (one.seen, other.seen) == (["a"], [])


async def test_an_observer_that_an_observer_adds_sees_nothing_of_before(clock):
    class Adding(Equal):
        def finished(self, trace):
            super().finished(trace)
            if trace.tag == "0":
                scheduler.add_observer(later)

    adding, later = Adding(), Equal()
    backend = FakeBackend({"m": len}, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2")
        scheduler.add_observer(adding)
        futures = [runner.options(tag=str(number)).submit("ab") for number in range(3)]
        for future in futures:
            future.cancel()
        await settle()
        runner.options(tag="after").submit("ab").cancel()
        await settle()
    assert adding.seen == ["0", "1", "2", "after"]
    assert later.seen == ["after"]


async def test_an_observer_that_is_added_twice_sees_each_request_once(clock):
    observer = Equal()
    backend = FakeBackend({"m": len}, auto=True, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2")
        scheduler.add_observer(observer)
        scheduler.add_observer(observer)
        await runner.options(tag="a").run("ab")
        scheduler.remove_observer(observer)
        await runner.options(tag="b").run("ab")
        await settle()
    assert observer.seen == ["a"]


async def test_an_observer_may_call_the_scheduler(clock):
    class Again(Observer):
        def finished(self, trace):
            if trace.tag == "first":
                self.second = runner.submit("abc")

    again = Again()
    backend = FakeBackend({"m": len}, auto=True, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2")
        scheduler.add_observer(again)
        await runner.options(tag="first").run("a")
        await settle()
        assert await again.second == 3
        with pytest.raises(ConfigError, match="expected an Observer"):
            scheduler.add_observer(print)


async def test_a_trace_tells_why_the_request_waited_while_a_recording_is_on(clock):
    backend = FakeBackend({"m": len}, lanes=1, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2")
        with scheduler.record(limit=10) as recording:
            first, second = runner.submit("a"), runner.submit("b")
            high = runner.options(priority=Priority.HIGH, timeout=10.0).submit("c")
            for _ in range(3):
                clock.advance(1.0)
                await backend.step()
            trace = second.trace
            assert {wait.cause for wait in trace.waits} >= {"slots", "class"}
            assert sum(wait.seconds for wait in trace.waits) == trace.queue_seconds
            assert "behind 1 HIGH run of 'm' of a higher class" in explain(trace)
            assert "used 20% of its timeout" in explain(high.trace)
        assert [one.state for one in recording.requests] == ["DONE"] * 3
        assert recording.explain(second.trace) == explain(trace)
        assert recording.slowest(1) == [trace]
        assert second.trace.waits == ()
        assert "by its recording.explain(trace)" in explain(second.trace)
        await asyncio.gather(first, second, high)
        for limit in (0, -1, True, 1.0, "all"):
            with (
                pytest.raises(ConfigError, match=r"record\(limit=\): expected a whole number"),
                scheduler.record(limit=limit),
            ):
                pass
        with scheduler.record(limit=10**30) as everything:
            assert everything.requests == []


async def test_a_request_that_waited_for_an_overdue_one_is_explained(clock):
    backend = FakeBackend({"m": len}, lanes=1, clock=clock)
    config = SchedulerConfig(devices={"cpu": DeviceConfig(max_wait=1.0)})
    async with fake_scheduler(backend, clock=clock, config=config) as scheduler:
        runner = await scheduler.load("m.pt2")
        with scheduler.record() as recording:
            futures = [runner.submit("a"), runner.options(priority=Priority.LOW).submit("b")]
            clock.advance(2.0)
            futures.append(runner.options(priority=Priority.HIGH).submit("c"))
            for _ in range(3):
                clock.advance(1.0)
                await backend.step()
            await asyncio.gather(*futures)
        first, low, high = recording.requests
        assert [one.priority for one in (first, low, high)] == ["NORMAL", "LOW", "HIGH"]
        waits = {wait.cause: wait.seconds for wait in high.waits}
        assert waits == {"slots": 1.0, "overdue": 1.0, "lane": 1.0}
        assert "1 s behind 1 LOW run of 'm' that was overdue" in explain(high)


async def test_a_second_recording_leaves_the_explanations_as_they_are(clock):
    """`aoti-sched timeline` may begin one at any time."""
    backend = FakeBackend({"m": len}, lanes=1, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2")
        with scheduler.record():
            first, second = runner.submit("a"), runner.submit("b")
            clock.advance(1.0)
            await backend.step()
            await backend.step()
            before = second.trace
            with scheduler.record():
                assert second.trace == before
            assert second.trace == before
        assert {wait.cause: wait.seconds for wait in before.waits} == {"slots": 1.0}
        await asyncio.gather(first, second)


async def test_what_had_ended_when_a_recording_began_is_unknown(clock):
    backend = FakeBackend({"m": len}, lanes=1, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2")
        futures = [runner.submit("a") for _ in range(4)]
        clock.advance(1.0)
        await backend.step()
        clock.advance(2.0)
        with scheduler.record():
            clock.advance(4.0)
            for _ in range(3):
                await backend.step()
            last = futures[-1].trace
        await asyncio.gather(*futures)
    # A run that ended later is known as a whole.
    assert {wait.cause: wait.seconds for wait in last.waits} == {"unknown": 1.0, "order": 6.0}


def simulated(seed, requests):
    """Return the recording of a device with three models under random load."""
    draw = random.Random(seed)
    queue = DeviceQueue("cpu", 2, Bounds(40), cores=3)
    recording = Recording(requests)
    runners = [
        queue.add_runner(f"r{n}", slots, Bounds(15), width=width, sheds=n == 2)
        for n, (slots, width) in enumerate([(1, 1), (2, 1), (2, 2)])
    ]
    for runner in runners:
        recording.loaded(loaded_of(queue, runner))
    events, now, ended = [], 0.0, set()

    def perform(commands):
        for command in commands:
            if isinstance(command, Launch):
                ends = now + draw.expovariate(100)
                heapq.heappush(events, (ends, command.job.id, command.job, now))
            elif isinstance(command, WakeAt):
                heapq.heappush(events, (command.at, -1, None, now))
            elif hasattr(command, "job"):
                see(command.job)

    def see(job):
        assert job.payload not in ended
        ended.add(job.payload)
        recording.finished(trace_of(job, queue))

    for number in range(requests):
        at = now + draw.expovariate(190)
        while events and events[0][0] <= at:
            now, _, job, started = heapq.heappop(events)
            if job is None:
                perform(queue.tick(now))
                continue
            recording.ran(
                run_of(job, queue, size=1, started=started, finished=now, now=now, ok=True)
            )
            perform(queue.complete(job, now, started=started, finished=now))
            if job.state is JobState.DONE:
                see(job)
        now = at
        runner, priority = draw.choice(runners), draw.choice(list(Priority))
        deadline = draw.choice([None, now + 0.3])
        tenant = draw.choice([None, "a", "b"])
        job = Job(runner, priority, deadline, 1, payload=number, tenant=tenant)
        perform(queue.submit(job, now, wait=draw.random() < 0.5 and not runner.sheds))
    return recording


@pytest.mark.parametrize("seed", range(2))
def test_the_parts_of_an_explanation_add_up_to_the_whole(seed):
    traces = simulated(seed, 5000).requests
    assert len(traces) > 4000
    for trace in traces:
        waited = (trace.started or trace.ended) - trace.queued
        assert sum(wait.seconds for wait in trace.waits) == pytest.approx(waited, abs=1e-9)
        assert all(wait.cause != "unknown" for wait in trace.waits)
        assert explain(trace)
    causes = {wait.cause for trace in traces for wait in trace.waits}
    assert {"class", "share", "tenant", "order", "slots", "lanes", "cores", "room"} <= causes


# --- the timeline ---------------------------------------------------------------------------------


async def test_a_timeline_has_each_run_on_its_lane_and_what_waited_beside_it(clock, tmp_path):
    backend = FakeBackend({"m": len}, lanes=2, weights={"m": {"w": 1}}, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2", instances=2)
        with scheduler.record() as recording:
            futures = [runner.options(tag=f"no. {n}").submit("ab") for n in range(3)]
            late = runner.options(timeout=0.5).submit("ab")
            clock.advance(1.0)
            for _ in range(3):
                await backend.step()
            await asyncio.wait({*futures, late})
            async with runner.lease():
                clock.advance(2.0)
            await runner.update({"w": 2})
            await settle()
        recording.save(tmp_path / "timeline.json")
    saved = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]

    def of(kind):
        return [event for event in saved if event["ph"] == kind]

    assert {(e["name"], e["args"]["name"]) for e in of("M")} == {
        ("process_name", "cpu"),
        ("thread_name", "lane 0"),
        ("thread_name", "lane 1"),
    }
    assert [(e["name"], e["ts"], e["dur"]) for e in of("X")][:2] == [("m", 1e6, 0.0)] * 2
    assert len(of("X")) == 3
    assert [e["name"] for e in of("i")] == ["m: expired", "m: epoch 2 serves"]
    begun = {e["id2"]["local"]: e for e in of("b")}
    ended = {e["id2"]["local"]: e for e in of("e")}
    assert begun.keys() == ended.keys()
    assert all(ended[name]["ts"] >= begun[name]["ts"] for name in begun)
    (lease,) = [name for name, e in begun.items() if e["cat"] == "lease"]
    assert ended[lease]["ts"] - begun[lease]["ts"] == 2e6
    assert {e["args"].get("tag") for e in begun.values() if e["cat"] == "waiting"} == {
        *("no. 0", "no. 1", "no. 2", ""),
    }
    levels = [e["args"]["queued"] for e in of("C") if e["name"] == "queued"]
    assert levels[-1] == 0 < max(levels)
    assert list(tmp_path.iterdir()) == [tmp_path / "timeline.json"]


class Seen(Observer):
    """Keeps all requests and runs as an observer gets them."""

    def __init__(self):
        self.requests, self.runs = [], []

    def finished(self, trace):
        self.requests.append(trace)

    def ran(self, run):
        self.runs.append(run)


@pytest.mark.parametrize("as_compiled", [False, True])
async def test_a_recording_gives_back_what_an_observer_sees(clock, monkeypatch, as_compiled):
    """Compiled, a recording keeps numbers that traces and runs are made of when it is read."""
    monkeypatch.setattr(observers, "_IS_COMPILED", as_compiled)
    backend = FakeBackend({"a": len, "b": len, "one": len}, lanes=2, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        few = Limits(jobs=1)
        a = await scheduler.load("a.pt2", instances=2, limits=few, overflow="wait")
        b = await scheduler.load("b.pt2", batching=Batching(max_size=8), limits=Limits(jobs=4))
        one = await scheduler.load("one.pt2", placement="inline")
        scheduler.add_observer(seen := Seen())
        with scheduler.record() as recording:
            futures = [a.options(tag="x", tenant=("ada", 1), timeout=7.5).submit("ab")]
            futures += [a.submit("a" * n) for n in range(4)]  # the last ones wait for room
            futures += [a.options(timeout=0.5).submit("ab"), a.options(tag="y").submit("ab")]
            futures += [b.options(priority=Priority.LOW).submit("abc") for _ in range(4)]
            futures += [one.options(tag="here").submit("ab")]
            with pytest.raises(QueueFullError):
                b.submit("ab")
            clock.advance(0.25)
            futures[6].cancel()  # while it waits
            clock.advance(1 / 3)
            await backend.step(ValueError("broken"))
            futures[1].cancel()  # while it runs
            while backend.running:
                clock.advance(0.1)
                await backend.step()
                await settle()
            async with a.options(tag="lease").lease() as lease:
                futures += [lease.submit("ab")]
                await backend.step()
            await asyncio.wait(futures)
            await settle()
    assert {trace.state for trace in seen.requests} == {
        *("DONE", "FAILED", "EXPIRED", "CANCELLED", "REJECTED"),
    }
    assert {trace.placement for trace in seen.requests} == {"lane", "inline"}
    assert {run.held for run in seen.runs} == {run.ok for run in seen.runs} == {False, True}
    found = [msgspec.structs.replace(trace, waits=()) for trace in recording.requests]
    assert found == seen.requests
    assert (
        recording.slowest(3)
        == sorted(recording.requests, key=lambda trace: trace.queued - trace.ended)[:3]
    )
    (events,) = recording._events().values()
    assert events.requests == seen.requests
    assert events.runs == seen.runs


async def test_a_recording_keeps_no_more_than_its_limit(clock, monkeypatch):
    monkeypatch.setattr(observers, "_IS_COMPILED", True)
    backend = FakeBackend({"m": len}, auto=True, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2")
        with scheduler.record(limit=3) as recording:
            for number in range(10):
                await runner.options(tag=str(number)).run("ab")
    assert [trace.tag for trace in recording.requests] == ["7", "8", "9"]
    (events,) = recording._events().values()
    assert [run.job for run in events.runs] == [trace.job for trace in events.requests]


async def test_what_no_observer_wants_is_not_made(clock, monkeypatch):
    """An observer of pauses must not cost each request a trace and a run."""

    class OfPauses(Observer):
        def paused(self, pause):
            seen.append(pause.runner)

    seen, made = [], []
    backend = FakeBackend({"m": len}, auto=True, weights={"m": {"w": 1}}, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2")
        scheduler.add_observer(OfPauses())
        with monkeypatch.context() as patch:
            for name in ("trace_of", "run_of", "KeptRequest", "KeptRun"):
                patch.setattr(observers, name, lambda *_: made.append(1))
            assert await runner.run("ab") == 2
        await runner.update({"w": 2})
        await settle()
    assert seen == ["m"]
    assert not made


async def test_a_timeline_in_pieces_leaves_the_garbage_collector_asleep(clock):
    """A full collection goes through all objects of the process, and holds up the event loop."""
    requests, seen = 5_000, []
    backend = FakeBackend({"m": len}, auto=True, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2")
        with scheduler.record() as recording:
            for _ in range(10):
                await asyncio.gather(*(runner.run("ab") for _ in range(requests // 10)))
        gc.collect()
        gc.callbacks.append(note := lambda phase, info: seen.append((phase, info["generation"])))
        try:
            events = sum(piece.count(b'"ph":"X"') for piece in recording.pieces())
        finally:
            gc.callbacks.remove(note)
    assert events == requests
    assert ("start", 2) not in seen
    assert len(seen) < requests / 100


async def test_a_timeline_that_cant_be_written_leaves_nothing(clock, tmp_path):
    async with fake_scheduler(FakeBackend(clock=clock), clock=clock) as scheduler:
        with scheduler.record() as recording:
            pass
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").touch()
    with pytest.raises(OSError, match="folder"):
        recording.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


async def test_a_recording_knows_the_lanes_that_later_models_brought(clock, tmp_path):
    backend = FakeBackend({"a": len, "b": len}, lanes=1, auto=True, clock=clock)
    backend.most_lanes = 3
    async with fake_scheduler(backend, clock=clock) as scheduler:
        with scheduler.record() as recording:
            lanes = []
            for name, instances in (("a", 1), ("b", 4)):
                await scheduler.load(f"{name}.pt2", name=name, instances=instances)
                lanes.append(scheduler.stats().devices["cpu"].lanes)
        recording.save(tmp_path / "timeline.json")
    models = read_recording(tmp_path / "timeline.json").models
    assert lanes == [1, 3]
    assert [(one.runner, one.lanes, one.device_cores) for one in models] == [
        ("a", 3, 3),
        ("b", 3, 3),
    ]
