"""AOTInductor's C ABI, described once: every function of torch's `interface.h`, and how to call it.

The functions are compiled into each model's library, so a library has the functions of the torch
that *compiled* it. Symbols are looked up in the library, and the version of the running torch does
not matter. This file has the table of functions, the library and the text of a failure. The files
beside this one use the functions for containers, constants and handles.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import _C

from aoti_sched.errors import LoadError, MissingCapabilityError

_system = ctypes.CDLL(None)
_system.dlopen.argtypes, _system.dlopen.restype = (c_char_p, c_int), c_void_p
_system.dlsym.argtypes, _system.dlsym.restype = (c_void_p, c_char_p), c_void_p
_system.dlerror.restype = c_char_p

libtorch = ctypes.CDLL(_C.__file__)
"""Every symbol of libtorch. A look-up also searches the libraries that torch depends on."""

# Handles are opaque pointers; the names say whose.
Container = c_void_p
Model = c_void_p
Tensor = c_void_p
ConstantMap = c_void_p  # really a std::unordered_map<std::string, AtenTensorHandle>*
Stream = c_void_p
ProxyExecutor = c_void_p


class ConstantEntry(Structure):
    """`AOTInductorConstantMapEntry`: a constant's name in the generated code, and its tensor."""

    _fields_ = (("name", c_char_p), ("handle", Tensor))


class ArrayRefTensor(Structure):
    """`AOTInductorArrayRefTensor`: a tensor as the minimal arrayref interface takes it.

    Borrows its memory.
    """

    _fields_ = (
        ("data", c_void_p),
        ("numel", c_int64),
        ("sizes", c_int64 * 8),
        ("strides", c_int64 * 8),
        ("ndim", c_int32),
        ("dtype", c_int32),
        ("device_type", c_int32),
        ("device_index", c_int32),
        ("reserved", c_int64 * 4),
    )


class Function(NamedTuple):
    """One function of the C ABI. Every function returns a status; 0 is success.

    Attributes:
        name: The function's name.
        arguments: The ctypes types of the arguments.
        since: The first torch release whose compiled models have the function.
        needs_cpp: Why Python can't make the arguments; "" where Python can.
    """

    name: str
    arguments: tuple[Any, ...]
    since: str
    needs_cpp: str = ""


_RUN = (Container, POINTER(Tensor), c_size_t, POINTER(Tensor), c_size_t, Stream, ProxyExecutor)
_MAP = "its constants travel in a std::unordered_map, which only C++ can build"

