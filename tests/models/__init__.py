"""Really compiled models for tests: each built once, then found in the repository's
`.cache/models`.

`build("mlp")` gives a `BuiltModel`; `python -m tests.models` builds them all beforehand, two at a
time. A model is built again when its definition, the compiler or the machine has changed. Processes
that want the same model wait for the one that builds it, and a build that is broken off leaves
nothing behind.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

import aoti_sched.child
import aoti_sched.compile
import aoti_sched.model.evidence
import aoti_sched.model.findings
import aoti_sched.model.program_runs
import aoti_sched.model.row_flow
import aoti_sched.model.size_conditions
import aoti_sched.model.specs
from tests.models.definitions import DEFINITIONS, Definition

_COMPILERS = (
    aoti_sched.child,
    aoti_sched.compile,
    aoti_sched.model.evidence,
    aoti_sched.model.findings,
    aoti_sched.model.program_runs,
    aoti_sched.model.row_flow,
    aoti_sched.model.size_conditions,
    aoti_sched.model.specs,
)
"""What decides what is in a package."""

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "models"


@dataclass(frozen=True)
class BuiltModel:
    """A compiled model and what it was compiled from."""

    name: str
    directory: Path
    definition: Definition

    @property
    def path(self) -> Path:
        """The package."""
        return self.directory / "model.pt2"

    @property
    def args(self) -> tuple[Any, ...]:
        return self.definition.args

    @property
    def kwargs(self) -> Mapping[str, Any]:
        return self.definition.kwargs

    def module(self) -> nn.Module:
        """The eager module, new, with the weights that were compiled."""
        return self.definition.module()

    def part(self, model_name: str) -> Definition:
        """The definition of one of several models in the package."""
        return self.definition.companions[model_name]

    def library(self, model_name: str = "model") -> Path:
        """The shared library of one model, unpacked; its other files lie beside it."""
        (library,) = self.directory.glob(f"unpacked/*/data/aotinductor/{model_name}/*.so")
        return library


def build(name: str) -> BuiltModel:
    """The model, compiled now if it is in no cache, which takes some ten seconds."""
    return _build(name, here=False)


def build_here(name: str) -> None:
    """Have the model built in this process, which leaves traces of the compiler in it: not for
    tests.
    """
    _build(name, here=True)


def build_demo() -> None:
    """Have both models of the demo built, each in a process of its own."""
    from rich.console import Console

    from examples.semantic_search.packages import ensure_packages

    ensure_packages(Console(quiet=True))


def compile_apart(scratch: str) -> None:
    """Give this process a compiler cache of its own: models that share their code (the same
    module, its weights here or there) share its files by content, and torch rewrites some of
    them in place while another package reads them.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(scratch, str(os.getpid())))


def _build(name: str, *, here: bool) -> BuiltModel:
    definition = DEFINITIONS[name]()
    directory = CACHE / f"{name}-{_key(name)}"
    if not directory.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not directory.exists():
                _compile(name, directory, here=here and not definition.alone)
    return BuiltModel(name, directory, definition)


def _compile(name: str, directory: Path, *, here: bool) -> None:
    # Renaming a complete directory is what makes a build all or nothing.
    partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=CACHE))
    try:
        if here:
            from tests.models.compiler import compile_into

            compile_into(name, partial)
        else:
            _in_own_process(name, partial)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _in_own_process(name: str, directory: Path) -> None:
    # Warnings that this process turns into errors are none of the compiler's business.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.models.compiler", name, str(directory)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(
            f"the test model {name!r} could not be compiled:\n{result.stderr[-8000:]}"
        )


def _key(name: str) -> str:
    parts = [inspect.getsource(DEFINITIONS[name].__wrapped__), *_environment()]  # type: ignore[attr-defined]
    if not DEFINITIONS[name]().foreign:
        parts += [inspect.getsource(module) for module in _COMPILERS]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _environment() -> list[str]:
    compiler = Path(__file__).with_name("compiler.py").read_text()
    machine = [platform.machine(), torch.backends.cpu.get_cpu_capability(), str(os.cpu_count())]
    return [compiler, torch.__version__, *machine]
