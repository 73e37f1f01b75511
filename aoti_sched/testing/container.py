"""`FakeContainer`: a Python function and a dict of weights in a container's place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from aoti_sched.backends.contracts import ContainerInfo, HostContainer, StagedSet
from aoti_sched.backends.executors.batches import Staging
from aoti_sched.backends.reading import Reading
from aoti_sched.errors import ConstantMismatchError, WeightsTypeError, brief


class FakeCall:
    """One call's arguments on their way to a fake model."""

    nbytes = 0

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Sequence[str] = ()
    ) -> None:
        self.args = args
        self.kwargs = kwargs
        self._parameters = parameters

    def tensors(self) -> list[Any]:
        """Return the tensors among the arguments, nested ones included, to compare with specs.

        Arrays count as tensors, as with real models. Arguments that are given by name come in the
        order of the module's parameters, as far as it is known.
        """
        import torch
        from torch.utils import _pytree as pytree

        place = {name: index for index, name in enumerate(self._parameters)}
        named = sorted(self.kwargs, key=lambda name: place.get(name, len(place)))
        leaves = pytree.tree_leaves((self.args, [self.kwargs[name] for name in named]))
        return [
            leaf for leaf in leaves if isinstance(leaf, torch.Tensor) or hasattr(leaf, "__dlpack__")
        ]


class AnyCall:
    """A call spec that takes any arguments and gives back what the function returned.

    Args:
        parameters: The names of the module's parameters, where a package states them.
    """

    def __init__(self, parameters: Sequence[str] = ()) -> None:
        self._parameters = tuple(parameters)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[FakeCall]:
        return [FakeCall(args, kwargs, self._parameters)]

    def unflatten(self, outputs: list[Any]) -> Any:
        return outputs[0]

    def takes(self) -> None:
        return None

    def __str__(self) -> str:
        return "(*args, **kwargs)"


class FakeContainer(HostContainer):
    """A Python function in a container's place.

    Its weights are a dict of any values, of which an update must give all; each counts as a byte.
    `faults` makes the next "stage", "fold", "swap", "free_inactive", "rebuild", "park" or "unpark"
    fail with the error given for it.
    """

    def __init__(
        self, function: Callable[..., Any], instances: int, weights: Mapping[str, Any]
    ) -> None:
        self.function = function
        self.weights = dict(weights)
        self.inactive: dict[str, Any] | None = None
        self.faults: dict[str, Exception] = {}
        self.folds = False
        self.closed = False
        self.parked = False
        self.constant_bytes = len(self.weights)
        self.graphs = 0
        self.unparkable = ""
        self.info = ContainerInfo(
            runtime="fake",
            gil="held",
            instances=instances,
            num_inputs=None,
            num_outputs=None,
            in_spec="",
            out_spec="",
            inline=False,  # a run that waits for its step takes no time that could be learned
        )

    c_run = None
    staging = Staging("fake")  # of no use: there is nothing to put together

    def detach_outputs(self, outputs: list[Any]) -> list[Any]:
        return outputs

    def run_raw(self, inputs: Sequence[Any]) -> list[Any]:
        if self.parked:
            raise RuntimeError("a parked model was run")
        call: FakeCall = inputs[0]
        return [self.function(*call.args, **call.kwargs)]

    def warm_up(self, make_inputs: Callable[[], Sequence[Any]]) -> None:
        """Do nothing: a function needs no warm-up."""

    updatable = ""

    @property
    def inactive_ready(self) -> bool:
        return self.inactive is not None

    @property
    def inactive_bytes(self) -> int:
        return len(self.inactive or {})

    def stage(
        self,
        weights: object,
        *,
        partial: bool = False,
        strict: bool = True,
        check_finite: bool = False,
        reading: Reading | None = None,
    ) -> StagedSet:
        del check_finite
        self._fail("stage")
        with (reading or Reading()).source(contextlib.nullcontext(weight_items(weights))) as items:
            given: dict[str, Any] = dict(items)
        unknown = [name for name in given if name not in self.weights]
        faults = [(name, "is unknown") for name in unknown if strict]
        faults += [
            (name, "is missing") for name in self.weights if name not in given and not partial
        ]
        if faults:
            raise ConstantMismatchError("fake", tuple(faults))
        self.inactive = {
            **self.weights,
            **{name: given[name] for name in given if name in self.weights},
        }
        return StagedSet(len(self.inactive), tuple(unknown))

    def fold(self) -> None:
        self._fail("fold")

    def swap(self) -> None:
        self._fail("swap")
        if self.inactive is None:
            raise RuntimeError("the inactive buffer holds nothing")
        self.weights, self.inactive = self.inactive, self.weights

    def free_inactive(self) -> None:
        self._fail("free_inactive")
        self.inactive = None

    def extract(self, *, inactive: bool = False) -> dict[str, Any]:
        return dict(self.inactive or {}) if inactive else dict(self.weights)

    def rebuild(self) -> None:
        self._fail("rebuild")
        self.inactive = None

    def park(self) -> None:
        self._fail("park")
        self.parked = True

    def unpark(self, reading: Reading | None = None) -> None:
        del reading
        self._fail("unpark")
        self.parked = False

    def _fail(self, step: str) -> None:
        error = self.faults.pop(step, None)
        if error is not None:
            raise error

    def close(self) -> None:
        self.closed = True


def weight_items(weights: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of a mapping, or of pairs.

    Raises:
        WeightsTypeError: It is neither. No file is read: a function's weights are values of any
            kind.
    """
    if isinstance(weights, (str, bytes, os.PathLike)):
        raise WeightsTypeError(
            f"weights: the fake backend reads no file, and {brief(weights)} is a path. Give it a "
            "mapping from names to values."
        )
    if not isinstance(weights, Iterable):
        raise WeightsTypeError(
            f"weights: expected a mapping from names to values, or pairs, got {brief(weights)}."
        )
    for pair in weights.items() if isinstance(weights, Mapping) else weights:
        try:
            name, value = pair
        except (TypeError, ValueError):
            raise WeightsTypeError(
                f"weights: expected pairs of a name and a value, got {brief(pair)}."
            ) from None
        yield name, value
