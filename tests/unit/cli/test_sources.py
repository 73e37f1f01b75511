"""What `compile` compiles, up to the call of `compile_package`: no compiler is needed."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cyclopts", reason="the command line needs the extra cli")

from aoti_sched.cli.failures import UsageError  # noqa: E402
from aoti_sched.cli.sources import read_source  # noqa: E402
from aoti_sched.errors import CompileError  # noqa: E402

CODE = """
import torch

class Pool(torch.nn.Module):
    def forward(self, ids, mask, scale=1):
        return (ids * mask).sum(1) * scale

class Nested(torch.nn.Module):
    def forward(self, pair, *, more):
        return pair[0] + pair[1] + more["a"]

def nested():
    x = torch.zeros(4, 3)
    return Nested(), ((x, x + 1),), {"more": {"a": x + 2}}

ready = Pool()

def fails():
    raise RuntimeError("no weights")

def wrong():
    return 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "users_models.py").write_text(CODE)
    (tmp_path / "broken_models.py").write_text("import nothing_of_the_kind\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    return tmp_path


@pytest.mark.parametrize("place", ["users_models", "users_models.py"])
@pytest.mark.parametrize("name", ["Pool", "ready"])
def test_a_module_a_class_and_a_file_are_sources(place, name):
    found = read_source(f"{place}:{name}", ["int64[2,3]:5..9", "mask=int64[2,3]"], [])
    ids, mask = found.args
    assert not found.module.training
    assert (ids.shape, ids.dtype, found.kwargs, found.dynamic) == ((2, 3), torch.int64, {}, None)
    assert 5 <= int(ids.min()) <= int(ids.max()) <= 9
    assert {*mask.flatten().tolist()} <= {0, 1}


def test_a_size_is_free_in_dimension_0_or_where_it_is_placed():
    examples = ["int64[2,3]", "int64[2,3]", "scale=2"]
    dynamic = ["batch=1..64", "tokens=2..128:ids.1,mask.1"]
    found = read_source("users_models:Pool", examples, dynamic)
    assert found.args[2] == 2
    batch, tokens = (found.dynamic["ids"][index] for index in (0, 1))
    assert (batch.__name__, batch.min, batch.max) == ("batch", 1, 64)
    assert (tokens.__name__, tokens.min, tokens.max) == ("tokens", 2, 128)
    assert found.dynamic["mask"] == found.dynamic["ids"]
    program = torch.export.export(found.module, found.args, dynamic_shapes=found.dynamic)
    assert len(program.range_constraints) == 2


def test_a_factory_may_bring_its_examples():
    found = read_source("users_models:nested", [], ["rows=..64"])
    program = torch.export.export(
        found.module, found.args, kwargs=found.kwargs, dynamic_shapes=found.dynamic
    )
    assert len(program.range_constraints) == 1


def test_an_exported_program_keeps_its_sizes(folder):
    source = read_source("users_models:nested", [], ["rows=2..64"])
    program = torch.export.export(
        source.module, source.args, kwargs=source.kwargs, dynamic_shapes=source.dynamic
    )
    torch.export.save(program, folder / "p.pt2")
    found = read_source(str(folder / "p.pt2"), [], [])
    again = torch.export.export(
        found.module, found.args, kwargs=found.kwargs, dynamic_shapes=found.dynamic
    )
    (bounds,) = again.range_constraints.values()
    assert (int(bounds.lower), int(bounds.upper)) == (2, 64)


@pytest.mark.parametrize(
    ("source", "examples", "dynamic", "says"),
    [
        ("users_models", [], [], "write MODULE:FACTORY"),
        ("no_models:x", [], [], "no_models: there is no such module"),
        ("none.py:x", [], [], "none.py: no such file"),
        ("users_models:Nothing", [], [], "users_models has no 'Nothing'"),
        ("users_models:torch", [], [], "expected a module or a function"),
        ("users_models:wrong", [], [], "returned 3. Return a torch.nn.Module"),
        ("users_models:Pool", ["float99[2]"], [], "'float99' is no dtype"),
        ("users_models:Pool", ["float32(2)"], [], "write DTYPE[SIZES]"),
        ("users_models:Pool", ["int64[2]:9..5"], [], "the range 9..5 is empty"),
        ("users_models:Pool", ["int64[2]"], [], "does not take these: missing a required"),
        ("users_models:nested", [], ["rows"], "write NAME=MIN..MAX"),
        ("users_models:nested", [], ["rows=9..1"], "--dynamic rows=9..1: "),
        ("users_models:nested", [], ["rows=1..9:x.0"], "no place 'x.0'"),
        ("users_models.py:Pool", [], ["rows=1..9"], "the examples do not fit forward"),
        ("users_models.pt2", ["1"], [], "has its own examples"),
    ],
)
def test_a_wrong_source_is_explained(source, examples, dynamic, says):
    with pytest.raises(UsageError) as raised:
        read_source(source, examples, dynamic)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("users_models:fails", "users_models:fails fails: RuntimeError: no weights."),
        ("broken_models:x", "importing broken_models fails: ModuleNotFoundError"),
    ],
)
def test_code_that_fails_is_a_failure(source, says):
    with pytest.raises(CompileError) as raised:
        read_source(source, [], [])
    assert says in str(raised.value)


def test_a_file_that_is_no_program_is_refused(folder):
    (folder / "x.pt2").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"x.pt2: no exported program"):
        read_source("x.pt2", [], [])
    with pytest.raises(FileNotFoundError):
        read_source("missing.pt2", [], [])
