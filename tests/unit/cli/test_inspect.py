"""`inspect`, on packages whose libraries are no code: whatever would load one would fail."""

import json
import sys

import pytest

from aoti_sched.model.specs import (
    BatchDim,
    DynamicDim,
    LiteralSpec,
    ModelSpec,
    RowEvidence,
    TensorSpec,
    spec_to_metadata,
)
from aoti_sched.package.platform import spelled_machine
from tests.unit.cli.support import json_of, refused, run
from tests.unit.package.files import elf, metadata, model_members, write_package, zipped

BATCH = DynamicDim("batch", 0, 64)
SPEC = ModelSpec(
    inputs=(TensorSpec("x", "float32", (BATCH, 16), order=(0, 1)), LiteralSpec("flag", True)),
    outputs=(TensorSpec("y", "float32", (BATCH, 4)),),
    parameters=("x", "flag"),
    batch=BatchDim(0, "batch", 64),
    threads=2,
    rows=RowEvidence(True, "Rows alone and together gave the same."),
    torch_version="2.13.0",
)


def packaged(path, spec=SPEC, **more):
    own = {} if spec is None else spec_to_metadata(spec)
    stated = metadata(AOTI_PLATFORM=sys.platform, AOTI_MACHINE=spelled_machine(), **more, **own)
    return write_package(path, files={"abc.wrapper_metadata.json": stated})


def test_a_package_of_ours_is_described_whole(tmp_path):
    path = packaged(tmp_path / "m.pt2", author="Ada")
    report = json_of("inspect", path)
    assert (report["version"], report["path"], report["bytes"]) == (
        1,
        str(path),
        path.stat().st_size,
    )
    (model,) = report["models"]
    assert [leaf["name"] for leaf in model["inputs"]] == ["x", "flag"]
    assert model["inputs"][0]["shape"][0]["max"] == 64
    assert model["batch"] == {"dim": 0, "symbol": "batch", "max": 64}
    assert (model["threads"], model["torch_version"]) == (2, "2.13.0")
    assert (model["constants"], model["weights"]) == (1, "in_library")
    assert (model["runs_here"], model["misfit"]) == (True, "")
    assert model["metadata"] == {"author": "Ada"}
    assert any("kernels of several threads" in text for text in model["unchecked"])


def test_people_see_the_same_in_words(tmp_path):
    done = run("inspect", packaged(tmp_path / "m.pt2", author="Ada"))
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        "float32[batch:0..64, 16]",
        "always True",
        "dimension 0, at most 64 rows",
        "Rows alone and together gave the same.",
        "metadata author  Ada",
        "runs here        yes",
    ):
        assert words in done.stdout
    assert [line for line in done.stdout.splitlines() if line != line.rstrip()] == []


def test_a_foreign_package_says_what_is_not_checked(tmp_path):
    (model,) = json_of("inspect", packaged(tmp_path / "m.pt2", spec=None))["models"]
    assert model["spec_source"] == "arity only"
    assert model["checked"] == ["number of tensors"]
    assert any("load(inputs=)" in text for text in model["unchecked"])
    assert (model["inputs"], model["batch"], model["frozen"]) == ([], None, None)


def test_a_package_for_another_machine_is_described_and_does_not_run_here(tmp_path):
    path = tmp_path / "m.pt2"
    stated = metadata(AOTI_PLATFORM="win32", AOTI_MACHINE="AMD64")
    write_package(path, files={"abc.wrapper_metadata.json": stated})
    (model,) = json_of("inspect", path)["models"]
    assert not model["runs_here"]
    assert "was compiled for win32/x86_64" in model["misfit"]
    assert "runs here     no: " in run("inspect", path).stdout


def test_several_models_are_all_shown_or_one(tmp_path):
    path = tmp_path / "m.pt2"
    path.write_bytes(zipped([*model_members("a"), *model_members("b")]))
    assert [model["name"] for model in json_of("inspect", path)["models"]] == ["a", "b"]
    assert [m["name"] for m in json_of("inspect", path, "--model", "b")["models"]] == ["b"]
    assert "holds no model 'c'; it holds 'a', 'b'." in refused(
        "inspect", path, "--model", "c", code=1
    )


def test_a_bare_library_is_described(tmp_path):
    path = tmp_path / "m.so"
    path.write_bytes(elf())
    (model,) = json_of("inspect", path)["models"]
    assert (model["name"], model["weights"], model["constants"]) == ("m", "unknown", None)


def test_control_characters_of_a_package_do_not_reach_the_terminal(tmp_path):
    path = packaged(tmp_path / "m.pt2", note="\x1b[31mred\x07\nnext")
    done = run("inspect", path)
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout
    assert json.loads(run("inspect", path, "--json").stdout)["models"][0]["metadata"]["note"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "There is no package at"),
        (b"no package", "is neither a zip nor a shared library"),
        (b"PK\x03\x04 truncated", ""),
    ],
)
def test_what_is_no_package_is_refused(tmp_path, content, says):
    path = tmp_path / "m.pt2"
    if content is not None:
        path.write_bytes(content)
    line = refused("inspect", path, code=1)
    assert says in line
    assert "m.pt2" in line
