"""The contracts of the machinery: Container, Executor, Device. A backend does everything and decides nothing.

All of it is blocking and knows no event loop. The front calls `Device.load` and `Container.close` from
worker threads, `Executor.submit`, `Executor.drain` and `Executor.run_here` from the loop's thread.
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
from aoti_sched.model.specs import ConstantSpec


class ContainerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded container says of itself.

    `runtime` is the way it is run ("c_abi", "torch runner", "fake"); `reason` says why it is not the C ABI, or what the model
    calls that has no C function.
    `gil` says whether a run holds the GIL: "released", "held", or "unknown".
    """

    runtime: str
    reason: str = ""
    gil: str = "released"
    instances: int
    num_inputs: int | None
    num_outputs: int | None
    in_spec: str
    out_spec: str
    constants: tuple[ConstantSpec, ...] = ()
    missing: tuple[str, ...] = ()
    """Functions of the C ABI that this model lacks, because an older torch compiled it."""
    inline: bool = True
    """Whether short runs may be placed on the loop's own thread without being asked for."""
    verified: bool = True
    """Whether this way to run a model has run on a real device of its kind."""
    notes: tuple[str, ...] = ()
    """What else there is to say of how it was loaded, a sentence each."""


class StagedSet(msgspec.Struct, frozen=True):
    """A set of weights that was written: its bytes, and the names that were given and are of no use to the model."""

    bytes: int
    ignored: tuple[str, ...] = ()


class CRun(msgspec.Struct, kw_only=True, eq=False):
    """How C runs a container: addresses of its functions, for lanes that never touch Python.

    `name` is what errors call the model; `proxy_executor` is torch's, for operators without a C function; `native` is what native lanes keep of it, `native_plan` the plan of its last
    batch as they know it. `slots` are the streams of a device, one for each of the container's slots; () on a CPU. Where runs are recorded,
    `graph_of` gives what native lanes launch for a work, and None where they can't.
    """

    name: str
    run: int
    container: int
    num_inputs: int
    num_outputs: int
    last_error: int = 0
    proxy_executor: int = 0
    native: Any = None
    native_plan: Any = None
    slots: Sequence[Any] = ()
    graph_of: Callable[[Work], Any] | None = None


class Container(Protocol):
    """A loaded model: one set of constants and `info.instances` instances."""

    @property
    def info(self) -> ContainerInfo: ...

    @property
    def c_run(self) -> CRun | None:
        """How C runs it; None where only `run_raw` can."""

    @property
    def staging(self) -> Staging:
        """Where Python puts batches together; cleared when the container is closed."""

    def own(self, outputs: list[Any]) -> list[Any]:
        """The same outputs, but copies of those that share memory with the weights."""

    def run_raw(self, inputs: Sequence[Any]) -> list[Any]:
        """Run once and wait. At most `info.instances` callers at a time; inputs are validated already.

        Raises:
            RunError: with torch's root cause. No handle is lost.
        """

    def run_work(self, work: Work) -> list[Any]:
        """Run one work, a request's or a batch's, from beginning to end on the calling thread.

        Raises:
            RunError: As `run_raw`.
        """

    @property
    def capture_stream(self) -> Callable[[Sequence[Any]], Sequence[Any]] | None:
        """A function of a request's inputs; None where runs depend on no stream.

        The function is called on the caller's thread. It returns the inputs with the caller's stream:
        what they wait for, and where the outputs are used. It may raise DeviceLostError.
        """

    def inherit_stream(self) -> AbstractContextManager[object]:
        """Return a context that makes the calling thread's stream current on the thread that enters."""

    def warm_up(self, make_inputs: Callable[[], Sequence[Any]]) -> None:
        """Run once per instance plus one, serially, before traffic; raises as `run_raw` does."""

    # Live weights: one caller at a time, in a worker thread, but for `swap`; runs go on meanwhile unless said otherwise.

    @property
    def updatable(self) -> str:
        """ "" when its weights can be replaced live, otherwise the reason in a sentence."""

    @property
    def folds(self) -> bool:
        """Whether it has constants that are computed from others."""

    @property
    def inactive_ready(self) -> bool:
        """Whether the inactive buffer holds a full set."""

    @property
    def inactive_bytes(self) -> int:
        """Memory that the inactive buffer holds now; 0 when it is free."""

    def stage(
        self,
        weights: object,
        *,
        partial: bool = False,
        strict: bool = True,
        check_finite: bool = False,
        reading: Reading | None = None,
    ) -> StagedSet:
        """Write a full set into the inactive buffer; what `partial` leaves out is the active one's. If not `strict`, names that
        nobody knows are ignored.

        The weights are read through `reading.source`, where there is a reading: its owner may leave while foreign code runs.

        Raises:
            ConstantMismatchError: with every fault at once. Nothing was written: a set kept there is still ready.
            WeightsFileError, WeightsTypeError: they can't be read.
        """

    def fold(self) -> None:
        """Compute the inactive buffer's folded constants. Takes an instance; after a failure only `rebuild` helps."""

    def swap(self) -> None:
        """Exchange the buffers; quick, on the loop's thread. No run may be going on."""

    def free_inactive(self) -> None:
        """Give the inactive buffer's memory back."""

    def extract(self, *, inactive: bool = False) -> dict[str, Any]:
        """Copies of the constants by FQN."""

    def rebuild(self) -> None:
        """Put a fresh container with the active weights in this one's place. No run may be going on."""

    @property
    def graphs(self) -> int:
        """Recorded runs that it keeps."""

    # Memory: one caller at a time, as above.

    @property
    def constant_bytes(self) -> int:
        """Memory that one set of constants takes."""

    @property
    def workspace(self) -> int | None:
        """Memory of its device that its runs have besides, as it was when it was warmed up or had its constants changed last; None where nobody knows."""

    @property
    def unparkable(self) -> str:
        """ "" when it can be parked without losing anything, otherwise the reason in a few words."""

    def park(self) -> None:
        """Give the memory of its constants back; there is only `unpark` and `close` then. No run may be going on.

        When it fails, nothing is lost: `unpark` helps all the same.
        """

    def unpark(self) -> None:
        """Be what it was before `park`, with the weights that served then. When it fails, it can be tried again.

        Raises:
            LoadError, DeviceLostError: The weights can't be brought back.
        """

    def close(self) -> None:
        """Free the container. No run may be going on. Closing twice does nothing."""


