"""The modules that tests compile for real: one function per model, each saying what it is there
to show.

A function is self-contained: its source text is the key under which the compiled package is cached,
so what it uses from outside (torch, `Definition`) may not change what it means. Every module is
built after `torch.manual_seed(0)`, so a test's eager module has the same weights as the compiled
one. Models are tiny unless they say otherwise: the time to compile them is the time before the
first test.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim


@dataclass(frozen=True)
class Definition:
    """What to compile, and how.

    `make` gives the module; `args` and `kwargs` are example arguments; `dynamic` is torch.export's
    `dynamic_shapes`. A `foreign` model is compiled by torch alone, so that its package carries no
    metadata of ours. `freeze` is `compile_package`'s, `options` are inductor's. `companions` are
    the models of a package that holds several. An `alone` model is compiled in a process of its
    own, since inductor picks a code generator only once.
    """

    make: Callable[[], nn.Module]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic: Any = None
    threads: int = 1
    foreign: bool = False
    freeze: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False
    companions: Mapping[str, Definition] = field(default_factory=dict)

    def module(self) -> nn.Module:
        """The module, new, and always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make()


DEFINITIONS: dict[str, Callable[[], Definition]] = {}


def model(function: Callable[[], Definition]) -> Callable[[], Definition]:
    @functools.cache
    @functools.wraps(function)
    def define() -> Definition:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return function()

    DEFINITIONS[function.__name__] = define
    return define


# --- what users bring -----------------------------------------------------------------------------


@model
def mlp() -> Definition:
    """The common case: a dynamic batch, 1 to 64."""

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(8, 16)
            self.out = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.hidden(x)))

    return Definition(Mlp, (torch.randn(4, 8),), dynamic={"x": {0: Dim("batch", min=1, max=64)}})


@model
def unbounded() -> Definition:
    """A foreign package whose batch may be anything from zero rows up."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x) * self.weight

    return Definition(
        Scale, (torch.randn(4, 3),), dynamic={"x": {0: Dim("batch", min=0)}}, foreign=True
    )


@model
def conv() -> Definition:
    """All sizes static, weights of four dimensions; a foreign package."""

    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 10)

        def forward(self, image: Tensor) -> Tensor:
            features = torch.relu(self.norm(self.conv(image)))
            return self.head(features.mean(dim=(2, 3)))

    return Definition(lambda: Conv().eval(), (torch.randn(2, 3, 8, 8),), foreign=True)


@model
def attention() -> Definition:
    """scaled_dot_product_attention over a dynamic sequence."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            batch, length, width = tokens.shape
            q, k, v = self.qkv(tokens).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask[:, None, None, :]
            )
            return out.transpose(1, 2).reshape(batch, length, width)

    batch, length = Dim("batch", min=1, max=8), Dim("length", min=1, max=32)
    args = (torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool))
    return Definition(
        Attention, args, dynamic={"tokens": {0: batch, 1: length}, "mask": {0: batch, 1: length}}
    )


@model
def signature() -> Definition:
    """Every shape of argument: nested dicts, a tuple, keywords, None, an int and a flag; a dict
    comes out.
    """

    class Signature(nn.Module):
        def forward(
            self,
            x: Tensor,
            pair: tuple[Tensor, Tensor],
            nested: dict[str, Any],
            nothing: None,
            *,
            scale: int,
            offset: Tensor,
            negate: bool = False,
        ) -> dict[str, Any]:
            total = x + pair[0] - pair[1] + nested["a"] * nested["deep"]["b"]
            total = total * scale + offset
            if negate:
                total = -total
            return {
                "total": total,
                "parts": (x * 2, [pair[1] * 3]),
                "nothing": nothing,
                "scale": scale,
            }

    a, b, c, d, e, f = (torch.randn(3) for _ in range(6))
    return Definition(
        Signature,
        (a, (b, c), {"a": d, "deep": {"b": e}}, None),
        {"scale": 2, "offset": f, "negate": True},
    )


@model
def dtypes() -> Definition:
    """One input of each dtype that users feed, each coming back in its own dtype."""

    class Dtypes(nn.Module):
        def forward(
            self, int64: Tensor, boolean: Tensor, bfloat16: Tensor, float16: Tensor, float64: Tensor
        ) -> tuple[Tensor, ...]:
            return (
                int64 * 2,
                ~boolean,
                bfloat16 * 2,
                float16 + 1,
                torch.where(boolean, float64, -float64),
            )

    return Definition(
        Dtypes,
        (
            torch.arange(4),
            torch.tensor([True, False, True, False]),
            torch.randn(4, dtype=torch.bfloat16),
            torch.randn(4, dtype=torch.float16),
            torch.randn(4, dtype=torch.float64),
        ),
        dynamic={
            name: {0: Dim("batch", min=1)}
            for name in ("int64", "boolean", "bfloat16", "float16", "float64")
        },
    )


