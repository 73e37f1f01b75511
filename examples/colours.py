"""Two small models that the other examples share: one looks at the middle of a photo, one names
a colour.

    python -m examples.colours      compiles both into .cache/examples/, where the examples find
    them

Nothing here knows a scheduler; `first_steps.py` is where to start reading.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.export import Dim

import aoti_sched

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "examples"
COLOURS = {
    "red": (0.85, 0.10, 0.10),
    "orange": (1.00, 0.55, 0.10),
    "yellow": (0.95, 0.90, 0.20),
    "green": (0.15, 0.60, 0.20),
    "blue": (0.15, 0.30, 0.85),
    "purple": (0.50, 0.15, 0.60),
    "white": (0.95, 0.95, 0.95),
    "black": (0.05, 0.05, 0.05),
}
NAMES = list(COLOURS)
SIDE = 64  # pixels of a photo


class Eye(nn.Module):
    """Photos (n, 3, 64, 64), 0 to 1, to the colour (n, 3) that is in their middle."""

    def forward(self, photos: Tensor) -> Tensor:
        blurred: Tensor = nn.functional.avg_pool2d(photos, 4)
        return blurred[:, :, 6:10, 6:10].mean((2, 3))


class Namer(nn.Module):
    """Colours (n, 3), 0 to 1, to a score (n, 8) for each name in `NAMES`: a small MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, len(NAMES)))

    def forward(self, rgb: Tensor) -> Tensor:
        scores: Tensor = self.layers(rgb)
        return scores


def trained_namer() -> Namer:
    """A namer that has seen ten thousand shades; training takes a second."""
    torch.manual_seed(0)
    namer, shades = Namer(), torch.tensor(list(COLOURS.values()))
    optimizer = torch.optim.Adam(namer.parameters(), lr=0.02)
    for _ in range(200):
        right = torch.randint(len(NAMES), (64,))
        rgb = (shades[right] + 0.08 * torch.randn(64, 3)).clamp(0, 1)
        loss = nn.functional.cross_entropy(namer(rgb), right)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return namer.eval()


def names(scores: Tensor) -> list[str]:
    """The best name of each row of a namer's scores."""
    return [NAMES[best] for best in scores.argmax(1).tolist()]


def photo_of(colour: str, seed: int = 0) -> Tensor:
    """A grainy photo (1, 3, 64, 64) of a disc of this colour before a grey wall."""
    grain = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    disc = (y - SIDE / 2) ** 2 + (x - SIDE / 2) ** 2 < (SIDE / 4) ** 2
    paint = torch.tensor(COLOURS[colour])[:, None, None]
    photo = torch.where(disc, paint, torch.full((3, SIDE, SIDE), 0.6))
    return (photo + 0.1 * torch.randn(3, SIDE, SIDE, generator=grain)).clamp(0, 1)[None]


def compile_eye(path: Path) -> None:
    batch = Dim("batch", min=1, max=16)
    aoti_sched.compile_package(
        Eye(), (torch.rand(2, 3, SIDE, SIDE),), path, dynamic={"photos": {0: batch}}
    )


def compile_namer(path: Path) -> None:
    batch = Dim("batch", min=1, max=64)
    aoti_sched.compile_package(
        trained_namer(), (torch.rand(2, 3),), path, dynamic={"rgb": {0: batch}}
    )


def made_once(name: str, compile_to: Callable[[Path], None]) -> Path:
    """The package `name` in the cache; compiled when it is not there or older than what it is
    made from.
    """
    library = Path(aoti_sched.__file__).parent
    sources = [
        Path(__file__),
        library / "compile.py",
        library / "model/specs.py",
        Path(torch.__file__),
    ]
    package = CACHE / f"{name}.pt2"
    if not package.exists() or package.stat().st_mtime < max(
        file.stat().st_mtime for file in sources
    ):
        print(f"Compiling {name}.pt2; that is done once and takes some seconds.", flush=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=CACHE) as folder:
            making = Path(folder, package.name)
            compile_to(making)
            making.replace(package)  # whole, or not at all
    return package


def eye_package() -> Path:
    return made_once("eye", compile_eye)


def namer_package() -> Path:
    return made_once("namer", compile_namer)


if __name__ == "__main__":
    for made in (eye_package(), namer_package()):
        print(made)
