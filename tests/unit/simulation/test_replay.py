"""Replays: the very same settings give the very same outcome, and other settings another one."""

import random

import msgspec
import pytest

from aoti_sched import Batching, ConfigError
from aoti_sched.simulation.outcome import outcome_of
from aoti_sched.simulation.recorded import (
    arrivals_of,
    read_recording,
    rows_of,
    settings_of,
    times_of,
)
from aoti_sched.simulation.replay import Arrival, replay
from aoti_sched.simulation.service_times import RECORDED, ServiceTimes
from tests.unit.simulation.traffic import TWO, DrawnTimes, poisson, settings

TOLERANCE = 1e-8
"""Seconds: the file has nanoseconds, and sums of them are rounded."""


def ends(requests):
    return sorted((round(one.queued, 6), one.state, one.batch_size) for one in requests)


@pytest.mark.parametrize("seed", [1, 2, None])
def test_the_recorded_settings_give_the_recorded_percentiles(tmp_path, seed):
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    print("seed", seed)
    arrivals = poisson(seed, 800, 900, ("a", "b"), varied=True)
    drawn = {"a": DrawnTimes(seed), "b": DrawnTimes(seed + 1)}
    first = replay(arrivals, TWO, drawn, timeline=tmp_path / "t.json")
    recorded = read_recording(tmp_path / "t.json")
    times = times_of(recorded)
    second = replay(arrivals_of(recorded), settings_of(recorded), times)
    one, two = (
        outcome_of(recorded.requests, recorded.runs),
        outcome_of(second.requests, second.runs),
    )
    assert one.ended == two.ended
    assert one.missed == two.missed
    assert one.batches == two.batches
    assert (one.requests, one.runs) == (two.requests, two.runs) == (800, len(first.runs))
    for part in ("latency", "queue", "run"):
        figures = msgspec.structs.asdict(getattr(one, part))
        assert figures == pytest.approx(msgspec.structs.asdict(getattr(two, part)), abs=TOLERANCE)
    assert [*times["a"].sources, *times["b"].sources] == [RECORDED] * 2


def test_a_recording_has_the_settings_it_was_made_with(tmp_path):
    given = settings(
        lanes=3,
        a={
            "instances": 2,
            "threads": 2,
            "share": 3.0,
            "overflow": "shed",
            "admission": "predictive",
            "placement": "lane",
            "batching": Batching(max_size=4, max_delay=0.5, max_seconds=2.0),
        },
    )
    replay([Arrival(0.0, "a")], given, {"a": DrawnTimes(1)}, timeline=tmp_path / "t.json")
    found = settings_of(read_recording(tmp_path / "t.json"))
    assert found.models == {"a": given.models["a"]}
    assert found.devices == given.devices


def test_two_lanes_serve_two_requests_at_once():
    two = [Arrival(0.0, "a"), Arrival(0.0, "a")]
    for instances, latest in ((1, 2.0), (2, 1.0)):
        done = replay(two, settings(a={"instances": instances}), {"a": ServiceTimes({1: [1.0]})})
        assert max(one.finished - one.queued for one in done.requests) == pytest.approx(latest)


def test_a_batch_takes_the_time_of_its_size():
    many = [Arrival(0.0, "a")] * 4 + [Arrival(5.0, "a")] * 4
    rule = Batching(max_size=4, max_seconds=100.0)
    times = ServiceTimes({1: [1.0], 4: [1.5]})
    done = replay(many, settings(a={"batching": rule}), {"a": times})
    assert outcome_of(done.requests, done.runs).batches[4] >= 1
    assert sum(run.batch_size for run in done.runs) == 8
    assert {round(run.finished - run.started, 6) for run in done.runs if run.batch_size == 4} == {
        1.5
    }


def test_an_inline_run_holds_the_loop():
    two = [Arrival(0.0, "a"), Arrival(0.5, "a")]
    done = replay(two, settings(a={"placement": "inline"}), {"a": ServiceTimes({1: [2.0]})})
    assert [run.lane for run in done.runs] == [-1, -1]
    # The second request is seen when the loop is free again.
    assert [one.queued - done.requests[0].queued for one in done.requests] == pytest.approx([0, 2])


def test_a_caller_that_leaves_is_replayed():
    one = [Arrival(0.0, "a", leaves_after=0.5)]
    (request,) = replay(one, settings(a={}), {"a": ServiceTimes({1: [1.0]})}).requests
    assert request.state == "CANCELLED"


def test_a_full_queue_refuses_as_it_does_elsewhere():
    from aoti_sched import Limits

    crowd = [Arrival(0.0, "a")] * 5
    done = replay(crowd, settings(a={"limits": Limits(jobs=2)}), {"a": ServiceTimes({1: [1.0]})})
    assert outcome_of(done.requests, done.runs).ended == {"REJECTED": 2, "DONE": 3}


def test_requests_of_several_rows_count_as_one_each(tmp_path):
    recorded = read_recording(saved(tmp_path))
    requests = [msgspec.structs.replace(one, rows=4) for one in recorded.requests]
    models = [msgspec.structs.replace(one, max_batch=10) for one in recorded.models]
    recorded = msgspec.structs.replace(recorded, requests=requests, models=models)
    assert rows_of(recorded, "a") == 4
    assert settings_of(recorded).models["a"].batching.max_size == 2


def saved(tmp_path):
    path = tmp_path / "t.json"
    replay([Arrival(0.0, "a")], settings(a={}), {"a": ServiceTimes({1: [1.0]})}, timeline=path)
    return path


def changed(path, change):
    file = msgspec.json.decode(path.read_bytes())
    change(file)
    path.write_bytes(msgspec.json.encode(file))
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda file: file.pop("otherData"), "no recording of this version"),
        (
            lambda file: file["otherData"]["aoti_sched"].update(version=9),
            "version 9, and this is 1",
        ),
        (lambda file: file["otherData"]["aoti_sched"].update(models=3), "a damaged recording"),
        (lambda file: [event.pop("args", 0) for event in file["traceEvents"]], "a damaged record"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, change, says):
    with pytest.raises(ConfigError, match=says):
        read_recording(changed(saved(tmp_path), change))


@pytest.mark.parametrize("content", [b"\x00\xff", b"3", b"[]", b"{}", b'{"otherData": []}'])
def test_what_is_no_recording_is_refused(tmp_path, content):
    path = tmp_path / "no.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="no recording"):
        read_recording(path)
