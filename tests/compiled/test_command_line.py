"""Commands that run models, as users run them: in processes of their own, or in copies of one."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import aoti_sched
from tests.models import build
from tests.unit.cli.support import IMPORTED, json_of, refused, refused_here, run

IMPORTED.append("torch")


@pytest.fixture(scope="module")
def mlp():
    return build("mlp")


@pytest.fixture(autouse=True)
def no_handlers():
    """A command that runs in this process leaves the log as it was."""
    logger = logging.getLogger("aoti_sched")
    before = list(logger.handlers)
    yield
    logger.handlers[:] = before


def numbers(tensor):
    return pytest.approx(tensor.flatten().tolist(), abs=1e-4)


# --- run ------------------------------------------------------------------------------------------


def test_a_model_runs_on_random_inputs_that_fit(mlp):
    first, again = (json_of("run", mlp.path, "--seed", "7", "--size", "batch=2") for _ in range(2))
    assert first["inputs"] == again["inputs"]
    (x,) = first["inputs"]
    assert (x["source"], x["shape"][0]) == ("random", 2)
    assert first["outputs"] == again["outputs"]
    assert json_of("run", mlp.path, "--seed", "8", "--size", "batch=2")["inputs"] != [x]


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
def test_a_file_goes_in_and_a_file_comes_out(mlp, tmp_path, kind):
    x = torch.randn(3, mlp.args[0].shape[1])
    given, got = tmp_path / f"x.{kind}", tmp_path / f"y.{kind}"
    if kind == "npy":
        np.save(given, x.numpy())
    elif kind == "npz":
        np.savez(given, x.numpy())
    else:
        save_file({"anything": x}, given)
    report = json_of("run", mlp.path, "--input", f"0=@{given}", "--output", got)
    assert report["inputs"][0]["source"] == "given"
    assert report["written"] == str(got)
    if kind == "safetensors":
        (y,) = load_file(got).values()
    else:
        loaded = np.load(got)
        y = torch.from_numpy(loaded if kind == "npy" else loaded[loaded.files[0]])
    with torch.no_grad():
        torch.testing.assert_close(y, mlp.module()(x), rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([given.name, got.name])


def test_arguments_of_every_shape_are_put_together(tmp_path):
    built = build("signature")
    tensors = dict.fromkeys(("x", "pair_0", "pair_1", "nested_a", "nested_deep_b", "offset"))
    given = tmp_path / "all.npz"
    np.savez(
        given, **{name: np.arange(3.0, dtype=np.float32) + i for i, name in enumerate(tensors)}
    )
    report = json_of("run", built.path, "--input", f"@{given}", "--input", "x=[0, 0, 1]")
    x = torch.tensor([0.0, 0, 1])
    b, c, d, e, f = (torch.arange(3.0) + i for i in range(1, 6))
    expected = built.module()(
        x, (b, c), {"a": d, "deep": {"b": e}}, None, scale=2, offset=f, negate=True
    )
    outputs = [tensor["values"] for tensor in report["outputs"]]
    assert outputs[0] == numbers(expected["total"])
    assert outputs[1] == numbers(expected["parts"][0])
    assert outputs[2] == numbers(expected["parts"][1][0])
    assert outputs[3] == [2]


def test_people_see_a_table_and_the_time_of_runs(mlp):
    done = run("run", mlp.path, "--repeat", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 runs: " in done.stdout
    assert "fastest" in done.stdout


def test_bare_libraries_need_their_inputs_and_take_them_by_number(mlp, tmp_path):
    library = tmp_path / "mlp.so"
    library.write_bytes(mlp.library().read_bytes())
    assert "Give them with --input 0=@FILE." in refused("run", library)
    np.save(tmp_path / "x.npy", mlp.args[0].numpy())
    report = json_of("run", library, "--input", f"0=@{tmp_path / 'x.npy'}")
    assert report["outputs"][0]["shape"][0] == mlp.args[0].shape[0]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--input", "nothing=@x.npy"), 2, "no input 'nothing'. The inputs are"),
        (("--input", "0"), 2, "write NAME=@FILE, NAME=VALUE or @FILE."),
        (("--input", "0=@missing.npy"), 1, "missing.npy: No such file or directory."),
        (("--input", "0=@broken.npy"), 2, "broken.npy: no npy file that can be read"),
        (("--input", "0=@x.csv"), 2, "x.csv: no known kind of file."),
        (("--input", "0=[[1, 2]"), 2, "is neither @FILE nor a number or list in JSON."),
        (("--input", "0=[1, 2]"), 1, "expected 2 dimensions"),
        (("--size", "rows=3"), 2, "no such size. The model's sizes are batch."),
        (("--size", "batch"), 2, "write SYMBOL=NUMBER"),
        (("--size", "batch=1000"), 1, "got 1000"),
        (("--repeat", "0"), 2, "run at least once"),
        (("--repeat", "x"), 2, "Invalid value"),
        (("--output", "y.txt"), 2, "y.txt: no known kind of file."),
        (("--output", "no/folder/y.npz"), 2, "does not exist."),
        (("--model", "other"), 1, "holds no model 'other'"),
        (("--device", "moon"), 2, "moon"),
        (("--threads", "0"), 2, "threads"),
    ],
)
def test_a_wrong_run_is_one_sentence(mlp, tmp_path, monkeypatch, capsys, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.npy").write_bytes(b"no array")
    assert says in refused_here(capsys, "run", mlp.path, *arguments, code=code)


def test_a_run_that_fails_is_a_failure_and_writes_no_file(tmp_path):
    built = build("failing")
    done = run("run", built.path, "--input", "0=[40]", "--output", "y.npz", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("aoti-sched: model 'model': the run failed")
    assert list(tmp_path.iterdir()) == []


def test_json_is_valid_where_outputs_are_not_finite():
    built = build("mlp")
    size = built.args[0].shape[1]
    row = json.dumps([[float("inf")] + [0.0] * (size - 1)])
    report = json_of("run", built.path, "--input", f"0={row}")
    assert report["inputs"][0]["high"] is None


# --- compile --------------------------------------------------------------------------------------

MODELS = """
import torch

