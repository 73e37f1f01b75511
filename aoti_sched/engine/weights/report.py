"""What an update tells its caller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aoti_sched.engine.replica import Replica
    from aoti_sched.engine.router import Router


class UpdateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an update, commit or rollback did to one runner. Times are in seconds.

    Attributes:
        runner: The runner's name.
        epoch: The epoch that serves now.
        bytes: Size of the set that was written.
        stage_seconds: Time of writing, while requests were served; 0.0 for a rollback.
        fold_seconds: Time of folding, while requests were served; 0.0 for a rollback.
        drain_seconds: Time of waiting for runs and leases that were under way.
        swap_seconds: Time of exchanging the buffers.
        pause_seconds: How long the barrier was closed: `drain_seconds` and `swap_seconds`.
        waited: Requests that were queued when the barrier opened.
        ignored: Given names of no use to the model. The module has them and the compiled graph does
            not use them, or `strict` was off.
    """

    runner: str
    epoch: int
    bytes: int
    stage_seconds: float
    fold_seconds: float
    drain_seconds: float
    swap_seconds: float
    pause_seconds: float
    waited: int
    ignored: tuple[str, ...] = ()


def reports_by_router(
    routers: Iterable[Router], reports: Mapping[Replica, UpdateReport]
) -> dict[Router, UpdateReport]:
    """Return one report for each router, made of the reports of its replicas."""
    return {
        router: _merged([reports[replica] for replica in router.replicas if replica in reports])
        for router in routers
    }


def _merged(reports: list[UpdateReport]) -> UpdateReport:
    """Return one report for replicas that were published at one instant."""
    return msgspec.structs.replace(
        reports[0],
        bytes=sum(report.bytes for report in reports),
        stage_seconds=sum(report.stage_seconds for report in reports),
        fold_seconds=sum(report.fold_seconds for report in reports),
        waited=sum(report.waited for report in reports),
    )
