"""Random walks: facts drawn from a seed, and the plain model's answers to them."""

from __future__ import annotations

import math
import random

from aoti_sched.errors import ShedError
from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.commands import (
    BarrierReached,
    Drained,
    Expire,
    Failing,
    GoOn,
    Grant,
    Launch,
    NextTurn,
    Reject,
    Revoke,
    Shed,
    WakeAt,
    Withdraw,
)
from aoti_sched.queue.job import IllegalFactError, Job
from aoti_sched.queue.policy import Policy
from aoti_sched.queue.recorded import RecordedQueue
from aoti_sched.queue.selection.placement import LOOP, Placement, Placing
from tests.unit.queue.plain_model import PlainModel
from tests.unit.queue.plain_parts import LIVE, Illegal

ON_LANES = ("lane", 0, 0, 0, 0, math.inf)
"""How a runner is placed that has no wishes."""


def answer_of(model, method, arguments):
    """Return what the plain model says to a fact, and then to `go_on` as often as it is needed."""
    if isinstance(arguments[0], float):
        model.now = arguments[0]
    commands = getattr(model, method)(*arguments)
    while model.goes_on:
        commands += model.go_on(arguments[0])
    return commands


class Walk:
    """The facts of one walk as (method, arguments), drawn from what exists in the plain model.

    Times are multiples of 1/8, and shares powers of two, so that sums of them are exact.
    """

    def __init__(self, seed, steps):
        self.draw = random.Random(seed)
        self.others = random.Random(f"others {seed}")
        self.now = 0.0
        draw = self.draw
        # Each walk is about some of the rules; a walk about all of them meets few cases.
        self.batches, self.tenants = draw.random() < 0.5, draw.random() < 0.5
        self.barriers, self.short_runs = (
            draw.random() < (0.2 if self.batches else 0.4),
            draw.random() < 0.5,
        )
        self.wide, self.tight = draw.random() < 0.3, draw.random() < 0.4
        known = self.tight or draw.random() < 0.6
        self.replicas = draw.random() < 0.3
        budget = draw.choice([0.125, 0.5, 2])
        bounds = (
            draw.choice([None, None, 9] if self.batches else [None, 1, 3, 6]),
            draw.choice([None, 60]),
        )
        lanes = draw.randint(1, 3)
        self.cores = draw.randint(1, lanes + 2) if self.wide else lanes
        self.device = {"lanes": lanes, "jobs": bounds[0], "size": bounds[1], "budget": budget}
        self.device |= {"cores": self.cores if self.wide else None}
        self.device |= {"order": draw.choice(["deadline", "deadline", "arrival"])}
        self.device |= {"fair": draw.random() < 0.75, "expire_late": draw.random() < 0.75}
        self.device |= {"max_wait": draw.choice([None, None, 0, 0.5, 2])}
        # Drawn apart, so that the walks of older seeds stay as they were.
        of_lanes = random.Random(f"lanes {seed}")
        self.device |= {"keeps_lanes": of_lanes.random() < 0.5}
        most = of_lanes.choice([None, None, 2, 4])
        self.device |= {"most_lanes": None if self.wide else most}
        self.model = PlainModel(**self.device)
        self.facts, self.answers, self.ripe_times = [], [], []
        for _ in range(draw.randint(1, 2 if self.batches else 3)):
            self.put(self.add_runner())
        if known:
            self.learn()
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
            self.withdraw,
            self.when_finished,
        ]
        leaving = draw.choice([0, 0, 0, 0, 1, 8] if self.batches else [0, 0, 3, 8])
        weights = [
            50,
            22,
            8,
            7,
            7,
            leaving,
            1,
            8,
            12 * self.barriers,
            6 * self.replicas,
            12 * self.replicas,
        ]
        if self.short_runs:
            weights[1] = 45
        if self.batches:
            weights[0], weights[1] = 90, 35
        pauses = [0, 0, 0, 0.125] if self.short_runs or self.batches else [0, 0, 0.125, 0.5, 2]
        self.succeeds = draw.choice([0.8, 0.8, 0.95, 0.4])
        for _ in range(steps):
            self.now += draw.choice(pauses)
            self.put(draw.choices(kinds, weights)[0]())

    def put(self, fact):
        if fact is not None:
            self.facts.append(fact)
            self.answers.append(self.answer(*fact))
            self.ripe_times.append((self.model.ripe_times(), self.model.ripe_times(held=True)))

    def learn(self):
        """Put some runs, one after the other, so that run times are known from the start."""
        draw, model = self.draw, self.model
        for which in range(len(model.runners)):
            for size in draw.sample(
                [0, 5, 10] if self.short_runs else [0, 5, 20], draw.randint(1, 3)
            ):
                usual = 1 if self.tight and draw.random() < 0.5 else draw.choice([0.125, 0.25])
                for _ in range(8):
                    wish = {
                        "priority": 1,
                        "deadline": None,
                        "bytes": size,
                        "is_lease_request": False,
                    }
                    number = len(model.jobs)
                    self.put(("submit", (self.now, number, ("runner", which), False, wish)))
                    self.now += draw.choice([usual, usual, usual, 0.125, 0.5])
                    if model.jobs[number].run:
                        self.put(("complete", (self.now, number, True)))
                    self.put(self.turn())

    def answer(self, method, arguments):
        try:
            return answer_of(self.model, method, arguments)
        except Illegal:
            return "illegal"

    def some_job(self, truth):
        jobs = [job.number for job in self.model.jobs if truth(job)]
        return self.draw.choice(jobs) if jobs else None

    # --- facts ------------------------------------------------------------------------------------

    def add_runner(self):
        draw = self.draw
        tenant_jobs = draw.choice([None, 1, 2]) if self.tenants else None
        jobs = draw.choice([None, None, 5] if self.batches else [None, 1, 2, 5])
        bounds = (jobs, draw.choice([None, 40]), tenant_jobs)
        placing = (
            draw.choice(["lane", "lane", "inline", "auto"]),
            draw.choice([0.25, 1, 2]),
            draw.choice([0, 1, 1] if self.short_runs else [0, 0.25, 1]),
            self.others.choice([0, 0.5, 1, 4]),
            draw.choice([0, 0.125]),
            self.others.choice([0, 0.25, 1, math.inf]),
        )
        rest = {
            "width": draw.randint(1, min(self.cores, 3)) if self.wide else 1,
            "share": draw.choice([0.5, 1.0, 1.0, 2.0]),
            "sheds": draw.random() < 0.3,
            "predicts": draw.random() < 0.4,
            "routable": self.replicas,
            "batching": None,
        }
        if self.batches and draw.random() < 0.8:
            rest["batching"] = (
                draw.choice([1, 4, 5, 8, 8, 8]),
                draw.choice([0, 0, 0, 0.125, 0.5, 2]),
                draw.choice([math.inf, math.inf, None, None, 0.25, 1]),
                draw.choice([None, None, 6, 12]),
            )
        if self.others.random() < 0.3:
            rest["waiting"] = self.others.choice([1, 2])
        return "add_runner", (
            f"r{len(self.model.runners)}",
            draw.randint(1, 3),
            bounds,
            placing,
            rest,
        )

    def submit(self):
        draw, model = self.draw, self.model
        leases = [lease.number for lease in model.leases if not lease.over or draw.random() < 0.1][
            -4:
        ]
        runners = [
            runner for runner in model.runners if runner.phase == "OPEN" or draw.random() < 0.1
        ]
        runners = runners or model.runners
        if leases and draw.random() < (0.15 if self.batches else 0.4):
            source, holds = ("lease", draw.choice(leases)), False
            runner = model.leases[source[1] - 1].runner
        else:
            source, holds = (
                ("runner", model.runners.index(draw.choice(runners))),
                draw.random() < (0.05 if self.batches else 0.15),
            )
            runner = model.runners[source[1]]
        after = [0.125, 0.25, 0.5, 1] if self.tight else [-0.125, 0, 0.125, 0.5, 1, 3, 9]
        hurried = draw.random() < (0.8 if self.tight else 0.25 if self.batches else 0.5)
        deadline = self.now + draw.choice(after) if hurried else None
        size = draw.choice([0, 0, 5] if self.short_runs or self.tight else [0, 0, 5, 20, 40, 60])
        wish = {
            "priority": draw.choice([0, 1, 1, 1, 2]),
            "deadline": deadline,
            "bytes": size,
            "is_lease_request": holds,
            "min_epoch": draw.choice([0, 0, 0, 1, 2, 3]) if self.barriers else 0,
            "tenant": draw.choice([None, "a", "b", "c"]) if self.tenants else None,
            "rows": draw.choice([0, 1, 1, 1, 2, 3, 5]),
            "tokens": draw.choice([1, 1, 1, 2, 3]),
            "key": draw.choice([None, "k", "k", "k", "k", "l"]) if self.batches else None,
        }
        if holds or runner.batching is None or not 1 <= wish["rows"] <= runner.batching[0]:
            wish["key"] = None
        if holds and draw.random() < 0.4:
            wish["bypasses_limits"] = True
            if draw.random() < 0.9:
                wish["bytes"] = wish["min_epoch"] = 0
        wait = not runner.sheds and draw.random() < 0.6
        if (
            self.replicas and source[0] == "runner" and draw.random() < 0.3
        ):  # withdrawn at another replica
            since = self.now - draw.choice([0, 0.125, 0.5, 2])
            return "submit", (self.now, len(model.jobs), source, True, wish, since)
        return "submit", (self.now, len(model.jobs), source, wait, wish)

    def complete(self):
        number = self.some_job(lambda job: job.run is not None and job.run.members[0] is job)
        succeeds = self.draw.random() < self.succeeds
        return None if number is None else ("complete", (self.now, number, succeeds))

    def cancel(self):
        number = self.some_job(lambda job: job.state in LIVE)
        return None if number is None else ("cancel", (self.now, number))

    def tick(self):
        return "tick", (self.now,)

    def turn(self):
        return ("turn", (self.now,)) if self.model.turn_asked else None

    def barrier(self):
        """Close a barrier, or open it on the same, the next, an earlier or an illegal epoch."""
        draw, runners = self.draw, self.model.runners
        closed = [runner for runner in runners if runner.closed]
        runner = draw.choice(closed if closed and draw.random() < 0.6 else runners)
        number = runners.index(runner)
        if not runner.closed and draw.random() < 0.9:
            return "close_barrier", (self.now, number, draw.random() < 0.3)
        epochs = [
            None,
            runner.published + 1,
            draw.randint(1, runner.published),
            runner.published + 2,
        ]
        return "open_barrier", (self.now, number, draw.choices(epochs, [3, 5, 3, 1])[0])

    def release(self):
        leases = [lease.number for lease in self.model.leases]
        return ("release", (self.now, self.draw.choice(leases))) if leases else None

    def leave(self):
        """Drain or terminate a runner, remove a drained one, or add one after a removal."""
        draw, runners = self.draw, self.model.runners
        number = draw.randrange(len(runners))
        if runners[number].removed:
            return self.add_runner() if len(runners) < 6 else None
        if runners[number].phase == "DRAINED":
            return "remove_runner", (number,)
        return draw.choice(["drain_runner", "drain_runner", "terminate_runner"]), (self.now, number)

    def withdraw(self):
        number = self.draw.randrange(len(self.model.runners))
        return "withdraw", (self.now, number)

    def when_finished(self):
        draw, runners = self.draw, self.model.runners
        numbers = [number for number, runner in enumerate(runners) if not runner.removed]
        tenant = draw.choice([None, "a", "d"])
        wish = {
            "priority": draw.choice([0, 1, 2]),
            "bytes": draw.choice([0, 5, 20]),
            "tenant": tenant,
        }
        return ("when_finished", (self.now, draw.choice(numbers), wish)) if numbers else None

    def impossible(self):
        """Draw a fact without regard to the state, so that it is mostly illegal."""
        draw, model = self.draw, self.model
        if not model.jobs:
            return "remove_runner", (draw.randrange(len(model.runners)),)
        job = draw.randrange(len(model.jobs))
        return draw.choice(
            [
                ("complete", (self.now, job, True)),
                ("cancel", (self.now, job)),
                ("submit", (self.now, job, ("runner", 0), True, {})),
                ("remove_runner", (draw.randrange(len(model.runners)),)),
                (
                    "add_runner",
                    (
                        model.runners[-1].name,
                        1,
                        (None, None, None),
                        ON_LANES,
                        {},
                    ),
                ),
                (
                    "add_runner",
                    (
                        "too wide",
                        1,
                        (None, None, None),
                        ON_LANES,
                        {"width": 9},
                    ),
                ),
            ]
        )


