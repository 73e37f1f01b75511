"""Snapshots as msgspec Structs. A snapshot is a value: it crosses a wire and holds nothing of the scheduler."""

from __future__ import annotations

import msgspec

from aoti_sched.model.specs import BatchDim, ConstantSpec, LeafSpec, SpecSource


class RunnerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a runner is. Does not change while it lives, but for `epoch`, what its inactive buffer holds, and `cuda_graphs`, the runs it has recorded.

    That is a `staged` set, the set of `previous_epoch` (None when that is not kept), or nothing; `inactive_bytes` is its memory.

    `runtime` is "c_abi" or "torch runner", `gil` what a run does with it. `spec_source` says where `inputs` come
    from; with "arity only" nothing but the number of tensors is checked. `notes` are sentences a person
    should read: what costs speed, what is not checked, what was adapted. `batch` is what the package says of its rows,
    `max_batch` how many of them run as one; 1 without batching. `verified` is False where this code has not run on a real device of
    that kind yet, but on a simulated one (`docs/devices.md`). Of a runner on several devices, `device` names them all, `instances`,
    `inactive_bytes` and `cuda_graphs` are of all together, and `replicas` has each, as long as it is in the rotation.
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


class RunnerStats(msgspec.Struct, frozen=True, kw_only=True):
    """A runner's numbers now (`waiting` to `updating`) and since its load (the rest).

    `waiting` requests wait for room or for an epoch, `queued` ones for a slot and a lane. While `updating`, an update's
    barrier holds back what is queued; while `parked`, its weights are not in memory, and what is queued waits for them. `parks` counts how often
    that was, `memory` is the bytes its weights take now. `running` counts runs, of which a batch is one. `inline` counts requests that ran on the
    event loop's own thread, `batches` the runs of several requests as one, `batched` the requests in them, and `retried` those
    that were run again by themselves since their batch had failed. `health` is "ok", or "failing" once five runs in a row have
    failed, until one succeeds. Of a runner on several devices these are the numbers of all together; `replicas` has those of each, by device,
    also of those that have left. What was moved from one to another is submitted once, and `withdrawn` counts the moves.
    """

    name: str
    phase: str
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
    replicas: dict[str, RunnerStats] = {}


class MemoryStats(msgspec.Struct, frozen=True, kw_only=True):
    """What the weights of a device's models take of its memory, in bytes: `used` now, of which `inactive` are staged and previous sets;
    `parked` is what those would take that are parked. `limit` is the device's `memory_limit`; `used` counts what models are just being loaded into.
    `workspace` is what torch keeps besides for their runs (intermediate results, outputs, graphs), as it was when each was warmed up or had its weights
    changed last; on other devices than CUDA it is 0, for nobody knows. It does not count towards the limit."""

    limit: int | None
    used: int
    inactive: int
    parked: int
    workspace: int


class DeviceStats(msgspec.Struct, frozen=True, kw_only=True):
    """A device's numbers now. `lost` says why nothing runs on it any more, "" while it works. Runs on lanes take `cores` - `free_cores` of its cores, as many each as they use threads."""

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


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True):
    """Everything, by device. `rules` says whether what decides is "compiled" or "python"."""

    devices: dict[str, DeviceStats]
    rules: str
