"""New weights from every kind of source, and every way in which a file can fail its reader."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import random
import subprocess
import sys
import weakref
import zipfile
from collections import OrderedDict
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from aoti_sched import WeightsFileError, WeightsTypeError
from aoti_sched.backends.aoti.weight_files import open_weights

STATE = {
    "weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "bias": torch.tensor([1.5, -2.0]),
    "scale": torch.tensor(7.0),
    "table": torch.arange(300, dtype=torch.int64),
}


def read(weights):
    with open_weights(weights) as offers:
        return {offered.name: offered.read() for offered in offers}


def same(read, expected):
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0, equal_nan=True)


def fault(path):
    """What reading the file to its end says is wrong with it."""
    with pytest.raises(WeightsFileError) as raised:
        read(path)
    assert raised.value.path.startswith(str(Path(path).parent))
    return str(raised.value)


@pytest.fixture
def safetensors(tmp_path):
    path = tmp_path / "new.safetensors"
    save_file(STATE, path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "new.pt"
    torch.save(STATE, path)
    return path


def with_header(path, header, data=b""):
    """A safetensors file with this header, be it right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


# --- what is in memory ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [dict, OrderedDict, lambda state: state.items(), lambda state: [*state.items()]]
)
def test_a_mapping_and_pairs_are_passed_on(given):
    assert [(name, id(tensor)) for name, tensor in read(given(STATE)).items()] == [
        (name, id(tensor)) for name, tensor in STATE.items()
    ]


def test_the_parameters_of_a_module_are_passed_on():
    module = torch.nn.Linear(2, 3)
    assert read(module.named_parameters()) == dict(module.named_parameters())
    same(read(module.state_dict()), module.state_dict())


def test_a_generator_is_asked_for_one_pair_at_a_time():
    asked = []

    def pairs():
        for name, tensor in STATE.items():
            asked.append(name)
            yield name, tensor

    with open_weights(pairs()) as offers:
        assert asked == []
        next(offers)
        assert asked == ["weight"]


def test_what_the_callers_generator_raises_comes_through():
    def pairs():
        yield "weight", STATE["weight"]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read(pairs())


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (None, "got NoneType"),
        (3, "got int"),
        (torch.zeros(2, 2), "got torch.Tensor"),
        (b"new.pt", "got bytes"),
        (torch.nn.Linear(2, 2), "Pass its state_dict()"),
        (["weight"], "Entry 0 of the weights: expected (name, tensor), got str"),
        (
            [("a", torch.zeros(1)), ("b",)],
            "Entry 1 of the weights: expected (name, tensor), got tuple",
        ),
        ({3: torch.zeros(1)}, "Entry 0 of the weights: expected a str as name, got int 3"),
        ({"a": [1.0]}, "Entry 'a' of the weights: expected a tensor, got list"),
        ({"a": {"b": torch.zeros(1)}}, "Entry 'a' of the weights: expected a tensor, got dict"),
    ],
)
def test_what_is_no_weights_is_named(weights, said):
    with pytest.raises(WeightsTypeError) as raised:
        read(weights)
    assert said in str(raised.value)
    assert isinstance(raised.value, TypeError)


# --- safetensors ----------------------------------------------------------------------------------

DTYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_from_safetensors(tmp_path, dtype):
    some = torch.tensor([0, 1, 1, 0, 1, 0]).to(dtype)
    state = {
        "some": some,
        "matrix": some.reshape(2, 3).clone(),
        "number": some[1].clone(),
        "none": some[:0].clone(),
    }
    state["no rows"] = torch.empty(0, 5, dtype=dtype)
    save_file(state, tmp_path / "a.safetensors")
    back = read(tmp_path / "a.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in back.items()} == {
        name: (t.dtype, t.shape) for name, t in state.items()
    }
    for name, tensor in state.items():
        assert (
            back[name].reshape(-1).view(torch.uint8).tolist()
            == tensor.reshape(-1).view(torch.uint8).tolist()
        )


def test_a_path_may_be_a_str_or_any_path_object(safetensors):
    same(read(str(safetensors)), STATE)
    same(read(safetensors), STATE)


def test_each_tensor_of_a_file_has_a_storage_of_its_own(safetensors, checkpoint):
    for path in (safetensors, checkpoint):
        tensors = read(path).values()
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(STATE)
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


