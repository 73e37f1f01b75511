"""Families: the numbers of a scheduler as the metrics of prometheus_client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from aoti_sched.histograms import Histogram

if TYPE_CHECKING:
    from aoti_sched.stats import DeviceStats, RunnerStats, SchedulerStats

_RUNNER = ("runner", "device")
_SECONDS_FROM = 64e-6
"""The first bucket of seconds; the others are powers of two of it."""

_COUNTERS = {
    "in_time": "Completed requests that ended by their deadline, or had none.",
    "inline": "Requests that ran on the thread of the event loop.",
    "batches": "Runs of several requests as one.",
    "batched": "Requests in runs of several.",
    "retried": "Requests that were run again alone after their batch failed.",
    "parks": "How often the weights were evicted.",
    "wasted_seconds": "Seconds of runs whose result was dropped.",
}
_GAUGES = {
    "queued": ("queued_requests", "Requests that wait for a slot and a lane."),
    "waiting": ("waiting_requests", "Requests that wait for room in the queue, or for an epoch."),
    "running": ("running_runs", "Runs that go on."),
    "in_flight": ("in_flight_requests", "Requests that have not ended."),
    "queued_bytes": ("queued_bytes", "Bytes of the inputs of queued requests."),
    "held_leases": ("held_leases", "Leases that callers hold."),
    "free_slots": ("free_slots", "Slots that neither a run nor a lease has."),
    "epoch": ("epoch", "Number of the set of weights that serves."),
    "memory": ("weights_bytes", "Bytes that the weights take."),
    "parked": ("parked", "1 while the weights are evicted."),
    "updating": ("updating", "1 while requests wait at the barrier of an update."),
}
_TRITON_FAILURES = {"rejected": "REJECTED", "cancelled": "CANCELED", "failed": "BACKEND"}


def families(stats: SchedulerStats, *, triton: bool = False) -> Iterator[Metric]:
    """Yield all metrics of one moment.

    Args:
        stats: The numbers.
        triton: Add the metrics `nv_inference_*` by the names of the Triton server.
    """
    runners = [
        (name, device.name, runner)
        for device in stats.devices.values()
        for name, runner in device.runners.items()
    ]
    yield from _requests(runners)
    yield from _numbers(runners)
    yield from _devices(stats)
    if stats.loop_lag is not None:
        lag = HistogramMetricFamily(
            "aoti_sched_loop_lag_seconds", "Seconds that the event loop was late.", labels=()
        )
        lag.add_metric((), *_buckets(stats.loop_lag))
        yield lag
    info = InfoMetricFamily("aoti_sched", "How the scheduler runs.")
    info.add_metric((), {"rules": stats.rules})
    yield info
    if triton:
        yield from _triton(runners)


_Runners = list[tuple[str, str, "RunnerStats"]]


def _requests(runners: _Runners) -> Iterator[Metric]:
    """Yield how many requests ended, and how, and their histograms."""
    labels = (*_RUNNER, "priority")
    ended = CounterMetricFamily(
        "aoti_sched_requests", "Requests that have ended.", labels=(*labels, "outcome")
    )
    rejected = CounterMetricFamily(
        "aoti_sched_rejections", "Rejected requests by their error.", labels=(*_RUNNER, "reason")
    )
    families = {
        "queue": HistogramMetricFamily(
            "aoti_sched_queue_seconds", "From submission to the run, if completed.", labels=labels
        ),
        "run": HistogramMetricFamily(
            "aoti_sched_run_seconds", "The run itself, of completed requests.", labels=labels
        ),
        "total": HistogramMetricFamily(
            "aoti_sched_request_seconds", "From submission to end, if completed.", labels=labels
        ),
        "batch_size": HistogramMetricFamily(
            "aoti_sched_batch_size", "Requests that ran as one, if completed.", labels=labels
        ),
    }
    for name, device, runner in runners:
        for part in runner.ended:
            values = (name, device, part.priority)
            ended.add_metric((*values, part.outcome), part.total.count)
            if part.outcome == "completed":
                for of, family in families.items():
                    family.add_metric(values, *_buckets(getattr(part, of)))
        for reason, count in runner.rejections.items():
            rejected.add_metric((name, device, reason), count)
    yield ended
    yield rejected
    yield from families.values()


def _numbers(runners: _Runners) -> Iterator[Metric]:
    for field, text in _COUNTERS.items():
        counter = CounterMetricFamily(f"aoti_sched_{field}", text, labels=_RUNNER)
        for name, device, runner in runners:
            counter.add_metric((name, device), getattr(runner, field))
        yield counter
    for field, (called, text) in _GAUGES.items():
        gauge = GaugeMetricFamily(f"aoti_sched_{called}", text, labels=_RUNNER)
        for name, device, runner in runners:
            gauge.add_metric((name, device), float(getattr(runner, field)))
        yield gauge


def _devices(stats: SchedulerStats) -> Iterator[Metric]:
    def gauge(called: str, text: str, values: dict[str, float]) -> Metric:
        family = GaugeMetricFamily(f"aoti_sched_{called}", text, labels=("device",))
        for device, value in values.items():
            family.add_metric((device,), value)
        return family

    devices: dict[str, DeviceStats] = stats.devices
    yield gauge("lanes", "Lanes of the device.", {n: d.lanes for n, d in devices.items()})
    yield gauge(
        "busy_lanes", "Lanes on which a run goes on.", {n: d.busy_lanes for n, d in devices.items()}
    )
    yield gauge("cores", "Cores of the device.", {n: d.cores for n, d in devices.items()})
    yield gauge(
        "cores_in_use",
        "Cores that runs on lanes take.",
        {n: d.cores - d.free_cores for n, d in devices.items()},
    )
    yield gauge(
        "memory_used_bytes",
        "Bytes that the weights of all models take.",
        {n: d.memory.used for n, d in devices.items()},
    )
    yield gauge(
        "memory_limit_bytes",
        "The device's memory_limit, where it has one.",
        {n: d.memory.limit for n, d in devices.items() if d.memory.limit is not None},
    )
    yield gauge(
        "device_lost",
        "1 once the device is lost.",
        {n: float(bool(d.lost)) for n, d in devices.items()},
    )


def _triton(runners: _Runners) -> Iterator[Metric]:
    """Yield what the Triton server calls these numbers; microseconds, as there."""
    labels = ("model", "version")
    success = CounterMetricFamily("nv_inference_request_success", "Completed.", labels=labels)
    failure = CounterMetricFamily(
        "nv_inference_request_failure", "Not completed.", labels=(*labels, "reason")
    )
    count = CounterMetricFamily("nv_inference_count", "Requests that ran.", labels=labels)
    runs = CounterMetricFamily("nv_inference_exec_count", "Runs.", labels=labels)
    pending = GaugeMetricFamily(
        "nv_inference_pending_request_count", "Requests that wait.", labels=labels
    )
    sums = {
        of: CounterMetricFamily(f"nv_inference_{called}_duration_us", text, labels=labels)
        for of, called, text in (
            ("total", "request", "From submission to end."),
            ("queue", "queue", "In the queue."),
            ("run", "compute_infer", "In runs."),
        )
    }
    models: dict[str, list[RunnerStats]] = {}
    for name, _, runner in runners:
        models.setdefault(name, []).append(runner)
    for name, each in models.items():
        values = (name, "1")
        parts = [part for runner in each for part in runner.ended]
        done = [part for part in parts if part.outcome == "completed"]
        success.add_metric(values, sum(part.total.count for part in done))
        reasons: dict[str, int] = {}
        for part in parts:
            if part.outcome != "completed":
                reason = _TRITON_FAILURES.get(part.outcome, "OTHER")
                reasons[reason] = reasons.get(reason, 0) + part.total.count
        for reason, number in reasons.items():
            failure.add_metric((*values, reason), number)
        ran = sum(part.run.count for part in parts)
        count.add_metric(values, ran)
        alone = ran - sum(runner.batched for runner in each)
        runs.add_metric(values, max(0, alone) + sum(runner.batches for runner in each))
        pending.add_metric(values, sum(runner.queued + runner.waiting for runner in each))
        for of, family in sums.items():
            family.add_metric(values, sum(getattr(part, of).sum for part in done) * 1e6)
    yield from (success, failure, count, runs, pending, *sums.values())


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Return the cumulative buckets, those of powers of two, and the sum."""
    least = _SECONDS_FROM if histogram.least < 1 else 1.0
    before, found, seen = 0, [], dict(zip(histogram.bounds, histogram.counts, strict=True))
    every = [histogram.least * 2**power * step for power in range(27) for step in (1.0, 1.5)]
    for index, bound in enumerate(every[:53]):
        before += seen.get(bound, 0)
        if index % 2 == 0 and bound >= least:
            found.append((f"{bound:g}", float(before)))
    return [*found, ("+Inf", float(histogram.count))], histogram.sum
