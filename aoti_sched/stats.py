"""Snapshots as msgspec Structs.

A snapshot is a value: it crosses a wire and holds nothing of the scheduler.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from aoti_sched import arguments
from aoti_sched.histograms import EndedRequests, Histogram, chosen
from aoti_sched.model.specs import BatchDim, ConstantSpec, LeafSpec, SpecSource

_HISTOGRAMS = ("queue", "run", "total", "batch_size")
_OUTCOMES = ("completed", "failed", "rejected", "expired", "cancelled", "revoked", "shed")
_PRIORITIES = ("HIGH", "NORMAL", "LOW")


class RunnerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Describes a runner.

    Only `epoch`, `staged`, `previous_epoch`, `inactive_bytes` and `cuda_graphs` change during its
    life. For a runner on several devices, the counts are sums over its replicas.

    Attributes:
        name: The name that was given at load.
        path: The package, as the caller named it.
        sha256: The hash of the package, in hexadecimal.
        device: The device; for several devices, their names with commas between them.
        executor: What runs the model: native lanes or Python threads.
        runtime: "c_abi" or "torch runner".
        gil: Whether a run has the GIL: "released" or "held".
        instances: How many runs may go on at once.
        threads: Intra-op threads of one run.
        epoch: Number of the set of weights that serves.
        signature: The arguments as text, such as "(x: float32[s0, 16])".
        inputs: Specs of the arguments' leaves.
        outputs: Specs of the results' leaves.
        spec_source: Where `inputs` come from. With "arity only", only the number of tensors is
            checked.
        batch: The dimension of the rows; None where the package states none.
        max_batch: The most rows that run as one; 1 without batching.
        frozen: Whether the weights are part of the compiled code; None when that is not known.
        constants: The constants of the model.
        staged: Whether the inactive buffer holds a staged set.
        previous_epoch: The epoch whose set the inactive buffer keeps for a rollback; None without
            one.
        inactive_bytes: Bytes of the set in the inactive buffer.
        cuda_graphs: How many runs are recorded as CUDA graphs.
        verified: False where this code has run only on a simulated device of this kind
            (`docs/devices.md`).
        replicas: The info of each replica that is in the rotation; () on one device.
        metadata: The metadata of the package, the user's own keys included.
        notes: Sentences for people: what costs speed, what is not checked, what was adapted.
    """

    name: str
    path: str
    sha256: str
    device: str
    executor: str
    runtime: str
    gil: str
    instances: int
    threads: int
    epoch: int
    signature: str
    inputs: tuple[LeafSpec, ...]
    outputs: tuple[LeafSpec, ...]
    spec_source: SpecSource
    batch: BatchDim | None
    max_batch: int = 1
    frozen: bool | None
    constants: tuple[ConstantSpec, ...]
    staged: bool = False
    previous_epoch: int | None = None
    inactive_bytes: int = 0
    cuda_graphs: int = 0
    verified: bool = True
    replicas: tuple[RunnerInfo, ...] = ()
    metadata: dict[str, str]
    notes: tuple[str, ...]


class Phase(str, enum.Enum):
    """Where a runner is in its life. A phase equals its name as text, and JSON has the name."""

    OPEN = "OPEN"
    """It takes requests."""
    DRAINING = "DRAINING"
    """It takes no new requests, and finishes those that it accepted, held leases included."""
    TERMINATED = "TERMINATED"
    """It takes no new requests, has failed those that were queued, and finishes running ones."""
    DRAINED = "DRAINED"
    """No request and no lease is left. Its memory is free, or is being freed."""

    __str__ = str.__str__


class RunnerStats(msgspec.Struct, frozen=True, kw_only=True):
    """A runner's numbers. Counts and seconds are totals since the load, unless stated otherwise.

    For a runner on several devices, the numbers are sums over its replicas.

    Attributes:
        name: The runner's name.
        phase: Where the runner is in its life.
        health: "failing" from the fifth failed run in a row until a run succeeds; otherwise "ok".
        waiting: Requests that wait for room in the queue, or for an epoch, now.
        queued: Requests that wait for a slot and a lane, now.
        queued_bytes: Bytes of the inputs of queued requests, now.
        running: Runs that go on now; a batch is one run.
        held_leases: Leases that callers hold now.
        free_slots: Slots that neither a run nor a lease has now.
        epoch: Number of the set of weights that serves.
        updating: Whether queued requests wait at the barrier of an update now.
        parked: Whether the weights are evicted now. Queued requests wait until they are restored.
        memory: Bytes that the weights take now.
        parks: How often the weights were evicted.
        submitted: Requests that were submitted; a request that was rerouted counts once.
        completed: Requests that ended with a result.
        failed: Requests that ended with the error of their run.
        rejected: Requests that were refused at submit.
        expired: Requests whose deadline passed before a result.
        cancelled: Requests that their callers gave up.
        revoked: Leases that were taken back.
        shed: Requests that were dropped to protect better ones.
        withdrawn: Requests that were rerouted to another replica.
        queue_seconds: Seconds that requests spent in the queue, together.
        run_seconds: Seconds that runs took, together.
        wasted_seconds: Seconds of runs whose result was dropped, since no caller waited for it.
        inline: Requests that ran on the thread of the event loop.
        batches: Runs of several requests as one.
        batched: Requests in `batches`.
        retried: Requests that were run again alone after their batch failed.
        in_time: Completed requests that ended by their deadline, or had none. Its rate is the
            goodput.
        in_flight: Requests that have not ended for their callers, now.
        rejections: Rejected requests by the name of their error.
        ended: Histograms of the requests that have ended, by outcome and priority.
        replicas: The stats of each replica by device, removed replicas included.
    """

    name: str
    phase: Phase
    health: str
    waiting: int
    queued: int
    queued_bytes: int
    running: int
    held_leases: int
    free_slots: int
    epoch: int
    updating: bool
    parked: bool = False
    memory: int = 0
    parks: int = 0
    submitted: int
    completed: int
    failed: int
    rejected: int
    expired: int
    cancelled: int
    revoked: int
    shed: int
    withdrawn: int
    queue_seconds: float
    run_seconds: float
    wasted_seconds: float
    inline: int
    batches: int
    batched: int
    retried: int
    in_time: int = 0
    in_flight: int = 0
    rejections: dict[str, int] = {}
    ended: tuple[EndedRequests, ...] = ()
    replicas: dict[str, RunnerStats] = {}

    def histogram(
        self, of: str = "total", *, outcome: str | None = "completed", priority: object = None
    ) -> Histogram:
        """Return a histogram of the runner's requests, as `SchedulerStats.histogram` does."""
        return _chosen(self.ended, of, outcome, priority)


