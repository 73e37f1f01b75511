"""What the C++ sources in a package state about the library compiled from them.

torch puts the generated wrapper and kernels beside the library. Some facts stand nowhere else: how
many threads a kernel was built for, and whether the library carries its own weights. Each pattern
here follows a line that torch's code generator prints (torch/_inductor/codegen: cpp.py,
cpp_wrapper_cpu.py and the templates); nothing is compiled or run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec


class ThreadFacts(msgspec.Struct, frozen=True):
    """How a model's CPU kernels use threads.

    `limit`: with more threads than this at run time, kernels write beyond their per-thread buffers.
    `fixed`: the most threads a kernel starts, independent of the setting at run time.
    None: no kernel says so.
    """

    limit: int | None
    fixed: int | None


class WeightFacts(msgspec.Struct, frozen=True):
    """The number of constants, their bytes in all, and whether the library brings their values."""

    constants: int
    in_library: bool
    bytes: int = 0


_PRAGMA = re.compile(r"#pragma omp parallel[^\n]*\bnum_threads\((\d+)\)")
# A reduction's partial results, one element per thread: `float tmp_acc0_arr[4];` (or, for MSVC,
# make_unique), written as `tmp_acc0_arr[tid] = …`. Arrays of the same name that are not indexed by
# thread hold the tail of a vectorized loop; their size says nothing about threads.
_PER_THREAD = re.compile(r"\b(\w+_arr)\[tid\] =")
_ARRAY = re.compile(r"\b(\w+_arr)(?:\[(\d+)\];| = std::make_unique<[^;\n]*>\((\d+)\);)")
# Attention kernels size their scratch by this and index it by at::get_thread_num(), under a
# parallel_for that takes whatever number of threads the process has.
_SCRATCH = re.compile(r"\bint64_t num_thread = (\d+);")
_KERNEL = re.compile(r'^(?=extern "C")', re.MULTILINE)

_MODEL_BASE = re.compile(
    r":\s*AOTInductorModelBase\(\s*\d+,\s*\d+,\s*(\d+),\s*device_str,\s*"
    r"(?:std::move\()?cubin_dir\)?(?:,\s*(true|false))?\s*\)"
)
# A pattern that begins with a text, and not with the beginning of a line, is found 50 times faster.
_LAYOUT = re.compile(
    r'constants_info_\[(\d+)\]\.(?:(name) = "([^"\n]*)"|(shape|stride) = \{([\d, ]*)\});'
)
_DATA_SIZE = re.compile(r"constants_info_\[\d+\]\.data_size = (\d+);")


Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""A constant's shape and strides, in elements."""


def constant_layouts(wrapper: str) -> dict[str, Layout]:
    """Return the memory layout that compiled code expects of constants, by the runtime's names."""
    found: dict[str, dict[str, str]] = {}
    for index, _, name, what, numbers in _LAYOUT.findall(wrapper):
        found.setdefault(index, {})[what or "name"] = numbers if what else name
    return {
        one["name"]: (_numbers(one["shape"]), _numbers(one["stride"]))
        for one in found.values()
        if one.keys() == {"name", "shape", "stride"}
    }


def _numbers(listed: str) -> tuple[int, ...]:
    return tuple(int(part) for part in listed.split(",") if part.strip())


def thread_facts(sources: Iterable[str]) -> ThreadFacts:
    """Return what the kernels in `sources` say about threads."""
    fixed: list[int] = []
    limits: list[int] = []
    for source in sources:
        # Each kernel has its own names, so the kernels are looked at one by one.
        for kernel in _KERNEL.split(source):
            fixed += [int(match) for match in _PRAGMA.findall(kernel)]
            limits += [int(match) for match in _SCRATCH.findall(kernel)]
            per_thread = set(_PER_THREAD.findall(kernel))
            limits += [
                int(size or allocated)
                for name, size, allocated in _ARRAY.findall(kernel)
                if name in per_thread
            ]
    limits += fixed
    return ThreadFacts(limit=min(limits, default=None), fixed=max(fixed, default=None))


def weight_facts(wrapper: str) -> WeightFacts | None:
    """Return what the wrapper's constructor says about constants, or None when it is not found.

    Before torch could leave weights out of the library, the constructor did not say; then they are
    inside.
    """
    match = _MODEL_BASE.search(wrapper)
    if match is None:
        return None
    size = sum(map(int, _DATA_SIZE.findall(wrapper)))
    return WeightFacts(constants=int(match[1]), in_library=match[2] != "false", bytes=size)
