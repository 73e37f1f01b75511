"""The table against torch's own header, libraries good and bad, and the words of a failure."""

from __future__ import annotations

import ctypes
import gc
import re
import subprocess
import weakref
from ctypes import POINTER, c_bool, c_char_p, c_int32, c_size_t, c_uint64, c_void_p
from pathlib import Path

import pytest
import torch

from aoti_sched.backends.aoti.c_abi import FUNCTIONS, ArrayRefTensor, ConstantEntry, Library
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.errors import LoadError, MissingCapabilityError, RunError

HEADER = Path(torch.__file__).parent / "include/torch/csrc/inductor/aoti_runtime/interface.h"

C_TYPES = {
    "size_t": c_size_t,
    "bool": c_bool,
    "int32_t": c_int32,
    "const char*": c_char_p,
    "size_t*": POINTER(c_size_t),
    "bool*": POINTER(c_bool),
    "int32_t*": POINTER(c_int32),
    "uint64_t*": POINTER(c_uint64),
    "const char**": POINTER(c_char_p),
    "const uint8_t*": c_void_p,
    "AOTInductorModelContainerHandle": c_void_p,
    "AOTInductorModelContainerHandle*": POINTER(c_void_p),
    "AOTInductorModelHandle": c_void_p,
    "AOTInductorModelHandle*": POINTER(c_void_p),
    "AOTInductorConstantMapHandle": c_void_p,
    "AOTInductorStreamHandle": c_void_p,
    "AOTIProxyExecutorHandle": c_void_p,
    "AtenTensorHandle*": POINTER(c_void_p),
    "const AOTInductorConstantMapEntry*": POINTER(ConstantEntry),
    "const AOTInductorConstantMapEntry**": POINTER(POINTER(ConstantEntry)),
    "const AOTInductorArrayRefTensor*": POINTER(ArrayRefTensor),
    "AOTInductorArrayRefTensor*": POINTER(ArrayRefTensor),
}


def header_functions() -> dict[str, tuple[object, ...]]:
    """The functions of the installed torch's interface.h, with their parameters as ctypes types."""
    text = re.sub(r"//[^\n]*", "", HEADER.read_text())
    functions = {}
    for name, parameters in re.findall(r"AOTI_API\s+AOTIRuntimeError\s+(\w+)\(([^;]*)\);", text):
        types = [" ".join(p.split()[:-1]) for p in parameters.split(",")]
        functions[name] = tuple(C_TYPES[kind] for kind in types)
    return functions


def library_of(source: str, directory: Path) -> Path:
    """A shared library compiled from a line of C."""
    (directory / "made.c").write_text(source)
    made = directory / "made.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", made, directory / "made.c"], check=True)
    return made


def test_the_table_is_the_installed_torchs_interface_h():
    described = {name: function.arguments for name, function in FUNCTIONS.items()}
    assert described == header_functions()


def test_the_structs_have_the_headers_sizes():
    assert ctypes.sizeof(ConstantEntry) == 2 * ctypes.sizeof(c_void_p)
    assert ctypes.sizeof(ArrayRefTensor) == 192
    assert "sizeof(AOTInductorArrayRefTensor) == 192" in HEADER.read_text()


def test_functions_that_need_cpp_are_those_that_take_a_map():
    text = re.sub(r"//[^\n]*", "", HEADER.read_text())
    with_map = set(
        re.findall(r"AOTIRuntimeError\s+(\w+)\([^;]*AOTInductorConstantMapHandle[^;]*\);", text)
    )
    assert {name for name, function in FUNCTIONS.items() if function.needs_cpp} == with_map


def test_a_compiled_model_has_every_function_but_the_arrayref_interface(built):
    library = Library(built("mlp").library())
    lacking = {name for name in FUNCTIONS if not library.has(name)}
    assert lacking == {"AOTInductorModelRunMinimalArrayrefInterfaceV2"}


def test_a_function_outside_the_table_is_no_capability(built):
    assert not Library(built("mlp").library()).has("AOTInductorModelContainerFly")


