"""Every function of the table, called by itself against a compiled model, and what it does seen
to be done.

`exercise` registers a check under the functions it calls; a test asserts that none of the table
lacks one. So a new torch's function is noticed twice: first by the table, then here.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator, Mapping
from ctypes import POINTER, byref, c_bool, c_char_p, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch

from aoti_sched.backends.aoti.c_abi import FUNCTIONS, ArrayRefTensor, ConstantEntry, Library
from aoti_sched.backends.aoti.handles import DTYPES, borrowed, free, handles_of, tensors_of
from tests.models import build

CONTAINER = "AOTInductorModelContainer"
CHECKS: dict[str, Callable[[Abi], None]] = {}


def exercise(*names: str) -> Callable[[Callable[[Abi], None]], Callable[[Abi], None]]:
    def register(check: Callable[[Abi], None]) -> Callable[[Abi], None]:
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return register


class ConstantMap:
    """A std::unordered_map of names to handles, living on the C++ side."""

    def __init__(self, cpp: ctypes.CDLL, handles: Mapping[str, int] | None = None) -> None:
        for name in ("map_new", "map_get"):
            cpp[name].restype = c_void_p
        self._cpp = cpp
        new = cpp["map_new"]
        new.restype = c_void_p
        self.address: int = new()
        for name, handle in (handles or {}).items():
            cpp["map_put"](c_void_p(self.address), name.encode(), c_void_p(handle))

    def __len__(self) -> int:
        return int(self._cpp["map_size"](c_void_p(self.address)))

    def __getitem__(self, name: str) -> torch.Tensor:
        get = self._cpp["map_get"]
        get.restype = c_void_p
        return borrowed(get(c_void_p(self.address), name.encode()))

    def delete(self) -> None:
        self._cpp["map_delete"](c_void_p(self.address))


class Abi:
    """The C ABI of compiled models, and what a check opens, to be freed after it."""

    def __init__(self, cpp: ctypes.CDLL) -> None:
        self._cpp = cpp
        self._opened: list[tuple[Library, str, c_void_p]] = []
        self._handles: list[int] = []
        self._maps: list[ConstantMap] = []

    def library(self, model: str = "canary") -> Library:
        return Library(build(model).library())

    def container(self, model: str = "canary", instances: int = 1) -> tuple[Library, c_void_p]:
        library, handle = self.library(model), c_void_p()
        library.call(CONTAINER + "CreateWithDevice", byref(handle), instances, b"cpu", None)
        self.opened(library, CONTAINER + "Delete", handle)
        return library, handle

    def opened(self, library: Library, delete: str, handle: c_void_p) -> None:
        self._opened.append((library, delete, handle))

    def lent(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Handles of tensors that stay ours until the check is over."""
        handles = handles_of(list(tensors.values()))
        self._handles += handles
        return dict(zip(tensors, handles, strict=True))

    def map(self, handles: Mapping[str, int] | None = None) -> ConstantMap:
        self._maps.append(ConstantMap(self._cpp, handles))
        return self._maps[-1]

    def close(self) -> None:
        for library, delete, handle in self._opened:
            library.call(delete, handle)
        free(self._handles)
        for each in self._maps:
            each.delete()


@pytest.fixture(scope="module")
def cpp(tmp_path_factory) -> ctypes.CDLL:
    made = tmp_path_factory.mktemp("cpp") / "constant_map.so"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    source = Path(__file__).with_name("constant_map.cpp")
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", abi, "-o", made, source], check=True)
    return ctypes.CDLL(str(made))


@pytest.fixture
def abi(cpp) -> Iterator[Abi]:
    abi = Abi(cpp)
    yield abi
    abi.close()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_function_does_what_it_says(name, abi):
    CHECKS[name](abi)


def test_no_exercise_is_left_over():
    assert set(CHECKS) == set(FUNCTIONS)


# --- helpers --------------------------------------------------------------------------------------


def get(library: Library, kind: Any, name: str, *arguments: Any) -> Any:
    value = kind()
    library.call(name, *arguments, byref(value))
    return value.value


