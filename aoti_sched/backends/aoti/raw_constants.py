"""`RawConstants`: the two buffers of constants of a container behind the C ABI.

Updates, extraction, folding, freeing and closing take no lock in the runtime. So only one thread at
a time may call these, and never on the active buffer while runs go on. A swap waits for the runs
that are going on, and may starve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from ctypes import POINTER, byref, c_bool, c_char_p, c_int32, c_size_t, c_uint64
from pathlib import Path

import torch

from aoti_sched.backends.aoti.c_abi import ConstantEntry
from aoti_sched.backends.aoti.constant_map import (
    EXTRACT,
    EXTRACT_ENTRIES,
    UPDATE_PAIRS,
    entries,
    map_type,
    mapped,
    why_not_updatable,
)
from aoti_sched.backends.aoti.constants import TYPES, Constant
from aoti_sched.backends.aoti.handles import DTYPES, borrowed, free, handles_of
from aoti_sched.backends.aoti.raw_handle import PREFIX, RawHandle
from aoti_sched.backends.aoti.weight_check import check, select, with_layout
from aoti_sched.errors import (
    LoadError,
    MissingCapabilityError,
    MissingWeightsError,
    shortened,
)
from aoti_sched.model.specs import ConstantSpec
from aoti_sched.package.sources import Layout


class RawConstants(RawHandle):
    """A container's handle and its constants: specs, values, and the ways to write them.

    There are two ways to write. `stage` writes a set that is complete, checked and laid out, in
    groups, while requests run. `update` checks and completes its tensors first. Loading,
    user-managed memory and tests of the C ABI use `update`.
    """

    def _inspect(self) -> None:
        super()._inspect()
        # Whether the model itself copies constants from the host to its device (since torch 2.13).
        self.takes_from_cpu = self.library.has(PREFIX + "UpdateConstantBufferFromCpuPairs")
        # Whether a tensor's address tells its place in memory. MPS's is that of an object, its
        # buffer, plus the offset in it.
        self.has_addresses = True
        # A context in which a file is read, while others may have the device.
        self.away: Callable[[], AbstractContextManager[object]] = nullcontext
        # Shape and strides of constants, by the runtime's names, as the package states them; the C
        # ABI knows none without values.
        self.layouts: Mapping[str, Layout] = {}
        self._constants: tuple[Constant, ...] | None = None
        # Which buffer holds every constant: active, inactive. At first only the runtime knows.
        self._complete = [False, False]
        self._complete[0] = not self.missing_constants()

    # --- what they are ----------------------------------------------------------------------------

    @property
    def constants(self) -> tuple[Constant, ...]:
        """Every constant in the runtime's order, folded constants included.

        Shapes and strides are known once the active buffer has values that the model lets us read.
        """
        if self._constants is None:
            # Only a complete buffer's layouts can be trusted: what an update was refused for is
            # still there.
            known = (
                dict(self._borrow(inactive=False))
                if self._complete[0] and self._can_extract()
                else {}
            )
            count = self._get(c_size_t, "GetNumConstants")
            constants = tuple(self._constant(index, known) for index in range(count))
            if not self._complete[0]:
                return constants
            self._constants = constants
        return self._constants

    def missing_constants(self, *, inactive: bool = False) -> tuple[str, ...]:
        """Return the FQNs of the constants that have no value in a buffer.

        The result is () where the model can't tell (before torch 2.13).

        Running on a buffer that lacks one is a segmentation fault.
        """
        if self._complete[inactive]:
            return ()
        if inactive:
            return tuple(c.spec.fqn for c in self.constants if not c.spec.folded)
        if not self._can_extract():
            return ()
        # Each answer of the runtime costs a call, and models have hundreds of constants.
        present = {name for name, _ in self._handles(inactive=inactive)}
        fqns = [self._fqn(index) for index in range(self._get(c_size_t, "GetNumConstants"))]
        return tuple(
            fqn for index, fqn in enumerate(fqns) if fqn not in present and not self._folded(index)
        )

    @property
    def why_not_updatable(self) -> str:
        """Why the constants can't be replaced while the model serves; "" when they can."""
        why = why_not_updatable(self.library, self.constants)
        if not why and not self.library.has(UPDATE_PAIRS) and self.on_host:
            # `update_constant_buffer` refuses only groups with such a constant, and looks places up
            # by a number that counts it, although it is not there.
            return (
                "a torch before 2.13 compiled it, whose code takes no constants in the host's "
                f"memory ({shortened(sorted(self.on_host))}) beside others on a device; compile it "
                "again with torch 2.13 or newer"
            )
        return why

    @property
    def on_host(self) -> frozenset[str]:
        """FQNs of the constants that a model for a device keeps in the host's memory."""
        if self.device_type == "cpu" or not self._can_extract():
            return frozenset()
        return frozenset(fqn for fqn, tensor in self._borrow(inactive=False) if tensor.is_cpu)

    def ready(self, *, inactive: bool) -> bool:
        """Return whether a buffer holds a full set of constants."""
        return self._complete[inactive]

    def constant_memory(self, *, inactive: bool = False) -> list[tuple[int, int]]:
        """Return the address ranges [start, end) of a buffer's constants.

        Where tensors have no addresses, a range is [storage, storage + 1). The C ABI does not tell
        where folded constants lie.
        """
        if not self._can_extract() or (inactive and not self._complete[1]):
            return []
        # A frozen model's weights may be packed by oneDNN: opaque, without an address, and never an
        # output.
        tensors = [
            t for _, t in self._borrow(inactive=inactive) if t.layout is torch.strided and t.numel()
        ]
        if not self.has_addresses:
            storages = {t.untyped_storage().data_ptr() for t in tensors}
            return [(storage, storage + 1) for storage in storages]
        return [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]

    # --- their values -----------------------------------------------------------------------------

    def extract(self, *, inactive: bool = False, host: bool = False) -> dict[str, torch.Tensor]:
        """Return copies of a buffer's constants by FQN, without the folded ones.

        The result is {} for an inactive buffer that was freed. Copies are on the constants' device,
        or with `host` on the host.
        """
        if inactive and not self._complete[1]:
            return {}  # what a freed buffer holds points into freed memory
        constants = self._borrow(inactive=inactive)
        return {name: t.to("cpu", copy=True) if host else t.clone() for name, t in constants}

    def full_set(self, weights: Mapping[str, torch.Tensor]) -> list[tuple[Constant, torch.Tensor]]:
        """Return a full set for `stage`: the given weights, and the rest from the active buffer.

        Args:
            weights: Tensors by FQN, chosen for this model and checked.
        """
        fit = dict(weights)
        active = dict(self._borrow(inactive=False)) if self._can_extract() else {}
        for constant in self.constants:
            spec = constant.spec
            if not spec.folded and spec.fqn not in fit and spec.fqn in active:
                fit[spec.fqn] = active[spec.fqn]  # made by the compiler, or left out of a part
        for fqn in self.on_host & fit.keys():
            fit[fqn] = fit[fqn].cpu()
        return [
            (c, with_layout(self.name, c, fit[c.spec.fqn]))
            for c in self.constants
            if c.spec.fqn in fit
        ]

    def stage(
        self,
        ready: list[tuple[Constant, torch.Tensor]],
        *,
        at_once: int | None = None,
        bring: Callable[[list[torch.Tensor]], AbstractContextManager[list[torch.Tensor]]]
        | None = None,
    ) -> int:
        """Write a `full_set` into the inactive buffer and return its bytes. Runs may go on.

        Args:
            ready: The set.
            at_once: The most bytes to write in one call, as far as constants can be written apart
                from others; None writes all at once.
            bring: Copies host tensors to the model's device for the duration of its context.
                Called for each group with the tensors that the model can't copy itself.
        """
        self._complete[1] = False
        groups = [ready] if at_once is None else _groups(ready, at_once)
        stay = self.on_host
        for number, group in enumerate(groups):
            name = "UpdateConstantBufferPairs"
            here = [
                place for place, (c, t) in enumerate(group) if t.is_cpu and c.spec.fqn not in stay
            ]
            there: AbstractContextManager[list[torch.Tensor]] = nullcontext([])
            if bring is not None and here:
                if self.takes_from_cpu:
                    name = "UpdateConstantBufferFromCpuPairs"
                else:
                    there = bring([group[place][1] for place in here])
            with there as brought:
                given = list(group)
                for place, tensor in zip(here, brought, strict=False):
                    given[place] = (group[place][0], tensor)
                self._write(name, given, inactive=True, full=len(groups) == 1)
            self._complete[1] = number == len(groups) - 1
        return sum(tensor.numel() * tensor.element_size() for _, tensor in ready)

    def update(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        inactive: bool,
        user_managed: bool = False,
        from_cpu: bool = False,
    ) -> None:
        """Write constants into a buffer, by FQN or by the runtime's name.

        Every parameter and buffer must be given unless the buffer has a full set already. Values
        are copied, so the tensors stay the caller's.

        Args:
            tensors: The values, with any strides. A tensor that fits no constant raises.
            inactive: Write the inactive buffer, which runs do not read; False writes the active
                one.
            user_managed: Let the container read the tensors' own memory instead of a copy. The
                container keeps that memory for its lifetime, even after later updates. The tensors
                must be laid out as compiled.
            from_cpu: CPU tensors are copied to the model's device.

        Raises:
            LoadError: A tensor does not fit, or the runtime refused. The buffer is unchanged unless
                the text states otherwise.
            MissingWeightsError: The buffer would have no full set.
        """
        full = not self._complete[inactive]
        ready = self.prepared(
            tensors, full=full, device_type="cpu" if from_cpu else self.device_type
        )
        ready += self._rest(ready, full=full, inactive=inactive)
        if user_managed:
            for constant, tensor in ready:
                given = tensors.get(constant.spec.fqn, tensors.get(constant.spec.name))
                if given is not None and tensor.data_ptr() != given.data_ptr():
                    raise LoadError(
                        f"{self.name}: constant {constant.spec.fqn!r} can only be user managed as "
                        f"a tensor of strides {constant.stride} that fills its storage"
                    )
        name = "UpdateConstantBufferPairs"
        if user_managed:
            name = "UpdateUserManagedConstantBufferPairs"
        elif from_cpu:
            name = "UpdateConstantBufferFromCpuPairs"
        self._write(name, ready, inactive=inactive, full=full, lend=user_managed)

    def _write(
        self,
        name: str,
        ready: list[tuple[Constant, torch.Tensor]],
        *,
        inactive: bool,
        full: bool,
        lend: bool = False,
    ) -> None:
        name = PREFIX + name
        map_name = name.removesuffix("Pairs")
        takes_map = not self.library.has(name) and self.library.has(map_name)
        if takes_map and (why_not := self.why_not_updatable):
            raise MissingCapabilityError(f"{self.name}: its constants can't be written: {why_not}")
        name = map_name if takes_map else name
        update = self.library.function(name)
        container = self._open()
        handles = handles_of([tensor for _, tensor in ready])
        try:
            if takes_map:
                constants = mapped(ready, handles)
                status = update(container, constants.address(), inactive, full)
            else:
                status = update(container, entries(ready, handles), len(ready), inactive, full)
        finally:
            if lend:
                self._lent += handles
            else:
                free(handles)
        if status != 0:
            raise LoadError(f"{self.name}: {name} failed: {self.library.root_cause()}")
        self._verify_shapes(ready, inactive=inactive)
        self._complete[inactive] = True

    def prepared(
        self, tensors: Mapping[str, torch.Tensor], *, full: bool, device_type: str = "cpu"
    ) -> list[tuple[Constant, torch.Tensor]]:
        """Check tensors and lay them out for their constants, with copies where layouts differ.

        Raises:
            LoadError, MissingWeightsError: As `update` raises them.
        """
        pairs = select(self.name, self.constants, tensors, full=full)
        for constant, tensor in pairs:
            check(self.name, constant, tensor, device_type)
        return [(constant, with_layout(self.name, constant, tensor)) for constant, tensor in pairs]

    def made_by_compiler(self) -> dict[str, torch.Tensor]:
        """Return copies of the constants that no state dict has. Every set has the same ones."""
        made = {c.spec.fqn for c in self.constants if c.spec.type == "constant"}
        return (
            {name: tensor for name, tensor in self.extract().items() if name in made}
            if made
            else {}
        )

    def blob_size(self) -> int | None:
        """Return the bytes of weights that are mapped from a file; None without such a file."""
        size = c_uint64()
        status = self.library.function(PREFIX + "GetConstantsBlobSize")(self._open(), byref(size))
        return size.value if status == 0 else None

    def update_from_blob(self, path: Path) -> None:
        """Load the weights of a model that keeps them in a file, once, before the first run.

        Raises:
            LoadError: The model has no such file, has its weights already, or the size is wrong.
        """
        size = self.blob_size()
        if size is None:
            raise LoadError(f"{self.name}: it was not compiled to have its weights in a file")
        if self._complete[0]:
            # The runtime would free the blob that its constants point into, and keep the constants.
            raise LoadError(
                f"{self.name}: it has its weights already; a weights file can be loaded once"
            )
        there = path.stat().st_size
        if there != size:
            raise LoadError(
                f"{self.name}: expected a weights file of {size} bytes, but {path} has {there}. "
                "Use the file of the same package."
            )
        # Mapped only for the call: the runtime copies.
        blob = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        self.library.call("AOTInductorModelUpdateConstantsFromBlob", self._open(), blob.data_ptr())
        self._complete[0] = not self.missing_constants()

    def fold(self, *, inactive: bool, stream: int | None = None) -> None:
        """Compute the folded constants of a buffer, so that the first run on it need not.

        Folding occupies an instance.

        Raises:
            MissingWeightsError: The buffer lacks constants.
            LoadError: Folding failed. Do not use the container any more, since one of its instances
                may still refer to the inactive buffer.
        """
        if not self._complete[inactive]:
            raise MissingWeightsError(f"{self.name}: the buffer to fold lacks constants")
        self._call("RunConstantFolding", inactive, stream, self._proxy_executor())

    def swap(self) -> None:
        """Exchange the active and the inactive buffer. Waits for the runs that are going on.

        Raises:
            MissingWeightsError: The inactive buffer has no full set of constants.
        """
        if not self._complete[1]:
            raise MissingWeightsError(
                f"{self.name}: the inactive buffer has no full set of constants. Stage one before "
                "the swap."
            )
        self._call("SwapConstantBuffer")
        self._complete.reverse()

    def free_inactive(self) -> None:
        """Free the inactive buffer's memory.

        No run that was launched on the buffer may still go on.
        """
        if not self.is_lost():
            self._call("FreeInactiveConstantBuffer")
        self._complete[1] = False

    # --- inside -----------------------------------------------------------------------------------

    def _can_extract(self) -> bool:
        return self.library.has(EXTRACT_ENTRIES) or (
            self.library.has(EXTRACT) and map_type() is not None
        )

    def _borrow(self, *, inactive: bool) -> list[tuple[str, torch.Tensor]]:
        """Return a buffer's constants by FQN, in the container's own memory.

        Callers must not keep them.
        """
        return [(fqn, borrowed(handle)) for fqn, handle in self._handles(inactive=inactive)]

    def _handles(self, *, inactive: bool) -> list[tuple[str, int]]:
        """Return a buffer's handles by FQN, in the runtime's order.

        The container owns the handles.
        """
        made = None if self.library.has(EXTRACT_ENTRIES) else map_type()
        if made is not None and self.library.has(EXTRACT):
            constants = made([])
            self._call("ExtractConstantsMap", constants.address(), inactive)
            found = dict(constants.pairs())
            count = self._get(c_size_t, "GetNumConstants")
            return [(fqn, found[fqn]) for fqn in map(self._fqn, range(count)) if fqn in found]
        entries = POINTER(ConstantEntry)()
        size = c_size_t()
        self._call("ExtractConstantsMapEntries", byref(entries), byref(size), inactive)
        return [(entries[i].name.decode(), entries[i].handle) for i in range(size.value)]

    def _fqn(self, index: int) -> str:
        fqn: str = self._get(c_char_p, "GetConstantOriginalFQN", index).decode()
        return fqn

    def _folded(self, index: int) -> bool:
        return bool(self._optional(c_bool, "GetConstantFromFolded", index, default=False))

    def _constant(self, index: int, known: dict[str, torch.Tensor]) -> Constant:
        fqn = self._fqn(index)
        capacity = self._optional(c_size_t, "GetConstantDataSize", index, default=0)
        kind = self._optional(c_int32, "GetConstantType", index, default=0)
        folded = self._folded(index)
        tensor = known.get(fqn)
        dtype = DTYPES[self._get(c_int32, "GetConstantDtype", index)]
        name = self._get(c_char_p, "GetConstantName", index).decode()
        shape, stride = self.layouts.get(name, (None, None))
        if tensor is not None:
            shape, stride = tuple(tensor.shape), tensor.stride()
        spec = ConstantSpec(
            name=name,
            fqn=fqn,
            dtype=str(dtype).removeprefix("torch."),
            shape=shape,
            bytes=capacity if tensor is None else tensor.numel() * tensor.element_size(),
            type=TYPES[kind] if kind < len(TYPES) else "unknown",
            folded=folded,
        )
        return Constant(spec, capacity, stride)

    def _rest(
        self, ready: list[tuple[Constant, torch.Tensor]], *, full: bool, inactive: bool
    ) -> list[tuple[Constant, torch.Tensor]]:
        """Return the constants that must be written besides the given ones.

        When an update of the inactive buffer leaves constants out, the runtime copies them from the
        active buffer, even over values that were written before.
        """
        if not inactive or not self._can_extract():
            return []
        values = self.made_by_compiler() if full else self.extract(inactive=True)
        given = {constant.spec.fqn for constant, _ in ready}
        return [
            (c, values[c.spec.fqn])
            for c in self.constants
            if c.spec.fqn in values and c.spec.fqn not in given
        ]

    def _verify_shapes(self, pairs: list[tuple[Constant, torch.Tensor]], *, inactive: bool) -> None:
        # A model without weights keeps its shapes to itself until it has some.
        if all(constant.stride is not None for constant, _ in pairs) or not self._can_extract():
            return
        present = {name: tuple(tensor.shape) for name, tensor in self._borrow(inactive=inactive)}
        for constant, tensor in pairs:
            shape = present[constant.spec.fqn]
            if shape != tuple(tensor.shape):
                raise LoadError(
                    f"{self.name}: constant {constant.spec.fqn!r} wants shape {shape}, got "
                    f"{tuple(tensor.shape)}. The buffer is unusable now; update it in full."
                )


def _groups(
    ready: list[tuple[Constant, torch.Tensor]], at_once: int
) -> list[list[tuple[Constant, torch.Tensor]]]:
    """Split a set into groups of at most `at_once` bytes; a larger constant is a group of its own.

    All constants that are no parameters are in the last group, however large it becomes. The
    runtime copies those that a call leaves out from the active buffer, even over values written
    before.
    """
    apart = [pair for pair in ready if pair[0].spec.type == "parameter" and pair[1].numel()]
    together = [pair for pair in ready if pair[0].spec.type != "parameter" or not pair[1].numel()]
    groups: list[list[tuple[Constant, torch.Tensor]]] = []
    room = 0
    for pair in apart:
        size = pair[1].numel() * pair[1].element_size()
        if not groups or size > room:
            groups.append([])
            room = at_once
        groups[-1].append(pair)
        room -= size
    if together or not groups:
        groups.append(together)
    return groups