def test_metadata_is_no_tensor(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors", metadata={"format": "pt", "step": "12"})
    same(read(tmp_path / "a.safetensors"), STATE)


def test_a_file_without_tensors_gives_none(tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors") == {}
    torch.save({}, tmp_path / "a.pt")
    assert read(tmp_path / "a.pt") == {}


def test_the_content_tells_the_format_and_not_the_name(safetensors, checkpoint, tmp_path):
    safetensors.rename(tmp_path / "really.pt")
    checkpoint.rename(tmp_path / "really.safetensors")
    same(read(tmp_path / "really.pt"), STATE)
    same(read(tmp_path / "really.safetensors"), STATE)


def test_tensors_of_a_hundred_are_in_memory_one_at_a_time(tmp_path):
    megabyte, path = 1 << 20, tmp_path / "hundred.safetensors"
    save_file(
        {f"layer {n}": torch.full((megabyte,), n, dtype=torch.uint8) for n in range(100)}, path
    )
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    peak, alive, names = 0, None, set()
    with open_weights(path) as offers:
        for offered in offers:
            assert alive is None or alive() is None
            name, tensor = offered.name, offered.read()
            names.add(name)
            assert tensor[-1] == int(name.removeprefix("layer "))
            peak = max(peak, process.memory_info().rss - before)
            alive = weakref.ref(tensor)
            del tensor
    assert len(names) == 100
    assert peak < 10 * megabyte


def test_a_file_is_closed_when_the_block_is_left(safetensors):
    process = psutil.Process()
    before = process.num_fds()
    for _ in range(3):
        with open_weights(safetensors) as offers:
            next(offers).read()
    assert process.num_fds() == before


# --- faults of safetensors ------------------------------------------------------------------------


def test_safetensors_cut_at_any_place_are_refused(safetensors):
    whole = safetensors.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    cuts = {*range(20), *range(header - 9, header + 9), *range(20, len(whole), 97), len(whole) - 1}
    for cut in sorted(cuts):
        safetensors.write_bytes(whole[:cut])
        said = fault(safetensors)
        assert ("is neither" if cut < 9 else "is truncated") in said, cut


def test_bytes_beyond_the_last_tensor_are_refused(safetensors):
    safetensors.write_bytes(safetensors.read_bytes() + b"more")
    assert "has bytes that belong to no tensor" in fault(safetensors)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{]", "broken safetensors header"),
        (b'{"a": "\xff"}', "broken safetensors header"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "broken safetensors header"),
        ({"a": 3}, "broken safetensors header"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "broken safetensors header"),
        ({"a": F32 | {"shape": [-2]}}, "broken safetensors header"),
        ({"a": F32 | {"shape": [2.5]}}, "broken safetensors header"),
        ({"a": F32 | {"dtype": "F4"}}, "'a' of dtype F4"),
        ({"a": F32 | {"shape": [3]}}, "'a' (F32 [3], 12 bytes) has the offsets 0 to 8"),
        ({"a": F32 | {"shape": [1 << 62, 1 << 62]}}, "broken safetensors header"),
        ({"a": F32 | {"shape": [10**30]}}, "broken safetensors header"),
        (
            {"a": F32 | {"shape": [0, 1 << 63], "data_offsets": [0, 0]}, "b": F32},
            "a shape that cannot be made",
        ),
        ({"a": F32 | {"data_offsets": [8, 0]}}, "broken safetensors header"),
        (
            {"a": F32 | {"data_offsets": [4, 12]}},
            "'a' (F32 [2], 8 bytes) has the offsets 4 to 12",
        ),
        ({"a": F32, "b": F32}, "'b' (F32 [2], 8 bytes) has the offsets 0 to 8, but 8 bytes"),
        ({"a": F32, "b": F32 | {"data_offsets": [8, 16]}}, "is truncated: its header promises"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, said):
    assert said in fault(with_header(tmp_path / "a.safetensors", header, bytes(8)))


def test_a_promise_of_more_than_the_file_allocates_nothing(tmp_path):
    huge = {"a": {"dtype": "U8", "shape": [1 << 50], "data_offsets": [0, 1 << 50]}}
    assert "is truncated" in fault(with_header(tmp_path / "a.safetensors", huge, bytes(8)))


# --- torch.save -----------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_is_read_in_both_of_torchs_formats(tmp_path, zipped):
    torch.save(STATE, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    same(read(tmp_path / "a.pt"), STATE)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_state_dict_beside_an_optimizers_is_found(tmp_path, key):
    module = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save(
        {"epoch": 3, key: module.state_dict(), "optimizer": optimizer.state_dict()},
        tmp_path / "a.pt",
    )
    same(read(tmp_path / "a.pt"), module.state_dict())


def test_of_two_state_dicts_none_is_chosen(tmp_path):
    torch.save({"model": STATE, "state_dict": STATE}, tmp_path / "a.pt")
    assert "several state dicts, ['state_dict', 'model']" in fault(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.zeros(3), "holds torch.Tensor, not a state dict"),
        ([torch.zeros(3)], "holds list, not a state dict"),
        (7, "holds int, not a state dict"),
        ({"net": STATE}, "holds dict as 'net'"),
        ({"weight": torch.zeros(3), "step": 7}, "holds int as 'step'"),
        ({0: torch.zeros(3)}, "holds torch.Tensor as 0"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "a.pt")
    assert said in fault(tmp_path / "a.pt")


class Greets:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.write_text, (Path(self.path), "hello")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_that_would_run_code_is_refused_with_advice(tmp_path, zipped):
    torch.save(
        {"a": Greets(tmp_path / "ran")}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped
    )
    said = fault(tmp_path / "a.pt")
    assert "could run any code" in said
    assert "weights_only=False" in said
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_module_is_refused_by_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    assert "holds torch.nn.modules.linear.Linear, which is no tensor" in fault(tmp_path / "a.pt")


def test_tensors_of_a_checkpoint_are_freed_as_they_are_used(checkpoint):
    with open_weights(checkpoint) as offers:
        tensor = next(offers).read()
        first = weakref.ref(tensor)
        tensor = next(offers).read()
        assert first() is None


def test_a_cut_checkpoint_is_refused(checkpoint):
    whole = checkpoint.read_bytes()
    for cut in {0, 1, 2, 3, *range(4, len(whole), 211), len(whole) - 23, len(whole) - 1}:
        checkpoint.write_bytes(whole[:cut])
        fault(checkpoint)


def test_a_cut_legacy_checkpoint_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for cut in {1, 2, 15, *range(16, len(whole), 211), len(whole) - 1}:
        path.write_bytes(whole[:cut])
        fault(path)


def test_a_checkpoint_whose_tensors_reach_beyond_their_records_is_refused(checkpoint, tmp_path):
    with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(tmp_path / "a.pt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[: len(content) // 2] if "/data/" in name else content)
    fault(tmp_path / "a.pt")


# --- what is no weights file ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"\x7fELF" + bytes(100),
        b"[1, 2]",
        bytes(100),
        pickle.dumps({"a": 1}),
        b"PK\3\4" + bytes(100),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    fault(tmp_path / "a.pt")


def test_a_zip_that_torch_did_not_write_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("hello.txt", "hello")
    assert "no readable torch checkpoint" in fault(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
def test_a_torchscript_archive_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pt")
    assert "TorchScript" in fault(tmp_path / "a.pt")


@pytest.mark.parametrize("path", ["nothing.pt", "nothing/here.safetensors"])
def test_a_missing_file_is_named(tmp_path, path):
    assert f"There is no weights file at {tmp_path / path}" in fault(tmp_path / path)


def test_a_path_below_a_file_leads_nowhere(safetensors):
    assert "There is no weights file" in fault(safetensors / "inner.pt")


def test_a_path_no_system_takes_is_refused(tmp_path):
    assert "Cannot read" in fault(tmp_path / "nul\0.pt")


def test_a_directory_is_refused(tmp_path):
    assert "is a directory" in fault(tmp_path)


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe or a device" in fault(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(safetensors):
    safetensors.chmod(0)
    assert "Permission denied" in fault(safetensors)


# --- shards ---------------------------------------------------------------------------------------


def sharded(folder, save=save_file):
    """The state in two files and an index."""
    shards = {"one-of-two": ["weight", "scale"], "two-of-two": ["bias", "table"]}
    for shard, names in shards.items():
        save({name: STATE[name] for name in names}, folder / shard)
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: s for s, names in shards.items() for name in names},
    }
    (folder / "model.index.json").write_text(json.dumps(index, indent=2))
    return folder / "model.index.json"


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_an_index_reads_all_its_shards(tmp_path, save):
    same(read(sharded(tmp_path, save)), STATE)


def test_a_missing_shard_is_named_before_any_is_read(tmp_path):
    index = sharded(tmp_path)
    (tmp_path / "two-of-two").unlink()
    with (
        open_weights(index) as offers,
        pytest.raises(WeightsFileError, match="'two-of-two' that is not beside it"),
    ):
        next(offers)


def test_an_index_and_shards_of_different_sets_are_refused(tmp_path):
    index = sharded(tmp_path)
    save_file({"weight": STATE["weight"]}, tmp_path / "one-of-two")
    assert "lists 'scale' for the shard 'one-of-two', which lacks it" in fault(index)
    save_file(STATE, tmp_path / "one-of-two")
    assert "for the shard 'one-of-two', which holds it" in fault(index)


@pytest.mark.parametrize("shard", ["../elsewhere", "/etc/passwd", "", ".."])
def test_a_shard_elsewhere_is_refused(tmp_path, shard):
    (tmp_path / "a.json").write_text(json.dumps({"weight_map": {"weight": shard}}))
    assert "is not the name of a file in its directory" in fault(tmp_path / "a.json")


def test_an_index_that_names_itself_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"weight_map": {"weight": "a.json"}}))
    assert "is neither" in fault(tmp_path / "a.json")


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{", '{"a":' * 10_000]
)
def test_json_that_is_no_index_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert "is no index of weights files" in fault(tmp_path / "a.json")