def carrying(number: float) -> dict[str, torch.Tensor]:
    """A set of the canary's constants, by internal name, each full of one number."""
    return {
        "first": torch.full((16, 16), number),
        "middle": torch.full((64,), number),
        "count": torch.full((3, 3), int(number)),
        "last": torch.full((5, 7), number),
    }


def entries(handles: Mapping[str, int]) -> ctypes.Array[ConstantEntry]:
    pairs = [ConstantEntry(name.encode(), handle) for name, handle in handles.items()]
    return (ConstantEntry * len(pairs))(*pairs)


def run(
    library: Library, container: c_void_p, *inputs: torch.Tensor, how: str = "Run"
) -> list[torch.Tensor]:
    ins = (c_void_p * len(inputs))(*handles_of(list(inputs)))
    outs = (c_void_p * get(library, c_size_t, CONTAINER + "GetNumOutputs", container))()
    library.call(CONTAINER + how, container, ins, len(ins), outs, len(outs), None, None)
    assert list(ins) == [None] * len(ins)  # stolen
    return [tensor for tensor in tensors_of(outs) if tensor is not None]


def numbers_seen(library: Library, container: c_void_p) -> set[float]:
    """The numbers that the canary finds in its constants as it runs."""
    return set(run(library, container, *build("canary").args)[0].flatten().tolist())


def index_of(library: Library, container: c_void_p, constant: str) -> int:
    count = get(library, c_size_t, CONTAINER + "GetNumConstants", container)
    names = [
        get(library, c_char_p, CONTAINER + "GetConstantName", container, i) for i in range(count)
    ]
    return names.index(constant.encode())


# --- containers -----------------------------------------------------------------------------------


@exercise(CONTAINER + "Create")
def create_takes_a_flag_for_the_cpu(abi):
    library, handle = abi.library(), c_void_p()
    library.call(CONTAINER + "Create", byref(handle), 1, True, None)
    abi.opened(library, CONTAINER + "Delete", handle)
    assert numbers_seen(library, handle) == {1.0}


@exercise(CONTAINER + "CreateWithDevice", CONTAINER + "Delete")
def create_takes_a_device_and_delete_frees_it(abi):
    library, handle = abi.library(), c_void_p()
    library.call(CONTAINER + "CreateWithDevice", byref(handle), 2, b"cpu", None)
    assert numbers_seen(library, handle) == {1.0}
    library.call(CONTAINER + "Delete", handle)


@exercise(CONTAINER + "Run", CONTAINER + "RunSingleThreaded")
def both_kinds_of_run_compute_what_the_module_computes(abi):
    library, container = abi.container("mlp")
    expected = build("mlp").module()(*build("mlp").args)
    for how in ("Run", "RunSingleThreaded"):
        torch.testing.assert_close(
            run(library, container, *build("mlp").args, how=how)[0], expected
        )


@exercise(
    CONTAINER + "GetNumInputs",
    CONTAINER + "GetInputName",
    CONTAINER + "GetNumOutputs",
    CONTAINER + "GetOutputName",
)
def inputs_and_outputs_are_counted_and_named(abi):
    library, container = abi.container("scalars")
    for kind in ("Input", "Output"):
        count = get(library, c_size_t, f"{CONTAINER}GetNum{kind}s", container)
        names = {
            get(library, c_char_p, f"{CONTAINER}Get{kind}Name", container, i) for i in range(count)
        }
        assert count == len(names) == 2


@exercise(CONTAINER + "GetCallSpec")
def the_call_spec_is_the_modules_pytrees(abi):
    library, container = abi.container("signature")
    in_spec, out_spec = c_char_p(), c_char_p()
    library.call(CONTAINER + "GetCallSpec", container, byref(in_spec), byref(out_spec))
    read = torch.utils._pytree.treespec_loads
    built = build("signature")
    assert read(in_spec.value.decode()) == torch.utils._pytree.tree_structure(
        (built.args, dict(built.kwargs))
    )
    outputs = built.module()(*built.args, **built.kwargs)
    # None is a leaf of the output here, where Python's pytrees have it too.
    assert read(out_spec.value.decode()) == torch.utils._pytree.tree_structure(outputs)


