"""Accounts: the time that each of several had of something shared, and which of them goes next.

The account with the least virtual time goes next (start-time fair queueing; Goyal, Vin and Cheng,
1996). `fairness.py` says what is charged to accounts, and when.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable

DEBTORS = 1024
"""Idle tenants of one runner and class whose accounts are kept although they had more than what
is served now. Of more, those that had the least are forgotten, and no tenant begins before them
any more.
"""


class Account:
    """What one has had of something shared, in one priority class.

    `virtual` never falls: what was charged too much is kept as a (negative) `balance` and set off
    against what comes. `queued` counts its queued jobs, `running` those that were launched and have
    not ended: members of a failed batch that are to be run again are among them. A tenant's account
    has its `name`. `rested` numbers the time since which it is idle; 0 while it is not.
    """

    __slots__ = ("balance", "name", "queued", "rested", "running", "share", "virtual")

    def __init__(self, share: float = 1.0, virtual: float = 0.0, name: Hashable = None) -> None:
        self.share = share
        self.virtual = virtual
        self.name = name
        self.rested = 0
        self.balance = 0.0
        self.queued = 0
        self.running = 0

    def charge(self, seconds: float) -> None:
        self.balance += seconds
        if self.balance > 0.0:
            self.virtual += self.balance / self.share
            self.balance = 0.0


class FairClass:
    """The accounts of one priority class that take turns.

    No account saves up turns while it has nothing to do.

    `floor` is the virtual time that was last served: an account that comes, or comes back, begins
    there. An idle tenant's account that is not above the floor is as good as a new one, and is
    forgotten.
    """

    __slots__ = ("_idle", "_resting", "_rests", "accounts", "floor")

    def __init__(self) -> None:
        self.floor = 0.0
        self.accounts: dict[Hashable, Account] = {}
        self._idle: list[
            tuple[float, int, Account]
        ] = []  # the least virtual time first; some have come back
        self._resting = 0  # how many of these have not
        self._rests = 0

    def enter(self, account: Account) -> None:
        """One of its jobs is queued."""
        if not account.queued and account.virtual <= self.floor:  # what was not used is lost
            account.virtual = self.floor
            account.balance = 0.0
        account.queued += 1
        if account.rested:
            account.rested = 0
            self._resting -= 1

    def launch(self, account: Account, seconds: float) -> None:
        """One of its jobs starts, and is expected to take so long."""
        self.floor = max(self.floor, account.virtual)
        account.charge(seconds)

    def rest(self, account: Account) -> None:
        """A job of a tenant's has ended: if it was the last, forget the account, or keep it as
        long as there are not too many.
        """
        if account.queued or account.running or account.name is None:
            return
        self._rests += 1
        self._resting += 1
        account.rested = self._rests
        heapq.heappush(self._idle, (account.virtual, self._rests, account))
        for _ in range(2):  # each time two, so that none has to take all
            if self._idle and self._idle[0][0] <= self.floor:
                self._forget_first()
        while self._resting > DEBTORS:
            self._forget_first()
        if len(self._idle) > 2 * self._resting + 16:
            self._idle = [entry for entry in self._idle if entry[2].rested == entry[1]]
            heapq.heapify(self._idle)

    def of(self, name: Hashable) -> Account:
        """The account of this name, a new one if need be."""
        account = self.accounts.get(name)
        if account is None:
            account = self.accounts[name] = Account(name=name)
        return account

    def _forget_first(self) -> None:
        """Of the idle ones; unless it has come back."""
        virtual, rests, account = heapq.heappop(self._idle)
        if account.rested == rests:
            self.floor = max(self.floor, virtual)
            self._resting -= 1
            del self.accounts[account.name]
