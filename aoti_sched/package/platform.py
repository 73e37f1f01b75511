"""What this machine is, in the words torch writes into a package's metadata."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from aoti_sched.errors import InstructionSetError, PlatformMismatchError

if TYPE_CHECKING:
    from aoti_sched.package.description import PackagedModel

# For each name in AOTI_CPU_ISA (torch/_inductor/cpu_vec_isa.py, in capitals), the flags of
# /proc/cpuinfo that stand for the compiler options torch gives with it.
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
"""The names that can be judged.

A name from a later torch cannot, and is no reason to refuse a model.
"""


def spelled_machine(name: str | None = None) -> str:
    """Return `name`, or this machine's, in one spelling: x86_64 for amd64, aarch64 for arm64."""
    name = (platform.machine() if name is None else name).lower()
    return _MACHINES.get(name, name)


def parse_isa(text: str) -> frozenset[str]:
    """Return the names in AOTI_CPU_ISA.

    Torch's INVALID_VEC_ISA says that the model uses no vector instructions.
    """
    return frozenset(text.split()) - {"INVALID_VEC_ISA"}


@cache
def this_cpu_isa() -> frozenset[str] | None:
    """This CPU's instruction sets by torch's names; None where the system does not tell.

    Linux tells in /proc/cpuinfo; on a machine with different cores, what all of them have counts.
    Elsewhere only what the architecture itself includes is known, and otherwise nothing.
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
    """Return the flags that every processor in /proc/cpuinfo lists; None without any list."""
    lists = [
        frozenset(value.split())
        for line in text.splitlines()
        for key, _, value in (line.partition(":"),)
        if key.strip().lower()
        in ("flags", "features")  # x86 says flags; arm and s390x say features
    ]
    return frozenset.intersection(*lists) if lists else None


def check_platform(model: PackagedModel, *, cpu_isa: frozenset[str] | None = None) -> None:
    """Refuse a model that was compiled for another system, machine or CPU than this one.

    What the model does not say is not judged, nor are instruction sets where this system does not
    tell its own (anything but Linux), nor names that a later torch may have introduced. Whether the
    model's device is there is its backend's question.

    Args:
        model: the model.
        cpu_isa: the instruction sets to compare with, by torch's names; None takes this CPU's.

    Raises:
        PlatformMismatchError: another operating system or machine.
        InstructionSetError: it needs instructions this CPU lacks; running it would be SIGILL.
    """
    here = spelled_machine()
    if model.platform not in ("", sys.platform) or model.machine not in ("", here):
        built = "/".join(filter(None, (model.platform, model.machine)))
        raise PlatformMismatchError(
            f"{model.path}: model {model.name!r} was compiled for {built}, this is "
            f"{sys.platform}/{here}. Compile it here, or on a machine like this one.",
            path=model.path,
        )
    available = this_cpu_isa() if cpu_isa is None else cpu_isa
    if available is None:
        return
    missing = (model.cpu_isa & KNOWN_ISA) - available
    if missing:
        raise InstructionSetError(
            f"{model.path}: model {model.name!r} was compiled for {_listed(model.cpu_isa)}, but "
            f"this CPU has {_listed(available) or 'none of them'}: {_listed(missing)} is missing, "
            "and running it would kill the process. Compile it on a CPU like this one, or for "
            "less, with both ATEN_CPU_CAPABILITY=avx2 (what torch writes) and "
            "TORCHINDUCTOR_CPP_MARCH=x86-64-v3 (what the C++ compiler makes of it) set meanwhile.",
            path=model.path,
        )


def check_capability(model: PackagedModel, here: int) -> None:
    """Refuse a model that was compiled for a newer CUDA architecture than a device has.

    The device's kernels would not load, at the first run. What was compiled for an older
    architecture may have code for newer ones too, and is not judged.

    Args:
        model: The model.
        here: The device's compute capability, as torch writes it: 90 for 9.0.

    Raises:
        PlatformMismatchError: The device is older.
    """
    built = model.metadata.get("AOTI_COMPUTE_CAPABILITY", "")
    if built.isdecimal() and int(built) > here:
        raise PlatformMismatchError(
            f"{model.path}: model {model.name!r} was compiled for the compute capability "
            f"{_spelled(int(built))}, this device has {_spelled(here)}. Compile it on a device "
            "like this one.",
            path=model.path,
        )


def _spelled(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


def _listed(names: Iterable[str]) -> str:
    return " ".join(sorted(names))
