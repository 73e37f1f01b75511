"""The C model library, compiled once and loaded; scripted containers and counted tensors as
Python sees them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import subprocess
from collections.abc import Callable
from ctypes import POINTER, c_char, c_char_p, c_int, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from filelock import FileLock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NATIVE = ROOT / "aoti_sched" / "backends" / "native"
DRIVER_SOURCES = sorted((HERE / "simulated_cuda").glob("*.c"))
C_SOURCES = [
    *(HERE / name for name in ("model_library.c", "tensor_library.c", "model_throws.cpp")),
    *DRIVER_SOURCES,
]
CACHE = ROOT / ".cache" / "native"

THROWS_STANDARD, THROWS_OTHER = 1, 2


HEADERS = [HERE / name for name in ("model_library.h", "scripted.hpp", "simulated_cuda.h")]
HEADERS += [HERE / "simulated_cuda" / "state.h"]
HEADERS += [NATIVE / f"{name}.hpp" for name in ("batch", "handle", "lane", "run", "shim", "stream")]


def compile_once(name: str, sources: list[Path], *flags: str) -> Path:
    """Return the product of these C and C++ sources, from the cache or linked now.

    Products share the objects of equal sources.
    """
    objects = [_object(source, flags) for source in sources]

    def link(made: Path) -> None:
        _run("g++", *flags, "-pthread", *objects, "-o", made)

    return _cached(name, (name, list(map(str, objects)), flags), link)


def _object(source: Path, flags: tuple[str, ...]) -> Path:
    compiler = ("gcc", "-std=c11") if source.suffix == ".c" else ("g++", "-std=c++17")
    # Exceptions of C++ pass through the C library, as they pass through a model's C functions.
    also = ("-fexceptions", "-pthread", "-Wall", "-Wextra", "-O1", "-g", f"-I{NATIVE}", f"-I{HERE}")
    options = (*also, *(flag for flag in flags if flag != "-shared"))

    def compile_it(made: Path) -> None:
        _run(*compiler, *options, "-c", source, "-o", made)

    content = [path.read_bytes() for path in (source, *HEADERS)]
    return _cached(f"{source.stem}.o", (content, options), compile_it)


def _cached(name: str, content: object, make: Callable[[Path], None]) -> Path:
    """Return the cache's file for this content; `make` makes it when there is none."""
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
    product = CACHE / digest / name
    product.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(product.with_suffix(".lock")):
        if not product.exists():
            made = product.with_suffix(".part")
            make(made)
            made.rename(product)
    return product


def _run(*command: Any) -> None:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stderr}")


class Container(ctypes.Structure):
    """`struct container`: a model whose runs do as its fields say."""

    _fields_ = (
        ("status", c_int32),
        ("throws", c_int32),
        ("error", c_char_p),
        ("cause", c_char_p),
        ("stolen", c_uint64),
        ("made", c_uint64),
        ("again", c_uint64),
        ("passes_on", c_int32),
        ("gated", c_int32),
        ("probe", c_void_p),
        ("more_rows", c_int64),
        ("omp_threads", c_int32),
        ("mkl_threads", c_int32),
        ("runs", c_int32),
        ("inside", c_int32),
        ("most_inside", c_int32),
        ("began", c_int32),
        ("probed", c_int32),
        ("num_inputs", c_uint64),
        ("num_outputs", c_uint64),
        ("stream", c_void_p),
        ("proxy_executor", c_void_p),
    )

    @property
    def address(self) -> int:
        return ctypes.addressof(self)


class Fence(ctypes.Structure):
    """`struct fence`."""

    _fields_ = (("status", c_int32), ("throws", c_int32), ("calls", c_int32))

    @property
    def address(self) -> int:
        return ctypes.addressof(self)


class Library:
    """The library's functions, and their addresses for `_native`."""

    def __init__(self, path: Path) -> None:
        self._cdll = cdll = ctypes.CDLL(str(path))
        cdll.new_tensor.restype = c_void_p
        cdll.tensor_deletes.argtypes = cdll.torch_delete_tensor.argtypes = (c_void_p,)
        cdll.break_tensor.argtypes = (c_void_p,)
        cdll.wait_until_inside.argtypes = (POINTER(Container), c_int)
        cdll.open_gate.argtypes = (POINTER(Container),)
        cdll.new_matrix.argtypes = (c_int64, c_int64, c_int32, c_int)
        cdll.new_matrix.restype = c_void_p
        cdll.is_matrix_of.argtypes = (c_void_p, c_int64, c_int64, c_int)
        cdll.thread_call.argtypes = (c_int, c_char_p, POINTER(c_char))
        self.new_tensor = cdll.new_tensor
        self.deletes = cdll.tensor_deletes
        self.live, self.live_storages = cdll.live_tensors, cdll.live_storages
        self.new_matrix, self.refuse_torch_call = cdll.new_matrix, cdll.refuse_torch_call
        self.is_matrix_of = cdll.is_matrix_of
        self.set_omp_threads, self.set_mkl_threads = (
            cdll.torch_set_omp_threads,
            cdll.torch_set_mkl_threads,
        )
        self.open_gate = cdll.open_gate
        self.break_tensor = cdll.break_tensor

    def address(self, name: str) -> int:
        return ctypes.cast(getattr(self._cdll, name), c_void_p).value or 0

    def wait_until_inside(self, container: Container, runs: int = 1) -> None:
        assert self._cdll.wait_until_inside(container, runs), "the run was not begun"

    def counts(self) -> tuple[int, int]:
        """The calling thread's intra-op threads: OpenMP's and MKL's."""
        return self._cdll.omp_threads(), self._cdll.mkl_threads()

    def name_thread(self, name: str) -> None:
        """Name the calling thread as the system knows it."""
        self._cdll.name_thread(name.encode())

    def delete(self, *handles: int) -> None:
        for handle in handles:
            self._cdll.torch_delete_tensor(handle)

    def thread_calls(self, prefix: str) -> list[tuple[str, str, int]]:
        """(thread, function, count) of every time that a thread of such a name asked or was
        told its thread count.
        """
        calls = []
        name, function = ctypes.create_string_buffer(16), c_char()
        for n in range(self._cdll.thread_calls()):
            count = self._cdll.thread_call(n, name, ctypes.byref(function))
            calls.append((name.value.decode(), function.value.decode(), count))
        return [call for call in calls if call[0].startswith(prefix)]


@functools.cache
def library() -> Library:
    sources = C_SOURCES
    return Library(compile_once("model_library.so", sources, "-shared", "-fPIC"))


def capsule(handle: int) -> Any:
    """A handle as torch gives it to Python: in a capsule without a name."""
    new = ctypes.pythonapi.PyCapsule_New
    new.argtypes, new.restype = (c_void_p, c_char_p, c_void_p), ctypes.py_object
    return new(handle, None, None)


def pointer(handle: Any) -> int:
    """The handle in a capsule."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.argtypes, get.restype = (ctypes.py_object, c_char_p), c_void_p
    return int(get(handle, None))


_numbers = itertools.count()


def new_prefix() -> str:
    """The beginning of thread names that no other lanes of this process have."""
    return f"aoti:t{next(_numbers)}:"
