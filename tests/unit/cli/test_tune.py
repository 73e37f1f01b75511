"""`tune`: what it writes, draws and prints. tests/compiled has it on a real model."""

import json

import msgspec
import pytest

from aoti_sched import Batching
from aoti_sched.cli import app, measuring, predicting, tune
from aoti_sched.cli.plot import pareto
from aoti_sched.cli.predicting import Candidate, Figures, Goal
from aoti_sched.cli.tuning import Trial
from aoti_sched.config_file import read_config
from aoti_sched.percentiles import Percentiles
from tests.unit.cli.support import refused
from tests.unit.cli.test_tuning import AXES, Known

MEASURED = Figures(
    rate=500.0,
    throughput=499.0,
    latency=Percentiles(0.002, 0.001, 0.003, 0.01, 0.02),
    batch_size=2.0,
    cores=1.5,
    failed=0,
)


PLAIN = Candidate(1, 2)


def report(candidate=PLAIN, rows=1):
    trial = Trial(candidate=candidate, predicted=MEASURED, measured=MEASURED, kept=True)
    return tune.TuneReport(
        path="m.pt2",
        goal=Goal(p99=0.02, rate=500.0),
        machine={"processor": "a processor", "torch": "2.13.0"},
        rows=rows,
        timed={},
        settings=48,
        simulated=(),
        trials=(trial,),
        best=trial,
        nearest=trial,
        written=None,
        notes=(),
    )


@pytest.mark.parametrize("name", ["m.pt2", 'sonder"bar\\ ü.pt2', "a.b.pt2"])
@pytest.mark.parametrize("below", [True, False])
def test_the_written_file_is_what_a_scheduler_reads(tmp_path, name, below):
    folder = tmp_path / "models" if below else tmp_path.parent
    package, output = folder / name, tmp_path / "scheduler.toml"
    found = report(Candidate(2, 3, 8, 0.0025, "lane"), rows=4)
    tune._write(output, tune.toml(found, package, "inner", output))
    config = read_config(output)
    (model,) = config.models.values()
    assert list(config.models) == [package.stem]
    assert model.path == str(package)
    assert (model.model_name, model.threads, model.instances) == ("inner", 2, 3)
    assert model.placement == "lane"
    assert model.batching == Batching(max_size=32, max_delay=0.0025)
    assert ("models/" in output.read_text()) == below
    assert [path.name for path in tmp_path.iterdir()] == ["scheduler.toml"]


def test_without_batches_none_are_written(tmp_path):
    output = tmp_path / "scheduler.toml"
    tune._write(output, tune.toml(report(), tmp_path / "m.pt2", None, output))
    assert read_config(output).models["m"].batching is None


def test_a_file_that_no_scheduler_reads_is_not_written(tmp_path):
    output = tmp_path / "scheduler.toml"
    output.write_text("old")
    with pytest.raises(Exception, match="instances"):
        tune._write(output, '[models.m]\npath = "m.pt2"\ninstances = 0\n')
    assert [path.name for path in tmp_path.iterdir()] == ["scheduler.toml"]
    assert output.read_text() == "old"


