"""Random walks through the rules of memory: the queue answers as the plain model does.

The invariants hold after every fact.
"""

from __future__ import annotations

import math
import random

import pytest

from aoti_sched.errors import MemoryLimitError
from aoti_sched.queue.commands import Claimed, Drained, Grant, Launch, Park, Return, Revoke, WakeAt
from aoti_sched.queue.holding import Holding
from aoti_sched.queue.job import Job, JobState
from aoti_sched.queue.memory import Claim
from tests.unit.queue.plain_memory import PlainMemory, PlainModel
from tests.unit.queue.seeds import share_of_seeds
from tests.unit.queue.support import add, device

WORDS = {Park: "park", Return: "return", Claimed: "claimed", Launch: "launch", Revoke: "revoke"}
STEPS, SHARES = 120, 4


class Walk:
    """One walk, through the queue and the plain model at once.

    Times are multiples of 1/8, so that sums of them are exact.
    """

    def __init__(self, seed):
        self.draw = draw = random.Random(seed)
        limit, evicts = draw.choice([8, 12, 20]), draw.random() < 0.9
        self.queue = device(64, memory=limit, evicts=evicts)
        self.plain = PlainMemory(limit, evicts=evicts)
        self.now, self.names, self.wake = 0.0, 0, math.inf
        self.sides = {}  # by plain model: its record, and its runner once it takes requests
        self.jobs, self.leases, self.due = {}, {}, []

    def both(self, fact, plain):
        """Put a fact to both sides, and assert that their commands are the same.

        Commands to be performed are added to `due`.
        """
        try:
            commands = fact()
        except MemoryLimitError:
            commands = "refused"
        answer = plain()
        if commands == "refused":
            assert answer == "refused"
            return False
        told = []
        for command in commands:
            match command:
                case WakeAt(at=at):
                    self.wake = at
                case Park(runner=runner) | Return(runner=runner):
                    self.due.append((WORDS[type(command)], runner.name))
                    told.append(self.due[-1])
                case Claimed(claim=claim):
                    told.append(("claimed", claim.holding.name))
                case Launch(job=job) | Revoke(job=job):
                    told.append((WORDS[type(command)], job.payload))
                case Grant(lease=lease):
                    self.leases[lease.runner.name].append(lease)
                case Drained():
                    pass
        assert sorted(told) == answer
        assert self.wake <= self.plain.wake(self.now)
        return True

    def some(self, *where, truth=lambda model: True):
        models = [m for m in self.plain.models if m.where in where and truth(m)]
        return self.draw.choice(models) if models else None

    # --- facts ------------------------------------------------------------------------------------

    def load(self):
        if sum(m.where != "loading" for m in self.plain.models) >= 6:
            return
        self.names += 1
        name = f"m{self.names}"
        model, holding = PlainModel(name, 0), Holding(name)
        size = self.draw.randint(0, 8)
        claim = Claim(holding, size)
        if self.both(
            lambda: self.queue.claim(claim, self.now),
            lambda: self.plain.claim(model, size, self.now),
        ):
            self.sides[model] = (holding, None)

    def serve(self):
        """Let a model whose memory is claimed take requests, or give up its load."""
        waits = [model for model, _, _ in self.plain.claims]
        model = self.some("loading", truth=lambda model: model not in waits)
        if model is None:
            return
        holding, _ = self.sides[model]
        if self.draw.random() < 0.2:
            self.both(
                lambda: self.queue.release_memory(holding, self.now),
                lambda: self.plain.forget(model, self.now),
            )
            return
        slots = self.draw.randint(1, 2)
        self.sides[model] = (holding, add(self.queue, model.name, slots, memory=holding))
        self.leases[model.name] = []
        self.plain.lives(model, slots)

    def submit(self):
        model = self.some(
            "here", "leaving", "away", "away", "coming", truth=lambda model: model.open
        )
        if model is None:
            return
        number = len(self.jobs)
        job = Job(self.sides[model][1])
        job.payload = number
        self.jobs[number] = (model, job)
        self.both(
            lambda: self.queue.submit(job, self.now),
            lambda: self.plain.submit(model, number, self.now),
        )

    def finish(self):
        running = [number for model in self.plain.models for number in model.running]
        if running:
            number = self.draw.choice(running)
            model, job = self.jobs[number]
            self.both(
                lambda: self.queue.complete(job, self.now),
                lambda: self.plain.complete(model, number, self.now),
            )

    def cancel(self):
        queued = [number for model in self.plain.models for number in model.queued]
        if queued:
            number = self.draw.choice(queued)
            model, job = self.jobs[number]
            self.both(
                lambda: self.queue.cancel(job, self.now),
                lambda: self.plain.cancel(model, number, self.now),
            )
            assert job.state is JobState.CANCELLED

    def lease(self):
        model = self.some(
            "here", truth=lambda m: m.open and not m.queued and len(m.running) + m.leases < m.slots
        )
        if model is not None:
            job = Job(self.sides[model][1], is_lease_request=True)
            self.both(
                lambda: self.queue.submit(job, self.now), lambda: self.plain.lease(model, self.now)
            )

    def release(self):
        model = self.some("here", truth=lambda m: m.leases)
        if model is not None:
            lease = self.leases[model.name].pop()
            self.both(
                lambda: self.queue.release(lease, self.now),
                lambda: self.plain.release(model, self.now),
            )

    def perform(self):
        """Complete a commanded park or return; a return may also fail."""
        if not self.due:
            return
        word, name = self.due.pop(self.draw.randrange(len(self.due)))
        model = next(m for m in self.plain.models if m.name == name)
        runner = self.sides[model][1]
        if word == "park":
            self.both(
                lambda: self.queue.parked(runner, self.now),
                lambda: self.plain.parked(model, self.now),
            )
            return
        ok = self.draw.random() < 0.9
        error = "" if ok else "broken"
        self.both(
            lambda: self.queue.returned(runner, self.now, error=error),
            lambda: self.plain.returned(model, ok, self.now),
        )

    def update(self):
        """Take one step of a model's update: pin it, restore it, claim memory, or end the update.

        At the end, the model has as much memory as it claimed, or less.
        """
        waits = [model for model, _, _ in self.plain.claims]
        model = self.some(
            "here", "away", "leaving", "coming", truth=lambda m: m.open and m not in waits
        )
        if model is None:
            return
        holding, runner = self.sides[model]
        if not model.held:
            model.held = True
            self.queue.pin(runner)
        elif model.where != "here":
            self.both(
                lambda: self.queue.call_back(runner, self.now),
                lambda: self.plain.call_back(model, self.now),
            )
        elif not model.extra and self.draw.random() < 0.6:
            claim = Claim(holding, model.size)
            self.both(
                lambda: self.queue.claim(claim, self.now),
                lambda: self.plain.claim(model, model.size, self.now),
            )
        else:
            extra, fixed = model.extra * self.draw.randint(0, 1), self.draw.random() < 0.2
            self.both(
                lambda: self.queue.update_use(
                    holding,
                    self.now,
                    constants=model.size,
                    inactive=extra,
                    fixed="dear" if fixed else "",
                ),
                lambda: self.plain.settle(model, model.size, extra, fixed, self.now),
            )

    def close(self):
        waits = [model for model, _, _ in self.plain.claims]
        model = self.some("here", "away", truth=lambda m: not m.busy and m not in waits)
        if model is not None:
            holding, runner = self.sides[model]
            model.open = False
            self.queue.drain_runner(runner, self.now)
            self.queue.remove_runner(runner)
            self.both(
                lambda: self.queue.release_memory(holding, self.now),
                lambda: self.plain.forget(model, self.now),
            )

    def tick(self):
        self.wake = math.inf
        self.both(lambda: self.queue.tick(self.now), lambda: self.plain.tick(self.now))

    def go(self, steps):
        facts = [
            self.load,
            self.serve,
            self.submit,
            self.finish,
            self.cancel,
            self.lease,
            self.release,
        ]
        facts += [self.perform, self.update, self.close, self.tick]
        weights = [8, 12, 30, 20, 4, 4, 6, 25, 8, 1, 3]
        for _ in range(steps):
            self.now += self.draw.choice([0, 0, 0.125, 0.5])
            if self.wake <= self.now:
                self.tick()
            self.draw.choices(facts, weights)[0]()

    def must_end(self):
        """Complete all that can be completed, and return whether no job waits any more."""
        for model in self.plain.models:
            if model.open and model.where != "loading" and model.held:
                holding, _ = self.sides[model]
                self.both(
                    lambda h=holding, m=model: self.queue.update_use(
                        h, self.now, constants=m.size, inactive=m.extra
                    ),
                    lambda m=model: self.plain.settle(m, m.size, m.extra, False, self.now),
                )
        for _ in range(2000):
            self.now += 1
            if self.wake <= self.now:
                self.tick()
            self.release()
            self.serve()
            self.finish()
            self.perform()
        return not any(model.queued for model in self.plain.models)


@pytest.mark.long
@pytest.mark.parametrize("share", range(SHARES))
def test_the_core_does_what_the_plain_model_says(share):
    for seed in share_of_seeds(share, SHARES):
        walk = Walk(seed)
        try:
            walk.go(STEPS)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.parametrize("seed", range(60))
def test_who_stands_in_line_comes_back_in_the_end(seed):
    walk = Walk(seed)
    walk.go(STEPS)
    assert walk.must_end()


def test_walks_go_through_all_of_it():
    seen = set()
    for seed in range(40):
        walk = Walk(seed)
        both = walk.both

        def watch(fact, plain, both=both, walk=walk):
            before = len(walk.due)
            ok = both(fact, plain)
            seen.update(word for word, _ in walk.due[before:])
            seen.add("granted" if ok else "refused")
            return ok

        walk.both = watch
        walk.go(STEPS)
        seen.update(f"{job.state.name}" for _, job in walk.jobs.values())
    assert seen >= {"park", "return", "granted", "refused", "DONE", "REVOKED", "CANCELLED"}
