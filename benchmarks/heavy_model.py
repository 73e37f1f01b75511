"""A model that keeps one thread busy for about as long as one asks: the size of its input says how long.

Compiled once into `.cache/bench/`, in a process of its own, so that no trace of inductor (its worker processes,
its threads) is left in the process that measures.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import aoti_sched

if TYPE_CHECKING:
    import torch

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = REPOSITORY / ".cache" / "bench"
WIDTH = 1024
MAX_ROWS = 65536


def ensure_package() -> Path:
    """The compiled package; made now if it is not in the cache."""
    library = Path(aoti_sched.__file__).parent
    key = hashlib.sha256(f"{version('torch')} {platform.machine()}".encode())
    for source in (Path(__file__), library / "compile.py", library / "specs.py"):
        key.update(source.read_bytes())
    path = CACHE / f"heavy-{key.hexdigest()[:16]}.pt2"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=CACHE) as folder:
            making = Path(folder, path.name)
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.heavy_model", str(making)]
            subprocess.run(command, cwd=REPOSITORY, check=True)
            making.replace(path)  # whole, or not at all
    return path


def compile_to(path: Path) -> None:
    """Compile an MLP of three square layers, for any number of rows, one thread per run."""
    import torch

    layers = [torch.nn.Linear(WIDTH, WIDTH) if n % 2 == 0 else torch.nn.GELU() for n in range(5)]
    rows = torch.export.Dim("rows", min=1, max=MAX_ROWS)
    example = torch.zeros(8, WIDTH)
    aoti_sched.compile_package(
        torch.nn.Sequential(*layers).eval(), (example,), path, dynamic=({0: rows},), threads=1
    )


def input_lasting(run: Callable[[torch.Tensor], object], seconds: float) -> torch.Tensor:
    """An input on which `run` takes about `seconds`, found by trying. `run` blocks, and nothing else runs."""
    import torch

    def fastest(rows: int) -> float:
        trial = torch.randn(rows, WIDTH)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            run(trial)
            times.append(time.perf_counter() - started)
        return min(times)

    rows = 64
    for _ in range(3):  # a longer trial tells better how long a row takes
        rows = max(1, min(MAX_ROWS, round(rows * seconds / fastest(rows))))
    return torch.randn(rows, WIDTH)


if __name__ == "__main__":
    compile_to(Path(sys.argv[1]))
