"""Batching: which jobs may run as one batch, and how long they wait for further jobs.

Jobs of one runner with the same key may share a launch; how many of them do, and which, is decided
at the launch (`growth.py`). A job that could run waits for two reasons only. Where several jobs
come in one turn of the loop, they are held until the turn ends, so that they run together. And with
`max_delay`, a key waits for more jobs, though never past a deadline.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

from aoti_sched.queue.job import Job
from aoti_sched.queue.selection.job_queue import JobQueue

AHEAD: Final = 3
"""A key is ripe this many runs before a deadline.

The batch may then take two of them within `USABLE` of the time (`growth.py`).
"""


@dataclass(frozen=True)
class Batching:
    """The rule by which a runner's jobs are batched.

    Args:
        max_rows: The most rows that run as one batch.
        max_delay: The most seconds that a job waits for others to join its batch.
        max_seconds: The most seconds that a batch is expected to take; None for a bound that is
            learned.
        max_tokens: The most tokens of a batch, padding included; None for no bound.
    """

    max_rows: int
    max_delay: float = 0.0
    max_seconds: float | None = math.inf
    max_tokens: int | None = None


class Key:
    """The queued jobs with one key.

    Attributes:
        jobs: How many jobs there are.
        rows: Their rows.
        tokens: Their tokens, without padding.
        bytes: The bytes of their inputs.
        held: Whether the jobs wait until the turn of the loop is over.
        ripe: Whether the jobs may run. A key that is ripe stays so until no job is left.
        ripe_at: When the delay of the key has elapsed.
    """

    __slots__ = ("bytes", "held", "jobs", "ripe", "ripe_at", "rows", "tokens")

    def __init__(self) -> None:
        self.jobs = 0
        self.rows = 0
        self.tokens = 0
        self.bytes = 0
        self.held = False
        self.ripe = False
        self.ripe_at = math.inf


class BatchQueue:
    """The jobs of one runner that may be batched. Keys that are not ripe are hidden in its queue.

    Args:
        rule: How the jobs are batched.
        queue: The runner's queue.

    Attributes:
        keys: The queued jobs by key.
        arrived: Batchable jobs that have come in this turn of the loop.
        gathering: Whether new jobs are held until the turn of the loop is over.
        hurries: Whether no job waits for others any more, since the runner drains.
    """

    __slots__ = ("arrived", "gathering", "hurries", "keys", "queue", "rule")

    def __init__(self, rule: Batching, queue: JobQueue) -> None:
        self.rule = rule
        self.queue = queue
        self.keys: dict[Hashable, Key] = {}
        self.arrived = 0
        self.gathering = False
        self.hurries = False

    @property
    def waits(self) -> bool:
        """Return whether a job that comes now has to be queued, even if no other job is."""
        return self.gathering or self.arrived > 0 or self.rule.max_delay > 0

    def note_arrival(self) -> None:
        """Count a job that has come in this turn of the loop.

        From the second job of a turn on, jobs are gathered, as more are likely to come.
        """
        self.arrived += 1
        if self.arrived > 1:
            self.gathering = True

    def enter(self, job: Job, now: float, bound: float) -> Key:
        """Queue a job.

        Args:
            job: The job, which has a key.
            now: The present time.
            bound: Seconds that a run of the job alone will hardly exceed.

        Returns:
            The queued jobs with the job's key.
        """
        key = self.keys.get(job.key)
        if key is None:
            key = self.keys[job.key] = Key()
            self.queue.hide(job.key)
        key.jobs += 1
        key.rows += job.rows
        key.tokens += job.rows * job.tokens
        key.bytes += job.bytes
        if not key.ripe:
            key.held = key.held or self.gathering
            if self.rule.max_delay > 0:
                latest = math.inf if job.deadline is None else job.deadline - AHEAD * bound
                key.ripe_at = min(key.ripe_at, job.submitted + self.rule.max_delay, latest)
        self.queue.push(job)
        self.refresh(job.key, now)
        return key

    def leave(self, job: Job) -> None:
        """Take a job out of the queue."""
        self.queue.remove(job)
        key = self.keys[job.key]
        key.jobs -= 1
        key.rows -= job.rows
        key.tokens -= job.rows * job.tokens
        key.bytes -= job.bytes
        if not key.jobs:
            del self.keys[job.key]
            self.queue.show(job.key)

    def potential_batch(self, job: Job) -> tuple[int, int]:
        """Estimate the batch that a job which has left the queue can lead.

        Where the queued jobs of the key have too many rows for one batch, a proportional part of
        their bytes and number is taken.

        Returns:
            The bytes and the number of the batch's jobs, the leader included.
        """
        key = self.keys.get(job.key)
        if key is None:
            return job.bytes, 1
        size, jobs, rows, most = (
            job.bytes + key.bytes,
            1 + key.jobs,
            job.rows + key.rows,
            self.rule.max_rows,
        )
        return (size, jobs) if rows <= most else (size * most // rows, max(1, jobs * most // rows))

    def usual_size(self, name: Hashable) -> int:
        """Return the mean bytes of the queued jobs of a key that has some."""
        key = self.keys[name]
        return key.bytes // key.jobs

    def refresh(self, name: Hashable, now: float) -> None:
        """Make a key ripe if it has waited long enough, or its batch is full."""
        key, rule = self.keys[name], self.rule
        if key.ripe:
            return
        full = key.rows >= rule.max_rows or (
            rule.max_tokens is not None and key.tokens >= rule.max_tokens
        )
        alone = rule.max_delay > 0 and not full and now < key.ripe_at
        if self.hurries or not (key.held or alone):
            key.ripe = True
            self.queue.show(name)

    def holds_back(self, job: Job) -> bool:
        """Return whether a queued job waits for the turn of the loop to end."""
        key = self.keys[job.key]
        return key.held and not key.ripe

    def turn(self, now: float) -> None:
        """Release the keys that were held until the turn of the loop was over."""
        if self.arrived < 2:
            self.gathering = False
        self.arrived = 0
        for name, key in self.keys.items():
            key.held = False
            self.refresh(name, now)

    def flush(self, now: float) -> None:
        """Make each key ripe, now and from now on, without waiting for further jobs."""
        self.hurries = True
        for name in self.keys:
            self.refresh(name, now)
