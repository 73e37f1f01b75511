"""Batch: which jobs may run as one, and how long they wait for company.

Jobs of one runner with the same key may share a launch, as long as their rows together are not too
many. None waits when it could run, but for two reasons. Where several come in one turn of the loop,
the turn is let come to its end, so that they go together. And where it is asked for (`max_delay`),
a key waits for more, though never past a deadline.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import msgspec

from aoti_sched.queue.job import Job
from aoti_sched.queue.selection.job_queue import JobQueue


class Batching(msgspec.Struct, frozen=True):
    """At most `max_rows` rows run as one; a job waits at most `max_delay` seconds for others to
    join it.
    """

    max_rows: int
    max_delay: float = 0.0


class Key:
    """The queued jobs with one key. Once `ripe`, it stays so until none is left."""

    __slots__ = ("bytes", "held", "jobs", "ripe", "ripe_at", "rows")

    def __init__(self) -> None:
        self.jobs = 0
        self.rows = 0
        self.bytes = 0
        self.held = False  # until the turn of the loop is over
        self.ripe = False
        self.ripe_at = math.inf


class BatchQueue:
    """What waits for company at one runner. Keys that are not ripe are hidden in its queue.

    `arrived` counts the jobs of this turn of the loop; while `gathering`, they are held until it is
    over.
    """

    __slots__ = ("arrived", "gathering", "hurries", "keys", "queue", "rule")

    def __init__(self, rule: Batching, queue: JobQueue) -> None:
        self.rule = rule
        self.queue = queue
        self.keys: dict[Hashable, Key] = {}
        self.arrived = 0
        self.gathering = False
        self.hurries = False  # it drains: nobody else will come

    @property
    def waits(self) -> bool:
        """Whether a job that comes now has to be queued, were it the only one."""
        return self.gathering or self.arrived > 0 or self.rule.max_delay > 0

    def note_arrival(self) -> None:
        """A job has come.

        The second in one turn shows that there are many: gather them, from now on.
        """
        self.arrived += 1
        if self.arrived > 1:
            self.gathering = True

    def enter(self, job: Job, now: float, bound: float) -> Key:
        """Queue a job whose run will hardly take longer than `bound` seconds."""
        key = self.keys.get(job.key)
        if key is None:
            key = self.keys[job.key] = Key()
            self.queue.hide(job.key)
        key.jobs += 1
        key.rows += job.rows
        key.bytes += job.bytes
        if not key.ripe:
            key.held = key.held or self.gathering
            if self.rule.max_delay > 0:
                latest = math.inf if job.deadline is None else job.deadline - bound
                key.ripe_at = min(key.ripe_at, job.submitted + self.rule.max_delay, latest)
        self.queue.push(job)
        self.refresh(job.key, now)
        return key

    def leave(self, job: Job) -> None:
        """A job is queued no more."""
        self.queue.remove(job)
        key = self.keys[job.key]
        key.jobs -= 1
        key.rows -= job.rows
        key.bytes -= job.bytes
        if not key.jobs:
            del self.keys[job.key]
            self.queue.show(job.key)

    def potential_batch(self, job: Job) -> tuple[int, int]:
        """How many bytes, of how many jobs, would run together with a job that is queued no
        more, itself included, by what is queued.
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

    def refresh(self, name: Hashable, now: float) -> None:
        """Let a key take part, if it waits no longer."""
        key, rule = self.keys[name], self.rule
        if key.ripe:
            return
        alone = rule.max_delay > 0 and key.rows < rule.max_rows and now < key.ripe_at
        if self.hurries or not (key.held or alone):
            key.ripe = True
            self.queue.show(name)

    def holds_back(self, job: Job) -> bool:
        """Whether a queued job waits for the turn of the loop to end."""
        key = self.keys[job.key]
        return key.held and not key.ripe

    def turn(self, now: float) -> None:
        """The turn of the loop is over."""
        if self.arrived < 2:
            self.gathering = False
        self.arrived = 0
        for name, key in self.keys.items():
            key.held = False
            self.refresh(name, now)

    def flush(self, now: float) -> None:
        """Wait for nobody from now on."""
        self.hurries = True
        for name in self.keys:
            self.refresh(name, now)
