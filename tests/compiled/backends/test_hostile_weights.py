"""Weights that cost more than they are worth: what is wrong with them is found before it is
paid for, and said in a few lines.

Names and sizes are compared before the bytes of a tensor are read; headers, pickles and directories
have bounds.
"""

from __future__ import annotations

import itertools
import json
import pickle
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.serialization import skip_data

from aoti_sched import AotiSchedError, ConstantMismatchError, WeightsFileError
from aoti_sched.backends.aoti.checkpoint import PICKLE_LIMIT
from aoti_sched.backends.aoti.constants import Constant, Names
from aoti_sched.backends.aoti.json_scan import JsonScan
from aoti_sched.backends.aoti.weight_check import SURPLUS_LIMIT, choose
from aoti_sched.backends.aoti.weight_files import open_weights
from aoti_sched.backends.aoti.weight_offer import HEADER_LIMIT
from aoti_sched.errors import clipped, shortened
from aoti_sched.model.specs import ConstantSpec, WeightName

SCREEN = 24 * 80  # characters
MEBIBYTE = 1 << 20


def constant(name="w", shape=(4,), dtype="float32"):
    size = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
    stride = torch.empty(shape, device="meta").stride()
    return Constant(
        ConstantSpec(name, name, dtype, tuple(shape), size, "parameter", False), size, stride
    )


MODEL = (constant(),)


def chosen(weights, *, constants=MODEL, strict=True, partial=False, names=(), check_finite=False):
    """What would be written for the model: its tensors by name."""
    with open_weights(weights) as offers:
        chosen = choose(
            "m",
            constants,
            Names(constants, names),
            offers,
            device_type="cpu",
            partial=partial,
            strict=strict,
        )
        chosen.read()
        return chosen.values(check_finite=check_finite)


def refusal(weights, **options):
    with pytest.raises(AotiSchedError) as caught:
        chosen(weights, **options)
    assert len(str(caught.value)) <= SCREEN
    return caught.value


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "complex64"])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_values_that_are_not_finite_are_refused_in_every_dtype(dtype, shape):
    constants = (constant(shape=shape, dtype=dtype),)
    good = torch.ones(shape).to(getattr(torch, dtype))
    bad = torch.full(shape, float("nan")).to(good.dtype)
    assert chosen({"w": good}, constants=constants, check_finite=True)["w"] is not None
    assert "not finite" in str(refusal({"w": bad}, constants=constants, check_finite=True))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float32"])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_tied_names_must_agree_in_every_dtype(dtype, shape):
    constants = (constant(shape=shape, dtype=dtype),)
    names = (WeightName("w"), WeightName("v", same_as="w"))
    one, other = (
        torch.ones(shape).to(getattr(torch, dtype)),
        torch.zeros(shape).to(getattr(torch, dtype)),
    )
    assert set(chosen({"w": one, "v": one.clone()}, constants=constants, names=names)) == {"w"}
    assert "other values" in str(refusal({"w": one, "v": other}, constants=constants, names=names))


# --- sizes ----------------------------------------------------------------------------------------