class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 12)

    def forward(self, x):
        return self.linear(x).relu()
"""
STAGES = [
    "loading torch and the module",
    "exporting the module",
    "running it on other inputs",
    "lowering to C++",
    "compiling the C++",
    "running the compiled code",
    "writing the package",
]
ARGUMENTS = ("compile", "users:Mlp", "-o", "m.pt2", "--example", "float32[4,16]")


@pytest.fixture
def users(tmp_path):
    (tmp_path / "users.py").write_text(MODELS)
    return tmp_path


def test_a_module_is_compiled_and_the_stages_are_told_apart(users):
    more = ("--dynamic", "batch=1..64", "--metadata", "author=Ada", "--json")
    done = run(*ARGUMENTS, *more, cwd=users)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line in STAGES] == STAGES
    report = json.loads(done.stdout)
    assert (report["path"], report["bytes"]) == ("m.pt2", (users / "m.pt2").stat().st_size)
    assert list(report["stages"]) == [
        *("loading", "exporting", "examining", "lowering", "compiling", "verifying", "packaging")
    ]
    (model,) = json_of("inspect", users / "m.pt2")["models"]
    assert model["metadata"] == {"author": "Ada"}
    assert model["batch"] == {"dim": 0, "symbol": "batch", "max": 64}
    assert sorted(path.name for path in users.iterdir() if path.suffix) == ["m.pt2", "users.py"]


@pytest.mark.parametrize("stage", ["exporting the module", "compiling the C++"])
def test_ctrl_c_while_compiling_leaves_nothing_behind(users, stage):
    process = subprocess.Popen(
        [sys.executable, "-m", "aoti_sched", *ARGUMENTS, "--metadata", f"stage={stage}"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=users,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(users / "inductor")},
    )
    lines = []
    for line in process.stderr:
        lines.append(line.strip())
        if lines[-1] == stage:
            process.send_signal(signal.SIGINT)
    process.stderr.close()
    assert process.wait() == 130
    assert lines[-1] == "aoti-sched: interrupted."
    assert {path.name for path in users.iterdir()} <= {"users.py", "__pycache__", "inductor"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-o", "m.txt"), "a package's name must end in .pt2"),
        (("-o", "m.pt2", "--metadata", "author"), "write KEY=VALUE"),
        (("-o", "m.pt2", "--option", "max_autotune=yes"), "no JSON"),
        ((), "requires an argument"),
    ],
)
def test_a_wrong_compile_is_one_sentence(users, capsys, arguments, says):
    assert says in refused_here(capsys, "compile", "users:Mlp", *arguments)


# --- bench ----------------------------------------------------------------------------------------

SHORT = ("--time", "0.2s", "--warm-up", "0", "--clients", "1,4", "--size", "batch=1")


def test_a_model_is_measured_and_compared_and_drawn(mlp, tmp_path):
    pytest.importorskip("matplotlib")
    saved, picture = tmp_path / "saved.json", tmp_path / "b.png"
    more = ("--rate", "50", "--poisson", "--budget", "p99=1h", "--budget", "throughput=0.1")
    report = json_of("bench", mlp.path, *SHORT, *more, "--save", saved, "--plot", picture)
    assert json.loads(saved.read_text()) == report
    assert picture.read_bytes().startswith(b"\x89PNG")
    levels = report["levels"]
    assert [level["clients"] for level in levels] == [1, 4, None]
    for measured in levels:
        assert measured["failed"] == {}
        assert (
            measured["latency"]["p50"] <= measured["latency"]["p99"] <= measured["latency"]["max"]
        )
    assert all(verdict["kept"] for verdict in report["verdicts"])
    done = run("bench", mlp.path, *SHORT, "--batching", "--compare", saved)
    assert (done.returncode, done.stderr) == (0, "")
    assert "compared with the earlier report" in done.stdout


def test_a_missed_budget_is_exit_code_3(mlp):
    done = run("bench", mlp.path, *SHORT, "--budget", "p50=1us")
    assert done.returncode == 3
    assert "budget p50=1us missed at 1 client: " in done.stderr
    assert "4 clients" in done.stdout


def test_a_model_that_can_not_be_run_is_not_measured():
    built = build("failing")
    done = run("bench", built.path, *SHORT[:-2], "--input", "0=[40]")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("aoti-sched: model 'model': the run failed")
    assert done.stdout == ""


def test_ctrl_c_ends_a_measurement(mlp):
    process = subprocess.Popen(
        [sys.executable, "-m", "aoti_sched", "--debug", "bench", str(mlp.path), "--time", "1h"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in process.stderr:
        lines.append(line.strip())
        if "model loaded" in line:
            process.send_signal(signal.SIGINT)
    process.stderr.close()
    assert process.stdout.read() == ""
    process.stdout.close()
    assert process.wait() == 130
    assert lines[-1] == "aoti-sched: interrupted."


# --- tune -----------------------------------------------------------------------------------------

FEW = (
    *("--threads", "1", "--instances", "1,2", "--max-size", "1,8", "--max-delay", "0,1ms"),
    *("--placement", "auto", "--tries", "2", "--time", "0.2s", "--warm-up", "0.1s"),
    *("--size", "batch=2"),
)


async def test_a_scheduler_loads_what_tune_writes(mlp, tmp_path):
    arguments = ("tune", mlp.path, "--p99", "10s", "--rate", "50", *FEW)
    done = run(*arguments, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["rows"] == 2
    assert report["timed"].keys() == {"1x1", "1x2"}
    assert report["settings"] == 6
    assert len(report["trials"]) == 2
    assert all(trial["measured"]["failed"] == 0 for trial in report["trials"])
    async with aoti_sched.Scheduler.from_config(tmp_path / "scheduler.toml") as scheduler:
        (runner,) = scheduler.runners.values()
        assert runner.info.instances == report["best"]["candidate"]["instances"]
        assert (await runner.run(*mlp.args)).shape[0] == mlp.args[0].shape[0]


def test_a_budget_that_no_settings_keep_is_exit_code_3(mlp, tmp_path):
    done = run("tune", mlp.path, "--p99", "1us", "--rate", "50", *FEW, cwd=tmp_path)
    assert done.returncode == 3
    assert "Nearest: threads 1" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_takes_no_batches_is_tuned_without(tmp_path):
    built = build("mutating")
    arguments = ("tune", built.path, "--p99", "10s", "--rate", "20", *FEW[:-2])
    done = run(*arguments, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (note,) = report["notes"]
    assert note.startswith("No batches were tried: model")
    assert {trial["candidate"]["max_size"] for trial in report["trials"]} == {1}


def test_ctrl_c_while_tuning_leaves_nothing_behind(mlp, tmp_path):
    command = ("tune", str(mlp.path), "--p99", "10s", "--rate", "50", *FEW)
    process = subprocess.Popen(
        [sys.executable, "-m", "aoti_sched", *command],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    lines = []
    for line in process.stderr:
        lines.append(line.strip())
        if lines[-1].startswith("confirming"):
            process.send_signal(signal.SIGINT)
    process.stderr.close()
    assert process.wait() == 130
    assert lines[-1] == "aoti-sched: interrupted."
    assert list(tmp_path.iterdir()) == []


# --- simulate -------------------------------------------------------------------------------------


async def test_a_recording_of_a_real_model_is_simulated(mlp, tmp_path):
    async with aoti_sched.Scheduler() as scheduler:
        runner = await scheduler.load(mlp.path, batching=True, name="mlp")
        with scheduler.record() as recording:
            for _ in range(5):
                await asyncio.gather(*(runner.run(mlp.args[0][:1]) for _ in range(8)))
        recording.save(tmp_path / "t.json")
    report = json_of("simulate", tmp_path / "t.json")
    for column in ("recording", "same"):
        assert report[column]["ended"] == {"DONE": 40}
    assert report["recording"]["run"]["max"] > 0
    changed = json_of("simulate", tmp_path / "t.json", "--max-size", "1")
    assert changed["simulation"]["batches"] == {"1": 40}
