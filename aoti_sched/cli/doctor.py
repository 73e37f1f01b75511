"""`aoti-sched doctor`: what this machine and this installation have, to paste into an issue."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from aoti_sched import __version__
from aoti_sched.cli.cache import read_cache
from aoti_sched.cli.options import Flag
from aoti_sched.cli.output import Report, out, print_json, print_pairs, print_title
from aoti_sched.cli.units import size_text
from aoti_sched.errors import AotiSchedError, first_line

_LEAST_TORCH = (2, 11)
_PACKAGES = (
    *("anyio", "msgspec", "structlog", "filelock", "cyclopts", "rich", "numpy"),
    *("safetensors", "matplotlib", "uvloop", "starlette", "uvicorn", "textual"),
    *("prometheus_client", "opentelemetry-api"),
)
_VARIABLES = (
    *("CXX", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY"),
    *("TORCHINDUCTOR_CPP_MARCH", "CUDA_VISIBLE_DEVICES"),
)


class DoctorReport(Report, frozen=True, kw_only=True):
    """What `doctor --json` prints.

    Attributes:
        aoti_sched: The version of this library.
        lanes: What runs models: "native threads" or "Python threads".
        rules: How the scheduling rules run: "compiled" or "Python".
        python: The version and the implementation.
        system: The operating system.
        processor: The name of the CPU.
        instruction_sets: By torch's names; () where the system does not tell.
        torch: The version of torch; "" where it is not installed.
        compiler: The C++ compiler and its version; "" without one.
        cores: Cores that the process may use.
        cores_in_machine: Cores of the machine.
        cores_by_affinity: Cores that the process is bound to; None where the system does not tell.
        devices: The devices that models can run on.
        cache: The folder of extracted packages.
        cache_bytes: Bytes in the folder; None where it can't be read.
        packages: Versions of the other packages; "" for those that are not installed.
        environment: Variables that change what happens.
        problems: What is wrong, and what to do.
    """

    aoti_sched: str
    lanes: str
    rules: str
    python: str
    system: str
    processor: str
    instruction_sets: tuple[str, ...]
    torch: str
    compiler: str
    cores: int
    cores_in_machine: int
    cores_by_affinity: int | None
    devices: tuple[str, ...]
    cache: str
    cache_bytes: int | None
    packages: dict[str, str]
    environment: dict[str, str]
    problems: tuple[str, ...]


def doctor_command(*, json: Flag = False) -> None:
    """Show what this machine and this installation have: a report to paste.

    Args:
        json: Print JSON.
    """
    report = examine()
    if json:
        print_json(report)
        return
    console = out()
    print_title(console, f"aoti_sched {report.aoti_sched}")
    packages = ", ".join(f"{name} {text or 'missing'}" for name, text in report.packages.items())
    bytes_ = "" if report.cache_bytes is None else f", {size_text(report.cache_bytes)}"
    bound = report.cores_by_affinity
    print_pairs(
        console,
        [
            ("lanes", report.lanes),
            ("rules", report.rules),
            ("Python", report.python),
            ("system", report.system),
            ("processor", report.processor),
            ("instruction sets", " ".join(report.instruction_sets)),
            ("torch", report.torch or "missing"),
            ("C++ compiler", report.compiler or "missing"),
            (
                "cores",
                f"{report.cores} of {report.cores_in_machine}"
                + ("" if bound is None else f", bound to {bound}"),
            ),
            ("devices", ", ".join(report.devices)),
            ("cache", f"{report.cache}{bytes_}"),
            ("packages", packages),
            *((f"${name}", text) for name, text in report.environment.items()),
        ],
    )
    if report.problems:
        console.print()
        print_title(console, "Problems")
        print_pairs(
            console, [(str(number), text) for number, text in enumerate(report.problems, 1)]
        )


def examine() -> DoctorReport:
    """Return what this machine and this installation have. Imports torch."""
    from aoti_sched.backends.native.missing import missing
    from aoti_sched.package.platform import this_cpu_isa

    problems: list[str] = []
    native = importlib.util.find_spec("aoti_sched.backends.native._native") is not None
    if not native:
        why, remedy = missing()
        problems.append(
            f"Lanes are Python threads, which cost more for each request: {why}. To change that, "
            f"{remedy}."
        )
    compiler = find_compiler()
    if not compiler:
        problems.append(
            "There is no C++ compiler, so models can't be compiled here. Install g++, or name a "
            "compiler in $CXX."
        )
    torch = _torch(problems)
    cores, devices = _devices(problems) if torch else (os.cpu_count() or 1, ())
    cache, cache_bytes = _cache(problems)
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return DoctorReport(
        aoti_sched=__version__,
        lanes="native threads" if native else "Python threads",
        rules=rules(),
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        system=platform.platform(),
        processor=processor(),
        instruction_sets=tuple(sorted(this_cpu_isa() or ())),
        torch=torch,
        compiler=compiler,
        cores=cores,
        cores_in_machine=os.cpu_count() or 1,
        cores_by_affinity=bound,
        devices=devices,
        cache=cache,
        cache_bytes=cache_bytes,
        packages={name: _version(name) for name in _PACKAGES},
        environment={
            name: os.environ[name]
            for name in sorted(os.environ)
            if name in _VARIABLES or name.startswith("AOTI_SCHED_")
        },
        problems=tuple(problems),
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _torch(problems: list[str]) -> str:
    found = _version("torch")
    if not found:
        problems.append("torch is not installed. Install torch 2.11 or newer.")
        return ""
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < _LEAST_TORCH:
        problems.append(f"torch {found} is too old. Install torch 2.11 or newer.")
    return found


def _devices(problems: list[str]) -> tuple[int, tuple[str, ...]]:
    """Return the cores that the process may use, and the names of the devices."""
    try:
        import torch

        from aoti_sched.backends.cpu import available_cores
        from aoti_sched.backends.devices import count_devices

        found = ["cpu"]
        for kind in ("cuda", "xpu"):
            found += [f"{kind}:{index}" for index in range(count_devices(kind))]
        found += ["mps"] * torch.backends.mps.is_available()
        return available_cores(), tuple(found)
    except Exception as error:  # noqa: BLE001 -- a broken torch raises anything, and is a finding
        problems.append(f"torch can't be used: {first_line(error)}. Install it anew.")
        return os.cpu_count() or 1, ()


def _cache(problems: list[str]) -> tuple[str, int | None]:
    try:
        report = read_cache()
    except (AotiSchedError, OSError) as error:
        problems.append(str(error))
        return "", None
    return report.path, report.bytes


def find_compiler() -> str:
    """Return the C++ compiler that torch calls, and its version; "" where there is none."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    command = (shlex.split(os.environ.get("CXX", "")) or [default])[0]
    path = shutil.which(command)
    if path is None:
        return ""
    try:
        done = subprocess.run(  # noqa: S603 -- the user's own compiler
            [path, "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.splitlines()
    return f"{path}: {lines[0]}" if done.returncode == 0 and lines else ""


def rules() -> str:
    """Return how the scheduling rules run: "compiled" or "Python"."""
    spec = importlib.util.find_spec("aoti_sched.queue.device_queue")
    return "Python" if spec is None or str(spec.origin).endswith(".py") else "compiled"


def processor() -> str:
    """Return the name of the CPU, as far as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor()
