"""Accounts: the device time that runners or tenants have had, and which of them goes next.

The account with the least virtual time goes next (start-time fair queueing; Goyal, Vin and Cheng,
1996). `fairness.py` says what is charged to accounts, and when.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable

DEBTORS = 1024
"""The most idle tenants of one runner and class whose accounts are kept.

Kept accounts have more virtual time than the floor. Of more such accounts, those with the least are
forgotten, and the floor rises to their virtual time.
"""


class Account:
    """The device time that a runner or tenant has had, in one priority class.

    Args:
        share: The part of the time, relative to the shares of the other accounts.
        virtual: Core seconds charged so far, divided by the share; never falls.
        name: The tenant, of a tenant's account.

    Attributes:
        balance: Core seconds charged too much (below zero), to be set off against later charges.
        queued: Queued jobs.
        running: Jobs that were launched and have not ended, members to be retried included.
        rested: The number of the account's present rest; 0 while the account is not idle.
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
    """The accounts of one priority class that share time.

    An account gains nothing by being idle: when a job comes again, the account begins at the floor.
    An idle tenant's account that is not above the floor is as good as a new one, and is forgotten.

    Attributes:
        floor: The highest virtual time that an account had at a launch, or when forgotten.
        accounts: The accounts by the name of the runner or tenant.
    """

    __slots__ = ("_idle", "_resting", "_rests", "accounts", "floor")

    def __init__(self) -> None:
        self.floor = 0.0
        self.accounts: dict[Hashable, Account] = {}
        # A heap of (virtual time, rest, account); some of the accounts are not idle any more.
        self._idle: list[tuple[float, int, Account]] = []
        self._resting = 0  # how many of these are still idle
        self._rests = 0

    def enter(self, account: Account) -> None:
        """Count a job that is queued."""
        if not account.queued and account.virtual <= self.floor:  # time that was not used is lost
            account.virtual = self.floor
            account.balance = 0.0
        account.queued += 1
        if account.rested:
            account.rested = 0
            self._resting -= 1

    def launch(self, account: Account, seconds: float) -> None:
        """Charge a job that starts, and is expected to take `seconds`."""
        self.floor = max(self.floor, account.virtual)
        account.charge(seconds)

    def rest(self, account: Account) -> None:
        """Note that a job has ended. A tenant's account becomes idle with its last job.

        Idle accounts that are not above the floor are forgotten, two at a time. So are those with
        the least virtual time when there are more than `DEBTORS`.
        """
        if account.queued or account.running or account.name is None:
            return
        self._rests += 1
        self._resting += 1
        account.rested = self._rests
        heapq.heappush(self._idle, (account.virtual, self._rests, account))
        for _ in range(2):  # two each time, so that no fact has to forget all
            if self._idle and self._idle[0][0] <= self.floor:
                self._forget_first()
        while self._resting > DEBTORS:
            self._forget_first()
        if len(self._idle) > 2 * self._resting + 16:
            self._idle = [entry for entry in self._idle if entry[2].rested == entry[1]]
            heapq.heapify(self._idle)

    def of(self, name: Hashable) -> Account:
        """Return the account of a name, a new one if there is none."""
        account = self.accounts.get(name)
        if account is None:
            account = self.accounts[name] = Account(name=name)
        return account

    def _forget_first(self) -> None:
        """Forget the first account of the heap, unless it is not idle any more."""
        virtual, rests, account = heapq.heappop(self._idle)
        if account.rested == rests:
            self.floor = max(self.floor, virtual)
            self._resting -= 1
            del self.accounts[account.name]
