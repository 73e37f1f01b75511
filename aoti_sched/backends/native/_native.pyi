"""Native lanes: threads that run compiled models and never touch Python. Addresses are plain integers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Taken: TypeAlias = tuple[int, list[Any] | tuple[str, str], float, float]
"""Token, outputs (None where one was left out) or the runtime's and torch's words for a failure, start and end in
seconds of the monotonic clock. A batch's outputs are two lists: of the whole ones (None where the members' are copies), and
of each member's list."""

class ForkedError(RuntimeError):
    """A forked child used the lanes of its parent, whose threads it does not have."""

class Model:
    """How one model is run; must outlive its works."""

    def __init__(
        self,
        *,
        run: int,
        container: int,
        num_inputs: int,
        num_outputs: int,
        last_error: int = 0,
        proxy_executor: int = 0,
    ) -> None: ...

class Tensors:
    """How tensors become handles and come back; directly where `new_handle` and `wrap` are given, otherwise through
    torch's functions for lists of capsules."""

    def __init__(
        self,
        type: type,
        to_capsules: Callable[[list[Any]], list[Any]],
        from_capsules: Callable[[list[Any]], list[Any]],
        *,
        new_handle: int = 0,
        wrap: int = 0,
    ) -> None: ...

class Shim:
    """Torch's functions by which batches are put together and taken apart, and its number for CPUs."""

    def __init__(
        self,
        *,
        get_data_ptr: int,
        get_dim: int,
        get_sizes: int,
        get_strides: int,
        get_dtype: int,
        dtype_element_size: int,
        empty_strided: int,
        reinterpret_tensor: int,
        clone: int,
        delete_tensor: int,
        cpu: int,
    ) -> None: ...

class Plan:
    """How a model's batches are put together and taken apart: for each input its dimension of rows, its order in memory,
    its ragged dimensions and one padding element for each dtype; for each output its dimension of rows, and as (dimension,
    input, dimension of that input) what is cut back."""

    def __init__(
        self,
        shim: Shim,
        inputs: Sequence[tuple[int, Sequence[int], Sequence[int], Mapping[int, bytes]]],
        outputs: Sequence[tuple[int, Sequence[tuple[int, int, int]]]],
        detach_rows: bool,
    ) -> None: ...

class Device:
    """A device as lanes know it: torch's number for its kind, its own number, whether it takes one work of the process at a time, and
    functions by name: `new_handle`, `get_device_type` and `copy` of torch; `guard` and `unguard` where there are current streams;
    `get_context`, `set_context`, `query`, `copy_in`, `copy_out`, `allocate_host`, `free_host`, `launch_graph` and `explain` of a driver."""

    def __init__(
        self,
        shim: Shim,
        *,
        type: int,
        index: int,
        one_at_a_time: bool,
        functions: Mapping[str, int],
        context: int = 0,
    ) -> None: ...

class Stream:
    """A slot's stream. `fence` returns a status or `wait` throws, each given the `argument`. `brought` says of each input whether
    it is copied to the device when it lies on the host; with `home`, outputs are copied to the host."""

    def __init__(
        self,
        device: Device,
        *,
        handle: int,
        fence: int = 0,
        wait: int = 0,
        argument: int,
        brought: Sequence[bool],
        home: bool,
    ) -> None: ...

class Graph:
    """A recorded run, launched on a slot's stream in the place of the model: what the driver launches, and the tensors that it reads and
    writes, as handles, which are taken; 0 stands for an output that the model left out."""

    def __init__(
        self, device: Device, *, executable: int, inputs: Sequence[int], outputs: Sequence[int]
    ) -> None: ...

def take_turn() -> None:
    """Wait for the process's turn on a device that takes one work at a time; it may be taken again by the same thread."""

def come_home(others: bool) -> None:
    """The interpreter ends, and the lanes are closed: wait for threads that are in here without the GIL. `others` says whether there are threads that it leaves behind: what they keep is no leak."""

def end_turn() -> None:
    """End it, on the same thread."""

class ConstantMap:
    """Names and handles in a `std::unordered_map`, as models compiled before torch 2.13 take and give their constants. The
    handles stay their owners'."""

    def __init__(self, pairs: Sequence[tuple[str, int]]) -> None: ...
    def address(self) -> int:
        """Where the map lies, for as long as this lives."""

    def pairs(self) -> list[tuple[str, int]]:
        """What it holds, in no order."""

class Lanes:
    """A device's lanes, each with a thread, or with so many `threads` for all, which launch on a device and look what is done. After a fork, the
    child's copy refuses to work."""

    def __init__(
        self,
        names: Sequence[str],
        affinities: Sequence[int],
        cores: int,
        tensors: Tensors,
        *,
        delete_tensor: int,
        root_cause: int = 0,
        get_threads: int = 0,
        set_omp_threads: int = 0,
        set_mkl_threads: int = 0,
        new_handle: int = 0,
        threads: int = 0,
    ) -> None: ...
    def submit(
        self,
        lane: int,
        token: int,
        model: Model,
        inputs: Sequence[Any],
        threads: int,
        stream: int = 0,
        fence: int = 0,
        fence_argument: int = 0,
        on: Stream | None = None,
        graph: Graph | None = None,
    ) -> None:
        """Hand a work to a lane. When it raises, nothing was taken."""

    def submit_batch(
        self,
        lane: int,
        token: int,
        model: Model,
        plan: Plan,
        members: Sequence[Sequence[Any]],
        rows: Sequence[int],
        padded_rows: int,
        slot: int,
        threads: int,
        stream: int = 0,
        fence: int = 0,
        fence_argument: int = 0,
        on: Stream | None = None,
        graph: Graph | None = None,
    ) -> object:
        """As `submit`. What it returns must be kept until the work is drained: the lane reads the members' memory."""

    def drain(self, limit: int) -> list[Taken]:
        """At most so many completions, oldest first, as (token, outputs or error, started, finished)."""

    def run_here(
        self,
        model: Model,
        inputs: Sequence[Any],
        threads: int,
        on: Stream | None = None,
        graph: Graph | None = None,
    ) -> Taken:
        """Run on the calling thread, the GIL held unless it is on a device; a completion as of `drain`. The thread has its own counts again after."""

    def run_batch_here(
        self,
        model: Model,
        plan: Plan,
        members: Sequence[Sequence[Any]],
        rows: Sequence[int],
        padded_rows: int,
        slot: int,
        threads: int,
        on: Stream | None = None,
        graph: Graph | None = None,
    ) -> Taken:
        """As `run_here`."""

    def poll(self, seconds: float) -> bool:
        """Spin until a completion waits, the GIL released, at most so long. Whether one does."""

    def ring(self) -> None:
        """Make the descriptor readable."""

    def fileno(self) -> int: ...
    def count(self) -> int: ...
    def close(self) -> None:
        """Wait for what was submitted and join the threads."""

    def hang_up(self) -> None:
        """Close, and give the descriptor back: `fileno` is -1 from then on."""
