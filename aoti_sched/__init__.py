"""An embeddable asyncio scheduler for PyTorch models compiled ahead of time by AOTInductor."""

from aoti_sched.compile import compile_package
from aoti_sched.config import DeviceConfig, Limits, ModelConfig, SchedulerConfig
from aoti_sched.errors import (
    AotiSchedError,
    CompileError,
    ConfigError,
    DeadlineExceededError,
    InputMismatchError,
    InstructionSetError,
    LeaseError,
    LoadError,
    MissingCapabilityError,
    MissingWeightsError,
    ModelNotFoundError,
    PackageError,
    PackageFormatError,
    PackageHashError,
    PackageNotFoundError,
    PlatformMismatchError,
    QueueFullError,
    RunError,
    RunnerClosedError,
    UnsupportedLoopError,
)
from aoti_sched.future import RunFuture, Trace
from aoti_sched.queue.job import Priority
from aoti_sched.runner import Lease, Runner, RunnerView
from aoti_sched.scheduler import Scheduler
from aoti_sched.specs import BatchDim, ConstantSpec, DynamicDim, ModelSpec, SpecSource, TensorSpec
from aoti_sched.telemetry import DeviceStats, RunnerInfo, RunnerStats, SchedulerStats

__all__ = [
    "AotiSchedError",
    "BatchDim",
    "CompileError",
    "ConfigError",
    "ConstantSpec",
    "DeadlineExceededError",
    "DeviceConfig",
    "DeviceStats",
    "DynamicDim",
    "InputMismatchError",
    "InstructionSetError",
    "Lease",
    "LeaseError",
    "Limits",
    "LoadError",
    "MissingCapabilityError",
    "MissingWeightsError",
    "ModelConfig",
    "ModelNotFoundError",
    "ModelSpec",
    "PackageError",
    "PackageFormatError",
    "PackageHashError",
    "PackageNotFoundError",
    "PlatformMismatchError",
    "Priority",
    "QueueFullError",
    "RunError",
    "RunFuture",
    "Runner",
    "RunnerClosedError",
    "RunnerInfo",
    "RunnerStats",
    "RunnerView",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "SpecSource",
    "TensorSpec",
    "Trace",
    "UnsupportedLoopError",
    "compile_package",
]