# --- what is known of each constant ---------------------------------------------------------------


@exercise(
    CONTAINER + "GetNumConstants",
    CONTAINER + "GetConstantName",
    CONTAINER + "GetConstantOriginalFQN",
    CONTAINER + "GetConstantDtype",
    CONTAINER + "GetConstantType",
)
def constants_are_counted_named_and_typed(abi):
    library, container = abi.container("mlp")
    index = index_of(library, container, "hidden_weight")
    assert (
        get(library, c_char_p, CONTAINER + "GetConstantOriginalFQN", container, index)
        == b"hidden.weight"
    )
    assert (
        DTYPES[get(library, c_int32, CONTAINER + "GetConstantDtype", container, index)]
        == torch.float32
    )
    assert (
        get(library, c_int32, CONTAINER + "GetConstantType", container, index) == 1
    )  # a parameter
    library, container = abi.container("canary")
    index = index_of(library, container, "count")
    assert (
        DTYPES[get(library, c_int32, CONTAINER + "GetConstantDtype", container, index)]
        == torch.int64
    )
    assert get(library, c_int32, CONTAINER + "GetConstantType", container, index) == 2  # a buffer


@exercise(CONTAINER + "GetConstantFromFolded")
def folded_constants_are_told_from_the_others(abi):
    library, container = abi.container("folding")
    count = get(library, c_size_t, CONTAINER + "GetNumConstants", container)
    folded = [
        get(library, c_bool, CONTAINER + "GetConstantFromFolded", container, i)
        for i in range(count)
    ]
    assert sorted(folded) == [False, False, True]


@exercise(CONTAINER + "GetConstantDataSize")
def the_data_size_of_a_cpu_constant_is_rounded_up_to_64_bytes(abi):
    library, container = abi.container("canary")
    index = index_of(library, container, "last")
    assert (
        get(library, c_size_t, CONTAINER + "GetConstantDataSize", container, index)
        == 192
        > 5 * 7 * 4
    )


def weights_file() -> Path:
    (blob,) = build("weights_blob").library().parent.glob("*_weights.blob")
    return blob


@exercise(CONTAINER + "GetConstantsBlobSize")
def the_blob_size_is_the_weights_files(abi):
    library, container = abi.container("weights_blob")
    assert (
        get(library, c_uint64, CONTAINER + "GetConstantsBlobSize", container)
        == weights_file().stat().st_size
    )


@exercise("AOTInductorModelUpdateConstantsFromBlob")
def a_blob_fills_a_container_without_weights(abi):
    library, container = abi.container("weights_blob")
    data = weights_file().read_bytes()
    library.call(
        "AOTInductorModelUpdateConstantsFromBlob", container, ctypes.create_string_buffer(data)
    )
    built = build("weights_blob")
    torch.testing.assert_close(run(library, container, *built.args)[0], built.module()(*built.args))


# --- the values of constants ----------------------------------------------------------------------


@exercise(CONTAINER + "ExtractConstantsMap")
def extract_fills_a_map(abi):
    library, container = abi.container()
    into = abi.map()
    library.call(CONTAINER + "ExtractConstantsMap", container, into.address, False)
    assert len(into) == 4
    assert torch.equal(into["last"], torch.ones(5, 7))


@exercise(CONTAINER + "ExtractConstantsMapEntries")
def extract_lists_entries(abi):
    library, container = abi.container()
    found, count = POINTER(ConstantEntry)(), c_size_t()
    library.call(
        CONTAINER + "ExtractConstantsMapEntries", container, byref(found), byref(count), False
    )
    values = {found[i].name: borrowed(found[i].handle) for i in range(count.value)}
    assert set(values) == {b"first", b"middle", b"count", b"last"}
    assert torch.equal(values[b"count"], torch.ones(3, 3, dtype=torch.int64))


