"""Random walks: a script of facts drawn from a seed, and what the plain model says to each."""

from __future__ import annotations

import random

from aoti_sched.queue.admission import Bounds
from aoti_sched.queue.batch import Batching
from aoti_sched.queue.command import (
    BarrierReached,
    Drained,
    Expire,
    Grant,
    Launch,
    NextTurn,
    Reject,
    Revoke,
    WakeAt,
)
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.job import IllegalFactError, Job, JobState
from aoti_sched.queue.placement import LOOP, Placement, Placing
from tests.queue.plain_model import LIVE, Illegal, PlainModel


class Walk:
    """Facts of one walk as (method, arguments), chosen by what the plain model says is there.

    Times are multiples of 1/8, so that sums of them are exact.
    """

    def __init__(self, seed, steps):
        self.draw = random.Random(seed)
        self.now = 0.0
        draw = self.draw
        budget = draw.choice([0.125, 0.5, 2])
        self.device = (draw.randint(1, 3), draw.choice([None, 1, 3, 6]), draw.choice([None, 60]), budget)
        # Some walks are about barriers, some about placement; one about everything goes nowhere.
        self.barriers, self.short_runs = draw.random() < 0.5, draw.random() < 0.5
        self.batches = draw.random() < 0.5
        self.model = PlainModel(*self.device)
        self.facts = [self.add_runner() for _ in range(draw.randint(1, 3))]
        self.answers = [self.answer(*fact) for fact in self.facts]
        kinds = [
            self.submit,
            self.complete,
            self.cancel,
            self.tick,
            self.release,
            self.leave,
            self.impossible,
            self.turn,
            self.barrier,
        ]
        weights = [50, 22, 8, 7, 7, draw.choice([0, 3, 8]), 1, 8, 12 * self.barriers]
        if self.short_runs:
            weights[1] = 45
        pauses = [0, 0, 0, 0.125] if self.short_runs else [0, 0, 0.125, 0.5, 2]
        while len(self.facts) < steps:
            self.now += draw.choice(pauses)
            fact = draw.choices(kinds, weights)[0]()
            if fact is not None:
                self.facts.append(fact)
                self.answers.append(self.answer(*fact))

    def answer(self, method, arguments):
        try:
            return getattr(self.model, method)(*arguments)
        except Illegal:
            return "illegal"

    def some_job(self, truth):
        jobs = [job.number for job in self.model.jobs if truth(job)]
        return self.draw.choice(jobs) if jobs else None

    # --- facts -----------------------------------------------------------------------------------------

    def add_runner(self):
        draw = self.draw
        bounds = (draw.choice([None, 1, 2, 5]), draw.choice([None, 40]))
        placing = (
            draw.choice(["lane", "lane", "inline", "auto"]),
            draw.choice([0.25, 1]),
            draw.choice([0, 0.25, 1]),
        )
        batching = (draw.randint(2, 5), draw.choice([0, 0, 0.25, 1]))
        batching = batching if self.batches and draw.random() < 0.7 else None
        name = f"r{len(self.model.runners)}"
        return "add_runner", (name, draw.randint(1, 3), *bounds, *placing, batching)

    def submit(self):
        draw, model = self.draw, self.model
        leases = [lease.number for lease in model.leases][-4:]
        if leases and draw.random() < 0.4:
            source, holds = ("lease", draw.choice(leases)), False
        else:
            source, holds = ("runner", draw.randrange(len(model.runners))), draw.random() < 0.2
        deadline = self.now + draw.choice([-0.125, 0, 0.125, 0.5, 1, 3, 9]) if draw.random() < 0.5 else None
        size, wait = draw.choice([0, 0, 5, 20, 40, 60]), draw.random() < 0.6
        if self.short_runs:
            size = draw.choice([0, 0, 0, 5])
        min_epoch = draw.choice([0, 0, 0, 1, 2, 3]) if self.barriers else 0
        rows, key = draw.choice([(1, "k"), (1, "k"), (1, "k"), (2, "k"), (6, "k"), (1, "l"), (0, None)])
        if not self.batches or (holds and draw.random() < 0.9):
            rows, key = 1, None
        exempt = holds and draw.random() < 0.4
        if exempt and draw.random() < 0.9:
            size = 0
        return "submit", (
            self.now,
            len(model.jobs),
            source,
            draw.choice([0, 1, 1, 2]),
            deadline,
            size,
            holds,
            wait,
            min_epoch,
            rows,
            key,
            exempt,
        )

    def complete(self):
        number = self.some_job(lambda job: job.on_lane)
        return None if number is None else ("complete", (self.now, number, self.draw.random() < 0.8))

    def cancel(self):
        number = self.some_job(lambda job: job.state in LIVE)
        return None if number is None else ("cancel", (self.now, number))

    def tick(self):
        return "tick", (self.now,)

    def turn(self):
        return ("turn", (self.now,)) if self.model.turn_asked else None

    def barrier(self):
        """Close one, or open it on the same, the next or an earlier epoch."""
        draw, runners = self.draw, self.model.runners
        number = draw.randrange(len(runners))
        runner = runners[number]
        if not runner.closed and draw.random() < 0.9:
            return "close_barrier", (self.now, number, draw.random() < 0.3)
        epochs = [None, runner.published + 1, draw.randint(1, runner.published), runner.published + 2]
        return "open_barrier", (self.now, number, draw.choices(epochs, [3, 5, 3, 1])[0])

    def release(self):
        leases = [lease.number for lease in self.model.leases]
        return ("release", (self.now, self.draw.choice(leases))) if leases else None

    def leave(self):
        """Drain, terminate, remove what is drained, put another in its place."""
        draw, runners = self.draw, self.model.runners
        number = draw.randrange(len(runners))
        if runners[number].removed:
            return self.add_runner() if len(runners) < 6 else None
        if runners[number].phase == "DRAINED":
            return "remove_runner", (number,)
        return draw.choice(["drain_runner", "drain_runner", "terminate_runner"]), (self.now, number)

    def impossible(self):
        """What the state may or may not allow; mostly not."""
        draw, model = self.draw, self.model
        if not model.jobs:
            return "remove_runner", (draw.randrange(len(model.runners)),)
        job = draw.randrange(len(model.jobs))
        return draw.choice(
            [
                ("complete", (self.now, job, True)),
                ("cancel", (self.now, job)),
                ("submit", (self.now, job, ("runner", 0), 1, None, 0, False, True)),
                ("remove_runner", (draw.randrange(len(model.runners)),)),
                ("add_runner", (model.runners[-1].name, 1, None, None)),
            ]
        )


