"""`Outcome`: what became of requests, measured in the same way in a recording and a simulation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from aoti_sched.events import Run, Trace
from aoti_sched.percentiles import Percentiles, percentiles


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of a number of requests.

    Attributes:
        requests: How many there were.
        ended: How many of them ended how, by the word for the state.
        seconds: From the first submission to the last end.
        throughput: Answers in a second of that.
        latency: From the submission to the end of the run, of answered requests.
        queue: From the submission to the start of the run, of answered requests.
        run: The runs of answered requests.
        missed: Requests with a deadline that were not answered by then.
        runs: How many runs there were.
        batch_size: Requests of a run, in the mean.
        batches: How many runs were of how many requests.
        busy: Runs that went on at once, in the mean.
    """

    requests: int
    ended: dict[str, int]
    seconds: float
    throughput: float
    latency: Percentiles | None
    queue: Percentiles | None
    run: Percentiles | None
    missed: int
    runs: int
    batch_size: float
    batches: dict[int, int]
    busy: float


def outcome_of(requests: Sequence[Trace], runs: Sequence[Run]) -> Outcome:
    """Return the figures of requests and of their runs."""
    answered = [one for one in requests if one.state == "DONE"]
    ends = [max(one.ended, one.finished) for one in requests]
    seconds = max(ends) - min(one.queued for one in requests) if requests else 0.0
    batches = Counter(run.batch_size for run in runs)
    return Outcome(
        requests=len(requests),
        ended=dict(Counter(one.state for one in requests)),
        seconds=seconds,
        throughput=len(answered) / seconds if seconds > 0 else 0.0,
        latency=percentiles([one.finished - one.queued for one in answered]),
        queue=percentiles([one.queue_seconds for one in answered]),
        run=percentiles([one.run_seconds for one in answered]),
        missed=sum(one.timeout is not None and not _in_time(one) for one in requests),
        runs=len(runs),
        batch_size=sum(run.batch_size for run in runs) / len(runs) if runs else 0.0,
        batches=dict(sorted(batches.items())),
        busy=sum(run.finished - run.started for run in runs) / seconds if seconds > 0 else 0.0,
    )


def _in_time(one: Trace) -> bool:
    return one.state == "DONE" and (one.timeout is None or one.finished <= one.queued + one.timeout)
