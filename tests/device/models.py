"""Compile a model of the tests for a device: `python -m tests.device.models NAME DEVICE PATH`.

`item`, `gather` and `noisy` are here alone: each does on a device what a CPU does not show.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_map

from tests.models import DEFINITIONS
from tests.models.definitions import Definition


def item() -> Definition:
    """The host reads a number of the device in the midst of the run, so no graph can be
    recorded.
    """

    class Item(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * (x > 0).sum().item()

    return Definition(Item, (torch.randn(4, 8),))


def gather() -> Definition:
    """An index out of range is found by the device itself, which is lost then."""

    class Gather(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(10, 8))

        def forward(self, ids: Tensor) -> Tensor:
            return self.table[ids] * 2.0

    return Definition(Gather, (torch.tensor([1, 2, 3]),))


def noisy() -> Definition:
    """Random numbers are drawn in each run, so a recorded run would repeat them."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + torch.rand_like(x)

    return Definition(Noisy, (torch.randn(4, 8),))


def wide() -> Definition:
    """Small products over long rows, for which cuBLAS takes a workspace; rows are free."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8192, 64)
            self.second = nn.Linear(64, 8192)
            self.third = nn.Linear(8192, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(torch.relu(self.second(torch.relu(self.first(x)))))

    return Definition(Wide, (torch.randn(4, 8192),), dynamic={"x": {0: Dim("rows", min=1, max=64)}})


HERE = {function.__name__: function for function in (item, gather, noisy, wide)}


def definition(name: str) -> Definition:
    if name not in HERE:
        return DEFINITIONS[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return HERE[name]()


def to(device: str, values: Any) -> Any:
    return tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, values)


def main(name: str, device: str, path: str) -> None:
    from aoti_sched import compile_package

    made = definition(name)
    compile_package(
        made.module().to(device),
        to(device, made.args),
        path,
        example_kwargs=to(device, dict(made.kwargs)),
        dynamic=made.dynamic,
        options=dict(made.options),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