def updates(name: str, *, takes_map: bool) -> None:
    """Register checks of one of the functions that write the active or the inactive buffer."""

    @exercise(CONTAINER + name)
    def update_writes_either_buffer(abi):
        library, container = abi.container()
        for inactive, number in ((False, 2.0), (True, 3.0)):
            handles = abi.lent(carrying(number))
            given = (abi.map(handles).address,) if takes_map else (entries(handles), len(handles))
            library.call(CONTAINER + name, container, *given, inactive, True)
        assert numbers_seen(library, container) == {2.0}
        library.call(CONTAINER + "SwapConstantBuffer", container)
        assert numbers_seen(library, container) == {3.0}


updates("UpdateConstantBuffer", takes_map=True)
updates("UpdateConstantBufferPairs", takes_map=False)
updates("UpdateConstantBufferFromCpu", takes_map=True)
updates("UpdateConstantBufferFromCpuPairs", takes_map=False)
updates("UpdateUserManagedConstantBuffer", takes_map=True)
updates("UpdateUserManagedConstantBufferPairs", takes_map=False)


@exercise(
    CONTAINER + "UpdateInactiveConstantBuffer",
    CONTAINER + "UpdateInactiveConstantBufferPairs",
    CONTAINER + "SwapConstantBuffer",
)
def what_is_written_to_the_inactive_buffer_is_seen_after_a_swap(abi):
    library, container = abi.container()
    map_of = abi.map(abi.lent(carrying(4.0))).address
    library.call(CONTAINER + "UpdateInactiveConstantBuffer", container, map_of)
    assert numbers_seen(library, container) == {1.0}
    library.call(CONTAINER + "SwapConstantBuffer", container)
    assert numbers_seen(library, container) == {4.0}
    handles = abi.lent(carrying(5.0))
    pairs = entries(handles)
    library.call(CONTAINER + "UpdateInactiveConstantBufferPairs", container, pairs, len(handles))
    library.call(CONTAINER + "SwapConstantBuffer", container)
    assert numbers_seen(library, container) == {5.0}


@exercise(CONTAINER + "RunConstantFolding")
def folding_computes_what_depends_on_constants_alone(abi):
    library, container = abi.container("folding")
    built = build("folding")
    module = built.module()
    with torch.no_grad():
        module.weight.mul_(3)
    handles = abi.lent({name: value.data for name, value in module.named_parameters()})
    pairs = entries(handles)
    library.call(CONTAINER + "UpdateInactiveConstantBufferPairs", container, pairs, len(handles))
    library.call(CONTAINER + "RunConstantFolding", container, True, None, None)
    library.call(CONTAINER + "SwapConstantBuffer", container)
    torch.testing.assert_close(run(library, container, *built.args)[0], module(*built.args))


@exercise(CONTAINER + "FreeInactiveConstantBuffer")
def freeing_the_inactive_buffer_leaves_the_active_one(abi):
    library, container = abi.container()
    handles = abi.lent(carrying(2.0))
    pairs = entries(handles)
    library.call(CONTAINER + "UpdateInactiveConstantBufferPairs", container, pairs, len(handles))
    library.call(CONTAINER + "FreeInactiveConstantBuffer", container)
    assert numbers_seen(library, container) == {1.0}
    library.call(CONTAINER + "SwapConstantBuffer", container)
    status = library.function(CONTAINER + "Run")
    inputs = (c_void_p * 1)(*handles_of(list(build("canary").args)))
    assert status(container, inputs, 1, (c_void_p * 2)(), 2, None, None) != 0
    assert "ConstantState::NONE" in library.last_error()
    free(inputs)


# --- the bare model -------------------------------------------------------------------------------


def bare(abi: Abi) -> tuple[Library, c_void_p]:
    library, model = abi.library(), c_void_p()
    library.call("AOTInductorModelCreateV2", byref(model), None, 0)
    abi.opened(library, "AOTInductorModelDelete", model)
    return library, model


def numbers_seen_bare(library: Library, model: c_void_p) -> set[float]:
    inputs = (c_void_p * 1)(*handles_of(list(build("canary").args)))
    outputs = (c_void_p * get(library, c_size_t, "AOTInductorModelGetNumOutputs", model))()
    library.call("AOTInductorModelRun", model, inputs, outputs)
    seen = tensors_of(outputs)[0]
    assert seen is not None
    return set(seen.flatten().tolist())


