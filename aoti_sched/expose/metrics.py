"""Metrics: the numbers as Prometheus reads them. It needs the extra `metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import Collector

from aoti_sched.exporters.families import families

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.core import Metric

    from aoti_sched.stats import SchedulerStats

__all__ = ["CONTENT_TYPE", "page"]


class _Snapshot(Collector):
    def __init__(self, stats: SchedulerStats) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        return families(self._stats)


def page(stats: SchedulerStats) -> bytes:
    """Return the metrics of one moment as text."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(stats))
    return generate_latest(registry)
