"""Native lanes: threads that run compiled models without Python.

Addresses are plain integers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Taken: TypeAlias = tuple[int, list[Any] | tuple[str, str], float, float]
"""A completion: token, outputs or error, start and end in seconds of the monotonic clock.

- Outputs: a tensor for each output, None for an output that the model left out.
- Outputs of a batch: the whole outputs (None where members get copies), and each member's list.
- Error: the runtime's text and torch's text for the failure.
"""

class ForkedError(RuntimeError):
    """A forked child used its parent's lanes, whose threads the child does not have."""

class Model:
    """The functions that run one model. Works keep this object alive, but not the container."""

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
    """Converts tensors to handles and back.

    With `new_handle` and `wrap`, the conversion is direct. Otherwise torch's functions for lists of
    capsules are used.
    """

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
    """Torch's functions for batches, and its number for CPUs."""

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
    """How the inputs of a model's batches are gathered, and the outputs split.

    Args:
        shim: Torch's functions for tensors.
        inputs: For each input, its dimension of rows, its order in memory, its ragged dimensions,
            and one padding element for each dtype.
        outputs: For each output, its dimension of rows, and (dimension, input, dimension of that
            input) for each dimension that is cut back.
        detach_rows: Whether members get copies instead of views.
    """

    def __init__(
        self,
        shim: Shim,
        inputs: Sequence[tuple[int, Sequence[int], Sequence[int], Mapping[int, bytes]]],
        outputs: Sequence[tuple[int, Sequence[tuple[int, int, int]]]],
        detach_rows: bool,
    ) -> None: ...

class Device:
    """The lanes' record of an accelerator.

    Args:
        shim: Torch's functions for tensors.
        type: Torch's number for this kind of device.
        index: The device's own number.
        one_at_a_time: Whether the device takes one work of the process at a time.
        functions: Addresses by name. Torch's are `new_handle`, `get_device_type` and `copy`, and
            `guard` and `unguard` where torch has current streams, and `record_use`. A driver's are
            `get_context`, `set_context`, `exchange_capture_mode`, `query`, `is_capturing`,
            `make_event`, `destroy_event`, `wait_for_event`, `record_event`, `query_event`,
            `copy_in`, `copy_out`, `allocate_host`, `free_host`, `launch_graph`, `explain` and
            `take_last_error`.
        context: The driver's context.
        not_ready: The status that the driver's `query` returns while a stream has work to do.
        asked: A stream without work, to be queried where the device may be lost.
    """

    def __init__(
        self,
        shim: Shim,
        *,
        type: int,
        index: int,
        one_at_a_time: bool,
        functions: Mapping[str, int],
        context: int = 0,
        not_ready: int = 0,
        asked: int = 0,
    ) -> None: ...
    def arrive(self, stream: int) -> Arrival:
        """Record an event on a stream. Does not block.

        Raises RuntimeError, also while the stream is recorded into a graph.
        """

class Arrival:
    """A point in the work of a stream, which the runs of a request come after."""

    def precede(self, stream: int) -> None:
        """Let later work on a stream wait for this point. Does not block."""

class Stream:
    """A slot's stream.

    Args:
        device: The stream's device.
        handle: The stream in the device's own library.
        fence: A function that waits for the stream and returns a status. Give this or `wait`.
        wait: A function that waits for the stream and throws on failure.
        argument: The argument of `fence` or `wait`.
        event: An event that is recorded on the stream before `fence` is called, and asked for
            shortly.
        brought: For each input, whether a tensor on the host is copied to the device.
        home: Whether outputs are copied to the host.
        bytes_in: Pinned memory for inputs to begin with.
        bytes_out: Pinned memory for outputs to begin with.
    """

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
        event: int = 0,
        bytes_in: int = 0,
        bytes_out: int = 0,
    ) -> None: ...

