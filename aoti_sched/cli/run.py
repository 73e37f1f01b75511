"""`aoti-sched run`: runs a model once or a few times, on given inputs or on random ones."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.cli.failures import UsageError
from aoti_sched.cli.options import Flag, Texts
from aoti_sched.cli.output import Report, out, print_json, print_table
from aoti_sched.cli.units import time_text

if TYPE_CHECKING:
    import torch

    from aoti_sched.cli.inputs import Inputs

_FEW = 16
"""The most values of an output that are shown."""


class TensorReport(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor.

    Attributes:
        name: The name of the input or output.
        source: "given", "random" or "output".
        dtype: Torch's name without the prefix.
        shape: The sizes.
        low: The least value; None for an empty or complex tensor, or where NaN is in it.
        high: The greatest value.
        mean: The mean.
        values: All values, where there are at most 16.
    """

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    low: float | None
    high: float | None
    mean: float | None
    values: tuple[float | int | bool, ...] | None


class RunReport(Report, frozen=True, kw_only=True):
    """What `run --json` prints.

    Attributes:
        path: The package.
        model: The name of the runner.
        load_seconds: Seconds from opening the scheduler to the loaded model.
        run_seconds: Seconds of each run.
        inputs: The tensors that went in.
        outputs: The tensors that came out of the last run.
        written: The file of the outputs; "" without one.
    """

    path: str
    model: str
    load_seconds: float
    run_seconds: tuple[float, ...]
    inputs: tuple[TensorReport, ...]
    outputs: tuple[TensorReport, ...]
    written: str


def run_command(
    package: Path,
    /,
    *,
    input: Texts = (),
    size: Texts = (),
    output: Path | None = None,
    repeat: int = 1,
    seed: int = 0,
    model: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    weights: Path | None = None,
    json: Flag = False,
) -> None:
    """Run a model on given inputs, or on random ones that fit its specs.

    Running a package runs its native code. Run only packages that you trust.

    Args:
        package: A .pt2 package, or a bare library.
        input: An input as NAME=@FILE, NAME=@FILE:KEY or NAME=JSON, or @FILE for all that are named
            in it. Files are .npy, .npz and .safetensors. Repeat the option for each input; an
            input that is not given is random.
        size: A size of random inputs, such as batch=8. By default the example's that the model was
            compiled with.
        output: Write the outputs to this .npy, .npz or .safetensors file.
        repeat: Run this many times, on the same inputs.
        seed: The seed of random inputs.
        model: The name of one of several models in the package.
        device: Where to run: cpu, cuda:0, xpu:0 or mps.
        threads: Threads of a run. By default the number that the model was compiled for.
        weights: A file of weights in place of the package's.
        json: Print JSON.
    """
    from aoti_sched.cli.tensors import check_writable, write_tensors

    if repeat < 1:
        raise UsageError(f"--repeat {repeat}: run at least once.")
    if output is not None:
        check_writable(output)
    settings: dict[str, Any] = {"model_name": model, "device": device, "threads": threads}
    if device != "cpu":
        settings |= {"copy_inputs": True, "copy_outputs": "cpu"}
    if weights is not None:
        settings["weights"] = weights
    report, outputs = asyncio.run(_run(package, input, size, settings, repeat, seed))
    if output is not None:
        write_tensors(output, outputs)
        report = msgspec.structs.replace(report, written=str(output))
    if json:
        print_json(report)
    else:
        _print(report)


async def _run(
    package: Path,
    given: tuple[str, ...],
    sizes: tuple[str, ...],
    settings: dict[str, Any],
    repeat: int,
    seed: int,
) -> tuple[RunReport, dict[str, torch.Tensor]]:
    from aoti_sched import Scheduler
    from aoti_sched.cli.inputs import Inputs
    from aoti_sched.cli.loading import quiet, wrapper_of

    quiet()
    async with Scheduler() as scheduler:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        runner = await scheduler.load(package, **settings)
        loaded = loop.time() - begin
        inputs = Inputs(runner.info, wrapper_of(package, settings["model_name"]), given, sizes)
        args, kwargs = inputs.arguments(seed)
        times = []
        for _ in range(repeat):
            future = runner.submit(*args, **kwargs)
            result = await future
            times.append(future.trace.run_seconds)
        outputs = named_outputs(result, [leaf.name for leaf in runner.info.outputs])
        report = RunReport(
            path=str(package),
            model=runner.name,
            load_seconds=loaded,
            run_seconds=tuple(times),
            inputs=tuple(_inputs(inputs, seed)),
            outputs=tuple(described(name, "output", value) for name, value in outputs.items()),
            written="",
        )
    return report, outputs


def _inputs(inputs: Inputs, seed: int) -> list[TensorReport]:
    return [
        described(inputs.name(index), "given" if index in inputs.given else "random", tensor)
        for index, tensor in enumerate(inputs.tensors(seed))
    ]


def named_outputs(result: object, names: list[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of a result by name; numbers become 0-dim tensors.

    Args:
        result: What the model returned.
        names: The names of the leaves, where the package states them.
    """
    import torch
    from torch.utils import _pytree as pytree

    leaves = pytree.tree_leaves(result)
    if len(names) != len(leaves):
        names = [f"output_{index}" for index in range(len(leaves))]
    found: dict[str, torch.Tensor] = {}
    for index, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if isinstance(leaf, torch.Tensor):
            tensor = leaf
        elif isinstance(leaf, (bool, int, float)):
            tensor = torch.tensor(leaf)
        else:
            continue  # None and texts, which are the same for each request
        found[f"output_{index}" if name in found or not name else name] = tensor
    return found


def described(name: str, source: str, tensor: torch.Tensor) -> TensorReport:
    """Return what to show of a tensor."""
    import torch

    plain = tensor.detach().cpu()
    low = high = mean = None
    if plain.numel() and not plain.is_complex():
        numbers = plain.to(torch.float64)
        least, most = torch.aminmax(numbers)
        low, high, mean = (_finite(value) for value in (least, most, numbers.mean()))
    few = plain.numel() <= _FEW and not plain.is_complex()
    return TensorReport(
        name=name,
        source=source,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        low=low,
        high=high,
        mean=mean,
        values=tuple(plain.flatten().tolist()) if few else None,
    )


def _finite(value: torch.Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _print(report: RunReport) -> None:
    console = out()
    rows = [
        (
            tensor.source,
            tensor.name,
            f"{tensor.dtype}{list(tensor.shape)}",
            *("" if number is None else f"{number:.4g}" for number in (tensor.low, tensor.high)),
            "" if tensor.values is None else " ".join(f"{value:.4g}" for value in tensor.values),
        )
        for tensor in (*report.inputs, *report.outputs)
    ]
    print_table(console, ("", "tensor", "type", "least", "greatest", "values"), rows)
    times = report.run_seconds
    spread = f", fastest {time_text(min(times))}, slowest {time_text(max(times))}"
    console.print()
    console.print(
        f"{len(times)} {'run' if len(times) == 1 else 'runs'}: "
        f"{time_text(sum(times) / len(times))}{spread if len(times) > 1 else ''}; "
        f"loading took {time_text(report.load_seconds)}"
    )
    if report.written:
        console.print(f"wrote {report.written}")
