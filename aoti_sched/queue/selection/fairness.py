"""Fairness: runners share a device's time, and tenants share a runner's time.

Each runner and each tenant has an account. Its virtual time is the device time that it has had,
divided by its share. The account with the least virtual time goes next (start-time fair queueing;
Goyal, Vin and Cheng, 1996). A run's time is known only when the run is over. So the expected time
is charged at the launch, and the difference at the end.
"""

from __future__ import annotations

from aoti_sched.queue.job import Job, Priority
from aoti_sched.queue.selection.accounts import Account, FairClass


class FairShares:
    """Keeps the accounts of a device's runners, and of their tenants.

    Jobs of a held lease are on the runner's account alone. For a job that is launched without
    having been queued, `enter` and `leave` are called before `launch`.

    Args:
        fair: Whether there are accounts; without them, only class and due time order jobs.
    """

    __slots__ = ("_classes", "fair")

    def __init__(self, fair: bool) -> None:
        self.fair = fair
        self._classes = tuple(FairClass() for _ in Priority)

    def open(self, name: str, share: float) -> tuple[Account, ...]:
        """Open a new runner's accounts, and return them by priority class."""
        if not self.fair:
            return ()
        accounts = tuple(Account(share) for _ in Priority)
        for fair_class, account in zip(self._classes, accounts, strict=True):
            fair_class.accounts[name] = account
        return accounts

    def close(self, name: str) -> None:
        """Remove the accounts of a runner."""
        if self.fair:
            for fair_class in self._classes:
                del fair_class.accounts[name]

    def enter(self, job: Job) -> None:
        """Count a job that is queued."""
        if not self.fair:
            return
        source, priority = job.source, job.priority
        runner = source.runner
        self._classes[priority].enter(runner.accounts[priority])
        if source is runner:
            fair_class = runner.tenants[priority]
            job.account = fair_class.of(job.tenant)
            fair_class.enter(job.account)

    def leave(self, job: Job) -> None:
        """Uncount a job that has left the queue."""
        if not self.fair:
            return
        job.source.runner.accounts[job.priority].queued -= 1
        if job.account is not None:
            job.account.queued -= 1

    def rest(self, job: Job) -> None:
        """Note that a job has left the queue and ends without a run."""
        if job.account is not None:
            job.source.runner.tenants[job.priority].rest(job.account)

    def launch(self, job: Job) -> None:
        """Charge the expected time of a job that starts."""
        if not self.fair:
            return
        runner, priority = job.source.runner, job.priority
        new = not job.retrying
        runner.accounts[priority].running += new
        self._classes[priority].launch(runner.accounts[priority], job.expected)
        if job.account is not None:
            job.account.running += new
            runner.tenants[priority].launch(job.account, job.expected)

    def settle(self, job: Job, seconds: float) -> None:
        """Charge the difference between the core seconds that a run took and those expected."""
        if not self.fair:
            return
        job.source.runner.accounts[job.priority].charge(seconds - job.expected)
        if job.account is not None:
            job.account.charge(seconds - job.expected)

    def end(self, job: Job) -> None:
        """Note that a launched job has ended, and is not retried."""
        if not self.fair:
            return
        runner, priority = job.source.runner, job.priority
        runner.accounts[priority].running -= 1
        if job.account is not None:
            job.account.running -= 1
            runner.tenants[priority].rest(job.account)
