"""Gate: which jobs may be queued, which wait for room, and which are shed for a new job.

A job that does not fit waits at its source's gate. The gates of runners contend for the device's
room. The gate of a held lease waits for the lease's own room alone. Where tenants are bounded, a
tenant has at most that many jobs at the gate and in the queue together. The tenant's other jobs
wait in a line before the gate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from aoti_sched.queue.admission.load import Bounds, Load
from aoti_sched.queue.admission.shedding import Scope, ShedHeap, victims
from aoti_sched.queue.job import Job
from aoti_sched.queue.runner_state import Lease, RunnerState, Source
from aoti_sched.queue.selection.job_queue import LazyHeap, Rank


def _place(runner: RunnerState) -> Rank | None:
    """Return a gate's rank among the gates that contend for the device's room.

    None means that no job waits at the gate, or that the runner itself has no room.
    """
    head = runner.gate.head()
    if head is None or runner.halted or runner.load.refusal(head.bytes) is not None:
        return None
    return (head.priority, head.due, head.id)


def _is_counted(job: Job) -> bool:
    """Return whether a job counts against its tenant's bound."""
    runner = job.source.runner
    return runner.counts_tenants and job.source is runner and not job.bypasses_limits


class Room:
    """The room for queued jobs on one device.

    Args:
        name: The device's name, for messages.
        bounds: The most that may be queued over all runners.

    Attributes:
        load: All jobs that are queued on the device.
        gates: Runners whose gates contend for the device's room.
    """

    __slots__ = ("_leases", "_worst", "gates", "load")

    def __init__(self, name: str, bounds: Bounds) -> None:
        self.load = Load(f"device {name}", bounds)
        self.gates: LazyHeap[RunnerState] = LazyHeap(_place)
        self._leases: list[Lease] = []  # leases whose gates may have a job to admit
        self._worst = ShedHeap()

    def full(self, job: Job) -> str | None:
        """Return why a job can't be queued now; None when there is room.

        No job overtakes the jobs that wait already.

        The jobs of a held lease are bounded by the lease's room alone. Other queued jobs may wait
        for the slot that the lease holds. If they held back the lease's jobs, neither could go on.
        """
        if job.bypasses_limits:
            return None
        source = job.source
        reason = source.load.refusal(job.bytes)
        if reason is None and source is source.runner:
            if source.runner.counts_tenants:
                reason = self._tenant_full(source.runner, job)
            if reason is None:
                reason = self.load.refusal(job.bytes)
        if reason is None and self._others_wait(job):
            reason = "earlier requests are waiting for room"
        return reason

    def crowded(self, job: Job) -> str | None:
        """Return why a job that can't be queued now may not wait for room; None when it may."""
        most, waits = job.source.load.bounds.waiting, job.source.waits
        if most is None or waits < most:
            return None
        return f"{waits} requests wait for room, the bound is {most}"

    def wait(self, job: Job) -> None:
        """Put a job to its source's gate, or into its tenant's line before the gate."""
        source = job.source
        if _is_counted(job):
            runner = source.runner
            line = runner.tenant_lines.get(job.tenant)
            if line is not None or self._tenant_full(runner, job) is not None:
                if line is None:
                    line = runner.tenant_lines[job.tenant] = OrderedDict()
                line[job.id] = job
                runner.lined += 1
                return
            _count(job)
        source.gate.push(job)
        self._look_at_gate(source)

    def leave(self, job: Job) -> None:
        """Take a waiting job out of the gate or the line."""
        source, runner = job.source, job.source.runner
        line = runner.tenant_lines.get(job.tenant) if source is runner else None
        if line is not None and line.pop(job.id, None) is not None:
            runner.lined -= 1
            if not line:
                del runner.tenant_lines[job.tenant]
            return
        source.gate.remove(job)
        if _is_counted(job):
            self._uncount(job)
        self._look_at_gate(source)

    def next_admitted(self) -> Job | None:
        """Take the next job to be queued out of its gate; None when no waiting job has room."""
        while self._leases:
            lease = self._leases[-1]
            head = lease.gate.head()
            if head is not None and not lease.halted and lease.load.refusal(head.bytes) is None:
                lease.gate.remove(head)
                return head
            self._leases.pop()
        runner = self.gates.best()
        head = None if runner is None else runner.gate.head()
        if runner is None or head is None or self.load.refusal(head.bytes) is not None:
            return None
        runner.gate.remove(head)
        self.gates.enter(runner)
        return head

    def take(self, job: Job, *, waited: bool) -> None:
        """Give room to a job that is queued, and that has `waited` at the gate, or is new."""
        source, runner = job.source, job.source.runner
        if source is not runner:
            source.load.add(job)
        runner.load.add(job)
        self.load.add(job)
        if runner.counts_tenants and not waited and _is_counted(job):
            _count(job)
        if runner.sheds and source is runner and not job.is_lease_request:
            for worst in self._worsts_of(job):
                worst.push(job)

    def give_back(self, job: Job) -> None:
        """Release the room of a job that has left the queue."""
        source, runner = job.source, job.source.runner
        if source is not runner:
            source.load.remove(job)
        runner.load.remove(job)
        self.load.remove(job)
        if runner.sheds and source is runner and not job.is_lease_request:
            for worst in self._worsts_of(job):
                worst.left()
            if not runner.worst_of[job.tenant].alive:
                del runner.worst_of[job.tenant]
        if runner.counts_tenants and _is_counted(job):
            self._uncount(job)
        self._look_at_gate(source)

    def shed_for(self, job: Job) -> Sequence[Job]:
        """Choose the queued jobs to be shed for a new job.

        Returns:
            The jobs; empty if shedding would not make enough room, or if other jobs that the new
            one may not overtake wait for room.
        """
        runner = job.source.runner
        if job.source is not runner or self._others_wait(job):
            return ()
        most = runner.load.bounds.tenant_jobs

        def tenant_lacks_room(without: Sequence[Job]) -> bool:
            return most is not None and runner.tenant_jobs.get(job.tenant, 0) - len(without) >= most

        return victims(
            job,
            [
                Scope(runner.worst_of.get(job.tenant) or ShedHeap(), tenant_lacks_room),
                Scope(runner.worst, lambda without: runner.load.lacks_room(job.bytes, without)),
                Scope(self._worst, lambda without: self.load.lacks_room(job.bytes, without)),
            ],
        )

    def _others_wait(self, job: Job) -> bool:
        """Return whether other jobs wait for room that a new job may not overtake."""
        source, runner = job.source, job.source.runner
        if len(source.gate):
            return True
        if source is not runner:
            return False
        return self.gates.best() is not None or (
            runner.counts_tenants and job.tenant in runner.tenant_lines
        )

    def _tenant_full(self, runner: RunnerState, job: Job) -> str | None:
        """Return why a job's tenant can have no more jobs at the gate and in the queue, or None."""
        most = runner.load.bounds.tenant_jobs
        if most is None or runner.tenant_jobs.get(job.tenant, 0) < most:
            return None
        return f"tenant {job.tenant!r} has {most} jobs queued, its bound is {most}"

    def _uncount(self, job: Job) -> None:
        """Uncount a job that left the gate or the queue; its tenant's next job goes to the gate.

        The next job is the first in the tenant's line.
        """
        runner, tenant = job.source.runner, job.tenant
        runner.tenant_jobs[tenant] -= 1
        if not runner.tenant_jobs[tenant]:
            del runner.tenant_jobs[tenant]
        line = runner.tenant_lines.get(tenant)
        if line is None:
            return
        _, first = line.popitem(last=False)
        runner.lined -= 1
        if not line:
            del runner.tenant_lines[tenant]
        _count(first)
        runner.gate.push(first)
        self._look_at_gate(runner)

    def _look_at_gate(self, source: Source) -> None:
        """Note that the head of a source's gate or the source's room has changed.

        The gate of a lease is checked by `next_admitted`. The gate of the runner contends anew for
        the device's room.
        """
        if isinstance(source, Lease) and len(source.gate):
            self._leases.append(source)
        self.gates.enter(source.runner)

    def _worsts_of(self, job: Job) -> tuple[ShedHeap, ...]:
        """Return the heaps that list a queued job of a runner that sheds."""
        runner = job.source.runner
        of_tenant = runner.worst_of.get(job.tenant)
        if of_tenant is None:
            of_tenant = runner.worst_of[job.tenant] = ShedHeap()
        return of_tenant, runner.worst, self._worst


def _count(job: Job) -> None:
    jobs = job.source.runner.tenant_jobs
    jobs[job.tenant] = jobs.get(job.tenant, 0) + 1
