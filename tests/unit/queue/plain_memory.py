"""The plain model of memory: its rules once more, simple and slow.

The model keeps no number that can be counted. Jobs are numbers: each model has its running jobs,
and its queued jobs in their order. There is a lane for each job.
"""

from __future__ import annotations

import math


class PlainModel:
    def __init__(self, name, size):
        self.name, self.size, self.extra = name, size, 0
        self.where = "loading"  # here, leaving, away, coming
        self.since, self.took, self.used = -math.inf, 0.0, -math.inf
        self.fixed = self.held = False
        self.slots = 0
        self.running, self.queued, self.leases = [], [], 0
        self.open = True

    @property
    def bytes(self):
        return self.size + self.extra

    @property
    def busy(self):
        return bool(self.running or self.queued or self.leases)


class PlainMemory:
    """The memory of one device. Each fact returns its commands as (word, model or job) pairs."""

    def __init__(self, limit, *, evicts):
        self.limit, self.evicts = limit, evicts
        self.models, self.claims, self.line = [], [], []
        self.told = []

    # --- counts -----------------------------------------------------------------------------------

    def there(self):
        """Return the models that take memory: not evicted, and without a waiting claim."""
        promised = [model for model, _, returns in self.claims if returns]
        return [m for m in self.models if m.where != "away" and m not in promised]

    def used(self):
        return sum(model.bytes for model in self.there())

    def short(self, size):
        stays = sum(model.bytes for model in self.there() if model.where != "leaving")
        return stays + sum(size for _, size, _ in self.claims) + size - self.limit

    def candidates(self):
        return [
            m
            for m in self.models
            if self.evicts
            and m.where == "here"
            and m.open
            and m.bytes
            and not (m.fixed or m.held or m.leases)
        ]

    def choose(self, order, short):
        chosen = []
        for model in order:
            if sum(m.bytes for m in chosen) < short:
                chosen.append(model)
        if sum(m.bytes for m in chosen) < short:
            return None
        for model in chosen[-2::-1]:
            if sum(m.bytes for m in chosen if m is not model) >= short:
                chosen = [m for m in chosen if m is not model]
        return chosen

    def idle_victims(self, short):
        idle = [m for m in self.candidates() if not m.busy]
        return self.choose(sorted(idle, key=lambda m: m.used), short)

    # --- what follows -----------------------------------------------------------------------------

    def promise(self, model, size, returns, victims):
        if returns:
            model.where = "coming"
            self.line = [m for m in self.line if m is not model]
        self.claims.append((model, size, returns))
        for victim in victims:
            victim.where = "leaving"
            self.see_home(victim)

    def see_home(self, model):
        if model.where == "leaving" and not model.running and not model.leases:
            self.told.append(("park", model.name))

    def give(self, now):
        while self.claims and (
            not self.claims[0][1] or self.used() + self.claims[0][1] <= self.limit
        ):
            model, size, returns = self.claims.pop(0)
            if returns:
                model.since = now
                self.told.append(("return", model.name))
            elif model.where == "loading":
                model.size += size
                self.told.append(("claimed", model.name))
            else:
                model.extra += size
                self.told.append(("claimed", model.name))

    def serve(self, now):
        while self.line:
            model = self.line[0]
            if not model.queued:
                self.line.pop(0)
                continue
            if (
                sum(m.bytes for m in self.models if m.fixed and m.where != "away") + model.bytes
                > self.limit
            ):
                self.line.pop(0)
                self.told += [("revoke", job) for job in model.queued]
                model.queued = []
                continue
            short = self.short(model.bytes)
            victims = self.idle_victims(short)
            if victims is None:
                able = [m for m in self.candidates() if not m.busy or m.since + 4 * m.took <= now]
                victims = self.choose(sorted(able, key=lambda m: (m.busy, m.since)), short)
            if victims is None:
                return
            self.promise(model, model.bytes, True, victims)
            self.give(now)

    def wake(self, now):
        """Return when the next busy model may be evicted for the line; infinite for never."""
        if not self.line:
            return math.inf
        times = [m.since + 4 * m.took for m in self.candidates() if m.busy]
        return min([at for at in times if at > now], default=math.inf)

    def start(self, model, now):
        while (
            model.where == "here"
            and model.queued
            and len(model.running) + model.leases < model.slots
        ):
            job = model.queued.pop(0)
            model.running.append(job)
            self.told.append(("launch", job))

    def ask(self, model, now):
        if model.where == "away" and model.queued and model not in self.line:
            self.line.append(model)

    def answer(self):
        told, self.told = self.told, []
        return sorted(told)

    # --- facts ------------------------------------------------------------------------------------

    def claim(self, model, size, now):
        victims = self.idle_victims(self.short(size))
        if victims is None:
            return "refused"
        if model not in self.models:
            self.models.append(model)
        self.promise(model, size, False, victims)
        self.give(now)
        return self.answer()

    def lives(self, model, slots):
        model.where, model.slots, model.held = "here", slots, True

    def settle(self, model, size, extra, fixed, now):
        model.size, model.extra, model.fixed, model.held = size, extra, fixed, False
        self.give(now)
        self.serve(now)
        return self.answer()

    def forget(self, model, now):
        self.models.remove(model)
        self.give(now)
        self.serve(now)
        return self.answer()

    def call_back(self, model, now):
        if model.where != "away":
            return []
        victims = self.idle_victims(self.short(model.bytes))
        if victims is None:
            return "refused"
        self.promise(model, model.bytes, True, victims)
        self.give(now)
        return self.answer()

    def parked(self, model, now):
        model.where = "away"
        self.give(now)
        self.ask(model, now)
        self.serve(now)
        return self.answer()

    def returned(self, model, ok, now):
        model.where = "here" if ok else "away"
        if ok:
            model.took, model.since = now - model.since, now
            self.start(model, now)
        else:
            self.give(now)
            self.told += [("revoke", job) for job in model.queued]
            model.queued = []
        self.serve(now)
        return self.answer()

    def submit(self, model, job, now):
        model.queued.append(job)
        self.start(model, now)
        self.ask(model, now)
        self.serve(now)
        return self.answer()

    def complete(self, model, job, now):
        model.running.remove(job)
        model.used = now
        self.start(model, now)
        self.see_home(model)
        self.serve(now)
        return self.answer()

    def cancel(self, model, job, now):
        model.queued.remove(job)
        self.serve(now)
        return self.answer()

    def lease(self, model, now):
        model.leases, model.used = model.leases + 1, now
        return self.answer()

    def release(self, model, now):
        model.leases -= 1
        self.start(model, now)
        self.see_home(model)
        self.serve(now)
        return self.answer()

    def tick(self, now):
        self.serve(now)
        return self.answer()
