"""Prometheus: a collector that reads a scheduler's numbers when it is scraped.

```
from prometheus_client import REGISTRY, start_http_server

REGISTRY.register(Collector(scheduler))
start_http_server(9000)
```

Nothing is counted twice: a scrape takes one snapshot of `stats()` on the event loop. It needs the
extra `metrics`. docs/observability.md lists the metrics.
"""

from __future__ import annotations

import concurrent.futures
from asyncio import _get_running_loop  # the public one raises
from collections.abc import Iterator
from typing import Literal

try:
    from prometheus_client.core import Metric
    from prometheus_client.registry import Collector as _Collector
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{__name__} needs the extra metrics. Run: pip install 'aoti_sched[metrics]'",
        name=error.name,
    ) from None

from aoti_sched import arguments
from aoti_sched.blocking import BlockingScheduler
from aoti_sched.errors import ConfigError, brief
from aoti_sched.exporters.families import families
from aoti_sched.histograms import LEAST_SECONDS, Histogram
from aoti_sched.scheduler import Scheduler
from aoti_sched.stats import SchedulerStats

PATIENCE = 5.0
"""Seconds that a scrape waits for the event loop."""
_NO_STATS = SchedulerStats(devices={}, rules="", loop_lag=Histogram(LEAST_SECONDS))
"""Stats that have every metric, whatever the scheduler's settings are."""


class Collector(_Collector):
    """Collects the numbers of one scheduler, for a registry of prometheus_client.

    A registry takes one collector, since a second one has the same metrics, and raises ValueError
    for it. For several schedulers, make a registry each.

    Made on the scheduler's event loop, or in any thread for a `BlockingScheduler`. A scrape in
    another thread waits for the loop, for at most `PATIENCE` seconds.

    Args:
        scheduler: The scheduler. After its end, scrapes give its last numbers.
        compat: "triton" adds the metrics `nv_inference_*` by the names of the Triton server, for
            dashboards that were made for it.

    Raises:
        ConfigError: An argument is wrong.
    """

    def __init__(
        self,
        scheduler: Scheduler | BlockingScheduler,
        *,
        compat: Literal["triton"] | None = None,
    ) -> None:
        if not isinstance(scheduler, (Scheduler, BlockingScheduler)):
            raise ConfigError(
                f"Collector(scheduler): expected a Scheduler or a BlockingScheduler, got "
                f"{brief(scheduler)}."
            )
        if compat is not None:
            arguments.one_of("Collector(compat=)", compat, ("triton",))
        self._scheduler = scheduler
        self._triton = compat == "triton"
        self._loop = _get_running_loop() if isinstance(scheduler, Scheduler) else None

    def describe(self) -> Iterator[Metric]:
        """Return the metrics without samples, by which a registry refuses a second collector."""
        return families(_NO_STATS, triton=self._triton)

    def collect(self) -> Iterator[Metric]:
        """Return all metrics, of one moment.

        Raises:
            TimeoutError: The event loop did not answer for `PATIENCE` seconds.
        """
        return families(self._snapshot(), triton=self._triton)

    def _snapshot(self) -> SchedulerStats:
        loop = self._loop
        if loop is None or loop is _get_running_loop() or not loop.is_running():
            return self._scheduler.stats()
        taken: concurrent.futures.Future[SchedulerStats] = concurrent.futures.Future()

        def take() -> None:
            try:
                taken.set_result(self._scheduler.stats())
            except Exception as error:  # noqa: BLE001 -- raised by the scrape
                taken.set_exception(error)

        try:
            loop.call_soon_threadsafe(take)
        except RuntimeError:  # it was closed meanwhile
            return self._scheduler.stats()
        try:
            return taken.result(PATIENCE)
        except concurrent.futures.TimeoutError:
            if not loop.is_running():  # it ended before its answer
                return self._scheduler.stats()
            raise TimeoutError(
                f"the event loop of the scheduler did not answer for {PATIENCE:g} s"
            ) from None
