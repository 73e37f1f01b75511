"""Batches: gathers the tensors of several requests for one run, and splits the outputs.

This code uses torch's functions, for runs that Python calls. Native lanes do the same without the
GIL (`native/batch.cpp`). The queue decides which requests form a batch. torch is imported on first
use, because the fake backend has batches and no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.errors import RunError
from aoti_sched.model.batch_plan import BatchPlan, InputPlan

if TYPE_CHECKING:
    import torch


class Batch(msgspec.Struct, frozen=True, eq=False):
    """The requests of one run.

    Attributes:
        plan: How inputs are gathered and outputs are split.
        members: The validated inputs of each request.
        rows: The number of rows of each request.
        padded_rows: The number of rows of the run. The rows beyond the members' are zeros, and are
            never returned.
        slot: The container's slot, which runs one work at a time. The memory in which inputs are
            gathered is kept for the slot.
    """

    plan: BatchPlan
    members: Sequence[Sequence[Any]]
    rows: Sequence[int]
    padded_rows: int
    slot: int


class Staging:
    """The memory in which a container's batches are gathered, kept for each slot until `clear`.

    Args:
        name: The model's name in errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._slots: dict[int, list[torch.Tensor | None]] = {}

    def run(
        self, batch: Batch, run: Callable[[Sequence[torch.Tensor]], list[torch.Tensor | None]]
    ) -> list[list[torch.Tensor | None]]:
        """Run a batch, and return a list of outputs for each member.

        Args:
            batch: The batch.
            run: Runs the model once on the gathered inputs.

        Raises:
            RunError: The model failed, the members do not fit together, or an output has the wrong
                number of rows.
        """
        memories = self._slots.setdefault(batch.slot, [None] * len(batch.plan.inputs))
        outputs = run(gather(self._name, batch, memories))
        members = split(self._name, batch, outputs)
        if not batch.plan.detach_rows:
            self._release_shared(memories, outputs)
        return members

    def clear(self) -> None:
        """Free all memory. No run may be going on."""
        self._slots.clear()

    def _release_shared(
        self, memories: list[torch.Tensor | None], outputs: list[torch.Tensor | None]
    ) -> None:
        """Drop memory that an output shares, so that the next batch does not overwrite the output.

        Args:
            memories: The slot's memory for each input; dropped entries become None.
            outputs: The outputs of the run.
        """
        shared = {output.untyped_storage().data_ptr() for output in outputs if output is not None}
        for index, memory in enumerate(memories):
            if memory is not None and memory.data_ptr() in shared:
                memories[index] = None


def gather(
    name: str, batch: Batch, memories: list[torch.Tensor | None] | None = None
) -> list[torch.Tensor]:
    """Return the gathered inputs of a batch's run.

    Args:
        name: The model's name in errors.
        batch: The batch.
        memories: Memory to use for each input; memory that is missing or too small is replaced.
            None makes new memory for this batch alone.

    Raises:
        RunError: The members do not fit together.
    """
    import torch

    if (
        not batch.members
        or len(batch.members) != len(batch.rows)
        or sum(batch.rows) > batch.padded_rows
    ):
        raise ValueError(
            f"{name}: {len(batch.members)} members with {sum(batch.rows)} rows are no batch of "
            f"{batch.padded_rows} rows."
        )
    inputs = []
    # Memory made in a caller's inference mode could not be written by torch outside of one.
    with torch.inference_mode(mode=False), torch.no_grad():
        for index, plan in enumerate(batch.plan.inputs):
            parts = [member[index] for member in batch.members]
            sizes = _whole_sizes(name, batch, index, parts)
            strides, elements = _dense(sizes, plan.order)
            memory = None if memories is None else memories[index]
            if memory is None or memory.dtype != parts[0].dtype or memory.numel() < elements:
                # Twice the previous size, so that batches that grow row by row do not allocate each
                # time.
                twice = 0 if memory is None else 2 * memory.numel()
                memory = torch.empty(
                    max(elements, twice), dtype=parts[0].dtype, device=parts[0].device
                )
                if memories is not None:
                    memories[index] = memory
            whole = memory.as_strided(sizes, strides)
            _fill(whole, plan, parts, batch.rows)
            inputs.append(whole)
    return inputs


