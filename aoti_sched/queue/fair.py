"""Fair: whose turn it is among those that share something. Runners share a device's time, tenants a runner's.

Each has an account of the time it has had, divided by its share: its virtual time. The one with the least goes
next (start-time fair queueing; Goyal, Vin and Cheng, 1996). How long a run takes is known when it is over, so what is
expected is charged at its launch, and the difference at its end.
"""

from __future__ import annotations

from collections.abc import Hashable

from aoti_sched.queue.job import Job, Priority


class Account:
    """What one has had of something shared, in one priority class.

    `virtual` never falls: what was charged too much is kept as a (negative) `balance` and set off against what comes.
    `queued` counts its queued jobs, `running` those that were launched and are not settled.
    """

    __slots__ = ("balance", "queued", "running", "share", "virtual")

    def __init__(self, share: float = 1.0, virtual: float = 0.0) -> None:
        self.share = share
        self.virtual = virtual
        self.balance = 0.0
        self.queued = 0
        self.running = 0

    def charge(self, seconds: float) -> None:
        self.balance += seconds
        if self.balance > 0.0:
            self.virtual += self.balance / self.share
            self.balance = 0.0


class Turns:
    """The accounts of one priority class that take turns. Nobody saves up turns while it has nothing to do.

    `floor` is the virtual time that was last served: who comes, or comes back, begins there.
    """

    __slots__ = ("_many", "accounts", "floor")

    def __init__(self) -> None:
        self.floor = 0.0
        self.accounts: dict[Hashable, Account] = {}
        self._many = 64

    def enter(self, account: Account) -> None:
        """One of its jobs is queued."""
        if not account.queued and account.virtual <= self.floor:  # what was not used is lost
            account.virtual = self.floor
            account.balance = 0.0
        account.queued += 1

    def launch(self, account: Account, seconds: float) -> None:
        """One of its jobs starts, and is expected to take so long."""
        self.floor = max(self.floor, account.virtual)
        account.running += 1
        account.charge(seconds)

    def of(self, name: Hashable) -> Account:
        """The account of this name, a new one if need be."""
        account = self.accounts.get(name)
        if account is None:
            if len(self.accounts) >= self._many:
                self._forget()
            account = self.accounts[name] = Account()
        return account

    def _forget(self) -> None:
        """Those that have nothing to do, and nothing to pay, are as good as new. That of nobody is always there."""
        for name, account in list(self.accounts.items()):
            idle = not (account.queued or account.running) and account.virtual <= self.floor
            if idle and name is not None:
                del self.accounts[name]
        self._many = max(64, 2 * len(self.accounts))


class Ledger:
    """Keeps the accounts of a device's runners, and of their tenants. Jobs of a held lease are on its runner's account alone.

    Where it is not `fair`, there are no accounts. A job that is launched without having been queued has entered and left.
    """

    __slots__ = ("_turns", "fair")

    def __init__(self, fair: bool) -> None:
        self.fair = fair
        self._turns = tuple(Turns() for _ in Priority)

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

    def launch(self, job: Job) -> None:
        """It starts, and what is expected of it is charged."""
        if not self.fair:
            return
        runner, priority = job.source.runner, job.priority
        self._turns[priority].launch(runner.accounts[priority], job.expected)
        if job.account is not None:
            runner.tenants[priority].launch(job.account, job.expected)

    def settle(self, job: Job, seconds: float) -> None:
        """Its run took so many core seconds."""
        if not self.fair:
            return
        account = job.source.runner.accounts[job.priority]
        account.running -= 1
        account.charge(seconds - job.expected)
        if job.account is not None:
            job.account.running -= 1
            job.account.charge(seconds - job.expected)