class Player:
    """Puts a walk's facts to a queue, and translates its commands to the plain model's."""

    def __init__(self, lanes, jobs, size, budget, cores, **policy):
        bounds, policy = Bounds(jobs, size), Policy(**policy)
        self.queue = RecordedQueue(
            "cpu", lanes, bounds, inline_budget=budget, cores=cores, policy=policy
        )
        self.runners = []
        self.jobs = []
        self.leases = []
        self.wake = None

    def play(self, method, arguments):
        try:
            commands = list(getattr(self, method)(*arguments))
        except IllegalFactError:
            return "illegal"
        while GoOn() in commands:
            commands.remove(GoOn())
            commands += self.queue.go_on(arguments[0])
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
                for member in job.members or (job,):
                    assert member.epoch == job.source.epoch
                    assert member.inline == (job.lane == LOOP)
                    assert (member.lane, member.slot, member.started) == (
                        job.lane,
                        job.slot,
                        job.started,
                    )
                yield (
                    "launch",
                    job.payload,
                    job.lane,
                    job.slot,
                    tuple(each.payload for each in job.members),
                )
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
            case Shed(job=job, error=error):
                assert type(error) is ShedError
                yield "shed", job.payload
            case Withdraw(job=job):
                yield "withdraw", job.payload
            case Failing(runner=runner):
                yield "failing", self.runners.index(runner)
            case Drained(runner=runner):
                yield "drained", self.runners.index(runner)
            case BarrierReached(runner=runner):
                yield "reached", self.runners.index(runner)
            case ("in", _):
                yield command
            case NextTurn():
                yield ("next turn",)

    def add_runner(self, name, slots, bounds, placing, rest):
        choice, limit, follow_limit, ahead_limit, hop, backlog_limit = placing
        placing = Placing(
            Placement(choice),
            limit,
            follow_limit=follow_limit,
            ahead_limit=ahead_limit,
            hop=hop,
            backlog_limit=backlog_limit,
        )
        if rest.get("batching"):
            rest = rest | {"batching": Batching(*rest["batching"])}
        rest = dict(rest)
        bounds = Bounds(*bounds, waiting=rest.pop("waiting", None))
        self.runners.append(self.queue.add_runner(name, slots, bounds, placing=placing, **rest))
        return []

    def submit(self, now, number, source, wait, wish, since=None):
        kind, which = source
        owner = self.leases[which - 1] if kind == "lease" else self.runners[which]
        if number < len(self.jobs):
            return self.queue.submit(self.jobs[number], now, wait=wait, since=since)
        job = Job(owner, payload=number, **wish)
        # An illegal job raises here, and is not kept.
        commands = self.queue.submit(job, now, wait=wait, since=since)
        self.jobs.append(job)
        return commands

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

    def withdraw(self, now, number):
        return self.queue.withdraw(self.runners[number], now)

    def when_finished(self, now, number, wish):
        seconds = self.queue.when_finished(Job(self.runners[number], **wish), now)
        return [("in", round(seconds, 9))]

    def remove_runner(self, number):
        self.queue.remove_runner(self.runners[number])
        return []