def whole_shapes(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Return the sizes of the gathered inputs of a batch whose members fit together."""
    shapes = []
    for index, plan in enumerate(batch.plan.inputs):
        sizes = list(batch.members[0][index].shape)
        for dim in plan.ragged:
            sizes[dim] = max(member[index].shape[dim] for member in batch.members)
        sizes[plan.dim] = batch.padded_rows
        shapes.append(tuple(sizes))
    return tuple(shapes)


def split(
    name: str, batch: Batch, outputs: Sequence[torch.Tensor | None]
) -> list[list[torch.Tensor | None]]:
    """Return each member's own rows of each output; None where the model left an output out.

    Raises:
        RunError: An output has the wrong number of rows.
    """
    plan = batch.plan
    if len(outputs) != len(plan.outputs):
        raise RunError(
            f"{name}: the run failed: it gave {len(outputs)} outputs, expected {len(plan.outputs)}"
        )
    surplus = batch.padded_rows - sum(batch.rows)
    members: list[list[torch.Tensor | None]] = [[] for _ in batch.members]
    for index, (how, output) in enumerate(zip(plan.outputs, outputs, strict=True)):
        if output is None:
            for member in members:
                member.append(None)
            continue
        _check_output(name, batch, index, output)
        parts = output.split_with_sizes([*batch.rows, surplus], how.dim)
        for member, inputs, whole in zip(members, batch.members, parts, strict=False):
            part = whole
            for cut in how.ragged:
                part = part.narrow(cut.dim, 0, inputs[cut.input].shape[cut.input_dim])
            member.append(part.clone() if plan.detach_rows else part)
    return members


def _whole_sizes(name: str, batch: Batch, index: int, parts: list[torch.Tensor]) -> list[int]:
    """Return the sizes of one gathered input.

    Raises:
        RunError: A member does not fit the others.
    """
    plan = batch.plan.inputs[index]
    dtype = parts[0].dtype
    sizes = list(parts[0].shape)
    for number, (part, rows) in enumerate(zip(parts, batch.rows, strict=True)):
        shape = list(part.shape)
        if len(shape) == len(sizes) == len(plan.order):
            sizes[plan.dim] = rows
            for dim in plan.ragged:
                sizes[dim] = max(sizes[dim], shape[dim])
                shape[dim] = sizes[dim]
        if shape != sizes or part.dim() != len(plan.order) or part.dtype is not dtype:
            raise RunError(
                f"{name}: the run failed: input {index} of request {number} of the batch "
                f"{_misfit(plan, part, dtype, sizes)}"
            )
    sizes[plan.dim] = batch.padded_rows
    return sizes


def _misfit(plan: InputPlan, part: torch.Tensor, dtype: torch.dtype, sizes: list[int]) -> str:
    if part.dim() != len(plan.order):
        return f"has {part.dim()} dimensions, not {len(plan.order)}"
    if part.dtype is not dtype:
        return "is of another dtype than that of the first"
    dim = next(
        dim for dim, size in enumerate(sizes) if size != part.shape[dim] and dim not in plan.ragged
    )
    return f"has size {part.shape[dim]} in dimension {dim}, not {sizes[dim]}"


def _dense(sizes: Sequence[int], order: Sequence[int]) -> tuple[list[int], int]:
    """Return the strides and the number of elements of a dense tensor in this memory order."""
    strides = [1] * len(sizes)
    step = 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(sizes[dim], 1)
    return strides, step


def _fill(
    whole: torch.Tensor, plan: InputPlan, parts: list[torch.Tensor], rows: Sequence[int]
) -> None:
    import torch

    used = sum(rows)
    if used < whole.shape[plan.dim]:
        whole.narrow(plan.dim, used, whole.shape[plan.dim] - used).zero_()
    target = whole.narrow(plan.dim, 0, used)
    if all(part.shape[dim] == whole.shape[dim] for part in parts for dim in plan.ragged):
        torch.cat(parts, plan.dim, out=target)
        return
    target.fill_(plan.pad)
    first = 0
    for part, count in zip(parts, rows, strict=True):
        place = target.narrow(plan.dim, first, count)
        for dim in plan.ragged:
            place = place.narrow(dim, 0, part.shape[dim])
        place.copy_(part)
        first += count


def _check_output(name: str, batch: Batch, index: int, output: torch.Tensor) -> None:
    how = batch.plan.outputs[index]
    what = f"{name}: the run failed: output {index} of a batch"
    if how.dim >= output.dim():
        raise RunError(
            f"{what} has {output.dim()} dimensions, and its rows should be in dimension {how.dim}"
        )
    if output.shape[how.dim] != batch.padded_rows:
        raise RunError(
            f"{what} has {output.shape[how.dim]} rows in dimension {how.dim}, expected "
            f"{batch.padded_rows}"
        )
    for cut in how.ragged:
        for number, inputs in enumerate(batch.members):
            if (
                cut.dim >= output.dim()
                or inputs[cut.input].shape[cut.input_dim] > output.shape[cut.dim]
            ):
                raise RunError(
                    f"{what} is shorter in dimension {cut.dim} than input {cut.input} of request "
                    f"{number} in dimension "
                    f"{cut.input_dim}"
                )
