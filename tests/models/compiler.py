"""Compiles one definition into a directory; run as a program, in a process of its own.

Compiling leaves traces in a process (dynamo's state, warnings, inductor's choice of code
generator), so tests never do it in theirs.
"""

from __future__ import annotations

import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch._inductor.package import package_aoti

from aoti_sched.compile import compile_package
from tests.models import DEFINITIONS, Definition

# The wrapper is the glue around the kernels. Unoptimized, it computes the same and compiles in 4.5
# s, not 6.5 s.
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0"}


def compile_into(name: str, directory: Path) -> None:
    """Write `model.pt2` into the directory, and what it holds, unpacked, beside it."""
    package = directory / "model.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _compile(DEFINITIONS[name](), package)
    with zipfile.ZipFile(package) as archive:
        archive.extractall(directory / "unpacked")


def _compile(definition: Definition, package: Path) -> None:
    options = {**QUICK, **definition.options}
    if definition.companions:
        files = {name: _files(part) for name, part in definition.companions.items()}
        package_aoti(str(package), files)
    elif definition.foreign:
        with torch.no_grad():
            program = _export(definition)
            options["cpp.threads"] = definition.threads
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(package), inductor_configs=options
            )
    else:
        compile_package(
            definition.module(),
            definition.args,
            package,
            example_kwargs=dict(definition.kwargs),
            dynamic=definition.dynamic,
            threads=definition.threads,
            freeze=definition.freeze,
            options=options,
        )


def _files(definition: Definition) -> Any:
    options = {
        **QUICK,
        **definition.options,
        "cpp.threads": definition.threads,
        "aot_inductor.package": True,
    }
    with torch.no_grad():
        program = _export(definition)
        return torch._inductor.aot_compile(
            program.module(), definition.args, dict(definition.kwargs), options=options
        )


def _export(definition: Definition) -> Any:
    return torch.export.export(
        definition.module(),
        definition.args,
        dict(definition.kwargs),
        dynamic_shapes=definition.dynamic,
    )


if __name__ == "__main__":
    compile_into(sys.argv[1], Path(sys.argv[2]))