def test_a_shard_that_changes_after_it_was_read_is_noticed(tmp_path):
    index = sharded(tmp_path)
    with pytest.raises(WeightsFileError, match="one-of-two changed while it was being read"):
        read_on(index, after=2, doing=lambda: touched(tmp_path / "one-of-two"))


# --- files that change ----------------------------------------------------------------------------


def replaced(path):
    save_file(STATE, path.with_name("newer"))
    path.with_name("newer").replace(path)


def rewritten(path):
    path.write_bytes(path.read_bytes())


def touched(path):
    os.utime(path, ns=(0, 0))


def read_on(path, *, after, doing):
    """Read so many tensors, do something, and read the rest."""
    with open_weights(path) as offers:
        for _ in range(after):
            next(offers).read()
        doing()
        for offered in offers:
            offered.read()


@pytest.mark.parametrize("change", [replaced, rewritten, touched, Path.unlink])
@pytest.mark.parametrize("kind", ["safetensors", "checkpoint"])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_file_that_changes_is_noticed_before_its_tensors_may_be_used(
    request, kind, change, after
):
    path = request.getfixturevalue(kind)
    os.utime(
        path, ns=(1, 1)
    )  # long ago: the file system's clock may tick no more often than every 4 ms
    with pytest.raises(
        WeightsFileError, match=r"changed while it was being read|There is no weights file"
    ):
        read_on(path, after=after, doing=lambda: change(path))