_TABLE = (
    # Containers
    Function(
        "AOTInductorModelContainerCreate", (POINTER(Container), c_size_t, c_bool, c_char_p), "2.2"
    ),
    Function(
        "AOTInductorModelContainerCreateWithDevice",
        (POINTER(Container), c_size_t, c_char_p, c_char_p),
        "2.3",
    ),
    Function("AOTInductorModelContainerDelete", (Container,), "2.2"),
    Function("AOTInductorModelContainerRun", _RUN, "2.2"),
    Function("AOTInductorModelContainerRunSingleThreaded", _RUN, "2.7"),
    Function("AOTInductorModelContainerGetNumInputs", (Container, POINTER(c_size_t)), "2.2"),
    Function(
        "AOTInductorModelContainerGetInputName", (Container, c_size_t, POINTER(c_char_p)), "2.2"
    ),
    Function("AOTInductorModelContainerGetNumOutputs", (Container, POINTER(c_size_t)), "2.2"),
    Function(
        "AOTInductorModelContainerGetOutputName", (Container, c_size_t, POINTER(c_char_p)), "2.2"
    ),
    Function(
        "AOTInductorModelContainerGetCallSpec",
        (Container, POINTER(c_char_p), POINTER(c_char_p)),
        "2.2",
    ),
    # What is known of each constant
    Function("AOTInductorModelContainerGetNumConstants", (Container, POINTER(c_size_t)), "2.2"),
    Function(
        "AOTInductorModelContainerGetConstantName", (Container, c_size_t, POINTER(c_char_p)), "2.2"
    ),
    Function(
        "AOTInductorModelContainerGetConstantOriginalFQN",
        (Container, c_size_t, POINTER(c_char_p)),
        "2.2",
    ),
    Function(
        "AOTInductorModelContainerGetConstantDtype", (Container, c_size_t, POINTER(c_int32)), "2.2"
    ),
    Function(
        "AOTInductorModelContainerGetConstantFromFolded",
        (Container, c_size_t, POINTER(c_bool)),
        "2.3",
    ),
    Function(
        "AOTInductorModelContainerGetConstantType", (Container, c_size_t, POINTER(c_int32)), "2.6"
    ),
    Function(
        "AOTInductorModelContainerGetConstantDataSize",
        (Container, c_size_t, POINTER(c_size_t)),
        "2.8",
    ),
    Function(
        "AOTInductorModelContainerGetConstantsBlobSize", (Container, POINTER(c_uint64)), "2.10"
    ),
    # The values of constants
    Function(
        "AOTInductorModelContainerExtractConstantsMap",
        (Container, ConstantMap, c_bool),
        "2.8",
        needs_cpp=_MAP,
    ),
    Function(
        "AOTInductorModelContainerExtractConstantsMapEntries",
        (Container, POINTER(POINTER(ConstantEntry)), POINTER(c_size_t), c_bool),
        "2.13",
    ),
    Function(
        "AOTInductorModelContainerUpdateConstantBuffer",
        (Container, ConstantMap, c_bool, c_bool),
        "2.3",
        needs_cpp=_MAP,
    ),
    Function(
        "AOTInductorModelContainerUpdateConstantBufferPairs",
        (Container, POINTER(ConstantEntry), c_size_t, c_bool, c_bool),
        "2.13",
    ),
    Function(
        "AOTInductorModelContainerUpdateInactiveConstantBuffer",
        (Container, ConstantMap),
        "2.2",
        needs_cpp=_MAP,
    ),
    Function(
        "AOTInductorModelContainerUpdateInactiveConstantBufferPairs",
        (Container, POINTER(ConstantEntry), c_size_t),
        "2.13",
    ),
    Function(
        "AOTInductorModelContainerUpdateUserManagedConstantBuffer",
        (Container, ConstantMap, c_bool, c_bool),
        "2.8",
        needs_cpp=_MAP,
    ),
    Function(
        "AOTInductorModelContainerUpdateUserManagedConstantBufferPairs",
        (Container, POINTER(ConstantEntry), c_size_t, c_bool, c_bool),
        "2.10",
    ),
    Function(
        "AOTInductorModelContainerUpdateConstantBufferFromCpu",
        (Container, ConstantMap, c_bool, c_bool),
        "2.13",
        needs_cpp=_MAP,
    ),
    Function(
        "AOTInductorModelContainerUpdateConstantBufferFromCpuPairs",
        (Container, POINTER(ConstantEntry), c_size_t, c_bool, c_bool),
        "2.13",
    ),
    Function("AOTInductorModelUpdateConstantsFromBlob", (Container, c_void_p), "2.10"),
    Function(
        "AOTInductorModelContainerRunConstantFolding",
        (Container, c_bool, Stream, ProxyExecutor),
        "2.3",
    ),
    Function("AOTInductorModelContainerSwapConstantBuffer", (Container,), "2.2"),
    Function("AOTInductorModelContainerFreeInactiveConstantBuffer", (Container,), "2.8"),
    # The bare model: one instance, no locks, CPU only
    Function("AOTInductorModelCreate", (POINTER(Model), ConstantMap), "2.2", needs_cpp=_MAP),
    Function(
        "AOTInductorModelCreateV2", (POINTER(Model), POINTER(ConstantEntry), c_size_t), "2.13"
    ),
    Function("AOTInductorModelRun", (Model, POINTER(Tensor), POINTER(Tensor)), "2.2"),
    Function("AOTInductorModelUpdateConstantsMap", (Model, ConstantMap), "2.2", needs_cpp=_MAP),
    Function(
        "AOTInductorModelUpdateConstantsMapV2", (Model, POINTER(ConstantEntry), c_int32), "2.13"
    ),
    Function("AOTInductorModelGetNumOutputs", (Model, POINTER(c_size_t)), "2.2"),
    Function("AOTInductorModelDelete", (Model,), "2.2"),
    # Only in models compiled with `aot_inductor.use_minimal_arrayref_interface`
    Function(
        "AOTInductorModelRunMinimalArrayrefInterfaceV2",
        (Model, c_int32, POINTER(ArrayRefTensor), c_int32, POINTER(ArrayRefTensor)),
        "2.13",
    ),
    # The calling thread's last failure
    Function("AOTInductorGetLastError", (POINTER(c_char_p),), "2.13"),
)
FUNCTIONS = {function.name: function for function in _TABLE}


