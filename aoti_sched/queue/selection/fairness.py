"""Fair: whose turn it is among those that share something.

Runners share a device's time, tenants a runner's.

Each has an account of the time it has had, divided by its share: its virtual time. The one with the
least goes next (start-time fair queueing; Goyal, Vin and Cheng, 1996). How long a run takes is
known when it is over, so what is expected is charged at its launch, and the difference at its end.
"""

from __future__ import annotations

from aoti_sched.queue.job import Job, Priority
from aoti_sched.queue.selection.accounts import Account, FairClass


class FairShares:
    """Keeps the accounts of a device's runners, and of their tenants.

    Jobs of a held lease are on its runner's account alone.

    Where it is not `fair`, there are no accounts. A job that is launched without having been queued
    has entered and left.
    """

    __slots__ = ("_turns", "fair")

    def __init__(self, fair: bool) -> None:
        self.fair = fair
        self._turns = tuple(FairClass() for _ in Priority)

    def open(self, name: str, share: float) -> tuple[Account, ...]:
        """A new runner's accounts, by class."""
        if not self.fair:
            return ()
        accounts = tuple(Account(share) for _ in Priority)
        for turns, account in zip(self._turns, accounts, strict=True):
            turns.accounts[name] = account
        return accounts

    def close(self, name: str) -> None:
        """The runner is gone."""
        if self.fair:
            for turns in self._turns:
                del turns.accounts[name]

    def enter(self, job: Job) -> None:
        """It is queued."""
        if not self.fair:
            return
        source, priority = job.source, job.priority
        runner = source.runner
        self._turns[priority].enter(runner.accounts[priority])
        if source is runner:
            turns = runner.tenants[priority]
            job.account = turns.of(job.tenant)
            turns.enter(job.account)

    def leave(self, job: Job) -> None:
        """It is queued no more."""
        if not self.fair:
            return
        job.source.runner.accounts[job.priority].queued -= 1
        if job.account is not None:
            job.account.queued -= 1

    def rest(self, job: Job) -> None:
        """It was queued, and has ended without a run."""
        if job.account is not None:
            job.source.runner.tenants[job.priority].rest(job.account)

    def launch(self, job: Job) -> None:
        """It starts, and what is expected of it is charged."""
        if not self.fair:
            return
        runner, priority = job.source.runner, job.priority
        new = not job.retrying
        runner.accounts[priority].running += new
        self._turns[priority].launch(runner.accounts[priority], job.expected)
        if job.account is not None:
            job.account.running += new
            runner.tenants[priority].launch(job.account, job.expected)

    def settle(self, job: Job, seconds: float) -> None:
        """Its run took so many core seconds."""
        if not self.fair:
            return
        job.source.runner.accounts[job.priority].charge(seconds - job.expected)
        if job.account is not None:
            job.account.charge(seconds - job.expected)

    def end(self, job: Job) -> None:
        """It was launched, and will not run again."""
        if not self.fair:
            return
        runner, priority = job.source.runner, job.priority
        runner.accounts[priority].running -= 1
        if job.account is not None:
            job.account.running -= 1
            runner.tenants[priority].rest(job.account)