@model
def complex_numbers() -> Definition:
    """Complex numbers, whose conjugate torch leaves to be computed later."""

    class Parts(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return torch.view_as_real(z) * 2

    return Definition(Parts, (torch.randn(4, dtype=torch.complex64),))


@model
def scalars() -> Definition:
    """0-dim tensors go in and come out."""

    class Scalars(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return a * b, (a + b).floor().to(torch.int64)

    return Definition(Scalars, (torch.tensor(1.5), torch.tensor(2.0)))


@model
def zero_rows() -> Definition:
    """A batch that may be empty, in a package of ours: a `Dim` without a least size."""
    return Definition(
        lambda: nn.Linear(3, 2), (torch.randn(4, 3),), dynamic={"input": {0: Dim("batch", max=16)}}
    )


@model
def frozen() -> Definition:
    """Weights folded into the code by inductor's freezing."""
    return Definition(
        lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).eval(),
        (torch.randn(4, 32),),
        dynamic={"input": {0: Dim("batch", min=1, max=32)}},
        freeze=True,
    )


@model
def ordered() -> Definition:
    """Containers that only torch's own pytree knows, going in and coming out."""

    class Ordered(nn.Module):
        def forward(self, pairs: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
            return OrderedDict(sum=pairs["b"] + pairs["a"], difference=pairs["b"] - pairs["a"])

    return Definition(Ordered, (OrderedDict(b=torch.randn(3), a=torch.randn(3)),))


@model
def registered() -> Definition:
    """A class of the user's own, registered with torch's pytree, going in and coming out."""

    @dataclass
    class Box:
        low: Tensor
        high: Tensor

    class Grow(nn.Module):
        def forward(self, box: Box) -> Box:
            return Box(box.low - 1, box.high + 1)

    torch.utils._pytree.register_dataclass(Box, serialized_type_name="tests.models.Box")
    return Definition(Grow, (Box(torch.randn(3), torch.randn(3)),))


@model
def pair() -> Definition:
    """Two models in one package, `double` and `square`; foreign, since one call compiles one
    model.
    """

    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    x = torch.randn(4)
    double = Definition(Double, (x,), foreign=True)
    square = Definition(Square, (x,), foreign=True)
    return Definition(Double, (x,), foreign=True, companions={"double": double, "square": square})


@model
def one_tensor_twice() -> Definition:
    """One tensor at several outputs, made there or an input: the runtime gives its one handle
    at each of them.
    """

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
            y = torch.relu(x)
            layers = [x + 1, y]
            return y, {
                "layers": layers,
                "last": layers[-1].contiguous(),
                "inputs": (x, x),
                "first": y[:, :1],
            }

    return Definition(
        Twice, (torch.randn(4, 3),), dynamic={"x": {0: Dim("batch", min=1, max=64)}}, foreign=True
    )


@model
def one_constant_twice() -> Definition:
    """One weight at two outputs, and so a constant that is folded."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            square = self.weight.t() @ self.weight
            return self.weight, self.weight, square, x @ square, square

    return Definition(
        Twice,
        (torch.randn(3, 4),),
        foreign=True,
        options={"aot_inductor.use_runtime_constant_folding": True},
    )


@model
def linear_algebra() -> Definition:
    """Operators of torch's own that have no C function, and fail for what has no inverse;
    weights that can be replaced.
    """

    class LinearAlgebra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(16))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            values = torch.linalg.svd(x)[1] * self.scale.sum()
            return values, torch.linalg.inv(x + 10 * torch.eye(x.shape[-1]))

    dynamic = {"x": {0: Dim("batch", min=1, max=1024)}}
    return Definition(LinearAlgebra, (torch.rand(2, 24, 24),), dynamic=dynamic, foreign=True)


@model
def custom_op() -> Definition:
    """A custom operator written in Python, which only a proxy executor can call."""

    @torch.library.custom_op("aoti_sched_tests::twice_plus_one", mutates_args=())
    def twice_plus_one(x: Tensor) -> Tensor:
        return x * 2 + 1

    @twice_plus_one.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aoti_sched_tests.twice_plus_one(x) * self.weight

    return Definition(Custom, (torch.randn(4),), foreign=True)


@model
def custom_late() -> Definition:
    """A custom operator, and no weights anywhere."""

    @torch.library.custom_op("aoti_sched_tests::thrice", mutates_args=())
    def thrice(x: Tensor) -> Tensor:
        return x * 3

    @thrice.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aoti_sched_tests.thrice(x) * self.weight

    return Definition(
        Custom,
        (torch.randn(16),),
        foreign=True,
        options={"aot_inductor.package_constants_in_so": False},
    )


# --- where weights live ---------------------------------------------------------------------------


@model
def weights_none() -> Definition:
    """No weights anywhere: they must be given before the first run."""
    return Definition(
        lambda: nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2)),
        (torch.randn(3, 4),),
        foreign=True,
        options={"aot_inductor.package_constants_in_so": False},
    )


@model
def weights_blob() -> Definition:
    """Weights in one binary file beside the library, to be mapped by whoever loads it."""
    return Definition(
        lambda: nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2)),
        (torch.randn(3, 4),),
        foreign=True,
        options={
            "aot_inductor.package_constants_in_so": False,
            "aot_inductor.package_constants_on_disk_format": "binary_blob",
        },
    )


@model
def weights_pickle() -> Definition:
    """Each weight pickled on its own in the package's `data/weights`."""
    return Definition(
        lambda: nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2)),
        (torch.randn(3, 4),),
        foreign=True,
        options={
            "aot_inductor.package_constants_in_so": False,
            "aot_inductor.package_constants_on_disk_format": "pickle_weights",
        },
    )


