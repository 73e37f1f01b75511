"""The contracts of the machinery: Container, Executor, Device.

Backends run models and contain no scheduling policy. Their calls block and use no event loop. The
engine calls `Device.inspect`, `Device.load` and `Container.close` from worker threads, and
`Executor.submit`, `Executor.drain` and `Executor.run_here` from the loop's thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import msgspec

from aoti_sched.backends.executors.batches import Batch, Staging
from aoti_sched.backends.reading import Reading
from aoti_sched.model.call_spec import CallSpec
from aoti_sched.model.specs import ConstantSpec, ModelSpec


class ContainerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The properties of a loaded container."""

    runtime: str
    """What runs the model: "c_abi", "torch runner" or "fake"."""
    reason: str = ""
    """Why the C ABI is not used, or a note on operators that have no C function."""
    gil: str = "released"
    """Whether a run holds the GIL: "released", "held", or "unknown"."""
    instances: int
    num_inputs: int | None
    num_outputs: int | None
    in_spec: str
    out_spec: str
    constants: tuple[ConstantSpec, ...] = ()
    missing: tuple[str, ...] = ()
    """Functions of the C ABI that this model lacks, because an older torch compiled it."""
    inline: bool = True
    """Whether "auto" placement may run short runs on the loop's own thread."""
    verified: bool = True
    """Whether this way to run a model has run on a real device of its kind."""
    notes: tuple[str, ...] = ()
    """Further notes on the load, a sentence each."""


class StagedSet(msgspec.Struct, frozen=True):
    """A set of weights that was written."""

    bytes: int
    ignored: tuple[str, ...] = ()
    """The given names for which the model has no use."""


class CRun(msgspec.Struct, kw_only=True, eq=False):
    """The addresses by which native lanes run a container without Python."""

    name: str
    """The model's name in errors."""
    run: int
    container: int
    num_inputs: int
    num_outputs: int
    last_error: int = 0
    proxy_executor: int = 0
    """The address of torch's proxy executor, for operators without a C function; 0 for none."""
    native: Any = None
    """The native lanes' record of the model."""
    native_plan: Any = None
    """The native lanes' record of the plan of the model's last batch."""
    slots: Sequence[Any] = ()
    """The streams of a device, one for each of the container's slots; () on a CPU."""
    graph_of: Callable[[Work], Any] | None = None
    """Returns the recorded run to launch for a work; None where native lanes have none."""


