"""Sustained load on a `DeviceQueue` in virtual time: no test sleeps."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from tests.unit.queue.support import launches


@dataclass(eq=False)
class Stream:
    """One client that always has `depth` requests under way, each of which takes `seconds`."""

    make: object  # returns a new job
    seconds: float
    depth: int = 4
    served: float = 0.0
    """Seconds of the client's runs so far."""
    runs: list = field(default_factory=list)


class Load:
    """Streams at work on a queue.

    `submit` adds a single job; a stream with depth 0 says how long it takes.
    """

    def __init__(self, queue, streams):
        self.queue = queue
        self.now = 0.0
        self.done = 0
        self.launched = []
        self._ends = []
        self._of = {}
        for stream in streams:
            self.join(stream)

    def join(self, stream):
        for _ in range(stream.depth):
            self.submit(stream.make(), stream)

    def submit(self, job, stream):
        self._of[job] = stream
        self._perform(self.queue.submit(job, self.now))

    def step(self):
        """Go on to the next completion; each stream of its jobs then submits one more."""
        self.now, _, leader = heapq.heappop(self._ends)
        jobs = leader.members or (leader,)
        streams = [self._of.pop(job) for job in jobs]
        for job, stream in zip(jobs, streams, strict=True):
            stream.served += stream.seconds
            stream.runs.append(job)
        self.done += len(jobs)
        self._perform(self.queue.complete(leader, self.now))
        for stream in streams:
            if stream.depth:
                self.submit(stream.make(), stream)

    def run(self, jobs):
        done = self.done + jobs
        while self.done < done:
            self.step()

    def run_until(self, time):
        while self._ends and self._ends[0][0] <= time:
            self.step()
        self.now = time

    def _perform(self, commands):
        for leader in launches(commands):
            self.launched.append(leader)
            seconds = max(self._of[job].seconds for job in leader.members or (leader,))
            heapq.heappush(self._ends, (self.now + seconds, leader.id, leader))