@model
def late() -> Definition:
    """No weights anywhere, folded constants, and a parameter that does not lie in memory as
    files have it.
    """

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))
            self.turned = nn.Parameter(torch.randn(4, 12).t())
            self.register_buffer("shift", torch.randn(12))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight.t() @ self.weight) @ self.turned.t() + self.shift

    return Definition(
        Late,
        (torch.randn(3, 4),),
        foreign=True,
        options={
            "aot_inductor.package_constants_in_so": False,
            "aot_inductor.use_runtime_constant_folding": True,
        },
    )


# --- constants ------------------------------------------------------------------------------------


@model
def canary() -> Definition:
    """Every constant carries one number, and the output reveals the number in each.

    A run on half an update shows two numbers. `seen` has two rows per constant, its smallest and
    its largest
    element: of `first` before the work, of `last` after it.
    """

    class Canary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.full((16, 16), 1.0))
            self.middle = nn.Parameter(torch.full((64,), 1.0))
            self.register_buffer("count", torch.full((3, 3), 1, dtype=torch.int64))
            self.last = nn.Parameter(torch.full((5, 7), 1.0))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            worked = x @ self.first
            for _ in range(4):
                worked = torch.tanh(worked @ self.first)
            constants = (self.first, self.middle, self.count.float(), self.last)
            seen = torch.stack([torch.stack([c.amin(), c.amax()]) for c in constants])
            return seen, worked + self.last.sum()

    return Definition(Canary, (torch.randn(32, 16),))


@model
def ordinary() -> Definition:
    """What a state dict has besides the graph's constants: a count that only training uses, a
    layer that nothing calls, tied weights, a buffer that it leaves out, extra state, a number
    that inductor takes for code, and a plain tensor.
    """

    class Ordinary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(12, 6)
            self.norm = nn.BatchNorm1d(6)
            self.unused = nn.Linear(3, 3)
            self.head = nn.Linear(6, 12, bias=False)
            self.head.weight = self.embed.weight
            self.twin = nn.Parameter(self.norm.weight.data)
            self.register_buffer("scale", torch.randn(6), persistent=False)
            self.register_buffer("unread", torch.randn(6), persistent=False)
            self.register_buffer("temperature", torch.tensor(2.0))
            self.plain = torch.randn(6)

        def get_extra_state(self) -> dict[str, int]:
            return {"version": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.norm(self.embed(ids)) * self.scale + self.plain * self.twin
            return self.head(hidden) / self.temperature

    return Definition(lambda: Ordinary().eval(), (torch.arange(4),))


@model
def folding() -> Definition:
    """weight.T @ weight depends on constants alone, so the runtime folds it once per set of
    constants.
    """

    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))
            self.bias = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight.t() @ self.weight) + self.bias

    return Definition(
        Folding,
        (torch.randn(3, 4),),
        foreign=True,
        options={"aot_inductor.use_runtime_constant_folding": True},
    )


@model
def folded_output() -> Definition:
    """An output that is a folded constant itself, whose memory the C ABI does not tell."""

    class FoldedOutput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            square = self.weight.t() @ self.weight
            return square, x @ square

    return Definition(
        FoldedOutput,
        (torch.randn(3, 4),),
        foreign=True,
        options={"aot_inductor.use_runtime_constant_folding": True},
    )