class Container(Protocol):
    """A loaded model: one set of constants and `info.instances` instances."""

    @property
    def info(self) -> ContainerInfo: ...

    @property
    def c_run(self) -> CRun | None:
        """How C runs the model; None where only `run_raw` can."""

    @property
    def staging(self) -> Staging:
        """The memory in which Python assembles batches; cleared when the container is closed."""

    def detach_outputs(self, outputs: list[Any]) -> list[Any]:
        """Return the outputs, with copies in the place of those that share memory with weights."""

    def run_raw(self, inputs: Sequence[Any]) -> list[Any]:
        """Run once and wait. The inputs are validated already.

        At most `info.instances` callers run at a time.

        Raises:
            RunError: The run failed. The text is torch's root cause. No handle is lost.
        """

    def run_work(self, work: Work) -> list[Any]:
        """Run one work, of a request or a batch, from beginning to end on the calling thread.

        Raises:
            RunError: As `run_raw`.
        """

    @property
    def capture_stream(self) -> Callable[[Sequence[Any]], Sequence[Any]] | None:
        """A function of a request's inputs; None where runs depend on no stream.

        The function is called on the caller's thread, and may raise DeviceLostError. The result is
        the inputs with the caller's stream, which the run waits for and which uses the outputs.
        """

    def inherit_stream(self) -> AbstractContextManager[object]:
        """Return a context that makes the calling thread's stream current where it is entered."""

    def warm_up(self, make_inputs: Callable[[], Sequence[Any]]) -> None:
        """Run each instance once, serially, before traffic; raises as `run_raw` does."""

    # Live weights: one caller at a time, in a worker thread except for `swap`. Runs go on meanwhile
    # unless a docstring excludes them.

    @property
    def updatable(self) -> str:
        """Why the weights can't be replaced live, a sentence; "" when they can."""

    @property
    def folds(self) -> bool:
        """Whether some constants are computed from others."""

    @property
    def inactive_ready(self) -> bool:
        """Whether the inactive buffer holds a full set."""

    @property
    def inactive_bytes(self) -> int:
        """Bytes that the inactive buffer holds now; 0 when it is free."""

    def stage(
        self,
        weights: object,
        *,
        partial: bool = False,
        strict: bool = True,
        check_finite: bool = False,
        reading: Reading | None = None,
    ) -> StagedSet:
        """Write a full set into the inactive buffer.

        Args:
            weights: A mapping, pairs, or the path of a file.
            partial: Take constants that are not given from the active set.
            strict: Refuse unknown names. Otherwise they are ignored.
            check_finite: Refuse NaN and infinities.
            reading: Reads the weights, so that its owner may abandon them while foreign code runs.

        Raises:
            ConstantMismatchError: The set does not fit. The error lists every fault. Nothing was
                written, so a set in the inactive buffer is still ready.
            WeightsFileError, WeightsTypeError: The weights can't be read.
        """

    def fold(self) -> None:
        """Compute the inactive buffer's folded constants, which takes an instance.

        After a failure only `rebuild` helps.
        """

    def swap(self) -> None:
        """Exchange the buffers. This is quick. The loop's thread calls it while no run goes on."""

    def free_inactive(self) -> None:
        """Free the inactive buffer."""

    def extract(self, *, inactive: bool = False) -> dict[str, Any]:
        """Return copies of the constants by FQN."""

    def rebuild(self) -> None:
        """Replace the runtime's container by a fresh one with the active weights.

        Called while no run goes on.
        """

    @property
    def graphs(self) -> int:
        """The number of recorded runs that are kept."""

    # Memory: one caller at a time, as above.

    @property
    def constant_bytes(self) -> int:
        """Bytes that one set of constants takes."""

    @property
    def unparkable(self) -> str:
        """Why eviction would lose weights, in a few words; "" when nothing would be lost."""

    def park(self) -> None:
        """Free the constants. Only `unpark` and `close` may follow. Called while no run goes on.

        A failure loses nothing: `unpark` restores the state even then.
        """

    def unpark(self, reading: Reading | None = None) -> None:
        """Restore the state before `park`, with the weights that served then.

        After a failure, the caller may retry.

        Args:
            reading: Reads a weights file, so that its owner may abandon it while it blocks. Only
                `close` may follow then.

        Raises:
            LoadError, DeviceLostError: The weights can't be restored.
        """

    def close(self) -> None:
        """Free the container. Called while no run goes on. Closing twice does nothing."""


class HostContainer(ABC):
    """The common part of containers whose runs depend on no stream."""

    staging: Staging

    @abstractmethod
    def run_raw(self, inputs: Sequence[Any]) -> list[Any]:
        """Run once and wait."""

    def run_work(self, work: Work) -> list[Any]:
        """Run one work, of a request or of a batch."""
        if work.batch is None:
            return self.run_raw(work.inputs)
        return self.staging.run(work.batch, self.run_raw)

    @property
    def capture_stream(self) -> Callable[[Sequence[Any]], Sequence[Any]] | None:
        """None: there is no stream."""
        return None

    def inherit_stream(self) -> AbstractContextManager[object]:
        """Return a context that does nothing."""
        return nullcontext()


class Work(msgspec.Struct, frozen=True, eq=False):
    """One run for a lane."""

    container: Container
    inputs: Sequence[Any]
    """The tensors of a request; () with a batch."""
    threads: int
    """Intra-op threads of the run."""
    token: Any
    """An object that is returned with the completion. Executors do not read it."""
    batch: Batch | None = None
    slot: int = 0
    """The container's slot that the run takes. On a device each slot has a stream of its own."""


class Completion(msgspec.Struct, frozen=True, eq=False):
    """The end of one work, with outputs or an error. Times are seconds of `time.monotonic`."""

    token: Any
    outputs: list[Any] | None
    """The outputs of a request; a list of them for each member of a batch."""
    error: BaseException | None
    started: float
    """When the run began; with a batch, before its members were assembled."""
    finished: float
    """When the run ended; with a batch, after its outputs were taken apart."""


