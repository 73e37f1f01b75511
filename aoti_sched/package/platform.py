"""What this machine is, in the words torch writes into a package's metadata."""

from __future__ import annotations

import platform
import sys
from functools import cache
from pathlib import Path

# For each name in AOTI_CPU_ISA (torch/_inductor/cpu_vec_isa.py, in capitals), the flags of /proc/cpuinfo
# that stand for the compiler options torch gives with it.
_AVX512 = ("avx512f", "avx512dq", "avx512vl", "avx512bw", "fma")
_FLAGS: dict[str, tuple[str, ...]] = {
    "AVX2": ("avx2", "fma", "f16c"),
    "AVX512": _AVX512,
    "AVX512_VNNI": (*_AVX512, "avx512_vnni"),
    "AMX_TILE": ("amx_tile", "amx_bf16", "amx_int8"),
    "ASIMD": ("asimd",),
    "NEON": ("asimd",),
    "SVE": ("sve",),
    "SVE2": ("sve2",),
    "SVE128": ("sve",),
    "SVE256": ("sve",),
    "ZVECTOR": ("vxe",),
}
# Part of the architecture itself, and named in no flag.
_BASELINE = {"ppc64le": frozenset({"VSX"}), "aarch64": frozenset({"ASIMD", "NEON"})}

_MACHINES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}

KNOWN_ISA = frozenset(_FLAGS).union(*_BASELINE.values())
"""The names that can be judged. A name from a later torch cannot, and is no reason to refuse a model."""


def spelled_machine(name: str | None = None) -> str:
    """`name`, or this machine's own, in one spelling: x86_64 for amd64 and x64, aarch64 for arm64."""
    name = (platform.machine() if name is None else name).lower()
    return _MACHINES.get(name, name)


def parse_isa(text: str) -> frozenset[str]:
    """The names in AOTI_CPU_ISA. torch's INVALID_VEC_ISA says that the model uses no vector instructions."""
    return frozenset(text.split()) - {"INVALID_VEC_ISA"}


@cache
def this_cpu_isa() -> frozenset[str] | None:
    """This CPU's instruction sets by torch's names; None where the system does not tell.

    Linux tells in /proc/cpuinfo; on a machine with different cores, what all of them have counts. Elsewhere
    only what the architecture itself includes is known, and otherwise nothing.
    """
    baseline = _BASELINE.get(spelled_machine())
    if sys.platform != "linux":
        return baseline
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return baseline
    flags = parse_cpuinfo(text)
    if flags is None:
        return baseline
    named = frozenset(name for name, wanted in _FLAGS.items() if flags.issuperset(wanted))
    return named | (baseline or frozenset())


def parse_cpuinfo(text: str) -> frozenset[str] | None:
    """The flags that every processor in /proc/cpuinfo lists, or None when it lists none at all."""
    lists = [
        frozenset(value.split())
        for line in text.splitlines()
        for key, _, value in (line.partition(":"),)
        if key.strip().lower()
        in ("flags", "features")  # x86 says flags; arm and s390x say features
    ]
    return frozenset.intersection(*lists) if lists else None
