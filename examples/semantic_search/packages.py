"""The two models as compiled packages, made once and kept in `.cache/demo/` of the repository.

Compiling takes tens of seconds, a processor core and a C++ compiler, so each model is compiled in a
process of its own (`python -m examples.semantic_search.packages MODEL PATH`), which prints a line
per step. What is already in the cache needs none of that.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import aoti_sched

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache" / "demo"
MODELS = ("encoder", "classifier")
MAX_BATCH = 64


class BuildError(Exception):
    """A package could not be made; the message says why and what to do."""


def package_path(model: str) -> Path:
    """Where the package of `model` is or will be: a folder per torch version, machine and
    source text.
    """
    library = Path(aoti_sched.__file__).parent
    sources = [Path(__file__).with_name(name) for name in ("minilm.py", "digits.py", "packages.py")]
    sources += [library / "compile.py", library / "model/specs.py"]
    key = hashlib.sha256(f"{version('torch')} {platform.machine()}".encode())
    for source in sources:
        key.update(source.read_bytes())
    return CACHE / key.hexdigest()[:16] / f"{model}.pt2"


def missing_compiler() -> str | None:
    """The name of the C++ compiler that compiling would call and that is not there; None when
    it is.
    """
    default = "clang++" if sys.platform == "darwin" else "g++"
    command = (shlex.split(os.environ.get("CXX", "")) or [default])[0]
    return None if shutil.which(command) else command


def ensure_packages(console: Console) -> dict[str, Path]:
    """The paths of both packages; compiles those not in the cache, beside each other.

    Raises:
        BuildError: There is no C++ compiler, or compiling failed.
    """
    paths = {model: package_path(model) for model in MODELS}
    missing = [model for model, path in paths.items() if not path.exists()]
    if not missing:
        return paths
    if (compiler := missing_compiler()) is not None:
        raise BuildError(
            f"The models have yet to be compiled, and that needs a C++ compiler; there is no "
            f"`{compiler}` here. "
            "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or name "
            "yours in $CXX. "
            "Once compiled, the models are kept, and the demo runs without it."
        )
    bars = Progress(
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.fields[model]:<10}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[step]}", style="dim"),
        console=console,
    )
    console.print("Compiling the models; that is done once.")
    with bars, ThreadPoolExecutor(len(missing)) as threads:

        def build(model: str) -> None:
            bar = bars.add_task("", total=None, model=model, step="starting")
            _build(model, paths[model], lambda step: bars.update(bar, step=step))
            bars.update(bar, total=1, completed=1)

        list(threads.map(build, missing))
    return paths


def _build(model: str, path: Path, tell: Callable[[str], None]) -> None:
    """Run this file as a program for `model`; the package appears at `path` whole, or not at
    all.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=CACHE) as folder,
        tempfile.TemporaryFile("w+") as complaints,
    ):
        made = Path(folder, path.name)
        command = [sys.executable, "-m", "examples.semantic_search.packages", model, str(made)]
        with subprocess.Popen(  # noqa: S603 - our own file, run by our own interpreter
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=complaints, text=True
        ) as process:
            for line in process.stdout or ():
                tell(line.strip())
        if process.returncode != 0:
            complaints.seek(0)
            raise BuildError(f"Compiling the {model} failed:\n{complaints.read()[-4000:]}")
        path.parent.mkdir(exist_ok=True)
        made.replace(path)


def dynamic_shapes(model: str) -> dict[str, Any]:
    """Which dimensions of the inputs of `model` may vary, and how far, as `torch.export` wants
    them told.
    """
    from torch.export import Dim

    from .minilm import MAX_TOKENS

    batch = Dim("batch", min=1, max=MAX_BATCH)
    if model == "classifier":
        return {"images": {0: batch}}
    tokens = Dim(
        "tokens", min=2, max=MAX_TOKENS
    )  # 2: each sentence has a mark where it starts and ends
    return {"input_ids": {0: batch, 1: tokens}, "attention_mask": {0: batch, 1: tokens}}


def tell(step: str) -> None:
    """Tell the demo which step begins."""
    print(step, flush=True)


def compile_encoder(path: Path) -> None:
    from . import minilm

    tell("reading the weights")
    encoder, tokenizer = minilm.load_encoder(), minilm.Tokenizer()
    example = tokenizer(["An example.", "Another one, and longer."])
    dynamic = dynamic_shapes("encoder")
    aoti_sched.compile_package(encoder, example, path, dynamic=dynamic, threads=1, progress=tell)
    tell("compiled")


def compile_classifier(path: Path) -> None:
    from . import digits

    tell("training")
    train, held_out = digits.load_digits()
    classifier = digits.train_classifier(train)
    right = digits.accuracy(classifier, held_out)
    trained = f"trained: reads {right:.1%} of {len(held_out.images)} held-out digits"
    example = (train.images[:2],)
    dynamic = dynamic_shapes("classifier")
    aoti_sched.compile_package(
        classifier,
        example,
        path,
        dynamic=dynamic,
        threads=1,
        progress=lambda stage: tell(f"{trained}; {stage}"),
    )
    tell(trained)


if __name__ == "__main__":
    {"encoder": compile_encoder, "classifier": compile_classifier}[sys.argv[1]](Path(sys.argv[2]))