@functools.cache
def handle_array(count: int) -> type[ctypes.Array[c_void_p]]:
    """Return the ctypes type of `count` handles in a row.

    Types are kept: each one is in a reference cycle.
    """
    return c_void_p * count


class Library:
    """A model's shared library.

    A loaded library stays mapped for the life of the process.

    Raises:
        LoadError: The system's loader refuses the file, or the file is no compiled model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.name = self.path.name
        # Not `ctypes.CDLL`, which makes a class for each library, and a class is in a reference
        # cycle. LOCAL: every model exports the same names. NOW: a missing symbol fails here, not in
        # a run.
        self._handle = _system.dlopen(os.fsencode(self.path), os.RTLD_LOCAL | os.RTLD_NOW)
        if not self._handle:
            why = (_system.dlerror() or b"the loader gave no reason").decode(errors="replace")
            raise LoadError(
                f"{self.path} could not be loaded: {why}. An undefined symbol means that another "
                f"torch compiled it than the one running here ({torch.__version__}): compile it "
                "again with this one."
            )
        self._addresses: dict[str, int] = {}
        self._functions: dict[str, Callable[..., int]] = {}
        if not self.has("AOTInductorModelContainerRun"):
            raise LoadError(
                f"{self.path} is a shared library, but not a model compiled by AOTInductor: it "
                "lacks AOTInductorModelContainerRun. Load the `.so` inside a `.pt2` package, or "
                "the package itself."
            )

    def has(self, name: str) -> bool:
        """Return whether the library exports this function of the table."""
        return self._symbol(name) != 0

    def function(self, name: str) -> Callable[..., int]:
        """Return the function, ready to be called with ctypes arguments.

        A call releases the GIL and returns a status.

        Raises:
            MissingCapabilityError: The library lacks the function.
        """
        try:
            return self._functions[name]
        except KeyError:
            pass
        description = FUNCTIONS[name]
        address = self._symbol(name)
        if not address:
            raise MissingCapabilityError(
                f"{self.name} lacks {name}, which models have that were compiled by torch "
                f"{description.since} or newer: compile the model again with a newer torch."
            )
        function = ctypes.CFUNCTYPE(c_int32, *description.arguments)(address)
        self._functions[name] = function
        return function

    def address(self, name: str) -> int:
        """Return a function's address, for callers in C.

        The address is 0 when the library lacks the function, or the table lacks its name.
        """
        return self._symbol(name) if self.has(name) else 0

    def _symbol(self, name: str) -> int:
        address = self._addresses.get(name)
        if address is None:
            found = _system.dlsym(self._handle, name.encode()) if name in FUNCTIONS else 0
            address = self._addresses[name] = found or 0
        return address

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            LoadError: The function failed. The text has the root cause.
        """
        if self.function(name)(*arguments) != 0:
            raise LoadError(f"{self.name}: {name} failed: {self.root_cause()}")

    def last_error(self) -> str:
        """Return the runtime's text for this thread's last failure in the library; "" if none."""
        if not self.has("AOTInductorGetLastError"):
            return ""
        text = c_char_p()
        self.function("AOTInductorGetLastError")(ctypes.byref(text))
        return _without_backtrace((text.value or b"").decode(errors="replace"))

    def root_cause(self) -> str:
        """Return why the last call on this thread failed, in one text without a C++ backtrace."""
        return explain_failure(self.last_error(), _torch_last_error())


def explain_failure(own: str, torchs: str) -> str:
    """Return one text for a failure, without a C++ backtrace.

    The runtime's message states the cause, unless it only reports that a call into torch failed.
    Then torch's message states the cause. Torch's message may come from an older failure of the
    same thread, so it is used only if the runtime points to torch or has no message.

    Args:
        own: The runtime's message.
        torchs: Torch's message.
    """
    own = _without_backtrace(own)
    if own and "API call failed" not in own:
        return own
    cause = _without_backtrace(torchs)
    if cause and own:
        return f"{cause} (in {own.partition('(')[0]})"
    return cause or own or "the runtime gave no reason; what it printed to stderr may tell"


def _torch_last_error() -> str:
    try:
        what = libtorch.torch_exception_get_what_without_backtrace  # since torch 2.13
    except AttributeError:
        return ""
    what.argtypes = ()
    what.restype = c_char_p
    return _without_backtrace((what() or b"").decode(errors="replace"))


def _without_backtrace(text: str) -> str:
    for mark in ("\nException raised from ", "\nC++ CapturedTraceback:"):
        text = text.partition(mark)[0]
    return text.strip()
