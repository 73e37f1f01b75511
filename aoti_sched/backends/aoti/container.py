"""`CAbiContainer`: a container on the CPU, run through the C ABI without the GIL.

Outputs never share memory with weights. The containers of accelerators extend this class.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch

from aoti_sched.backends.aoti.c_abi import FUNCTIONS, Library
from aoti_sched.backends.aoti.constants import Constant, Names
from aoti_sched.backends.aoti.handles import each_once
from aoti_sched.backends.aoti.packaged_weights import GivenWeights, give_weights, load_weights
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.backends.aoti.weight_check import Chosen, choose
from aoti_sched.backends.aoti.weight_files import open_weights
from aoti_sched.backends.contracts import (
    ContainerInfo,
    CRun,
    HostContainer,
    LoadRequest,
    StagedSet,
)
from aoti_sched.backends.executors.batches import Staging
from aoti_sched.backends.reading import Reading
from aoti_sched.errors import LoadError, shortened
from aoti_sched.model.specs import ModelSpec
from aoti_sched.package import Extracted


class CAbiContainer(HostContainer):
    """A container run through the C ABI without the GIL."""

    def __init__(
        self,
        raw: RawContainer,
        request: LoadRequest,
        extracted: Extracted,
        spec: ModelSpec | None = None,
    ) -> None:
        self._raw = raw
        self._spec = spec
        self._weight_names = spec.weights if spec is not None else ()
        self._name = request.name
        self._instances = request.instances
        self._extracted = extracted
        self._given: GivenWeights | None = None
        if request.weights is not None:
            if reason := self.updatable:
                raise LoadError(f"{raw.name}: weights= was given, but {reason}. Leave it out.")
            self._given = GivenWeights(request, self._weight_names)
        load_weights(raw, extracted, self._given)
        self.folds = any(constant.spec.folded for constant in raw.constants)
        if self.folds:
            self._fold(raw, inactive=False)  # now, and not in the first request
        self._c_run = raw.c_run()
        self.staging = Staging(raw.name)
        self._inactive_bytes = 0
        self.constant_bytes = sum(constant.capacity for constant in raw.constants)
        # For each buffer, the active one first: whether its weights are those of the package or of
        # the file given at load.
        self._packaged = [self._given is None or self._given.is_file, False]
        if self._given is not None:
            self._given.forget()
        self._is_parked = False
        self._kept: dict[str, torch.Tensor] = {}  # while evicted: weights that the package lacks
        # An output that lies where constants lie is a weight itself; so is one that warming up
        # found to be folded.
        self._constants_start: list[int] = []
        self._constants_end: list[int] = []
        self._constants_span = (0, 0)
        self._folded_outputs: set[int] = set()
        self._index_constants()
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
                notes=self._notes(),
                reason="" if raw.proxy is None else raw.proxy.note,
                gil="released" if raw.proxy is None else raw.proxy.gil,
            )
        return self._info

    def _notes(self) -> tuple[str, ...]:
        ignored = self._given.ignored if self._given is not None else ()
        if not ignored:
            return ()
        return (
            (
                "Of the weights given at load, the model has no use for "
                f"{shortened(map(repr, ignored))}."
            ),
        )

    @property
    def c_run(self) -> CRun:
        return self._c_run

    def detach_outputs(self, outputs: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        shared = self._aliases(outputs)
        if shared:
            copies = each_once([outputs[index] for index in shared], torch.Tensor.clone)
            for index, copy in zip(shared, copies, strict=True):
                outputs[index] = copy
        return outputs

    def _aliases(self, outputs: Sequence[torch.Tensor | None]) -> list[int]:
        """Return which outputs share memory with the weights."""
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
        return self.detach_outputs(self._run(inputs))

    def warm_up(self, make_inputs: Callable[[], Sequence[torch.Tensor]]) -> None:
        """Run each instance once, and learn which outputs are folded constants.

        Runs one after another go to one instance after another. Two results that live at once can
        only share folded constants, so a model that folds is run twice at least.
        """
        before: list[torch.Tensor | None] = []
        for _ in range(max(self._instances, 2 if self.folds else 1)):
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

    def _index_constants(self) -> None:
        both = sorted({*self._raw.constant_memory(), *self._raw.constant_memory(inactive=True)})
        self._constants_start = [start for start, _ in both]
        self._constants_end = [end for _, end in both]
        self._constants_span = (both[0][0], max(self._constants_end)) if both else (0, 0)

    # --- live weights -----------------------------------------------------------------------------

    @property
    def updatable(self) -> str:
        constants = self._raw.constants
        spec = self._spec
        if any(constant.spec.fqn.startswith("_frozen_param") for constant in constants) or (
            spec is not None and spec.frozen
        ):
            return "they were compiled into its code (freeze=True)"
        if constants:
            return self._raw.why_not_updatable
        if not self._weight_names:
            return (
                "it has none"
                if spec is not None
                else "it has none, or all of them were compiled into its code (small ones are, and "
                "all where inductor freezes)"
            )
        if any(weight.used for weight in self._weight_names):
            return "all of them were compiled into its code"
        return "it uses none of its module's weights"

    @property
    def inactive_ready(self) -> bool:
        return self._raw.ready(inactive=True)

    @property
    def inactive_bytes(self) -> int:
        return self._inactive_bytes

    def stage(
        self,
        weights: object,
        *,
        partial: bool = False,
        strict: bool = True,
        check_finite: bool = False,
        reading: Reading | None = None,
    ) -> StagedSet:
        reading = reading or Reading()
        with reading.source(open_weights(weights)) as offers:
            constants = self._raw.constants
            chosen = choose(
                self._name,
                constants,
                Names(constants, self._weight_names),
                offers,
                device_type=self._raw.device_type,
                partial=partial,
                strict=strict,
            )
            with reading.foreign():
                chosen.read()
            ready = self._full_set(chosen, check_finite=check_finite)
        self._packaged[1] = False
        size = self._write(ready)  # not before a file was found to be still the one that was read
        self._inactive_bytes = size
        self._index_constants()  # before anything can run on it
        return StagedSet(size, chosen.ignored)

    def fold(self) -> None:
        self._fold(self._raw, inactive=True)

    def swap(self) -> None:
        self._raw.swap()
        self._packaged.reverse()

    def free_inactive(self) -> None:
        self._raw.free_inactive()
        self._inactive_bytes = 0
        self._index_constants()

    def extract(self, *, inactive: bool = False) -> dict[str, torch.Tensor]:
        return self._raw.extract(inactive=inactive)

    def rebuild(self) -> None:
        # When folding the inactive buffer throws, the runtime gives the instance it folded with
        # back to the others while that one's maps still point into the inactive buffer
        # (`run_const_fold` in model_container.h): it would run on it.
        old = self._raw
        if self.updatable:  # so they are the package's own still
            raw = self._fresh(self._load_weights)
        else:
            raw = self._fresh(lambda raw: raw.update(old.extract(), inactive=False))
        self._adopt(raw)
        old.close()

    @property
    def graphs(self) -> int:
        return 0

    # --- memory -----------------------------------------------------------------------------------

    @property
    def unparkable(self) -> str:
        return (
            ""
            if self._packaged[0]
            else "its weights were given or updated, and only memory has them"
        )

    def park(self) -> None:
        self._is_parked = True
        self._raw.close()
        self.staging.clear()
        self._c_run.native = None  # with what native lanes keep

    def unpark(self, reading: Reading | None = None) -> None:
        if not self._is_parked:
            return
        kept = self._kept
        self._adopt(
            self._fresh(
                lambda raw: give_weights(raw, kept) if kept else self._load_weights(raw, reading)
            )
        )
        self._kept, self._is_parked = {}, False

    def _load_weights(self, raw: RawContainer, reading: Reading | None = None) -> None:
        """Fill a container with the weights that the model was loaded with."""
        load_weights(raw, self._extracted, self._given, reading)

    def _fresh(self, fill: Callable[[RawContainer], None]) -> RawContainer:
        """Return a new container of the same model, filled by `fill` and folded."""
        raw = self._new_raw()
        raw.proxy = self._raw.proxy
        try:
            fill(raw)
            if self.folds:
                self._fold(raw, inactive=False)
        except BaseException:
            raw.close()
            raise
        return raw

    def _adopt(self, raw: RawContainer) -> None:
        self._raw = raw
        self._c_run = raw.c_run()
        self._inactive_bytes = 0
        self._index_constants()

    # --- what devices do in their own way ---------------------------------------------------------

    def _run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        return self._raw.run(inputs)

    def _fold(self, raw: RawContainer, *, inactive: bool) -> None:
        raw.fold(inactive=inactive)

    def _full_set(
        self, chosen: Chosen, *, check_finite: bool
    ) -> list[tuple[Constant, torch.Tensor]]:
        return self._raw.full_set(chosen.values(check_finite=check_finite))

    def _write(self, ready: list[tuple[Constant, torch.Tensor]]) -> int:
        """Write a full set into the inactive buffer and return its bytes."""
        return self._raw.stage(ready)

    def _new_raw(self) -> RawContainer:
        """Return a fresh container of the same model."""
        raw = RawContainer(self._raw.library, self._instances)
        raw.name, raw.layouts = self._raw.name, self._raw.layouts
        return raw


def missing_functions(library: Library) -> tuple[str, ...]:
    """Return the functions that a model's library lacks, each with the torch that brings it.

    A library lacks functions when an older torch compiled it.
    """
    wanted = {
        name: f
        for name, f in FUNCTIONS.items()
        if not f.needs_cpp and "MinimalArrayref" not in name
    }
    return tuple(f"{name} (torch {f.since})" for name, f in wanted.items() if not library.has(name))
