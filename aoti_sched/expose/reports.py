"""Reports: what an exposed scheduler answers, as JSON. A new field does not change the version."""

from __future__ import annotations

from typing import Any

import msgspec

from aoti_sched.stats import SchedulerStats

VERSION = 1


class Exposure(msgspec.Struct, frozen=True, kw_only=True):
    """Where a scheduler is exposed, until it is closed.

    Attributes:
        name: Its name, which the commands take.
        pid: Its process.
        path: Its Unix socket.
        url: The address of the live page; None without a port.
        weights: Whether weights can be changed through the socket.
    """

    name: str
    pid: int
    path: str
    url: str | None
    weights: bool


class StatsReport(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a scheduler at one moment.

    Attributes:
        version: The version of the format.
        name: The name of the exposed scheduler.
        pid: Its process.
        time: When, in seconds since 1970.
        uptime: Seconds since the scheduler was exposed, on a clock that never jumps.
        weights: Whether this way in can change weights.
        stats: What `Scheduler.stats` returns.
    """

    version: int = VERSION
    name: str
    pid: int
    time: float
    uptime: float
    weights: bool
    stats: SchedulerStats


class HealthReport(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a scheduler serves well.

    Attributes:
        version: The version of the format.
        status: "ok", or "failing" where there are problems. The HTTP status is 200 or 503.
        problems: Sentences.
    """

    version: int = VERSION
    status: str
    problems: tuple[str, ...] = ()


class WeightsReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a change of weights did.

    Attributes:
        version: The version of the format.
        runners: The runners.
        file: The file that was read or written; None where there was none.
        epochs: The epoch that serves now, of each runner.
        updates: The fields of `UpdateReport` of each runner, after a commit or a rollback.
    """

    version: int = VERSION
    runners: tuple[str, ...]
    file: str | None = None
    epochs: dict[str, int]
    updates: tuple[dict[str, Any], ...] = ()


class FailureReport(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a request that is refused or has failed.

    Attributes:
        version: The version of the format.
        error: What is wrong, in a sentence.
        kind: The name of the error's class; "" where there is none.
    """

    version: int = VERSION
    error: str
    kind: str = ""


class StageRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `POST /weights/stage` takes. `Runner.stage` describes the settings.

    Attributes:
        runner: The runner's name.
        file: The weights: an absolute path, which the exposed process reads.
    """

    runner: str
    file: str
    partial: bool = False
    strict: bool = True
    fold: bool = True
    check_finite: bool = False
    timeout: float | None = None


class PublishRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `POST /weights/commit` and `/weights/rollback` take, for one instant.

    Attributes:
        runners: The runners' names.
        barrier: As in `Scheduler.commit`.
        keep_previous: As in `Scheduler.commit`; a rollback has no use for it.
        timeout: As in `Scheduler.commit`.
    """

    runners: tuple[str, ...]
    barrier: str = "drain"
    keep_previous: bool = True
    timeout: float | None = None


class ExtractRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `POST /weights/extract` takes.

    Attributes:
        runner: The runner's name.
        file: The `.safetensors` file to write: an absolute path of the exposed process.
        inactive: The staged or previous set in place of the one that serves.
    """

    runner: str
    file: str
    inactive: bool = False
