"""Rates: what happened between two moments, from the totals of both."""

from __future__ import annotations

import itertools
from collections import deque

import msgspec

from aoti_sched.expose.reports import StatsReport
from aoti_sched.histograms import Histogram
from aoti_sched.stats import RunnerStats

WINDOW = 10.0
"""Seconds that rates and quantiles are about, where reports come as often."""
_KEPT = 120


class RunnerRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a runner has done lately on one device.

    Attributes:
        runner: Its name.
        device: The device's name.
        state: A word: "ok", "failing", "parked", "updating" or a phase.
        rate: Completed requests in a second.
        errors: Requests in a second that ended otherwise.
        queued: Requests that wait, now.
        running: Runs that go on, now.
        p50: The median of the seconds from submission to end; None without completed requests.
        p99: What 99 of 100 of these do not exceed.
        batch: The mean number of requests in a run; None without runs.
        epoch: The epoch that serves.
        memory: Bytes that the weights take.
        history: The rate between each two of the last moments, the oldest first.
    """

    runner: str
    device: str
    state: str
    rate: float
    errors: float
    queued: int
    running: int
    p50: float | None
    p99: float | None
    batch: float | None
    epoch: int
    memory: int
    history: tuple[float, ...]


class History:
    """The last reports of one exposed scheduler. A restarted process begins a new history."""

    def __init__(self) -> None:
        self._reports: deque[StatsReport] = deque(maxlen=_KEPT)

    def add(self, report: StatsReport) -> None:
        """Add the newest report."""
        if self._reports:
            last = self._reports[-1]
            if report.pid != last.pid or report.uptime < last.uptime:
                self._reports.clear()
            elif report.uptime == last.uptime:  # the same moment
                return
        self._reports.append(report)

    @property
    def latest(self) -> StatsReport:
        """The newest report."""
        return self._reports[-1]

    def rows(self) -> list[RunnerRow]:
        """Return a row for each runner on each device."""
        *earlier, latest = self._reports
        within = (one for one in earlier if latest.uptime - one.uptime <= WINDOW)
        before = next(within, earlier[-1] if earlier else latest)
        return [
            _row(
                _runner(before, device.name, name),
                runner,
                device.name,
                latest.uptime - before.uptime,
                self._rates(device.name, name),
            )
            for device in latest.stats.devices.values()
            for name, runner in device.runners.items()
        ]

    def total(self) -> list[float]:
        """Return the rate of all runners between each two of the last moments."""
        found = [
            self._rates(device.name, name)
            for device in self.latest.stats.devices.values()
            for name in device.runners
        ]
        return [sum(rates) for rates in zip(*found, strict=True)]

    def _rates(self, device: str, name: str) -> tuple[float, ...]:
        """Return a runner's rate between each two of the last moments."""
        rates = []
        for old, new in itertools.pairwise(self._reports):
            done = _completed(new, device, name) - _completed(old, device, name)
            rates.append(max(0, done) / (new.uptime - old.uptime))
        return tuple(rates)


def between(old: Histogram, new: Histogram) -> Histogram:
    """Return the histogram of the values that have come since an older one was taken."""
    missing = (0,) * (len(new.counts) - len(old.counts))
    counts = [b - a for a, b in zip((*old.counts, *missing), new.counts, strict=False)]
    if any(count < 0 for count in counts) or len(old.counts) > len(new.counts):
        return new  # of a runner that was loaded anew
    return Histogram(new.least, tuple(counts), new.sum - old.sum, new.max)


def state(runner: RunnerStats) -> str:
    """Return the state of a runner in a word."""
    if runner.health != "ok":
        return runner.health
    if runner.phase != "OPEN":
        return str(runner.phase).lower()
    return "parked" if runner.parked else "updating" if runner.updating else "ok"


def _row(
    old: RunnerStats | None,
    new: RunnerStats,
    device: str,
    seconds: float,
    history: tuple[float, ...],
) -> RunnerRow:
    def lately(of: str, outcome: str = "completed") -> Histogram:
        now = new.histogram(of, outcome=outcome)
        return now if old is None else between(old.histogram(of, outcome=outcome), now)

    total = lately("total")
    # Each by itself, since those of a runner that was loaded anew are compared with another's.
    others = {part.outcome for part in new.ended} - {"completed", "cancelled"}
    errors = sum(lately("total", outcome).count for outcome in others)
    rate = total.count / seconds if seconds > 0 else 0.0
    return RunnerRow(
        runner=new.name,
        device=device,
        state=state(new),
        rate=rate,
        errors=errors / seconds if seconds > 0 else 0.0,
        queued=new.queued + new.waiting,
        running=new.running,
        p50=total.p50 if total.count else None,
        p99=total.p99 if total.count else None,
        batch=requests_of_a_run(old, new),
        epoch=new.epoch,
        memory=new.memory,
        history=history,
    )


def requests_of_a_run(old: RunnerStats | None, new: RunnerStats) -> float | None:
    """Return the mean number of requests in the runs between two moments; None without runs.

    Args:
        old: The runner's numbers at the first moment; None for the time since its load.
        new: Its numbers at the second moment.
    """
    requests, runs = _requests_and_runs(new)
    if old is not None:
        before = _requests_and_runs(old)
        if requests >= before[0]:  # otherwise the runner was loaded anew
            requests, runs = requests - before[0], runs - before[1]
    return requests / runs if requests and runs > 0 else None


def _requests_and_runs(runner: RunnerStats) -> tuple[int, int]:
    """Return how many requests have run, and in how many runs. Batches count from their launch."""
    requests = runner.histogram("run", outcome=None).count
    return requests, requests - runner.batched + runner.batches


def _runner(report: StatsReport, device: str, name: str) -> RunnerStats | None:
    found = report.stats.devices.get(device)
    return None if found is None else found.runners.get(name)


def _completed(report: StatsReport, device: str, name: str) -> int:
    runner = _runner(report, device, name)
    return 0 if runner is None else runner.completed