EXPENSIVE = """
import resource, sys
from tests.compiled.backends.test_hostile_weights import refusal
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
error = refusal(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


def cost(path):
    """The megabytes that refusing the file took, in a process of its own, and what was said."""
    root = Path(__file__).resolve().parents[3]
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EXPENSIVE), path],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    kilobytes, _, said = ran.stdout.partition(" ")
    return int(kilobytes) / 1024, said


def sparse_safetensors(path, size):
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


def sparse_checkpoint(path, size):
    with skip_data():
        torch.save({"w": torch.empty(size, dtype=torch.uint8)}, path)


def deflated_checkpoint(path, size, member="data/0"):
    torch.save({"w": torch.zeros(4)}, path.with_suffix(".small"))
    with (
        zipfile.ZipFile(path.with_suffix(".small")) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            content = old.read(info)
            with new.open(info.filename, "w") as file:
                file.write(content)
                if info.filename.endswith(member):
                    for _ in range(size // MEBIBYTE):
                        file.write(bytes(MEBIBYTE))


@pytest.mark.parametrize("make", [sparse_safetensors, sparse_checkpoint])
def test_a_tensor_of_the_wrong_size_is_refused_before_it_is_read(tmp_path, make):
    make(tmp_path / "huge", 3 << 30)
    took, said = cost(tmp_path / "huge")
    assert "'w' wants float32, got uint8" in said
    assert took < 32


@pytest.mark.parametrize(
    ("member", "said"), [("data/0", "claims to grow from"), ("data.pkl", "names its tensors in")]
)
def test_a_checkpoint_that_grows_is_refused_before_it_has_grown(tmp_path, member, said):
    deflated_checkpoint(tmp_path / "bomb.pt", 512 * MEBIBYTE, member)
    assert (tmp_path / "bomb.pt").stat().st_size < MEBIBYTE
    took, text = cost(tmp_path / "bomb.pt")
    assert said in text
    assert took < 32


def test_a_checkpoint_that_was_packed_again_is_read(tmp_path):
    value = torch.randn(1000)
    torch.save({"w": value}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert torch.equal(chosen(tmp_path / "b.pt", constants=[constant(shape=(1000,))])["w"], value)


def test_a_pickle_that_is_too_long_is_refused(tmp_path):
    torch.save({"w" * (PICKLE_LIMIT + 1): torch.zeros(4)}, tmp_path / "zip.pt")
    assert "names its tensors in" in str(refusal(tmp_path / "zip.pt"))
    torch.save(
        {"w" * (PICKLE_LIMIT + 1): torch.zeros(4)},
        tmp_path / "old.pt",
        _use_new_zipfile_serialization=False,
    )
    assert "are plausible" in str(refusal(tmp_path / "old.pt"))


def test_a_header_that_is_too_long_is_refused_unread(tmp_path):
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write((HEADER_LIMIT + 1).to_bytes(8, "little") + b"{")
        file.truncate(HEADER_LIMIT + 1000)
    assert f"at most {HEADER_LIMIT} are plausible" in str(refusal(tmp_path / "a.safetensors"))


def test_an_index_that_is_too_long_is_refused_unread(tmp_path):
    with (tmp_path / "a.index.json").open("wb") as file:
        file.write(b'{"weight_map"')
        file.truncate(HEADER_LIMIT + 1)
    assert "is no index of weights files" in str(refusal(tmp_path / "a.index.json"))


def test_only_what_the_model_wants_is_read(tmp_path):
    """Of 2 GiB that are not there, four elements."""
    path = tmp_path / "a.pt"
    with skip_data():
        torch.save(
            {"w": torch.zeros(4), "optimizer": torch.empty(2 << 30, dtype=torch.uint8)}, path
        )
    took = chosen(path, strict=False)
    assert took.keys() == {"w"}


# --- tensors that do not fill their storage -------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[5],
        lambda t: t[:, 3],
        lambda t: t.t(),
        lambda t: t[10:20, ::3],
        lambda t: t[:, :1].expand(-1, 4),
        lambda t: t[::7, 5:6],
        lambda t: t.as_strided((3, 2), (1, 1), 4),
        lambda t: t[0, 0],
        lambda t: t[:0],
        lambda t: torch.view_as_complex(t.reshape(-1, 2)).conj(),
        lambda t: torch.view_as_complex(t.reshape(-1, 2)).conj().imag,
    ],
)
def test_views_in_a_checkpoint_are_read_as_what_they_show(tmp_path, view, zipped, monkeypatch):
    monkeypatch.setattr(
        "aoti_sched.backends.aoti.checkpoint._SLACK", 64
    )  # so that much lies between
    shown = view(torch.randn(64, 64))
    torch.save({"w": shown}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with open_weights(tmp_path / "a.pt") as offers:
        (offered,) = offers
        read = offered.read()
    assert read.shape == shown.shape
    assert torch.equal(read.resolve_conj().resolve_neg(), shown.resolve_conj().resolve_neg())


# --- names ----------------------------------------------------------------------------------------

MANY = 300_000


def endless():
    tensor = torch.zeros(1)
    yield "w", torch.zeros(4)
    for number in itertools.count():
        yield f"layer {number}", tensor


def the_same_for_ever():
    while True:
        yield "w", torch.zeros(4)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "weights",
    [
        endless,
        lambda: {"w": torch.zeros(4), **dict.fromkeys(map(str, range(MANY)), torch.zeros(1))},
    ],
    ids=["endless", "mapping"],
)
def test_more_names_than_any_model_has_are_not_read_to_the_end(weights, strict):
    error = refusal(weights(), strict=strict)
    assert isinstance(error, ConstantMismatchError)
    assert error.faults[-1][1].startswith(f"is one of more than {SURPLUS_LIMIT} names")


def test_one_name_for_ever_ends_too():
    assert ("w", "is given twice") in refusal(the_same_for_ever()).faults


def test_faults_are_all_in_the_error_and_few_in_its_message():
    error = refusal({f"layer {number} " + "x" * 500: torch.zeros(1) for number in range(1000)})
    assert len(error.faults) == 1001
    assert "and 993 more, all in .faults" in str(error)
    assert pickle.loads(pickle.dumps(error)).faults == error.faults


def test_names_of_any_length_make_short_messages(tmp_path):
    long = "x" * 3000
    save_file({long: torch.zeros(1)}, tmp_path / "a.safetensors")
    assert refusal(tmp_path / "a.safetensors").faults[0][0] == long
    torch.save({long: 3}, tmp_path / "a.pt")
    refusal(tmp_path / "a.pt")
    refusal({long: 3})
    refusal({(1,) * 10_000: torch.zeros(1)})
    (tmp_path / "a.index.json").write_text(json.dumps({"weight_map": {"w": long}}))
    refusal(tmp_path / "a.index.json")


def test_lists_are_shortened():
    assert shortened(["a", "b"]) == "a, b"
    assert shortened(map(str, range(11)), limit=2) == "0, 1 and 9 more"
    assert clipped("x" * 200, 21) == "x" * 9 + "..." + "x" * 9
    assert clipped(12345, 5) == "12345"


# --- values that are code -------------------------------------------------------------------------


def test_a_value_that_became_code_may_be_given_as_it_was_compiled():
    from aoti_sched.model.weight_names import digest_of

    names = (WeightName("w"), WeightName("small", digest=digest_of(torch.ones(3))))
    state = {"w": torch.zeros(4), "small": torch.ones(3)}
    assert chosen(state, names=names).keys() == {"w"}
    for other in (torch.zeros(3), torch.ones(3).double(), torch.ones(1, 3)):
        error = refusal({**state, "small": other}, names=names)
        assert error.faults == (
            ("small", "is part of the compiled code, and this is another value. Compile again"),
        )
    refusal({**state, "small": torch.ones(3)}, names=(WeightName("w"), WeightName("small")))


# --- chance ---------------------------------------------------------------------------------------

_numbers = st.one_of(st.integers(0, 64), st.sampled_from([-1, 1 << 31, 1 << 62, 1 << 63, 10**30]))
_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F8_E5M2", "C64", "F4", "", "x" * 300]),
        "shape": st.lists(_numbers, max_size=4),
        "data_offsets": st.one_of(st.tuples(_numbers, _numbers), st.lists(_numbers, max_size=3)),
    },
    optional={"more": st.text(max_size=10)},
)
_headers = st.dictionaries(
    st.text(max_size=400), st.one_of(_entries, st.text(max_size=20), st.none()), max_size=5
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(header=_headers, data=st.binary(max_size=96), honest=st.booleans())
def test_any_header_is_read_or_refused_in_a_few_lines(tmp_path, header, data, honest):
    if honest:  # sizes that fit, one after the other, so that some headers are right
        place = 0
        for entry in header.values():
            if isinstance(entry, dict):
                entry.update(dtype="U8", shape=[3], data_offsets=(place, place + 3))
                place += 3
        data = bytes(place)
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + data)
    looked_at(tmp_path / "a", len(data))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
    legacy=st.booleans(),
)
def test_any_edit_of_a_checkpoint_is_read_or_refused_in_a_few_lines(tmp_path, edits, legacy):
    path = tmp_path / "a"
    torch.save(
        {"w": torch.zeros(4), "v": torch.zeros(2, 3).t()},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    content = bytearray(path.read_bytes())
    for place, value in edits:
        content[place % len(content)] = value
    path.write_bytes(content)
    looked_at(path, len(content))


def looked_at(path, size):
    """Read all of a file, or see it refused; no tensor has more bytes than the file."""
    try:
        with open_weights(path) as offers:
            for offered in offers:
                if offered.like is not None and offered.like.nbytes <= size:
                    assert offered.read().nbytes <= size
    except WeightsFileError as error:
        said = str(error)
    else:
        said = ""
    assert len(said) <= SCREEN


_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(
    value=st.dictionaries(st.text(max_size=20), _json, max_size=5),
    indent=st.sampled_from([None, 1]),
)
def test_an_object_is_walked_through_as_a_parser_reads_it(value, indent):
    scan = JsonScan(json.dumps(value, indent=indent).encode() + b" ")
    assert {key: json.loads(scan.value(1 << 20)) for key in scan.members()} == value
    scan.end()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a"',
        b'{"a":',
        b'{"a":1',
        b'{"a":1,}',
        b'{"a":{"b":"',
        b'{"a":[',
        b"{} {}",
        b"{a:1}",
    ],
)
def test_what_is_no_object_is_refused(text):
    with pytest.raises(ValueError, match=r"expected|no JSON|does not end|more than one"):
        walk(text)


def walk(text):
    scan = JsonScan(text)
    for _ in scan.members():
        scan.skip()
    scan.end()
