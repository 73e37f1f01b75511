"""Lanes: what runs where, what was handed ahead to a lane, and what is left of the loop's turn.

Each run has a slot of its source, too. Jobs that were handed ahead to a lane share the slot of the
job that runs there, since they run one after the other. Members of a failed batch share the slot,
too: they are retried there, behind what was handed ahead.

Which free lane a run goes to is one of two rules:

- The lane freed last, whose thread may still be awake. This suits lanes that compute.
- The lane that the slot ran on last; else a lane that no slot ran on last; else the lane freed
  last. This suits lanes that launch work on a device: libraries keep memory for each pair of a
  thread and a slot's stream that has met. With as many lanes as slots, each slot stays on one lane.
"""

from __future__ import annotations

from aoti_sched.queue.job import Fact, Job, JobState
from aoti_sched.queue.runner_state import RunnerState, Source
from aoti_sched.queue.selection.placement import LOOP


class Lanes:
    """A device's lanes, and the loop's own thread as one more place to run (`LOOP`).

    Inline runs have `inline_budget` seconds in each turn of the loop.

    A run on a lane takes as many of the device's `cores` as its runner is wide.

    Args:
        count: The number of lanes.
        cores: The number of cores.
        inline_budget: Seconds of inline runs in one turn of the loop.
        keeps: Whether a slot keeps the lane that it ran on last.
        most: The most lanes that `add_slots` adds up to; None where their number is fixed.
    """

    __slots__ = (
        "_claims",
        "_keeps",
        "_most",
        "_slots",
        "cores",
        "count",
        "free",
        "free_cores",
        "handed_ahead",
        "inline_budget",
        "inline_left",
        "running",
    )

    def __init__(
        self,
        count: int,
        cores: int,
        inline_budget: float,
        *,
        keeps: bool = False,
        most: int | None = None,
    ) -> None:
        self.count = count
        self._keeps = keeps
        self._most = most
        self._claims = [0] * count  # by lane: how many slots ran there last
        self._slots = 0  # of all runners
        self.cores = self.free_cores = cores
        self.free = list(reversed(range(count)))  # a stack: the lane used last may still be awake
        self.running: dict[int, Job] = {}  # by lane; of a batch, its leader
        self.handed_ahead: dict[int, list[Job]] = {}  # by lane: behind the running one, in order
        self.inline_budget = inline_budget
        self.inline_left = inline_budget

    def has_launched(self, job: Job) -> bool:
        """Return whether a job was launched and is not complete."""
        if self.running.get(job.lane) is job:
            return True
        ahead = self.handed_ahead.get(job.lane)
        return ahead is not None and job in ahead

    def loop_is_free(self) -> bool:
        return LOOP not in self.running and self.inline_left > 0

    def loop_is_fresh(self) -> bool:
        """Return whether the loop is free, and no inline run has ended in its present turn."""
        return LOOP not in self.running and self.inline_left == self.inline_budget

    def launched(self) -> list[Job]:
        """Return the jobs that were launched and are not complete; of a batch, its leader."""
        jobs = list(self.running.values())
        for ahead in self.handed_ahead.values():
            jobs += ahead
        return jobs

    def add_slots(self, slots: int) -> None:
        """Note a new runner's slots, and add the lanes that are missing for them, with cores."""
        self._slots += slots
        if self._most is None:
            return
        more = min(self._most, self._slots) - self.count
        if more > 0:
            # Below the others in the stack: the new lanes have not run anything.
            self.free[:0] = reversed(range(self.count, self.count + more))
            self._claims += [0] * more
            self.count += more
            self.cores += more
            self.free_cores += more

    def with_slots(self, slots: int) -> int:
        """Return how many lanes there will be with `slots` more slots."""
        if self._most is None:
            return self.count
        return max(self.count, min(self._most, self._slots + slots))

    def cores_with_slots(self, slots: int) -> int:
        """Return how many cores there will be with `slots` more slots."""
        return self.cores + self.with_slots(slots) - self.count

    def remove_slots(self, runner: RunnerState) -> None:
        """Forget a removed runner's slots. Lanes stay."""
        self._slots -= runner.slots
        for lane in runner.last_lanes.values():
            self._claims[lane] -= 1
        runner.last_lanes.clear()

    def next_for(self, source: Source) -> int:
        """Return the lane for a run on the source's next slot. A lane must be free."""
        if not self._keeps:
            return self.free[-1]
        last = source.runner.last_lanes.get(source.free[-1], -1)
        if last >= 0 and last not in self.running:
            return last
        for lane in reversed(self.free):
            if not self._claims[lane]:
                return lane
        return self.free[-1]

    def take(self, job: Job) -> None:
        """Occupy `job.lane`. A lane that runs a short job may be handed the source's next jobs."""
        self.running[job.lane] = job
        if job.lane != LOOP:
            if self._keeps:
                self._keep(job)
            if self.free[-1] == job.lane:
                self.free.pop()
            else:
                self.free.remove(job.lane)
            self.free_cores -= job.source.runner.width
            if job.source.runner.placing.follows(job.size):
                job.source.open_for_next.append(job.lane)

    def _keep(self, job: Job) -> None:
        """Note that a slot runs on a lane, perhaps on another than the last time."""
        lanes = job.source.runner.last_lanes
        last = lanes.get(job.slot, -1)
        if last != job.lane:
            if last >= 0:
                self._claims[last] -= 1
            self._claims[job.lane] += 1
            lanes[job.slot] = job.lane

    def waiting_on(self, lane: int) -> int:
        """Return how many jobs a lane was handed ahead, and has not begun."""
        ahead = self.handed_ahead.get(lane)
        return 0 if ahead is None else len(ahead)

    def open_lane(self, source: Source) -> int:
        """Return the lane for the source's next job: the one with the fewest jobs ahead.

        Of several, it is the one that was opened last. The source must have an open lane.
        """
        lanes = source.open_for_next
        best = lanes[-1]
        if len(lanes) > 1 and self.handed_ahead:
            fewest = self.waiting_on(best)
            for lane in reversed(lanes):
                waiting = self.waiting_on(lane)
                if waiting < fewest:
                    best, fewest = lane, waiting
        return best

    def takes_ahead(self, source: Source, most: int) -> bool:
        """Return whether a lane that the source's jobs run on has fewer than `most` jobs ahead."""
        if not source.open_for_next:
            return False
        waiting = self.waiting_on(self.open_lane(source)) if self.handed_ahead else 0
        return waiting < most

    def hand_ahead(self, job: Job, most: int) -> None:
        """Add a job to those of `job.lane`, an open one, which takes no more than `most` of them.

        A lane that has as many is closed until one of its jobs has ended.
        """
        ahead = self.handed_ahead.get(job.lane)
        if ahead is None:
            ahead = self.handed_ahead[job.lane] = []
        ahead.append(job)
        if len(ahead) >= most:
            job.source.open_for_next.remove(job.lane)

    def leave(self, job: Job, now: float) -> Job | None:
        """Release the lane and slot, or pass them on to a job handed ahead or to be retried.

        Returns the batch member to retry, which is to be launched; None when there is none.
        A lane with a member to retry is handed no other job ahead.
        """
        lane, source = job.lane, job.source
        again = _next_of(job, now) if job.to_retry else None
        ahead = self.handed_ahead.get(lane)
        if source.open_for_next and lane in source.open_for_next:
            source.open_for_next.remove(lane)
        if ahead is not None:
            if self.running[lane] is job:
                self.running[lane] = ahead.pop(0)
            else:  # the lane did not take the job
                ahead.remove(job)
            if again is not None:
                ahead.append(again)
            if not self.running[lane].retrying and not (ahead and ahead[-1].retrying):
                source.open_for_next.append(lane)
            if not ahead:
                del self.handed_ahead[lane]
        elif again is not None:
            self.running[lane] = again
        else:
            del self.running[lane]
            source.free.append(job.slot)
            if lane != LOOP:
                self.free.append(lane)
                self.free_cores += source.runner.width
        return again


def _next_of(job: Job, now: float) -> Job | None:
    """Return the member of a failed batch to retry next; members whose caller left are skipped."""
    rest, job.to_retry = job.to_retry, ()
    for index, member in enumerate(rest):
        if member.state is JobState.RUNNING:
            member.to_retry = rest[index + 1 :]
            member.retrying = True
            member.batch = 1
            member.size = member.bytes
            member.recorded += ((member.started, Fact.LAUNCH, JobState.QUEUED),)
            member.started = now
            member.source.runner.counters.retried += 1
            return member
        member.source.live -= 1
    return None
