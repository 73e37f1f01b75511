"""A container run through the C ABI, the GIL released; outputs never share memory with weights. It runs on the CPU, and is what
the containers of devices are made from.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence

import torch

from aoti_sched.backends.base import ContainerInfo, CRun, LoadRequest
from aoti_sched.backends.batch import Staging
from aoti_sched.backends.c_abi import FUNCTIONS, Library
from aoti_sched.backends.constants import Constant
from aoti_sched.backends.handles import each_once
from aoti_sched.backends.raw_container import RawContainer
from aoti_sched.backends.weight_source import open_weights
from aoti_sched.backends.weights import give_weights, load_weights
from aoti_sched.package import Extracted


class CAbiContainer:
    """A container run through the C ABI, the GIL released."""

    def __init__(self, raw: RawContainer, request: LoadRequest, extracted: Extracted) -> None:
        self._raw = raw
        self._name = request.name
        self._instances = request.instances
        self._extracted = extracted
        load_weights(raw, extracted)
        self.folds = any(constant.spec.folded for constant in raw.constants)
        if self.folds:
            self._fold(raw, inactive=False)  # now, and not in the first request
        self._c_run = raw.c_run()
        self.staging = Staging(raw.name)
        self._inactive_bytes = 0
        self.constant_bytes = sum(constant.capacity for constant in raw.constants)
        # Of each buffer, the active one first: whether the package has the same weights.
        self._packaged = [True, False]
        self._is_parked = False
        self._kept: dict[str, torch.Tensor] = {}  # by one that is parked, what the package has not
        # An output that lies where constants lie is a weight itself; so is one that warming up found to be folded.
        self._constants_start: list[int] = []
        self._constants_end: list[int] = []
        self._constants_span = (0, 0)
        self._folded_outputs: set[int] = set()
        self._know_memory()
        self._info: ContainerInfo | None = None

    @property
    def info(self) -> ContainerInfo:
        if self._info is None:
            raw = self._raw
            in_spec, out_spec = raw.call_spec()
            self._info = ContainerInfo(
                runtime="c_abi",
                instances=self._instances,
                num_inputs=raw.num_inputs,
                num_outputs=raw.num_outputs,
                in_spec=in_spec,
                out_spec=out_spec,
                constants=tuple(constant.spec for constant in raw.constants),
                missing=missing_functions(raw.library),
                reason="" if raw.proxy is None else raw.proxy.note,
                gil="released" if raw.proxy is None else raw.proxy.gil,
            )
        return self._info

    @property
    def c_run(self) -> CRun:
        return self._c_run

    def own(self, outputs: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        shared = self._aliases(outputs)
        if shared:
            copies = each_once([outputs[index] for index in shared], torch.Tensor.clone)
            for index, copy in zip(shared, copies, strict=True):
                outputs[index] = copy
        return outputs

    def _aliases(self, outputs: Sequence[torch.Tensor | None]) -> list[int]:
        """Which outputs share memory with the weights."""
        if not self._folded_outputs:
            low, high = self._constants_span
            for tensor in outputs:
                if tensor is not None and low <= tensor.data_ptr() < high:
                    break
            else:
                return []  # nearly always
        found = [index for index in self._folded_outputs if outputs[index] is not None]
        starts = self._constants_start
        if starts:
            for index, tensor in enumerate(outputs):
                if tensor is not None:
                    address = tensor.data_ptr()
                    place = bisect_right(starts, address)
                    if place and address < self._constants_end[place - 1] and index not in found:
                        found.append(index)
        return found

    def run_raw(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        return self.own(self._run(inputs))

    def warm_up(self, make_inputs: Callable[[], Sequence[torch.Tensor]]) -> None:
        """Also learns which outputs are folded constants: two results that live at once can only share those."""
        before: list[torch.Tensor | None] = []
        for _ in range(self._instances + 1):
            inputs = make_inputs()
            now = self._run(inputs)
            own = {tensor.data_ptr() for tensor in inputs}
            for index, (old, new) in enumerate(zip(before, now, strict=False)):
                if old is None or new is None or not new.numel():
                    continue
                start = new.data_ptr()
                if start == old.data_ptr() and start not in own:
                    self._folded_outputs.add(index)
            before = now

    def close(self) -> None:
        self._raw.close()
        self.staging.clear()
        self._c_run.native = None  # with what native lanes keep

    def _know_memory(self) -> None:
        both = sorted({*self._raw.constant_memory(), *self._raw.constant_memory(inactive=True)})
        self._constants_start = [start for start, _ in both]
        self._constants_end = [end for _, end in both]
        self._constants_span = (both[0][0], max(self._constants_end)) if both else (0, 0)

    # --- live weights ----------------------------------------------------------------------------------

    @property
    def updatable(self) -> str:
        constants = self._raw.constants
        if not constants or any(constant.spec.fqn.startswith("_frozen_param") for constant in constants):
            return "they were compiled into its code (freeze=True)"
        return self._raw.why_not_updatable

    @property
    def inactive_ready(self) -> bool:
        return self._raw.ready(inactive=True)

    @property
    def inactive_bytes(self) -> int:
        return self._inactive_bytes

    def stage(self, weights: object, *, partial: bool = False, check_finite: bool = False) -> int:
        with open_weights(weights) as tensors:
            ready = self._full_set(tensors, partial=partial, check_finite=check_finite)
        self._packaged[1] = False
        size = self._write(ready)  # not before a file was found to be still the one that was read
        self._inactive_bytes = size
        self._know_memory()  # before anything can run on it
        return size

    def fold(self) -> None:
        self._fold(self._raw, inactive=True)

    def swap(self) -> None:
        self._raw.swap()
        self._packaged.reverse()

    def free_inactive(self) -> None:
        self._raw.free_inactive()
        self._inactive_bytes = 0
        self._know_memory()

    def extract(self, *, inactive: bool = False) -> dict[str, torch.Tensor]:
        return self._raw.extract(inactive=inactive)

    def rebuild(self) -> None:
        # When folding the inactive buffer throws, the runtime gives the instance it folded with back to the others while
        # that one's maps still point into the inactive buffer (`run_const_fold` in model_container.h): it would run on it.
        old = self._raw
        if self.updatable:  # so they are the package's own still
            raw = self._fresh(lambda raw: load_weights(raw, self._extracted))
        else:
            raw = self._fresh(lambda raw: raw.update(old.extract(), inactive=False))
        self._become(raw)
        old.close()

    @property
    def graphs(self) -> int:
        return 0

    @property
    def workspace(self) -> int | None:
        return None

    # --- memory ----------------------------------------------------------------------------------------

    @property
    def unparkable(self) -> str:
        return "" if self._packaged[0] else "its weights were updated, and only memory has them"

    def park(self) -> None:
        self._is_parked = True
        self._raw.close()
        self.staging.clear()
        self._c_run.native = None  # with what native lanes keep

    def unpark(self) -> None:
        if not self._is_parked:
            return
        kept = self._kept
        self._become(
            self._fresh(lambda raw: give_weights(raw, kept) if kept else load_weights(raw, self._extracted))
        )
        self._kept, self._is_parked = {}, False

    def _fresh(self, fill: Callable[[RawContainer], None]) -> RawContainer:
        """Another container of the same model, with the weights that are filled in."""
        raw = self._another()
        raw.proxy = self._raw.proxy
        try:
            fill(raw)
            if self.folds:
                self._fold(raw, inactive=False)
        except BaseException:
            raw.close()
            raise
        return raw

    def _become(self, raw: RawContainer) -> None:
        self._raw = raw
        self._c_run = raw.c_run()
        self._inactive_bytes = 0
        self._know_memory()

    # --- what devices do in their own way --------------------------------------------------------------

    def _run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        return self._raw.run(inputs)

    def _fold(self, raw: RawContainer, *, inactive: bool) -> None:
        raw.fold(inactive=inactive)

    def _full_set(
        self, tensors: Iterable[tuple[str, torch.Tensor]], *, partial: bool, check_finite: bool
    ) -> list[tuple[Constant, torch.Tensor]]:
        return self._raw.full_set(self._name, tensors, partial=partial, check_finite=check_finite)

    def _write(self, ready: list[tuple[Constant, torch.Tensor]]) -> int:
        """Write a full set into the inactive buffer; returns its bytes."""
        return self._raw.stage(ready)

    def _another(self) -> RawContainer:
        """A fresh container of the same model."""
        raw = RawContainer(self._raw.library, self._instances)
        raw.name = self._raw.name
        return raw


def missing_functions(library: Library) -> tuple[str, ...]:
    """The functions that a model's library lacks because an older torch compiled it, and the torch that brings them."""
    wanted = {name: f for name, f in FUNCTIONS.items() if not f.needs_cpp and "MinimalArrayref" not in name}
    return tuple(f"{name} (torch {f.since})" for name, f in wanted.items() if not library.has(name))
