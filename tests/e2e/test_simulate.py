"""The simulator: the same seed gives the same figures, every request has one end, and what
queueing theory knows comes out.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from aoti_sched.queue.job import JobState
from aoti_sched.recording import Recording
from benchmarks import simulate
from benchmarks.simulation import (
    RULES,
    TRACES,
    Requests,
    Scenario,
    Simulation,
    entitled,
    measure,
    places,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = Scenario(requests=3000, devices=2, lanes=2, models=20)
ONE_QUEUE = Scenario(
    requests=3000,
    devices=1,
    lanes=1,
    models=1,
    tenants=1,
    runs=(0.01, 0.01),
    spread=0.0,
    timeouts=(),
    classes=(0, 1, 0),
)


def simulated(scenario, rules="default"):
    simulation = Simulation(Requests(scenario), RULES[rules])
    simulation.run()
    return simulation


def with_load(scenario, load, **others):
    return dataclasses.replace(scenario, load=load, **others)


# --- true to itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", TRACES)
def test_the_same_seed_gives_the_same_ends_at_the_same_times(trace):
    scenario = with_load(SMALL, 2.0, trace=trace)
    first, second = simulated(scenario, "predictive"), simulated(scenario, "predictive")
    assert first.state == second.state
    assert first.ended == second.ended
    other = simulated(dataclasses.replace(scenario, seed=2), "predictive")
    assert other.ended != first.ended


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("load", [0.5, 2.0, 5.0])
def test_every_request_has_exactly_one_end(rules, load):
    scenario = with_load(SMALL, load, bounds=(20, 40))
    simulation = simulated(scenario, rules)  # raises where one ends twice
    ends = measure(simulation).ends
    assert sum(ends.values()) == scenario.requests
    assert set(ends) <= {"DONE", "EXPIRED", "REJECTED", "SHED"}
    assert all(queue.load.jobs == 0 and not queue.lanes.launched() for queue in simulation.queues)


@pytest.mark.parametrize("rules", RULES)
def test_what_was_answered_had_run_and_was_in_time(rules):
    simulation = simulated(with_load(SMALL, 2.0), rules)
    requests = simulation.requests
    done = np.frombuffer(simulation.state, np.uint8) == JobState.DONE
    late = np.frombuffer(simulation.ended, np.float64) - requests.at - requests.timeout
    assert (np.frombuffer(simulation.home, np.float64)[done] > 0.0).all()
    assert (late[done] <= 1e-9).all()


def test_no_lane_is_ever_busier_than_always():
    scenario = with_load(SMALL, 5.0)
    assert measure(simulated(scenario, "fifo")).busy == pytest.approx(1.0, abs=0.02)


# --- what is known of simple queues ---------------------------------------------------------------


def test_under_half_load_all_is_answered_and_goodput_is_the_load():
    outcome = measure(simulated(with_load(SMALL, 0.5)))
    assert outcome.ends == {"DONE": SMALL.requests}
    assert outcome.goodput == pytest.approx(0.5, rel=0.1)
    assert outcome.useful == outcome.busy


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_the_mean_wait_of_one_lane_with_equal_runs_is_that_of_pollaczek_and_khinchine(load):
    # M/D/1: a request waits for load / (2 (1 - load)) runs, on average.
    outcome = measure(simulated(with_load(ONE_QUEUE, load, requests=40_000), "fifo"))
    assert outcome.mean / 0.01 == pytest.approx(1.0 + load / (2.0 * (1.0 - load)), rel=0.06)
    assert outcome.busy == pytest.approx(load, rel=0.03)


def test_without_timeouts_a_full_queue_keeps_its_lane_busy_and_refuses_the_rest():
    outcome = measure(simulated(with_load(ONE_QUEUE, 2.0, bounds=(10, 10)), "fifo"))
    assert outcome.goodput == pytest.approx(1.0, abs=0.01)
    assert outcome.ends["REJECTED"] == pytest.approx(1500, rel=0.1)
    assert outcome.p99 == pytest.approx(0.11, abs=0.002)  # ten before it, and its own run


def test_late_answers_are_not_goodput():
    scenario = with_load(ONE_QUEUE, 2.0, timeouts=(0.05,))
    outcome = measure(simulated(scenario, "fifo"))
    assert outcome.busy == pytest.approx(1.0, abs=0.01)
    assert outcome.goodput < 0.5  # all that are started have waited as long as one may


@pytest.mark.parametrize("rules", ["default", "predictive"])
def test_what_is_not_started_too_late_keeps_goodput_near_capacity(rules):
    scenario = Scenario(requests=20_000, devices=1, models=100)
    for load in (2.0, 5.0):
        assert measure(simulated(with_load(scenario, load), rules)).useful > 0.95


def test_high_priority_is_answered_whatever_comes_of_others():
    outcome = measure(simulated(with_load(SMALL, 5.0), "default"))
    high, normal, low = outcome.kept
    assert high > 0.95
    assert high > normal > low


def test_models_get_device_time_by_their_shares():
    scenario = Scenario(
        requests=40_000,
        load=5.0,
        devices=1,
        lanes=2,
        models=4,
        tenants=1,
        skew=0.0,
        even=True,
        runs=(0.001, 0.1),
        timeouts=(),
        classes=(0, 1, 0),
        shares=(1.0, 1.0, 2.0, 4.0),
        bounds=(100, 400),
    )
    fair, unfair = (measure(simulated(scenario, rules)).by_model[1] for rules in ("fair", "edf"))
    assert fair == pytest.approx([1 / 8, 1 / 8, 2 / 8, 4 / 8], abs=0.02)
    assert unfair != pytest.approx(fair, abs=0.1)


# --- its parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", TRACES)
def test_a_trace_comes_in_order_and_at_the_mean_rate(trace):
    requests = Requests(Scenario(requests=50_000, trace=trace, devices=1))
    assert (np.diff(requests.at) >= 0.0).all()
    rate = len(requests.at) / requests.at[-1]
    # Bursts come as they come: there are few of them, and each carries much.
    assert rate == pytest.approx(requests.capacity, rel=0.3 if trace == "bursty" else 0.02)


def test_a_day_is_busier_than_its_night():
    requests = Requests(Scenario(requests=50_000, trace="diurnal"))
    counts, _ = np.histogram(requests.at, 8)  # two days
    assert counts[1] > 1.5 * counts[0] or counts[0] > 2.0 * counts[3]
    assert counts.max() > 3 * counts.min()


def test_a_model_is_on_as_many_devices_as_its_work_asks_for():
    requests = Requests(Scenario(requests=100, devices=16, models=50))
    found = places(requests)
    work = requests.popularity * requests.mean
    work *= 16 / work.sum()
    for devices, of_model in zip(found, work, strict=True):
        assert len(set(devices)) == len(devices) == min(16, max(1, int(np.ceil(2.0 * of_model))))


def test_whoever_asks_for_little_gets_it_and_the_others_share_the_rest():
    shares = np.array([1.0, 1.0, 2.0])
    assert entitled(np.array([1.0, 9.0, 9.0]), shares, 7.0) == pytest.approx([1.0, 2.0, 4.0])
    assert entitled(np.array([1.0, 1.0, 1.0]), shares, 7.0) == pytest.approx([1.0, 1.0, 1.0])
    assert entitled(np.array([0.0, 9.0, 9.0]), shares, 0.0) == pytest.approx([0.0, 0.0, 0.0])


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_a_row_for_each_policy_and_load_and_draws_a_picture(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.simulate",
        "--requests",
        "2000",
        "--devices",
        "1",
        "--load",
        "1,2",
    ]
    ran = subprocess.run(
        [*command, "--out", str(tmp_path / "made")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for name in RULES:
        assert ran.stdout.count(f" {name} ") >= 2
    assert "28,000 requests" in ran.stdout
    assert (tmp_path / "made" / "overload.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("by", ["model", "tenant"])
def test_the_parts_of_few_are_drawn(by, tmp_path, capsys):
    few = [
        "--models",
        "3",
        "--tenants",
        "3",
        "--shares",
        "1,2,4",
        "--requests",
        "500",
        "--load",
        "2",
    ]
    simulate.main(
        [*few, "--policies", "edf,default", "--parts", by, "--out", str(tmp_path), "--name", by]
    )
    assert (tmp_path / f"{by}.png").read_bytes().startswith(b"\x89PNG")
    assert "500 requests at each load" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--policies", "lifo"], "there is no policy 'lifo'"),
        (["--devices", "257"], "--devices 257"),
        (["--load", "0"], "--load"),
        (["--runs", "1"], "--runs: 2 numbers"),
        (["--parts", "model"], "--parts model: at most"),
    ],
)
def test_a_wrong_argument_is_refused(wrong, told, capsys):
    with pytest.raises(SystemExit):
        simulate.arguments(wrong)
    assert told in capsys.readouterr().err


# --- timelines ------------------------------------------------------------------------------------


def test_a_simulation_is_recorded_as_a_scheduler_would_be(tmp_path):
    """Each request once and each run, and the causes of the waits add up."""
    recording = Recording(SMALL.requests)
    simulation = Simulation(Requests(with_load(SMALL, 2.0)), RULES["default"], recording)
    simulation.run()
    traces = recording.requests
    assert Counter(trace.state for trace in traces) == measure(simulation).ends
    for trace in traces[:: len(traces) // 200]:
        waited = (trace.started or trace.ended) - trace.queued
        assert sum(wait.seconds for wait in trace.waits) == pytest.approx(waited)
        assert not {"unknown", "loop"} & {wait.cause for wait in trace.waits}
    recording.save(tmp_path / "timeline.json")
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    runs = [event for event in events if event["ph"] == "X"]
    assert len(runs) == np.count_nonzero(np.frombuffer(simulation.home, np.float64))
    tracks = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert tracks == {"device 0", "device 1"}


def test_the_command_writes_the_last_simulation(tmp_path, capsys):
    path = tmp_path / "timeline.json"
    simulate.main(
        ["--requests", "200", "--load", "1", "--policies", "fifo,default", "--timeline", str(path)]
    )
    assert f"Timeline: {path}" in capsys.readouterr().out
    events = json.loads(path.read_text())["traceEvents"]
    assert {event["cat"] for event in events if "cat" in event} == {"run", "waiting"}
