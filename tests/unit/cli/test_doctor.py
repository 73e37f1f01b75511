"""`doctor`: what it finds, and which sentences it has for what is wrong."""

import re
from pathlib import Path

import pytest

import aoti_sched
from aoti_sched.cli import doctor
from tests.unit.cli.support import json_of, run


@pytest.fixture
def no_torch(monkeypatch):
    """Importing torch takes seconds; what is found without it is the same."""
    monkeypatch.setattr(doctor, "_devices", lambda problems: (2, ("cpu",)))


def test_the_report_names_what_decides_how_models_run():
    pytest.importorskip("torch")
    report = json_of("doctor", env={"AOTI_SCHED_EXECUTOR": "threads"})
    assert report["aoti_sched"] == aoti_sched.__version__
    assert report["devices"][0] == "cpu"
    assert 1 <= report["cores"] <= report["cores_in_machine"]
    assert report["packages"]["msgspec"]
    assert report["environment"]["AOTI_SCHED_EXECUTOR"] == "threads"


@pytest.mark.parametrize("extra", ["cli", "expose", "metrics", "otel", "top", "web"])
def test_the_packages_of_every_extra_are_listed(no_torch, extra):
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8")
    (listed,) = re.findall(rf"^{extra} = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    names = {name.replace("-", "_") for name in re.findall(r'"([\w-]+)>=', listed)}
    assert names
    assert names <= {name.replace("-", "_") for name in doctor.examine().packages}


def test_people_get_the_problems_last(monkeypatch, capsys, no_torch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    doctor.doctor_command()
    text = capsys.readouterr().out
    assert re.search(r"C\+\+ compiler +missing", text)
    assert "models can't be compiled here" in text.partition("Problems")[2]


@pytest.mark.parametrize("version", ["", "2.10.1+cpu"])
def test_a_torch_that_is_missing_or_too_old_is_a_problem(monkeypatch, no_torch, version):
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    (problem,) = (text for text in doctor.examine().problems if "torch" in text)
    assert problem.endswith("Install torch 2.11 or newer.")


def test_a_newer_torch_is_none(monkeypatch, no_torch):
    monkeypatch.setattr(doctor, "_version", lambda name: "3.0.0a0+git")
    assert [text for text in doctor.examine().problems if "torch" in text] == []


def test_a_compiler_that_does_not_work_is_none(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert doctor.find_compiler() == ""


def test_a_cache_that_can_not_be_trusted_is_a_problem(monkeypatch, no_torch, tmp_path):
    tmp_path.chmod(0o777)
    monkeypatch.setenv("AOTI_SCHED_CACHE", str(tmp_path))
    report = doctor.examine()
    assert report.cache_bytes is None
    assert any("may be written by others" in text for text in report.problems)


def test_the_report_of_a_process_has_nothing_on_stderr():
    pytest.importorskip("torch")
    done = run("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"aoti_sched {aoti_sched.__version__}\n")
