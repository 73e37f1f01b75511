"""An embeddable asyncio scheduler for PyTorch models compiled ahead of time by AOTInductor.

Each public name is imported when it is first used, so a program pays for what it uses. Only
compiling and loading import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Its handler runs after the exit handlers that a program registers from now on.
import aoti_sched.at_exit  # noqa: F401
from aoti_sched.version import VERSION

if TYPE_CHECKING:
    from aoti_sched.apply import ConfigReport
    from aoti_sched.blocking import BlockingScheduler
    from aoti_sched.blocking_handles import (
        BlockingRunner,
        BlockingRunnerView,
        BlockingSplit,
        BlockingSplitView,
    )
    from aoti_sched.blocking_lease import BlockingLease, BlockingSession
    from aoti_sched.compile import compile_package
    from aoti_sched.config import Batching, DeviceConfig, Limits, ModelConfig, SchedulerConfig
    from aoti_sched.engine.blocking import BlockingFuture
    from aoti_sched.engine.future import RunFuture
    from aoti_sched.engine.weights.report import UpdateReport
    from aoti_sched.errors import (
        AotiSchedError,
        CompileError,
        ConfigError,
        ConstantMismatchError,
        DeadlineExceededError,
        DeadlineUnreachableError,
        DeviceLostError,
        EpochError,
        ExposeError,
        InputMismatchError,
        InstructionSetError,
        LeaseError,
        LoadError,
        MemoryLimitError,
        MissingCapabilityError,
        MissingWeightsError,
        ModelNotFoundError,
        PackageError,
        PackageFormatError,
        PackageHashError,
        PackageNotFoundError,
        PlatformMismatchError,
        QueueFullError,
        ReplayError,
        ResourcesError,
        RunError,
        RunnerClosedError,
        ShedError,
        UnsupportedLoopError,
        UpdateAbortedError,
        UpdateError,
        WeightsFileError,
        WeightsTypeError,
    )
    from aoti_sched.events import (
        CallerObserver,
        Held,
        Loaded,
        MemoryUse,
        Observer,
        Pause,
        Run,
        Trace,
        Wait,
    )
    from aoti_sched.explanation import explain
    from aoti_sched.expose.reports import Exposure
    from aoti_sched.flight import FlightRecord
    from aoti_sched.histograms import EndedRequests, Histogram
    from aoti_sched.lease import Lease
    from aoti_sched.load_settings import LoadSettings
    from aoti_sched.mapping import MapResults
    from aoti_sched.model.specs import (
        BatchDim,
        ConstantSpec,
        DynamicDim,
        ModelSpec,
        SpecSource,
        TensorSpec,
    )
    from aoti_sched.queue.job import Priority
    from aoti_sched.recording import Recording
    from aoti_sched.runnable import Runnable
    from aoti_sched.runner import Runner, RunnerView
    from aoti_sched.scheduler import Scheduler
    from aoti_sched.session import Session
    from aoti_sched.split import Shadow, Split, SplitView
    from aoti_sched.stats import (
        DeviceStats,
        Phase,
        RunnerInfo,
        RunnerStats,
        SchedulerStats,
        ShadowStats,
        SplitStats,
    )

__version__ = VERSION

_HOMES = {
    "apply": ("ConfigReport",),
    "blocking": ("BlockingScheduler",),
    "blocking_handles": (
        "BlockingRunner",
        "BlockingRunnerView",
        "BlockingSplit",
        "BlockingSplitView",
    ),
    "blocking_lease": ("BlockingLease", "BlockingSession"),
    "compile": ("compile_package",),
    "config": ("Batching", "DeviceConfig", "Limits", "ModelConfig", "SchedulerConfig"),
    "engine.blocking": ("BlockingFuture",),
    "engine.future": ("RunFuture",),
    "engine.weights.report": ("UpdateReport",),
    "errors": (
        "AotiSchedError",
        "CompileError",
        "ConfigError",
        "ConstantMismatchError",
        "DeadlineExceededError",
        "DeadlineUnreachableError",
        "DeviceLostError",
        "EpochError",
        "ExposeError",
        "InputMismatchError",
        "InstructionSetError",
        "LeaseError",
        "LoadError",
        "MemoryLimitError",
        "MissingCapabilityError",
        "MissingWeightsError",
        "ModelNotFoundError",
        "PackageError",
        "PackageFormatError",
        "PackageHashError",
        "PackageNotFoundError",
        "PlatformMismatchError",
        "QueueFullError",
        "ReplayError",
        "ResourcesError",
        "RunError",
        "RunnerClosedError",
        "ShedError",
        "UnsupportedLoopError",
        "UpdateAbortedError",
        "UpdateError",
        "WeightsFileError",
        "WeightsTypeError",
    ),
    "events": (
        "CallerObserver",
        "Held",
        "Loaded",
        "MemoryUse",
        "Observer",
        "Pause",
        "Run",
        "Trace",
        "Wait",
    ),
    "explanation": ("explain",),
    "expose.reports": ("Exposure",),
    "flight": ("FlightRecord",),
    "histograms": ("EndedRequests", "Histogram"),
    "lease": ("Lease",),
    "load_settings": ("LoadSettings",),
    "mapping": ("MapResults",),
    "model.specs": (
        "BatchDim",
        "ConstantSpec",
        "DynamicDim",
        "ModelSpec",
        "SpecSource",
        "TensorSpec",
    ),
    "queue.job": ("Priority",),
    "recording": ("Recording",),
    "runnable": ("Runnable",),
    "runner": ("Runner", "RunnerView"),
    "scheduler": ("Scheduler",),
    "session": ("Session",),
    "split": ("Shadow", "Split", "SplitView"),
    "stats": (
        "DeviceStats",
        "Phase",
        "RunnerInfo",
        "RunnerStats",
        "SchedulerStats",
        "ShadowStats",
        "SplitStats",
    ),
}
"""The public names by the module that defines them."""

_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"aoti_sched.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AotiSchedError",
    "BatchDim",
    "Batching",
    "BlockingFuture",
    "BlockingLease",
    "BlockingRunner",
    "BlockingRunnerView",
    "BlockingScheduler",
    "BlockingSession",
    "BlockingSplit",
    "BlockingSplitView",
    "CallerObserver",
    "CompileError",
    "ConfigError",
    "ConfigReport",
    "ConstantMismatchError",
    "ConstantSpec",
    "DeadlineExceededError",
    "DeadlineUnreachableError",
    "DeviceConfig",
    "DeviceLostError",
    "DeviceStats",
    "DynamicDim",
    "EndedRequests",
    "EpochError",
    "ExposeError",
    "Exposure",
    "FlightRecord",
    "Held",
    "Histogram",
    "InputMismatchError",
    "InstructionSetError",
    "Lease",
    "LeaseError",
    "Limits",
    "LoadError",
    "LoadSettings",
    "Loaded",
    "MapResults",
    "MemoryLimitError",
    "MemoryUse",
    "MissingCapabilityError",
    "MissingWeightsError",
    "ModelConfig",
    "ModelNotFoundError",
    "ModelSpec",
    "Observer",
    "PackageError",
    "PackageFormatError",
    "PackageHashError",
    "PackageNotFoundError",
    "Pause",
    "Phase",
    "PlatformMismatchError",
    "Priority",
    "QueueFullError",
    "Recording",
    "ReplayError",
    "ResourcesError",
    "Run",
    "RunError",
    "RunFuture",
    "Runnable",
    "Runner",
    "RunnerClosedError",
    "RunnerInfo",
    "RunnerStats",
    "RunnerView",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "Session",
    "Shadow",
    "ShadowStats",
    "ShedError",
    "SpecSource",
    "Split",
    "SplitStats",
    "SplitView",
    "TensorSpec",
    "Trace",
    "UnsupportedLoopError",
    "UpdateAbortedError",
    "UpdateError",
    "UpdateReport",
    "Wait",
    "WeightsFileError",
    "WeightsTypeError",
    "__version__",
    "compile_package",
    "explain",
]