@model
def strided() -> Definition:
    """Constants in odd places: a transposed parameter, a channels-last one, a view with an
    offset, an empty one, and a tensor that is neither parameter nor buffer.
    """

    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transposed = nn.Parameter(torch.randn(4, 3).t())
            self.image = nn.Parameter(torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last))
            self.register_buffer("window", torch.randn(20)[2:14])
            self.register_buffer("empty", torch.zeros(0, 3))
            self.plain = torch.randn(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            flat = (x @ self.transposed + self.plain[0]).sum() + torch.sin(self.window).sum()
            return flat + self.empty.sum() + torch.sin(self.image)

    return Definition(Strided, (torch.randn(2, 3),), foreign=True)


@model
def views() -> Definition:
    """Inputs that are not dense, outputs that are numbers and conditions, and rows that may not
    be fewer than two.
    """

    class Views(nn.Module):
        def forward(
            self, x: Tensor, wide: Tensor, columns: Tensor, scale: Tensor
        ) -> dict[str, Any]:
            return {
                "first": x[:2] * 2,
                "sum": wide + columns,
                "half": x.shape[0] / 2,
                "long": x.shape[0] > 5,
                "scale": scale.item(),
            }

    args = (
        torch.randn(4, 3),
        torch.randn(1, 6).expand(5, 6),
        torch.randn(5, 12)[:, ::2],
        torch.tensor(2.5),
    )
    return Definition(
        Views, args, dynamic={"x": {0: Dim("rows")}, "wide": None, "columns": None, "scale": None}
    )


@model
def towers() -> Definition:
    """Two inputs whose rows torch tells apart; one row, and none, are right of either.

    The examples are one tensor.
    """

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 2)

        def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(left), self.right(right)

    both = torch.randn(4, 3)
    return Definition(Towers, (both, both), dynamic=({0: Dim.AUTO}, {0: Dim.AUTO}))