@exercise(
    "AOTInductorModelCreate",
    "AOTInductorModelRun",
    "AOTInductorModelGetNumOutputs",
    "AOTInductorModelDelete",
)
def a_bare_model_runs_on_the_librarys_weights(abi):
    library, model = abi.library(), c_void_p()
    library.call("AOTInductorModelCreate", byref(model), None)
    assert numbers_seen_bare(library, model) == {1.0}
    library.call("AOTInductorModelDelete", model)


@exercise("AOTInductorModelCreateV2")
def a_bare_model_finds_the_constants_given_at_its_creation_only_once_they_are_updated(abi):
    library, model = abi.library(), c_void_p()
    given = entries(dict(zip(carrying(6.0), handles_of(list(carrying(6.0).values())), strict=True)))
    library.call(
        "AOTInductorModelCreateV2", byref(model), given, len(given)
    )  # which steals the handles
    abi.opened(library, "AOTInductorModelDelete", model)
    inputs = (c_void_p * 1)(*handles_of(list(build("canary").args)))
    assert library.function("AOTInductorModelRun")(model, inputs, (c_void_p * 2)()) != 0
    free(inputs)
    again = entries(dict(zip(carrying(6.0), handles_of(list(carrying(6.0).values())), strict=True)))
    library.call("AOTInductorModelUpdateConstantsMapV2", model, again, len(again))
    assert numbers_seen_bare(library, model) == {6.0}


@exercise("AOTInductorModelUpdateConstantsMap")
def a_bare_models_constants_are_replaced_from_a_map(abi):
    library, model = bare(abi)
    handles = dict(zip(carrying(7.0), handles_of(list(carrying(7.0).values())), strict=True))
    library.call("AOTInductorModelUpdateConstantsMap", model, abi.map(handles).address)
    assert numbers_seen_bare(library, model) == {7.0}


@exercise("AOTInductorModelUpdateConstantsMapV2")
def a_bare_models_constants_are_replaced_from_pairs(abi):
    library, model = bare(abi)
    given = entries(dict(zip(carrying(8.0), handles_of(list(carrying(8.0).values())), strict=True)))
    library.call("AOTInductorModelUpdateConstantsMapV2", model, given, len(given))
    assert numbers_seen_bare(library, model) == {8.0}


@exercise("AOTInductorModelRunMinimalArrayrefInterfaceV2")
def the_arrayref_interface_runs_on_borrowed_memory(abi):
    library, model = abi.library("arrayref"), c_void_p()
    library.call("AOTInductorModelCreateV2", byref(model), None, 0)
    abi.opened(library, "AOTInductorModelDelete", model)
    (x,) = build("arrayref").args
    described = ArrayRefTensor(
        data=x.data_ptr(),
        numel=x.numel(),
        sizes=(c_int64 * 8)(*x.shape),
        strides=(c_int64 * 8)(*x.stride()),
        ndim=x.dim(),
        dtype={dtype: code for code, dtype in DTYPES.items()}[x.dtype],
    )
    output = ArrayRefTensor()
    library.call(
        "AOTInductorModelRunMinimalArrayrefInterfaceV2",
        model,
        1,
        byref(described),
        1,
        byref(output),
    )
    values = (ctypes.c_float * output.numel).from_address(output.data)
    result = torch.tensor(list(values)).view(*output.sizes[: output.ndim])
    torch.testing.assert_close(result, build("arrayref").module()(x))


# --- failures -------------------------------------------------------------------------------------


@exercise("AOTInductorGetLastError")
def the_last_error_is_the_failed_calls_reason(abi):
    library, handle = abi.library(), c_void_p()
    create = library.function(CONTAINER + "CreateWithDevice")
    assert create(byref(handle), 1, b"abacus", None) != 0
    assert get(library, c_char_p, "AOTInductorGetLastError") == b"Invalid device: abacus"