def test_a_lacking_function_is_a_missing_capability_that_names_the_torch_that_brings_it(tmp_path):
    library = Library(library_of("int AOTInductorModelContainerRun(void) { return 0; }", tmp_path))
    assert not library.has("AOTInductorModelContainerSwapConstantBuffer")
    with pytest.raises(
        MissingCapabilityError,
        match=r"made\.so lacks AOTInductorGetLastError.*torch 2\.13 or newer",
    ):
        library.function("AOTInductorGetLastError")


def test_a_library_that_is_no_model_is_refused_with_what_to_load_instead(tmp_path):
    made = library_of("int nothing;", tmp_path)
    with pytest.raises(
        LoadError, match=r"not a model compiled by AOTInductor.*Load the `\.so` inside"
    ):
        Library(made)


def test_a_file_that_is_no_library_is_refused_with_the_loaders_own_words(tmp_path):
    path = tmp_path / "model.so"
    path.write_bytes(b"not an ELF file at all, but long enough to have a header of its own" * 4)
    with pytest.raises(LoadError, match=r"model\.so could not be loaded: .*invalid ELF header"):
        Library(path)


def test_a_library_of_another_torch_is_refused_with_the_symbol_that_is_missing(tmp_path):
    source = (
        "int of_another_torch(void); int AOTInductorModelContainerRun(void) { return "
        "of_another_torch(); }"
    )
    with pytest.raises(
        LoadError, match=r"undefined symbol: of_another_torch.*compile it again with this one"
    ):
        Library(library_of(source, tmp_path))


def test_models_do_not_see_each_others_symbols(load):
    first, second = load("mlp"), load("scalars")
    assert (first.num_inputs, second.num_inputs) == (1, 2)


def test_the_runtimes_own_reason_is_the_root_cause_without_a_backtrace(load):
    container = load("failing")
    with pytest.raises(RunError) as caught:
        container.run([torch.tensor([99])])
    assert "index out of bounds" in str(caught.value)
    assert "frame #" not in str(caught.value)
    assert "Exception raised from" not in str(caught.value)


def test_torchs_reason_is_the_root_cause_where_the_runtime_only_says_that_a_call_failed(load):
    container = load("custom_op")
    with pytest.raises(
        RunError, match=r"Unable to find a proxy executor.*aoti_torch_proxy_executor"
    ) as caught:
        container.run([torch.zeros(4)])
    assert "API call failed" not in str(caught.value)


def test_an_older_failure_of_the_same_thread_is_not_told_again(load):
    custom, failing = load("custom_op"), load("failing")
    with pytest.raises(RunError, match="proxy executor"):
        custom.run([torch.zeros(4)])
    with pytest.raises(RunError) as caught:
        failing.run([torch.tensor([99])])
    assert "proxy executor" not in str(caught.value)


def test_without_a_last_error_function_torchs_own_words_are_told(load, monkeypatch):
    container = load("custom_op")
    monkeypatch.setattr(container.library, "has", lambda name: name != "AOTInductorGetLastError")
    with pytest.raises(RunError, match="Unable to find a proxy executor"):
        container.run([torch.zeros(4)])


def test_the_last_error_is_empty_after_a_success(load):
    container = load("failing")
    with pytest.raises(RunError):
        container.run([torch.tensor([99])])
    assert "out of bounds" in container.library.last_error()
    container.run([torch.tensor([1])])
    assert container.library.last_error() == ""


def test_a_failed_call_that_is_no_run_is_a_load_error_with_its_name(built):
    library = Library(built("mlp").library())
    handle = c_void_p()
    with pytest.raises(
        LoadError, match=r"ContainerCreateWithDevice failed: Invalid device: abacus"
    ):
        library.call(
            "AOTInductorModelContainerCreateWithDevice", ctypes.byref(handle), 1, b"abacus", None
        )


def test_a_library_that_is_let_go_leaves_nothing_for_the_collector(built):
    path = built("mlp").library()
    RawContainer(Library(path)).close()
    gc.collect()
    gc.disable()
    try:
        container = RawContainer(Library(path))
        owners = [weakref.ref(container.library), weakref.ref(container)]
        container.close()
        del container
        assert [ref() for ref in owners] == [None, None]
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert [thing for thing in gc.garbage if "ctypes" in type(thing).__module__] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