class Graph:
    """A recorded run, launched on a slot's stream instead of the model.

    Args:
        device: The device on which the run was recorded.
        executable: The driver's executable graph.
        inputs: Handles of the tensors that the graph reads. The graph owns the handles, even when
            this call raises.
        outputs: Handles of the tensors that the graph writes, owned in the same way; 0 for an
            output that is left out.
    """

    def __init__(
        self, device: Device, *, executable: int, inputs: Sequence[int], outputs: Sequence[int]
    ) -> None: ...

def take_turn() -> None:
    """Wait for the process's lock on devices that take one work at a time.

    A thread may take the lock again.
    """

def wait_for_detached_threads(others: bool) -> None:
    """Wait for threads that are in this module without the GIL. Call this at interpreter exit.

    The lanes are closed by then.

    Args:
        others: Whether other threads still run, so that the objects they keep are no leaks.
    """

def end_turn() -> None:
    """Release the lock on the thread that took it."""

class ConstantMap:
    """Names and handles in a `std::unordered_map`.

    Models compiled before torch 2.13 take and return constants in such a map. The map does not own
    the handles.
    """

    def __init__(self, pairs: Sequence[tuple[str, int]]) -> None: ...
    def address(self) -> int:
        """Return the map's address, which is valid while this object lives."""

    def pairs(self) -> list[tuple[str, int]]:
        """Return the names and handles, in no order."""

class Lanes:
    """A device's lanes. In a forked child they refuse to work.

    Args:
        names: The name of each lane and of its thread.
        affinities: A core for each lane's thread. A core that is missing or negative binds nothing.
        cores: The number of awake threads from which on lanes do not spin for work.
        tensors: The conversion of tensors to handles and back.
        delete_tensor: The address of torch's function that deletes a handle.
        root_cause: The address of a function that returns torch's text for the calling thread's
            last failure.
        get_threads: The address of a function that returns the calling thread's intra-op threads.
        set_omp_threads: The address of a function that sets the calling thread's OpenMP threads.
        set_mkl_threads: The address of a function that sets the calling thread's MKL threads.
        new_handle: The address of torch's function that makes another handle of a tensor.
        threads: The number of threads for all lanes, which then poll a device; 0 for one thread per
            lane.
        open: The number of lanes to begin with; 0 for all.
    """

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
        open: int = 0,
    ) -> None: ...
    def submit(
        self,
        lane: int,
        token: int,
        model: Model,
        inputs: Sequence[Any],
        threads: int,
        on: Stream | None = None,
        graph: Graph | None = None,
        after: Arrival | None = None,
        consumers: Sequence[int | None] | None = None,
    ) -> None:
        """Hand a work to a lane. When this call raises, the lane has taken nothing."""

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
        on: Stream | None = None,
        graph: Graph | None = None,
        consumers: Sequence[int | None] | None = None,
    ) -> object:
        """Hand a batch to a lane, as `submit` does.

        Keep the returned object until the work is drained: the lane reads the members' memory.
        """

    def drain(self, limit: int) -> list[Taken]:
        """Return at most `limit` completions, oldest first."""

    def run_here(
        self,
        model: Model,
        inputs: Sequence[Any],
        threads: int,
        on: Stream | None = None,
        graph: Graph | None = None,
        after: Arrival | None = None,
        consumers: Sequence[int | None] | None = None,
    ) -> Taken:
        """Run on the calling thread, and return a completion as `drain` does.

        The GIL is held, unless the run is on a device. The thread's own intra-op counts are
        restored.
        """

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
        consumers: Sequence[int | None] | None = None,
    ) -> Taken:
        """Run a batch on the calling thread, as `run_here` does."""

    def poll(self, seconds: float) -> bool:
        """Spin without the GIL for at most `seconds`. Return whether a completion waits."""

    def wake(self) -> None:
        """Make the descriptor readable."""

    def fileno(self) -> int: ...
    def count(self) -> int: ...
    def grow(self, count: int) -> None:
        """Open lanes until there are `count`. Any thread may call this."""
    def close(self) -> None:
        """Wait for the submitted works, then join the threads."""

    def hang_up(self) -> None:
        """Close the lanes and the descriptor. `fileno` then returns -1."""