class ShadowStats(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the copies that a split sends to one more runner.

    Attributes:
        runner: The name of the runner that gets the copies.
        copied: Requests that were copied.
        dropped: Copies that the runner did not take: its queue was full, or it was closed.
    """

    runner: str
    copied: int
    dropped: int


class SplitStats(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a split since it was made.

    Attributes:
        name: The split's name.
        shares: The part of the requests that each runner gets now, by name; they sum up to 1.
        requests: Requests that each runner got, by name; runners that get none any more included.
        shadows: What became of the copies, for each shadow.
    """

    name: str
    shares: dict[str, float]
    requests: dict[str, int]
    shadows: tuple[ShadowStats, ...]


class MemoryStats(msgspec.Struct, frozen=True, kw_only=True):
    """The memory that the weights of a device's models take, in bytes.

    Attributes:
        limit: The device's `memory_limit`; None without one.
        used: Bytes taken now, those reserved for models that are being loaded included.
        inactive: The part of `used` for staged and previous sets.
        parked: Bytes that the evicted models would take.
        workspace: Further bytes that torch keeps for runs: intermediate results, outputs and
            graphs. Measured when the numbers were asked for before; at first 0. 0 on
            devices other than CUDA, where the number is not known. Not counted against the limit.
    """

    limit: int | None
    used: int
    inactive: int
    parked: int
    workspace: int


class DeviceStats(msgspec.Struct, frozen=True, kw_only=True):
    """A device's numbers now.

    Attributes:
        name: The device's name, such as "cpu" or "cuda:0".
        executor: What runs models on it: native lanes or Python threads.
        lost: Why nothing runs on it any more; "" while it works.
        lanes: How many runs may go on at once.
        busy_lanes: Lanes on which a run goes on.
        cores: CPU cores that belong to the device.
        free_cores: Cores that no run on a lane uses; a run uses one for each of its threads.
        queued: Requests that wait for a slot and a lane.
        queued_bytes: Bytes of the inputs of queued requests.
        memory: The memory that weights take.
        runners: The stats of each runner by name.
    """

    name: str
    executor: str
    lost: str = ""
    lanes: int
    busy_lanes: int
    cores: int
    free_cores: int
    queued: int
    queued_bytes: int
    memory: MemoryStats
    runners: dict[str, RunnerStats]

    def histogram(
        self, of: str = "total", *, outcome: str | None = "completed", priority: object = None
    ) -> Histogram:
        """Return a histogram of the device's requests, as `SchedulerStats.histogram` does."""
        return _chosen(_ended(self), of, outcome, priority)


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a scheduler. A closed scheduler gives those of its end.

    Attributes:
        devices: The stats of each device by name.
        rules: How the scheduling rules run: "compiled" or "python".
        loop_lag: Seconds that the event loop was late for a timer; None where the settings have no
            `loop_lag`.
    """

    devices: dict[str, DeviceStats]
    rules: str
    loop_lag: Histogram | None = None

    def histogram(
        self, of: str = "total", *, outcome: str | None = "completed", priority: object = None
    ) -> Histogram:
        """Return a histogram of the requests of all devices together.

        Args:
            of: "queue", "run" or "total" for seconds, or "batch_size". `EndedRequests` says what
                each of them counts.
            outcome: How the requests ended, as `EndedRequests.outcome`; None for all.
            priority: A `Priority` or its name; None for all.

        Raises:
            ConfigError: There is no such histogram, outcome or priority.
        """
        parts = [part for device in self.devices.values() for part in _ended(device)]
        return _chosen(parts, of, outcome, priority)


def _ended(device: DeviceStats) -> list[EndedRequests]:
    return [part for runner in device.runners.values() for part in runner.ended]


def _chosen(
    parts: Sequence[EndedRequests], of: str, outcome: str | None, priority: object
) -> Histogram:
    """Check what is asked for, and add it up. The arguments are those of `histogram`.

    Raises:
        ConfigError: There is no such histogram, outcome or priority.
    """
    arguments.one_of("histogram(of)", of, _HISTOGRAMS)
    # Numbers of another process may have the outcomes of a later release.
    if outcome is not None and all(outcome != part.outcome for part in parts):
        arguments.one_of("histogram(outcome=)", outcome, _OUTCOMES)
    name = None if priority is None else getattr(priority, "name", priority)
    if name is not None:
        arguments.one_of("histogram(priority=)", name, _PRIORITIES)
    return chosen(parts, of, outcome, name)
