"""`simulate`: a recording beside the simulation of its own settings and of others."""

import json

import pytest

from aoti_sched.simulation.replay import replay
from tests.unit.cli.support import json_of, refused, run
from tests.unit.simulation.test_replay import TOLERANCE, changed
from tests.unit.simulation.traffic import TWO, DrawnTimes, poisson


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("recording") / "t.json"
    times = {"a": DrawnTimes(5), "b": DrawnTimes(6)}
    replay(poisson(3, 500, 900, ("a", "b"), varied=True), TWO, times, timeline=path)
    return path


def test_the_same_settings_reproduce_the_recording(recording):
    report = json_of("simulate", recording)
    assert not report["changed"]
    for figures in [report, *report["models"].values()]:
        for part in ("latency", "queue", "run"):
            expected = pytest.approx(figures["recording"][part], abs=TOLERANCE)
            assert figures["same"][part] == expected
            assert figures["simulation"][part] == expected
        for count in ("ended", "missed", "runs", "batches"):
            assert figures["same"][count] == figures["recording"][count]
    assert {*report["runs"]["a"], *report["runs"]["b"]} == {"recorded run"}
    assert report["notes"] == []


def test_changed_settings_are_simulated_and_shown_beside_the_recorded_ones(recording):
    flags = ("--instances", "2", "--max-size", "4", "--max-delay", "2ms", "--placement", "lane")
    report = json_of("simulate", recording, "--model", "b", "--lanes", "3", "--cores", "3", *flags)
    assert report["changed"]
    assert report["settings"]["devices"]["cpu"]["lanes"] == 3
    assert report["settings"]["models"]["b"] == {
        "instances": 2,
        "threads": 1,
        "max_size": 4,
        "max_delay": 0.002,
        "placement": "lane",
        "admission": "bounded",
        "overflow": "reject",
    }
    assert report["settings"]["models"]["a"]["max_size"] == 8
    of_b = report["models"]["b"]
    assert of_b["same"]["latency"] == pytest.approx(of_b["recording"]["latency"], abs=TOLERANCE)
    assert of_b["simulation"]["latency"]["p99"] < of_b["recording"]["latency"]["p99"]
    assert set(of_b["simulation"]["batches"]) > {"1"} == set(of_b["recording"]["batches"])
    assert report["runs"]["b"]["extrapolated"] > 0  # no batch of it was ever recorded


def test_settings_come_from_a_file_too(recording, tmp_path):
    file = tmp_path / "scheduler.toml"
    file.write_text(
        "[devices.cpu]\nlanes = 3\ncores = 4\n"
        '[models.b]\npath = "b.pt2"\ninstances = 3\nthreads = 2\nbatching = true\n'
    )
    done = run("simulate", recording, "--settings", file, "--overflow", "wait", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert report["settings"]["devices"]["cpu"] == {"lanes": 3, "cores": 4, "max_wait": None}
    assert report["settings"]["models"]["b"]["max_size"] == 64
    assert report["settings"]["models"]["b"]["threads"] == 2
    assert {one["overflow"] for one in report["settings"]["models"].values()} == {"wait"}
    unknown, threads = report["notes"]
    assert "no model 'a'" in unknown
    assert "2 threads instead of 1" in threads


def test_twice_the_load_waits_longer(recording):
    report = json_of("simulate", recording, "--speed", "2")
    assert report["changed"]
    assert report["simulation"]["requests"] == report["recording"]["requests"]
    assert report["simulation"]["queue"]["p50"] > report["recording"]["queue"]["p50"]


def test_a_table_is_for_people_and_says_what_was_extrapolated(recording):
    done = run("simulate", recording, "--model", "b", "--max-size", "8")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].endswith("500 requests")
    assert lines[2].split() == ["recorded", "simulated", "as", "recorded", "changed"]
    assert any(line.startswith("latency p99") for line in lines)
    assert "extrapolated" in done.stdout
    assert done.stderr.startswith("aoti-sched: b: runs of some sizes lie beyond")


def test_the_simulation_can_be_written_as_a_timeline(recording, tmp_path):
    made = tmp_path / "made.json"
    json_of("simulate", recording, "--lanes", "1", "--timeline", made)
    again = json_of("simulate", made)
    assert again["settings"]["devices"]["cpu"]["lanes"] == 1
    assert again["recording"]["requests"] == 500


def test_what_a_recording_has_and_a_simulation_has_not_is_said(recording, tmp_path):
    def change(file):
        first = next(event for event in file["traceEvents"] if event.get("cat") == "run")
        first["args"]["ok"] = False
        begun = {"ph": "b", "pid": first["pid"], "name": "x", "args": {}}
        file["traceEvents"] += [{**begun, "cat": "lease"}, {**begun, "cat": "lease"}]

    copy = tmp_path / "t.json"
    copy.write_bytes(recording.read_bytes())
    notes = json_of("simulate", changed(copy, change))["notes"]
    assert [note.partition(":")[0] for note in notes] == [
        "2 leases left out",
        "1 run that failed left out",
    ]


def test_a_simulation_that_is_far_from_the_recording_says_so(recording, tmp_path):
    def change(file):
        for event in file["traceEvents"]:
            if event.get("cat") == "waiting" and "finished" in event.get("args", {}):
                event["args"]["finished"] += 50_000  # us in which the event loop was late

    copy = tmp_path / "t.json"
    copy.write_bytes(recording.read_bytes())
    (note,) = json_of("simulate", changed(copy, change))["notes"]
    assert note.startswith("with the recorded settings the p50 is ")
    assert "Compare the two simulations" in note


def test_it_needs_no_torch(recording, tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module', name='torch')")
    (tmp_path / "pytest.py").write_text("raise ModuleNotFoundError('No module', name='pytest')")
    from pathlib import Path

    import aoti_sched

    root = Path(aoti_sched.__file__).parents[1]
    env = {"PYTHONPATH": f"{tmp_path}:{root}"}
    assert json_of("simulate", recording, "--lanes", "1", env=env)["changed"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("no.json",), "no.json: No such file"),
        (("empty.json",), "empty.json: no recording of this version"),
        (("t.json", "--model", "c"), "t.json has a, b."),
        (("t.json", "--lanes", "0"), "--lanes 0: write a number of at least 1."),
        (("t.json", "--max-size", "-1"), "--max-size -1: write a number"),
        (("t.json", "--speed", "0"), "--speed 0: write a number above 0"),
        (("t.json", "--model", "b", "--max-delay", "1ms"), "runs no batches. Give --max-size"),
        (("t.json", "--max-delay", "soon"), "'soon' is no time"),
        (("t.json", "--settings", "no.toml"), "no.toml: the configuration can't be read"),
        (("t.json", "--placement", "moon"), 'Choose from: "auto", "lane", "inline".'),
        (("t.json", "--cores", "1", "--instances", "2000"), "instances"),
    ],
)
def test_a_wrong_simulation_is_one_sentence(recording, tmp_path, arguments, says):
    (tmp_path / "t.json").write_bytes(recording.read_bytes())
    (tmp_path / "empty.json").write_text("{}")
    code = 1 if arguments[0] == "no.json" else 2
    assert says in refused("simulate", *arguments, cwd=tmp_path, code=code)