class Player:
    """Puts a walk's facts to a real `DeviceQueue` and says its commands in the plain model's words."""

    def __init__(self, lanes, jobs, size, budget):
        self.queue = DeviceQueue("cpu", lanes, Bounds(jobs, size), inline_budget=budget)
        self.runners = []
        self.jobs = []
        self.leases = []
        self.wake = None

    def play(self, method, arguments):
        try:
            commands = getattr(self, method)(*arguments)
        except IllegalFactError:
            return "illegal"
        if method == "tick":
            self.wake = None
        return [said for command in commands for said in self.say(command)]

    def say(self, command):
        match command:
            case WakeAt(at=at):
                assert self.wake is None or at < self.wake, (
                    f"asked to wake at {at}, no earlier than {self.wake}"
                )
                self.wake = at
            case Launch(job=job):
                assert job.epoch == job.source.epoch
                assert job.inline == (job.lane == LOOP)
                for member in job.members:
                    assert (member.lane, member.slot, member.epoch) == (job.lane, job.slot, job.epoch)
                members = tuple(member.payload for member in job.members)
                yield "launch", job.payload, job.lane, job.slot, members
            case Grant(job=job, lease=lease):
                assert job.slot == lease.slot
                self.leases.append(lease)
                yield "grant", job.payload, lease.id, lease.slot
            case Reject(job=job, error=error):
                yield "reject", job.payload, type(error).__name__
            case Expire(job=job):
                yield "expire", job.payload
            case Revoke(job=job):
                yield "revoke", job.payload
            case Drained(runner=runner):
                yield "drained", self.runners.index(runner)
            case BarrierReached(runner=runner):
                yield "reached", self.runners.index(runner)
            case NextTurn():
                yield ("next turn",)

    def add_runner(self, name, slots, jobs, size, choice="lane", limit=0, follow_limit=0, batching=None):
        placing = Placing(Placement(choice), limit, follow_limit=follow_limit)
        batching = None if batching is None else Batching(*batching)
        runner = self.queue.add_runner(name, slots, Bounds(jobs, size), placing=placing, batching=batching)
        self.runners.append(runner)
        return []

    def submit(self, now, number, source, priority, deadline, size, holds, wait, *rest):
        """`rest` are a job's further fields, in their order: min_epoch, rows, key, exempt."""
        kind, which = source
        owner = self.leases[which - 1] if kind == "lease" else self.runners[which]
        if number == len(self.jobs):
            self.jobs.append(Job(owner, priority, deadline, size, holds, number, *rest))
        try:
            return self.queue.submit(self.jobs[number], now, wait=wait)
        except IllegalFactError:
            if self.jobs[number].state is JobState.NEW:
                del self.jobs[number]  # there never was such a job
            raise

    def complete(self, now, number, ok):
        return self.queue.complete(self.jobs[number], now, ok=ok)

    def cancel(self, now, number):
        return self.queue.cancel(self.jobs[number], now)

    def tick(self, now):
        return self.queue.tick(now)

    def turn(self, now):
        return self.queue.turn(now)

    def close_barrier(self, now, number, abort):
        return self.queue.close_barrier(self.runners[number], now, abort=abort)

    def open_barrier(self, now, number, epoch):
        return self.queue.open_barrier(self.runners[number], now, epoch=epoch)

    def release(self, now, number):
        return self.queue.release(self.leases[number - 1], now)

    def drain_runner(self, now, number):
        return self.queue.drain_runner(self.runners[number], now)

    def terminate_runner(self, now, number):
        return self.queue.terminate_runner(self.runners[number], now)

    def remove_runner(self, number):
        self.queue.remove_runner(self.runners[number])
        return []