def touch_and_leave(path, error=None):
    with open_weights(path) as offers:
        next(offers).read()
        touched(path)
        if error:
            raise error


def test_a_file_that_changes_is_noticed_by_who_stops_before_its_end(safetensors):
    with pytest.raises(WeightsFileError, match="changed"):
        touch_and_leave(safetensors)


def test_the_callers_own_error_is_not_replaced(safetensors):
    with pytest.raises(ZeroDivisionError):
        touch_and_leave(safetensors, ZeroDivisionError())


SHRINKS = """
import os, sys, torch
from aoti_sched import WeightsFileError
from aoti_sched.backends.aoti.weight_files import open_weights
path = sys.argv[1]
try:
    with open_weights(path) as offers:
        offers = list(offers)
        kept = [offers[0].read()]
        os.truncate(path, 5000)
        kept += [offered.read() for offered in offers[1:]]
except WeightsFileError as error:
    print(float(sum(tensor.double().sum() for tensor in kept)), error)
"""


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_file_that_shrinks_while_it_is_read_does_not_end_the_process(tmp_path, save):
    path = tmp_path / "shrinks"
    save({f"layer {n}": torch.ones(1 << 18) for n in range(8)}, path)
    ran = subprocess.run(
        [sys.executable, "-c", SHRINKS, path], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"{float(1 << 18)} {path}")


# --- chance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "checkpoint", "legacy"])
@pytest.mark.parametrize("seed", range(60))
def test_a_file_with_random_damage_is_read_or_refused(tmp_path, kind, seed):
    chance, path = random.Random(seed), tmp_path / "damaged"
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "checkpoint")
    content = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 8)):
        match chance.randrange(4):
            case 0:
                content[chance.randrange(len(content))] = chance.randrange(256)
            case 1:
                start = chance.randrange(min(len(content), 1000))
                content[start : start + 8] = chance.randbytes(8)
            case 2:
                start = chance.randrange(len(content))
                del content[start : start + chance.randint(1, 64)]
            case 3:
                start = chance.randrange(len(content))
                content[start:start] = chance.randbytes(chance.randint(1, 64))
    path.write_bytes(content)
    with contextlib.suppress(WeightsFileError):
        read(path)


@pytest.mark.parametrize("seed", range(40))
def test_random_bytes_are_refused(tmp_path, seed):
    chance = random.Random(seed)
    start = chance.choice([b"", b"PK\3\4", b"\x80\2", b"{", (20).to_bytes(8, "little") + b"{"])
    (tmp_path / "a").write_bytes(start + chance.randbytes(chance.randrange(4000)))
    fault(tmp_path / "a")