@model
def mutating() -> Definition:
    """Counts its runs in a buffer: instances share it, so it can only run one at a time."""

    class Mutating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("runs", torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            self.runs.add_(1)
            return x + self.runs

    return Definition(Mutating, (torch.zeros(16),))


@model
def counter() -> Definition:
    """Counts its runs in one element, which torch 2.13 takes for a constant of its first value
    unless told not to.
    """

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("runs", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.runs.add_(1)
            return x + self.runs

    return Definition(Counter, (torch.zeros(3),))


@model
def aliasing() -> Definition:
    """Outputs that alias: a buffer, a view of a parameter, and an input itself.

    torch 2.13 clones the constants.
    """

    class Aliasing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(4, 4))
            self.weight = nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return self.table, self.weight.t(), x, x + self.table

    return Definition(Aliasing, (torch.zeros(4),))


# --- how runs go ----------------------------------------------------------------------------------


@model
def heavy() -> Definition:
    """About 50 ms on one thread, all in matmuls of its input: it keeps a core busy, and has no
    weights.
    """

    class Heavy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x
            for _ in range(3):
                y = torch.tanh(y @ x)
            return y

    return Definition(Heavy, (torch.randn(960, 960) / 31,))


@model
def wide() -> Definition:
    """64 MiB of weights, and hardly anything to do with them."""
    return Definition(
        make=lambda: nn.Linear(4096, 4096, bias=False),
        args=(torch.randn(1, 4096),),
    )


@model
def failing() -> Definition:
    """Fails as it runs when an id is not below 10."""

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.embedding(ids) * 2

    return Definition(
        Failing, (torch.arange(3),), dynamic={"ids": {0: Dim("length", min=1, max=64)}}
    )


@model
def fails_on_zeros() -> Definition:
    """Takes ids from 20 to 29 only, so that warming it up on zeros fails."""

    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.embedding(ids - 20) * 2

    return Definition(Offset, (torch.arange(20, 23),))


# --- packages of torch alone, of which loading finds out what they are ----------------------------


@model
def picky() -> Definition:
    """A foreign package that takes ids from 20 to 29 only: zeros make it fail."""

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.embedding(ids - 20) * 2

    return Definition(Picky, (torch.arange(20, 23),), foreign=True)


@model
def foreign_counter() -> Definition:
    """A foreign package that adds 4 to a buffer in each run."""

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("runs", torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            self.runs.add_(4)
            return x + self.runs

    return Definition(Counter, (torch.zeros(16),), foreign=True)


@model
def pairs_of_rows() -> Definition:
    """A foreign package: rows come in pairs, stated as at least 4; buffers that are only read;
    two literals.
    """

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 16)
            self.norm = nn.BatchNorm1d(16)

        def forward(self, x: Tensor, scale: float, negate: bool) -> Tensor:
            out = self.norm(self.inner(x)) * scale
            return -out if negate else out

    half = Dim("half", max=8)
    return Definition(
        lambda: Pairs().eval(),
        (torch.randn(8, 3), 2.5, True),
        dynamic={"x": {0: 2 * half}, "scale": None, "negate": None},
        foreign=True,
    )


@model
def last_rows() -> Definition:
    """A foreign package that reads the last row of an intermediate result, and the first two of
    its input.
    """

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.relu(self.inner(x))[-1] * 2, x[:2] + 1

    return Definition(
        Last, (torch.randn(4, 3),), dynamic={"x": {0: Dim("batch", min=0)}}, foreign=True
    )


@model
def centered() -> Definition:
    """A foreign package whose rows influence each other."""

    class Centered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    return Definition(
        Centered, (torch.randn(4, 3),), dynamic={"x": {0: Dim("batch")}}, foreign=True
    )


@model
def cache_input() -> Definition:
    """A foreign package that writes to one of its inputs."""

    class Cache(nn.Module):
        def forward(self, cache: Tensor, x: Tensor) -> Tensor:
            cache.add_(x)
            return cache * 1

    batch = Dim("batch")
    return Definition(
        Cache,
        (torch.zeros(4, 3), torch.randn(4, 3)),
        dynamic={"cache": {0: batch}, "x": {0: batch}},
        foreign=True,
    )


@model
def shorter() -> Definition:
    """Of two sizes, one must not exceed the other; no range says so."""

    class Shorter(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x[: y.shape[0]] * 2

    return Definition(
        Shorter,
        (torch.randn(6), torch.randn(3)),
        dynamic={"x": {0: Dim("a")}, "y": {0: Dim("b")}},
    )


@model
def chosen_by_size() -> Definition:
    """Inductor chooses code by the example's sizes: of a diagonal and a pooling it is wrong for
    others, of a sum it is right.
    """

    class Chosen(nn.Module):
        def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, ...]:
            pooled = nn.functional.adaptive_avg_pool2d(image, 3)
            return x.diagonal() * 2, x.sum(), pooled

    return Definition(
        Chosen,
        (torch.randn(4, 6), torch.randn(1, 2, 8, 6)),
        dynamic={"x": {0: Dim("rows", max=4000)}, "image": {2: Dim("height", min=4, max=32)}},
    )


@model
def two_symbols() -> Definition:
    """A foreign package as torch's own advice makes it: each input has a symbol of its own for
    the batch.
    """

    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return torch.relu(x), y * 2

    return Definition(
        Two,
        (torch.randn(4, 3), torch.randn(5, 3)),
        dynamic={"x": {0: Dim.DYNAMIC}, "y": {0: Dim.DYNAMIC}},
        foreign=True,
    )


@model
def steps() -> Definition:
    """A foreign package compiled with an example of every second column and of an expanded row."""

    class Steps(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * 2 + y

    return Definition(
        Steps, (torch.randn(4, 6)[:, ::2], torch.randn(1, 3).expand(4, 3)), foreign=True
    )


@model
def divides() -> Definition:
    """Divides integers towards zero, which torch's kernels do without a look at the divisor."""

    class Divides(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.div(x, y + 1, rounding_mode="trunc")

    return Definition(Divides, (torch.arange(16), torch.arange(16)))


@model
def floors() -> Definition:
    """Divides integers downwards, on two threads; torch's kernels look at the divisor."""

    class Floors(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x // (y + 1), x % (y + 1)

    return Definition(Floors, (torch.arange(1 << 16), torch.arange(1 << 16)), threads=2)


@model
def parallel() -> Definition:
    """Kernels of two threads: a reduction, and an embedding whose bad ids are found in a
    parallel region.
    """

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 64)

        def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            return (x * x).sum(), torch.sin(self.embedding(ids))

    return Definition(Parallel, (torch.randn(1 << 16), torch.arange(4096) % 10), threads=2)


@model
def arrayref() -> Definition:
    """Offers the minimal arrayref interface as well."""
    return Definition(
        lambda: nn.Linear(4, 2),
        (torch.randn(3, 4),),
        foreign=True,
        alone=True,
        options={
            "aot_inductor.use_minimal_arrayref_interface": True,
            "aot_inductor.allow_stack_allocation": True,
        },
    )
