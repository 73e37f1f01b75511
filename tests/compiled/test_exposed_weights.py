"""`aoti-sched weights` changes the weights of a real model that serves meanwhile."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aoti_sched import BlockingScheduler
from tests.models import build
from tests.unit.cli.support import json_of, refused, run

pytest.importorskip("starlette", reason="exposing needs the extra expose")
pytest.importorskip("uvicorn", reason="exposing needs the extra expose")


@pytest.fixture
def env(monkeypatch):
    folder = Path(tempfile.mkdtemp(prefix="xdg-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield {"XDG_RUNTIME_DIR": str(folder)}
    shutil.rmtree(folder)


def test_weights_are_extracted_staged_published_and_restored(env, tmp_path):
    mlp = build("mlp")
    x = mlp.args[0]
    with BlockingScheduler() as scheduler:
        runner = scheduler.load(mlp.path, name="mlp")
        twin = scheduler.load(mlp.path, name="twin")
        scheduler.expose("app", weights=True)
        first = runner.run(x)

        old = tmp_path / "old.safetensors"
        report = json_of("weights", "extract", "mlp", "-o", old, env=env)
        assert report["file"] == str(old)
        tensors = load_file(old)
        assert list(tmp_path.iterdir()) == [old]

        new = tmp_path / "new.safetensors"
        save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, new)
        for name in ("mlp", "twin"):
            report = json_of("weights", "stage", name, "new.safetensors", env=env, cwd=tmp_path)
            assert report["epochs"] == {name: 1}
        torch.testing.assert_close(runner.run(x), first)

        report = json_of("weights", "commit", "mlp", "twin", env=env)
        assert report["epochs"] == {"mlp": 2, "twin": 2}
        assert [update["runner"] for update in report["updates"]] == ["mlp", "twin"]
        assert not runner.run(x).any()
        assert not twin.run(x).any()

        done = run("weights", "rollback", "mlp", "twin", "--process", "app", env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("mlp: epoch 1 serves, ")
        torch.testing.assert_close(runner.run(x), first)

        line = refused("weights", "commit", "mlp", env=env, code=1)
        assert "has nothing to publish; call stage(weights) first" in line
        save_file({"other": torch.zeros(1)}, new)
        line = refused("weights", "stage", "mlp", new, env=env, code=1)
        assert "the new weights do not fit" in line
        line = refused("weights", "extract", "mlp", "-o", "/nowhere/x.safetensors", env=env, code=1)
        assert "/nowhere/x.safetensors" in line
        torch.testing.assert_close(runner.run(x), first)