class Executor(Protocol):
    """A device's lanes. Each runs one work at a time."""

    lost: Callable[[], str]
    """Returns why nothing runs on the device any more; "" while the device works."""
    workspace: Callable[[], int]
    """Returns the further bytes of the device that runs use, as they were last measured.

    0 where that is unknown. Asking starts the next measurement, in another thread.
    """

    @property
    def kind(self) -> str: ...

    @property
    def lanes(self) -> int: ...

    def grow(self, lanes: int) -> None:
        """Open lanes until there are at least this many. May be called in any thread.

        Raises:
            ResourcesError: A thread can't be started. The lanes that are there go on.
        """

    def submit(self, lane: int, work: Work) -> bool:
        """Hand a work to a lane. Never blocks.

        Returns:
            True if the work may finish before a sleeping loop could wake up. Then `poll` is worth
            a call.
        """

    def run_here(self, work: Work) -> Completion:
        """Run a work on the calling thread, without a lane.

        The work's intra-op thread count applies during the run, and is reset afterwards. A run that
        fails raises nothing: its completion has the error. No handle is lost.
        """

    def poll(self) -> bool:
        """Wait shortly for the last submitted work. Return whether completions wait.

        The wait is no longer than a sleep and a wake-up would take.
        """

    def drain(self) -> list[Completion]:
        """Return completions, a bounded number. The descriptor stays readable for the rest."""

    def fileno(self) -> int:
        """Return a descriptor that is readable while completions wait; -1 where there is none."""

    def close(self) -> None:
        """Wait for running works, then end the lanes. Closing twice does nothing."""


class LoadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to load one model of a package."""

    name: str
    path: Path
    model_name: str | None
    instances: int
    sha256: str | None
    cache_dir: Path | None
    contents: bytes | None = None
    """The package, where it is in memory; `path` is then only a name."""
    copy_inputs: bool = False
    """Whether inputs on the host are copied to the device."""
    copy_outputs: str | None = None
    """"cpu" for outputs on the host; None leaves them where the model makes them."""
    cuda_graphs: bool = False
    """Whether runs are recorded, and launched as one CUDA graph."""
    stream_priority: int = 0
    """The priority of the model's streams; 0 or less, and less goes first."""
    weights: object = None
    """Weights in place of the package's: a mapping from names to tensors, or the path of a file.

    None for the package's.
    """
    weights_strict: bool = True
    """Whether names in `weights` that the model does not have are refused."""
    reading: Reading | None = None
    """Reads `weights`, so that the engine may abandon them while foreign code runs."""
    replicated: bool = False
    """Whether the runner is on several devices.

    A request then runs on any of them, and may be rerouted.
    """


class Inspected(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A model as its package describes it, before its container is made."""

    request: LoadRequest
    """The request without `contents`, and with one instance where the model allows no more."""
    constant_bytes: int
    """Bytes that one set of constants takes on the device; 0 where the package does not state them.
    """
    own: ModelSpec | None = None
    """The specs that `compile_package` stored in the package."""
    metadata: dict[str, str]
    wrapper_source: str | None
    """The C++ source of the model's wrapper, where the package has it."""
    sha256: str
    thread_limit: int | None
    """The most intra-op threads of a run.

    With more, the compiled code would write past its arrays.
    """
    fixed_threads: int | None = None
    """Intra-op threads that every kernel uses, whatever is set at run time."""
    call_spec: CallSpec | None = None
    """The model's call spec, where the container's `in_spec` has none (fakes)."""


class Device(Protocol):
    """One device, as the engine uses it."""

    @property
    def name(self) -> str: ...

    @property
    def records_runs(self) -> bool:
        """Whether a run can be recorded on the device, and launched again as one CUDA graph."""

    @property
    def most_lanes(self) -> int | None:
        """The most lanes of a device that has one for each instance by default.

        None where the number of lanes is fixed when the device is opened.
        """

    def cores(self) -> int:
        """Return the number of lanes by default: on a CPU, the cores that this process may use.

        With `most_lanes`, the number of lanes to begin with.
        """

    def open_executor(
        self,
        lanes: int,
        affinity: Sequence[int] | None = None,
        launchers: int | None = None,
        wait: str | None = None,
    ) -> Executor:
        """Start the lanes.

        Args:
            lanes: The most runs that go on at once.
            affinity: For each lane, the number of the core that its thread is bound to; None to
                bind none.
            launchers: The number of threads that launch the runs of all lanes and poll for their
                completion; None for one thread per lane.
            wait: How a lane waits for its device: "block" or "spin"; None for the device's own way.

        Raises:
            ConfigError: The device has no such lanes.
        """

    def inspect(self, request: LoadRequest) -> Inspected:
        """Read, check and extract one model, without running its code. Blocks for seconds.

        Raises:
            PackageError: The package is missing, broken, or for another platform or device.
            DeviceLostError: The device has failed before.
        """

    def load(self, inspected: Inspected) -> Container:
        """Load a model that this device's `inspect` returned, and make its container.

        This call blocks for seconds. The engine has reserved `inspected.constant_bytes` of the
        device's memory before. Afterwards the engine reserves the difference to
        `Container.constant_bytes`, the bytes that the constants really take.

        Raises:
            LoadError: The library or its weights can't be loaded.
            DeviceLostError: The device has failed before.
        """
