"""Recordings: what is found in them, and that they can be read while they go on."""

from __future__ import annotations

import random
import threading

import msgspec
import pytest

from aoti_sched import ConfigError, explain
from aoti_sched.events import Held, Loaded, MemoryUse, Pause, Run, Trace
from aoti_sched.recording import Recording
from aoti_sched.spans import Spans


def loaded(runner, **settings):
    settings = {"slots": 1, "cores": 1, "lanes": 1, "device_cores": 1, **settings}
    return Loaded(device="cpu", runner=runner, **settings)


def request(job, queued, launched, runner="m"):
    return Trace(
        runner=runner,
        device="cpu",
        state="DONE",
        placement="lane",
        lane=0,
        slot=0,
        epoch=1,
        queued=queued,
        started=launched,
        finished=launched + 1.0,
        job=job,
        admitted=queued,
        launched=launched,
        ended=launched + 1.0,
    )


def run(job, launched, collected, runner="m"):
    return Run(
        device="cpu",
        runner=runner,
        job=job,
        lane=0,
        slot=0,
        epoch=1,
        priority="NORMAL",
        tenant="",
        batch_size=1,
        cores=1,
        launched=launched,
        started=launched,
        finished=collected,
        collected=collected,
        ok=True,
    )


def memory(change, time, runner="m"):
    return MemoryUse("cpu", runner, change, time, 1, 1)


# --- spans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_spans_are_found_by_the_time_in_which_they_went_on(seed):
    draw = random.Random(seed)
    spans, every = Spans(10_000), []
    end = 0.0
    for number in range(2_000):
        end += draw.choice([0.0, 1.0])
        begin = end - draw.choice([0.0, 1.0, 2.0, draw.uniform(0, 1_000)])
        spans.add(number, begin, end)
        every.append((number, begin, end))
    assert list(spans) == [number for number, _, _ in every]
    for _ in range(100):
        since = draw.uniform(-1_000, 1_100)
        until = since + draw.choice([0.0, 1.0, 50.0])
        expected = [number for number, begin, end in every if begin < until and end > since]
        assert list(spans.during(since, until)) == expected


@pytest.mark.parametrize("limit", [1, 10, 1_000])
def test_spans_keep_the_last_ones(limit):
    spans = Spans(limit)
    for number in range(5_000):
        spans.add(number, number, number + 1)
        kept = list(spans)
        assert kept == list(range(kept[0], number + 1)), "the last ones, without a gap"
        assert min(limit, number + 1) <= len(kept) < limit + 256
    assert list(spans.during(0, 4_000)) == [number for number in kept if number < 4_000]


def test_a_search_skips_what_began_too_late():
    class Counted(float):
        comparisons = 0

        def __lt__(self, other):
            Counted.comparisons += 1
            return float(self) < other

    spans = Spans(100_000)
    for number in range(50_000):
        spans.add(number, Counted(number), number + 1.0)
    spans.add("long", Counted(0.0), 50_000.0)
    Counted.comparisons = 0
    assert list(spans.during(10.0, 11.0)) == [10, "long"]
    assert Counted.comparisons < 1_000


# --- what a request waited for --------------------------------------------------------------------


def causes(trace):
    return {wait.cause: wait.seconds for wait in trace.waits}


def test_a_model_that_was_evicted_when_it_was_closed_is_not_evicted_when_it_is_loaded_again():
    recording = Recording()
    recording.loaded(loaded("m"))
    for change, time in [("evicted", 1.0), ("freed", 2.0), ("measured", 3.0)]:
        recording.memory_changed(memory(change, time))
    recording.finished(request(0, 1.5, 5.0))
    recording.finished(request(1, 4.0, 5.0))
    assert [causes(trace) for trace in recording.requests] == [
        {"eviction": 0.5, "loop": 3.0},
        {"loop": 1.0},
    ]


def test_each_request_is_explained_by_what_went_on_meanwhile_alone():
    recording = Recording()
    recording.loaded(loaded("m", lanes=2, device_cores=2))
    for second in range(1, 1_001):
        recording.held(Held("cpu", "m", 0, second, second + 0.25))
        recording.paused(Pause("cpu", "m", second + 0.25, second + 0.5, 1, published=False))
        recording.memory_changed(memory("evicted", second + 0.5))
        recording.memory_changed(memory("restored", second + 0.75))
        recording.finished(request(second, second, second + 1.0))
    expected = {"leases": 0.25, "update": 0.25, "eviction": 0.25, "loop": 0.25}
    assert [causes(trace) for trace in recording.requests] == [expected] * 1_000


@pytest.mark.parametrize("is_read", [False, True])
def test_what_is_not_kept_any_more_is_unknown(is_read):
    recording = Recording(10)
    recording.loaded(loaded("m"))
    for second in range(1_000):
        recording.ran(run(second, second, second + 1.0))
        recording.finished(request(second, 1.0, second))
        if is_read:
            recording.waits(request(second, 1.0, second))
    found = causes(recording.requests[-1])
    assert found.keys() == {"unknown", "order"}
    assert sum(found.values()) == 998.0
    assert found["order"] >= 9.0


@pytest.mark.parametrize("count", [-1, "3", 1.5, True])
def test_a_number_of_slow_requests_is_a_whole_number(count):
    with pytest.raises(ConfigError, match=r"slowest\(\): expected a whole number, at least 0, got"):
        Recording().slowest(count)


@pytest.mark.parametrize("trace", [None, "job 1", Loaded])
def test_only_a_trace_can_be_explained(trace):
    with pytest.raises(ConfigError, match=r"explain\(\): expected a trace, as `future.trace`, got"):
        explain(trace)


def test_a_request_that_never_ran_was_queued_to_its_end():
    queued = msgspec.structs.replace(request(0, 1.0, 0.0), finished=0.0, ended=0.0)
    expired = msgspec.structs.replace(queued, state="EXPIRED", ended=3.5)
    assert (queued.queue_seconds, queued.run_seconds) == (0.0, 0.0)
    assert (expired.queue_seconds, expired.run_seconds) == (2.5, 0.0)


# --- threads --------------------------------------------------------------------------------------


def test_a_recording_can_be_read_in_other_threads_while_it_goes_on(tmp_path):
    """Names come all the time, and more events than are kept."""
    recording = Recording(500)
    ended, failures = threading.Event(), []

    def read(number):
        try:
            while not ended.is_set():
                recording.save(tmp_path / f"{number}.json")
                for trace in recording.slowest(50):
                    assert sum(wait.seconds for wait in trace.waits) == pytest.approx(1.0)
        except BaseException as error:  # noqa: BLE001 -- shown by the test
            failures.append(error)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    recording.loaded(loaded("m0"))
    for reader in readers:
        reader.start()
    for number in range(20_000):
        runner = f"m{number // 20}"
        if number % 20 == 0:
            recording.loaded(loaded(runner))
        recording.ran(run(number, number, number + 1.0, runner))
        recording.held(Held("cpu", runner, 0, number, number + 1.0))
        recording.paused(Pause("cpu", runner, number, number + 1.0, 1, published=True))
        recording.memory_changed(memory("measured", number, runner))
        recording.finished(request(number, number, number + 1.0, runner))
        if failures:
            break
    ended.set()
    for reader in readers:
        reader.join()
    assert not failures
    assert len(recording.requests) == 500
