"""`RawContainer`: a container behind the C ABI, with Python's types and without its ways to end the process.

Everything blocks and releases the GIL. Runs may come from as many threads as there are instances; updates,
extraction, folding, freeing and closing take no lock in the runtime, so one thread at a time calls those, and
never on the active buffer while runs go on. A swap waits for the runs that are going on, and may starve.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import POINTER, byref, c_bool, c_char_p, c_int32, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aoti_sched.backends.aoti.c_abi import ConstantEntry, Library, handle_array
from aoti_sched.backends.aoti.constant_map import (
    EXTRACT,
    EXTRACT_ENTRIES,
    map_type,
    why_not_updatable,
)
from aoti_sched.backends.aoti.constants import TYPES, Constant, check, laid_out, select
from aoti_sched.backends.aoti.handles import DTYPES, borrowed, free, handles_of, tensors_of
from aoti_sched.backends.contracts import CRun
from aoti_sched.errors import (
    InputMismatchError,
    LoadError,
    MissingCapabilityError,
    MissingWeightsError,
    RunError,
    RunnerClosedError,
    shortened,
)
from aoti_sched.model.specs import ConstantSpec
from aoti_sched.package.sources import Layout

if TYPE_CHECKING:
    from aoti_sched.backends.aoti.proxy_executor import ProxyExecutor
    from aoti_sched.backends.native._native import ConstantMap

_PREFIX = "AOTInductorModelContainer"


class RawContainer:
    """A container of `instances` executable copies of one model.

    Args:
        library: The model's library.
        instances: How many runs may go on at once; at least 1.
        device: "cpu", "cuda:0", "xpu:0" or "mps".
        resources: The directory with the model's device code, where it has any.

    Raises:
        LoadError: the runtime could not create it; the text is the root cause.
    """

    def __init__(
        self,
        library: Library,
        instances: int = 1,
        device: str = "cpu",
        resources: str | None = None,
    ) -> None:
        if instances < 1:
            raise LoadError(
                f"{library.name}: instances={instances}, but a container holds at least one"
            )
        self.library = library
        self.name = library.name
        self.device = device
        self.device_type = device.partition(":")[0]
        # Whether the model itself copies constants from the host to its device (compiled by torch 2.13 or newer).
        self.takes_from_cpu = library.has(_PREFIX + "UpdateConstantBufferFromCpuPairs")
        # Whether a tensor's address tells its place in memory. MPS's is that of an object, its buffer, plus the offset in it.
        self.has_addresses = True
        # By which the model calls operators that have no C function; None where it calls none, or has nothing to call them.
        self.proxy: ProxyExecutor | None = None
        self._lent: list[int] = []
        # Shape and strides of constants, by the runtime's names, as the package states them; the C ABI knows none without values.
        self.layouts: Mapping[str, Layout] = {}
        handle = c_void_p()
        directory = None if resources is None else resources.encode()
        if library.has(_PREFIX + "CreateWithDevice"):
            library.call(
                _PREFIX + "CreateWithDevice", byref(handle), instances, device.encode(), directory
            )
        elif device in ("cpu", "cuda"):
            library.call(_PREFIX + "Create", byref(handle), instances, device == "cpu", directory)
        else:
            library.function(_PREFIX + "CreateWithDevice")
        self._handle: int | None = handle.value
        self.input_names = self._names("GetNumInputs", "GetInputName")
        self.output_names = self._names("GetNumOutputs", "GetOutputName")
        self.num_inputs, self.num_outputs = len(self.input_names), len(self.output_names)
        self._inputs = handle_array(self.num_inputs)
        self._outputs = handle_array(self.num_outputs)
        self._run = library.function(_PREFIX + "Run")
        self._constants: tuple[Constant, ...] | None = None
        # Which buffer holds every constant: active, inactive. At first only the runtime knows.
        self._complete = [False, False]
        self._complete[0] = not self.missing_constants()

    def close(self) -> None:
        """Free the container. No call may be going on. Closing twice does nothing."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            try:
                self.library.call(_PREFIX + "Delete", handle)
            finally:
                free(self._lent)
                self._lent.clear()

    # --- runs ---------------------------------------------------------------------------------------------

    def run(
        self, tensors: Sequence[torch.Tensor], *, stream: int | None = None
    ) -> list[torch.Tensor | None]:
        """Run once; None stands where an output is left out. Output tensors may be the inputs themselves.

        Only the number of inputs is checked here: a wrong dtype or size reads past buffers. Blocks while
        every instance is busy. The first run after an update also folds, alone.

        Raises:
            InputMismatchError: as many tensors were given as the model does not take.
            MissingWeightsError: the active buffer lacks constants.
            RunError: the model failed; the text is the root cause. The inputs are the caller's again.
        """
        return self._run_with(self._run, tensors, stream)

    def c_run(self) -> CRun:
        """How C runs it, for lanes that never touch Python; they check nothing."""
        return CRun(
            name=self.name,
            run=self.library.address(_PREFIX + "Run"),
            container=self._open(),
            num_inputs=self.num_inputs,
            num_outputs=self.num_outputs,
            last_error=self.library.address("AOTInductorGetLastError"),
            proxy_executor=self._proxy_executor() or 0,
        )

    def run_single_threaded(
        self, tensors: Sequence[torch.Tensor], *, stream: int | None = None
    ) -> list[torch.Tensor | None]:
        """`run` without locks or events, always on the first instance: no other call may be going on."""
        function = self.library.function(_PREFIX + "RunSingleThreaded")
        return self._run_with(function, tensors, stream)

    def _proxy_executor(self) -> int | None:
        return None if self.proxy is None else self.proxy.address

    def _run_with(
        self, function: Any, tensors: Sequence[torch.Tensor], stream: int | None
    ) -> list[torch.Tensor | None]:
        # The runtime throws across the C boundary for a wrong count, and reads null for a missing constant.
        if len(tensors) != self.num_inputs:
            raise InputMismatchError(self.name, "", f"{self.num_inputs} tensors", f"{len(tensors)}")
        if not self._complete[0]:
            raise MissingWeightsError(
                f"{self.name} was compiled without its weights, and none were loaded: "
                f"{shortened(self.missing_constants())} have no values"
            )
        container = self._open()
        inputs = self._inputs(*handles_of(list(tensors)))
        outputs = self._outputs()
        proxy = self._proxy_executor()
        if function(container, inputs, self.num_inputs, outputs, self.num_outputs, stream, proxy):
            # What was stolen is null now; the rest is ours.
            free(inputs)
            free(outputs)
            raise RunError(f"{self.name}: the run failed: {self.library.root_cause()}")
        return tensors_of(outputs)

    # --- what the model says of itself --------------------------------------------------------------------

    def call_spec(self) -> tuple[str, str]:
        """The pytree specs of arguments and results, as torch serializes them; "" each where there is none."""
        in_spec, out_spec = c_char_p(), c_char_p()
        self._call("GetCallSpec", byref(in_spec), byref(out_spec))
        return (in_spec.value or b"").decode(), (out_spec.value or b"").decode()

    def blob_size(self) -> int | None:
        """Bytes of the weights that are mapped from a file; None when the model's weights are not mapped."""
        size = c_uint64()
        status = self.library.function(_PREFIX + "GetConstantsBlobSize")(self._open(), byref(size))
        return size.value if status == 0 else None

    @property
    def constants(self) -> tuple[Constant, ...]:
        """Every constant, the ones folded from others included, in the runtime's order.

        Shapes and strides are known once the active buffer has values, where the model lets them be read.
        """
        if self._constants is None:
            # Only a complete buffer's layouts can be trusted: what an update was refused for is still there.
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
        """FQNs of the constants that a buffer has no tensor for; () where the model can't tell (before 2.13).

        Running on a buffer that lacks one is a segmentation fault.
        """
        if inactive and not self._complete[1]:
            return tuple(c.spec.fqn for c in self.constants if not c.spec.folded)
        if not self._can_extract():
            return ()
        present = {name for name, _ in self._borrow(inactive=inactive)}
        return tuple(
            c.spec.fqn for c in self.constants if not c.spec.folded and c.spec.fqn not in present
        )

    @property
    def why_not_updatable(self) -> str:
        """Why its constants can't be replaced while it serves; "" when they can."""
        return why_not_updatable(self.library, self.constants)

    @property
    def on_host(self) -> frozenset[str]:
        """Constants, by FQN, that a model for a device wants in the host's memory all the same."""
        if self.device_type == "cpu" or not self._can_extract():
            return frozenset()
        return frozenset(fqn for fqn, tensor in self._borrow(inactive=False) if tensor.is_cpu)

    def ready(self, *, inactive: bool) -> bool:
        """Whether a buffer holds a full set."""
        return self._complete[inactive]

    def constant_memory(self, *, inactive: bool = False) -> list[tuple[int, int]]:
        """Where a buffer's constants lie: [start, end) addresses, or [storage, storage + 1) where there are none. Folded ones are not
        told by the C ABI."""
        if not self._can_extract() or (inactive and not self._complete[1]):
            return []
        # A frozen model's weights may be packed by oneDNN: opaque, without an address, and never an output.
        tensors = [
            t for _, t in self._borrow(inactive=inactive) if t.layout is torch.strided and t.numel()
        ]
        if not self.has_addresses:
            storages = {t.untyped_storage().data_ptr() for t in tensors}
            return [(storage, storage + 1) for storage in storages]
        return [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]

    # --- the values of constants --------------------------------------------------------------------------

    def extract(self, *, inactive: bool = False, host: bool = False) -> dict[str, torch.Tensor]:
        """Copies of a buffer's constants by FQN, without the folded ones; {} of an inactive buffer that was freed. They lie where the
        constants do, or all on the host."""
        if inactive and not self._complete[1]:
            return {}  # what a freed buffer holds points into freed memory
        constants = self._borrow(inactive=inactive)
        return {name: t.to("cpu", copy=True) if host else t.clone() for name, t in constants}

    def full_set(self, weights: Mapping[str, torch.Tensor]) -> list[tuple[Constant, torch.Tensor]]:
        """A full set, laid out for `stage`: what was chosen for this model, by FQN, and the rest from the active buffer."""
        fit = dict(weights)
        active = dict(self._borrow(inactive=False)) if self._can_extract() else {}
        for constant in self.constants:
            spec = constant.spec
            if not spec.folded and spec.fqn not in fit and spec.fqn in active:
                fit[spec.fqn] = active[spec.fqn]  # made by the compiler, or left out of a part
        for fqn in self.on_host & fit.keys():
            fit[fqn] = fit[fqn].cpu()
        return [
            (c, laid_out(self.name, c, fit[c.spec.fqn]))
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
        """Write a `full_set` into the inactive buffer; returns its bytes. Runs may go on.

        Args:
            ready: The set.
            at_once: Bytes to be written in one call, as far as constants can be written apart from others; by default all.
            bring: Copies host tensors to the model's device, for as long as its context lasts. It is asked for those that the
                model can't copy itself, so many at once.
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
        """Write constants, by FQN or the runtime's name, into a buffer. Every parameter and buffer must be
        given unless the buffer has a full set already. Values are copied, so the tensors stay the caller's.

        Args:
            tensors: The values. They may lie in memory in any way; what fits no constant raises.
            inactive: Write the inactive buffer, which runs do not read, or the active one.
            user_managed: Don't copy: the container reads the tensors' own memory from now on and keeps
                it for its lifetime, even after later updates. They must be laid out as compiled.
            from_cpu: CPU tensors are copied to the model's device.

        Raises:
            LoadError: a tensor does not fit, or the runtime refused; the buffer is unchanged unless the text says so.
            MissingWeightsError: not a full set.
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
                        f"{self.name}: constant {constant.spec.fqn!r} can only be user managed as a tensor of "
                        f"strides {constant.stride} that fills its storage"
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
        name = _PREFIX + name
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
        """Tensors checked and laid out for the constants they are given for, copied where they must be.

        Raises:
            LoadError, MissingWeightsError: as `update` does.
        """
        pairs = select(self.name, self.constants, tensors, full=full)
        for constant, tensor in pairs:
            check(self.name, constant, tensor, device_type)
        return [(constant, laid_out(self.name, constant, tensor)) for constant, tensor in pairs]

    def made_by_compiler(self) -> dict[str, torch.Tensor]:
        """Copies of the constants that no state dict has; they are the same in every set."""
        made = {c.spec.fqn for c in self.constants if c.spec.type == "constant"}
        return (
            {name: tensor for name, tensor in self.extract().items() if name in made}
            if made
            else {}
        )

    def update_from_blob(self, path: Path) -> None:
        """Load the weights of a model whose weights lie in a file of their own; once, before the first run.

        Raises LoadError when the model has no such weights, when they are loaded, or when the size is wrong.
        """
        size = self.blob_size()
        if size is None:
            raise LoadError(f"{self.name} was not compiled to have its weights in a file")
        if self._complete[0]:
            # The runtime would free the blob that its constants point into, and keep the constants.
            raise LoadError(
                f"{self.name} has its weights already; a weights file can be loaded once"
            )
        there = path.stat().st_size
        if there != size:
            raise LoadError(
                f"{self.name} wants a weights file of {size} bytes, and {path} has {there}"
            )
        # Mapped only for the call: the runtime copies.
        blob = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        self.library.call("AOTInductorModelUpdateConstantsFromBlob", self._open(), blob.data_ptr())
        self._complete[0] = not self.missing_constants()

    def fold(self, *, inactive: bool, stream: int | None = None) -> None:
        """Compute the folded constants of a buffer, so that the first run on it need not. Occupies an instance.

        Raises LoadError when the buffer lacks constants, or folding fails; then the container is not to be
        used any more, since one of its instances may be left on the inactive buffer.
        """
        if not self._complete[inactive]:
            raise MissingWeightsError(f"{self.name}: the buffer to fold lacks constants")
        self._call("RunConstantFolding", inactive, stream, self._proxy_executor())

    def swap(self) -> None:
        """Exchange the active and the inactive buffer. Waits for the runs that are going on.

        Raises LoadError when the inactive buffer has no full set of constants.
        """
        if not self._complete[1]:
            raise MissingWeightsError(
                f"{self.name}: the inactive buffer has no full set of constants to swap in"
            )
        self._call("SwapConstantBuffer")
        self._complete.reverse()

    def free_inactive(self) -> None:
        """Free the inactive buffer's memory. Nothing that was launched on it may still be going on."""
        self._call("FreeInactiveConstantBuffer")
        self._complete[1] = False

    # --- inside -------------------------------------------------------------------------------------------

    def _open(self) -> int:
        if self._handle is None:
            raise RunnerClosedError(f"{self.name}: the container is closed")
        return self._handle

    def _call(self, name: str, *arguments: Any) -> None:
        self.library.call(_PREFIX + name, self._open(), *arguments)

    def _get(self, kind: Any, name: str, *arguments: Any) -> Any:
        value = kind()
        self._call(name, *arguments, byref(value))
        return value.value

    def _names(self, count: str, name: str) -> tuple[str, ...]:
        return tuple(
            self._get(c_char_p, name, index).decode() for index in range(self._get(c_size_t, count))
        )

    def _can_extract(self) -> bool:
        return self.library.has(EXTRACT_ENTRIES) or (
            self.library.has(EXTRACT) and map_type() is not None
        )

    def _borrow(self, *, inactive: bool) -> list[tuple[str, torch.Tensor]]:
        """A buffer's constants by FQN, in the container's own memory: not to be kept."""
        return [(fqn, borrowed(handle)) for fqn, handle in self._handles(inactive=inactive)]

    def _handles(self, *, inactive: bool) -> list[tuple[str, int]]:
        """A buffer's constants by FQN, in the runtime's order; the handles stay the container's."""
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

    def _constant(self, index: int, known: dict[str, torch.Tensor]) -> Constant:
        fqn = self._fqn(index)
        capacity = self._optional(c_size_t, "GetConstantDataSize", index, default=0)
        kind = self._optional(c_int32, "GetConstantType", index, default=0)
        folded = bool(self._optional(c_bool, "GetConstantFromFolded", index, default=False))
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

    def _optional(self, kind: Any, name: str, index: int, *, default: Any) -> Any:
        return self._get(kind, name, index) if self.library.has(_PREFIX + name) else default

    def _rest(
        self, ready: list[tuple[Constant, torch.Tensor]], *, full: bool, inactive: bool
    ) -> list[tuple[Constant, torch.Tensor]]:
        """What must be written beside what is given.

        The runtime copies buffers that an update of the inactive buffer leaves out from the active one, even
        over those written before.
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
                    f"{self.name}: constant {constant.spec.fqn!r} wants shape {shape}, got {tuple(tensor.shape)}. "
                    "The buffer is unusable now; update it in full."
                )


def _groups(
    ready: list[tuple[Constant, torch.Tensor]], at_once: int
) -> list[list[tuple[Constant, torch.Tensor]]]:
    """A set in groups of so many bytes, or of one constant that has more.

    What is no parameter is all in the last group, however large: the runtime copies those that a call leaves out from the
    active buffer, even over those that were written before.
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


def entries(
    pairs: list[tuple[Constant, torch.Tensor]], handles: list[int]
) -> ctypes.Array[ConstantEntry]:
    """The array that the C ABI takes: each constant's internal name and its handle."""
    names = [constant.spec.name.encode() for constant, _ in pairs]
    return (ConstantEntry * len(pairs))(*map(ConstantEntry, names, handles))


def mapped(pairs: list[tuple[Constant, torch.Tensor]], handles: list[int]) -> ConstantMap:
    """`entries` as a map, for older models. It must live as long as C uses its address."""
    made = map_type()
    if made is None:
        raise MissingCapabilityError(
            "aoti_sched was installed without a C++ compiler, and builds no C++ maps"
        )
    return made(
        [(constant.spec.name, handle) for (constant, _), handle in zip(pairs, handles, strict=True)]
    )
