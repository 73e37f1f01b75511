"""Room: who may be queued, who waits for it, and who makes way.

A job that does not fit waits at its source's gate. Gates contend for the device's room; a held
lease's gate waits for its own alone. Of a tenant with a bound of its own, no more than that are at
the gate and in the queue; the others stand in line before it.
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
    """Among those who wait for the device's room, if it has room itself."""
    head = runner.gate.head()
    if head is None or runner.halted or runner.load.refusal(head.bytes) is not None:
        return None
    return (head.priority, head.due, head.id)


def _is_counted(job: Job) -> bool:
    """Whether it counts against its tenant's bound."""
    runner = job.source.runner
    return runner.counts_tenants and job.source is runner and not job.bypasses_limits


class Room:
    """One device's. `load` is what is queued there in all."""

    __slots__ = ("_leases", "_worst", "gates", "load")

    def __init__(self, name: str, bounds: Bounds) -> None:
        self.load = Load(f"device {name}", bounds)
        self.gates: LazyHeap[RunnerState] = LazyHeap(_place)
        self._leases: list[Lease] = []  # whose gates are to be looked at
        self._worst = ShedHeap()

    def full(self, job: Job) -> str | None:
        """Why a job can't be queued now. Nobody passes those who wait already.

        A held lease answers for its own jobs alone. Those in the queue may wait for the very slot
        it
        holds: were its jobs held back by them, neither would ever go on.
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

    def wait(self, job: Job) -> None:
        """At its source's gate, or in line before it."""
        source = job.source
        if _is_counted(job):
            runner = source.runner
            line = runner.tenant_lines.get(job.tenant)
            if line is not None or self._tenant_full(runner, job) is not None:
                if line is None:
                    line = runner.tenant_lines[job.tenant] = OrderedDict()
                line[job.id] = job
                return
            _count(job)
        source.gate.push(job)
        self._look_at_gate(source)

    def leave(self, job: Job) -> None:
        """It waits no more."""
        source, runner = job.source, job.source.runner
        line = runner.tenant_lines.get(job.tenant) if source is runner else None
        if line is not None and line.pop(job.id, None) is not None:
            if not line:
                del runner.tenant_lines[job.tenant]
            return
        source.gate.remove(job)
        if _is_counted(job):
            self._uncount(job)
        self._look_at_gate(source)

    def next_admitted(self) -> Job | None:
        """Who has waited, and is to be queued now."""
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
        """It is queued."""
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
        """It is queued no more."""
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
        """Who is to be shed so that it can be queued; nobody if that does not help, or others
        wait for room already.
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
        """Whether there are some for room whom it may not pass."""
        source, runner = job.source, job.source.runner
        if len(source.gate):
            return True
        if source is not runner:
            return False
        return self.gates.best() is not None or (
            runner.counts_tenants and job.tenant in runner.tenant_lines
        )

    def _tenant_full(self, runner: RunnerState, job: Job) -> str | None:
        """Why a job of this tenant can't be queued now, nor wait at the gate."""
        most = runner.load.bounds.tenant_jobs
        if most is None or runner.tenant_jobs.get(job.tenant, 0) < most:
            return None
        return f"tenant {job.tenant!r} has {most} jobs queued, its bound is {most}"

    def _uncount(self, job: Job) -> None:
        """One of its tenant's has left the gate or the queue: the next in line may have its
        place.
        """
        runner, tenant = job.source.runner, job.tenant
        runner.tenant_jobs[tenant] -= 1
        if not runner.tenant_jobs[tenant]:
            del runner.tenant_jobs[tenant]
        line = runner.tenant_lines.get(tenant)
        if line is None:
            return
        _, first = line.popitem(last=False)
        if not line:
            del runner.tenant_lines[tenant]
        _count(first)
        runner.gate.push(first)
        self._look_at_gate(runner)

    def _look_at_gate(self, source: Source) -> None:
        """Its head or the room behind it changed.

        A runner's gate then contends for the device's room.
        """
        if isinstance(source, Lease) and len(source.gate):
            self._leases.append(source)
        self.gates.enter(source.runner)

    def _worsts_of(self, job: Job) -> tuple[ShedHeap, ...]:
        """What keeps a queued job of a runner that sheds."""
        runner = job.source.runner
        of_tenant = runner.worst_of.get(job.tenant)
        if of_tenant is None:
            of_tenant = runner.worst_of[job.tenant] = ShedHeap()
        return of_tenant, runner.worst, self._worst


def _count(job: Job) -> None:
    jobs = job.source.runner.tenant_jobs
    jobs[job.tenant] = jobs.get(job.tenant, 0) + 1