class HostContainer(ABC):
    """What containers have in common whose runs depend on no stream."""

    staging: Staging

    @abstractmethod
    def run_raw(self, inputs: Sequence[Any]) -> list[Any]:
        """Run once and wait."""

    def run_work(self, work: Work) -> list[Any]:
        """Run one work, a request's or a batch's."""
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
    """One run for a lane. `token` comes back with the completion and is not looked at.

    With a `batch` it is the run of that batch, and `inputs` is (). `slot` is the container's that it runs in: on a device, each
    has a stream of its own.
    """

    container: Container
    inputs: Sequence[Any]
    threads: int
    token: Any
    batch: Batch | None = None
    slot: int = 0


class Completion(msgspec.Struct, frozen=True, eq=False):
    """The end of one work. Either `outputs` or `error`; times are seconds of `time.monotonic`.

    The `outputs` of a batch are a list of outputs for each member. It was started before its members were put together, and
    finished after they were taken apart.
    """

    token: Any
    outputs: list[Any] | None
    error: BaseException | None
    started: float
    finished: float


class Executor(Protocol):
    """A device's lanes. Each runs one work at a time. `lost` says why nothing runs on its device any more; "" while it works."""

    lost: Callable[[], str]

    @property
    def kind(self) -> str: ...

    @property
    def lanes(self) -> int: ...

    def submit(self, lane: int, work: Work) -> bool:
        """Hand a work to a lane. Never blocks. Says whether it may be back sooner than its owner could fall asleep and be woken."""

    def run_here(self, work: Work) -> Completion:
        """Run a work on the calling thread, which waits for it; no lane hears of it.

        During the run the thread's intra-op thread counts are the work's, afterwards what they were. Never raises for
        a run that fails: the completion carries the error, and no handle is lost.
        """

    def poll(self) -> bool:
        """Wait for what was submitted last, for no longer than it would take to sleep and be woken. Whether completions are there."""

    def drain(self) -> list[Completion]:
        """The completions that are there now, a bounded number; the descriptor stays readable for the rest."""

    def fileno(self) -> int:
        """A descriptor that is readable while completions wait; -1 where the owner is told in another way."""

    def close(self) -> None:
        """Wait for what runs, then end the lanes. Closing twice does nothing."""


def _there_is_room(size: int) -> None:
    """Where memory has no limit."""


class LoadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a device needs to load one model of a package."""

    name: str
    path: Path
    model_name: str | None
    instances: int
    sha256: str | None
    cache_dir: Path | None
    contents: bytes | None = None
    """The package, where it is in memory; `path` only names it then."""
    copy_inputs: bool = False
    """Whether inputs on the host are copied to the device."""
    copy_outputs: str | None = None
    """"cpu" for outputs on the host; None leaves them where the model makes them."""
    cuda_graphs: bool = False
    """Whether runs are recorded and launched as one thing."""
    weights: object = None
    """A mapping from names to tensors, or the path of a file, in place of the weights in the package; None for those."""
    weights_strict: bool = True
    """Whether names in `weights` that nobody knows are refused."""
    replicated: bool = False
    """Whether the runner is on several devices; a request then runs on any of them, and may move."""
    make_room: Callable[[int], None] = _there_is_room
    """Called before the container is made, with the bytes that its constants will take, as far as the package says. It may wait.

    Raises:
        MemoryLimitError: They do not fit.
    """


class Loaded(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A loaded model: its container, and what its package says of it."""

    container: Container
    metadata: dict[str, str]
    wrapper_source: str | None
    sha256: str
    thread_limit: int | None
    """Beyond this many intra-op threads the compiled code would write past its arrays."""
    fixed_threads: int | None = None
    """As many threads run in a kernel whatever is set at run time."""
    call_spec: CallSpec | None = None
    """The device's own, where the container's `in_spec` does not say how it is called (fakes)."""


class Device(Protocol):
    """What the front needs of one kind of device."""

    @property
    def name(self) -> str: ...

    @property
    def records_runs(self) -> bool:
        """Whether a run can be recorded there, and launched again as one thing (CUDA graphs)."""

    def cores(self) -> int:
        """How many lanes there are by default: on a CPU, the cores that this process may use."""

    def open_executor(
        self, lanes: int, affinity: Sequence[int] | None = None, launchers: int | None = None
    ) -> Executor:
        """Start the lanes; with `affinity`, each bound to the core of that number. Each has a thread, unless there shall be so many `launchers`
        for all, which launch runs and look what is done.

        Raises:
            ConfigError: There are no such lanes here.
        """

    def load(self, request: LoadRequest) -> Loaded:
        """Read, check, extract and load one model. Blocking, for seconds.

        Raises:
            PackageError, LoadError: as `aoti_sched.errors` tells them.
        """