def test_the_pareto_front_has_what_no_other_beats():
    points = [(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.0), (4.0, 1.0)]
    assert pareto(points, more_is_better=False) == [(1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]
    assert pareto(points, more_is_better=True) == [(4.0, 1.0)]
    assert pareto([], more_is_better=True) == []


class KnownMachine(Known):
    """A machine of known run times in the place of this one, for the command as a whole."""

    rows = 1
    notes = ("No batches of the sun were tried.",)

    def __init__(self, package, model, goal, lengths, made):
        super().__init__(goal)
        self.known = {}

    async def look(self):
        pass

    async def axes(self, chosen):
        return AXES

    async def timed(self, threads, instances):
        self.known[threads, instances] = await super().timed(threads, instances)
        return self.known[threads, instances]


@pytest.fixture
def known(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "RealMachine", KnownMachine)
    monkeypatch.setattr(predicting, "REQUESTS", 200)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("more", [(), ("--maximize", "throughput")])
def test_the_best_settings_are_written_drawn_and_reported(known, capsys, more):
    pytest.importorskip("matplotlib")
    arguments = ("tune", "m.pt2", "--p99", "50ms", "--rate", "300", "--tries", "3", *more)
    assert app.run([*arguments, "--json", "--plot", "t.png"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["version"] == 1
    assert found["written"] == "scheduler.toml"
    assert found["settings"] == 48
    assert len(found["trials"]) <= 3
    assert found["best"]["kept"]
    assert {*found["timed"]} == {"1x1", "1x2", "2x1"}
    assert err.startswith("measuring runs of 1 threads, 1 at once\n")
    assert (known / "t.png").read_bytes().startswith(b"\x89PNG")
    model = read_config(known / "scheduler.toml").models["m"]
    best = found["best"]["candidate"]
    assert (model.threads, model.instances) == (best["threads"], best["instances"])
    assert app.run([*arguments, "--overwrite"]) == 0
    out, err = capsys.readouterr()
    assert "Written: scheduler.toml" in out
    assert "best" in out
    assert "No batches of the sun" in err


def test_a_budget_that_nothing_keeps_is_exit_code_3_and_no_file(known, capsys):
    pytest.importorskip("torch")
    assert app.run(["tune", "m.pt2", "--p99", "1ms", "--rate", "300", "--tries", "1"]) == 3
    out, err = capsys.readouterr()
    assert "missed" in out
    last = err.splitlines()[-1]
    assert last.startswith("aoti-sched: no settings keep the budget. Nearest: threads ")
    assert "300 requests in a second" in last
    assert list(known.iterdir()) == []


def test_ctrl_c_leaves_the_old_file(known, capsys, monkeypatch):
    async def interrupted(self, candidate, rate):
        raise KeyboardInterrupt

    monkeypatch.setattr(KnownMachine, "confirm", interrupted)
    (known / "scheduler.toml").write_text("old")
    assert app.run(["tune", "m.pt2", "--p99", "50ms", "--rate", "300", "--overwrite"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "aoti-sched: interrupted."
    assert [path.read_text() for path in known.iterdir()] == ["old"]


def test_requests_that_fail_are_told_of():
    failed = msgspec.structs.replace(MEASURED, failed=7, latency=None)
    trial = Trial(candidate=Candidate(1, 1), predicted=MEASURED, measured=failed, kept=False)
    found = msgspec.structs.replace(report(), nearest=trial)
    assert "no answer and 7 failed requests at 500" in tune._nearest(found)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--rate", "500"), "--p99"),
        (("--p99", "20ms"), "--rate"),
        (("--p99", "fast", "--rate", "500"), "'fast' is no time"),
        (("--p99", "0", "--rate", "500"), "--p99 0: write a time above 0"),
        (("--p99", "20ms", "--rate", "0"), "--rate 0: write a number"),
        (("--p99", "20ms", "--rate", "9", "--maximize", "fun"), 'Choose from: "throughput".'),
        (("--p99", "20ms", "--rate", "9", "--threads", "1,x"), "--threads 1,x: 'x' is no number"),
        (("--p99", "20ms", "--rate", "9", "--instances", "0"), "--instances 0: '0' is no number"),
        (("--p99", "20ms", "--rate", "9", "--max-delay", "soon"), "'soon' is no time"),
        (("--p99", "20ms", "--rate", "9", "--placement", "moon"), "'moon' is none of auto, lane"),
        (("--p99", "20ms", "--rate", "9", "--tries", "0"), "--tries 0: write a number"),
        (("--p99", "20ms", "--rate", "9", "--output", "s.json"), "settings are TOML"),
        (("--p99", "20ms", "--rate", "9", "--output", "old.toml"), "Give --overwrite"),
        (("--p99", "20ms", "--rate", "9", "--output", "no/s.toml"), "does not exist"),
        (("--p99", "20ms", "--rate", "9", "--plot", "t.gif"), "no known kind of picture"),
    ],
)
def test_a_wrong_tune_is_one_sentence(tmp_path, arguments, says):
    (tmp_path / "old.toml").touch()
    assert says in refused("tune", "m.pt2", *arguments, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old.toml"]


def test_a_missing_package_is_one_sentence(tmp_path):
    pytest.importorskip("torch")
    arguments = ("tune", "no.pt2", "--p99", "20ms", "--rate", "9")
    assert "no.pt2" in refused(*arguments, cwd=tmp_path, code=1)
