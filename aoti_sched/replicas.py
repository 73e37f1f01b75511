"""Replicas: one runner on several devices. Each of them has a runner of its own there; this is the whole.

Which of them a request goes to is decided in `queue/selection/routing.py`. One that leaves takes no more requests; those that are queued
there move to the others, and their callers hear nothing of it.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import TYPE_CHECKING

import msgspec

from aoti_sched.engine.tenants import Tenants
from aoti_sched.queue.job import Job
from aoti_sched.queue.runner_state import Phase
from aoti_sched.queue.selection.routing import Rotation
from aoti_sched.runner import Calls, Runner
from aoti_sched.stats import RunnerInfo, RunnerStats

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aoti_sched.engine.dispatcher import Clock
    from aoti_sched.engine.future import RunFuture
    from aoti_sched.queue.runner_state import Source
    from aoti_sched.runner import Options


class ReplicatedRunner(Runner):
    """A loaded model on several devices."""

    __slots__ = ("_clock", "_loaded", "_of_state", "_replicas", "_rotation")

    def __init__(
        self,
        replicas: Sequence[Runner],
        *,
        options: Options,
        clock: Clock,
        close: Callable[[Runner, bool], Awaitable[None]],
    ) -> None:
        first = replicas[0]
        Calls.__init__(self, None, first.state, options)
        self._loaded = self._replicas = tuple(replicas)
        self._rotation = Rotation([(one.dispatcher.queue, one.state) for one in replicas])
        self._of_state: dict[Source, Runner] = {one.state: one for one in replicas}
        self._clock = clock
        self._close = close
        self._info = first.info
        self.name = first.name
        self.device = ", ".join(replica.device for replica in replicas)
        # What is asked before a replica is chosen, and is the same for all.
        self.state = first.state
        self.call_spec = first.call_spec
        self.input_check = first.input_check
        self.grouping = first.grouping
        self.dispatcher = first.dispatcher
        self.loop = first.loop
        self.updates = first.updates
        self.tenants = Tenants()
        self.blocking = first.blocking
        self.left = ""
        self._whole = None
        self.place = self._choose
        self.arrive = None  # it takes inputs from the host, and brings outputs there
        self.as_here = nullcontext
        for replica in replicas:
            replica.join(self)

    @property
    def replicas(self) -> tuple[Runner, ...]:
        return self._replicas

    @property
    def loaded(self) -> tuple[Runner, ...]:
        return self._loaded

    def _choose(self, job: Job) -> Runner:
        self._rotation.place(job, self._clock.time())
        return self._of_state[job.source]

    def leave(self, replica: Runner, why: str) -> int:
        replica.left = why
        self._replicas = tuple(one for one in self._replicas if one is not replica)
        self._rotation.leave(replica.state)
        if not self._replicas:
            self.place = self.nowhere
        if not any(one.state.phase is Phase.OPEN for one in self._replicas):
            return 0  # what was accepted ends where it is
        return replica.dispatcher.withdraw(replica.state, self._move)

    def _move(self, old: Job) -> None:
        """Submit what was withdrawn at one replica to another, in the place of the old job."""
        future: RunFuture = old.payload
        old.payload = None
        job = Job(
            old.source,
            old.priority,
            old.deadline,
            old.bytes,
            old.is_lease_request,
            future,
            old.min_epoch,
            old.rows,
            old.key,
            tenant=old.tenant,
        )
        job.timeout = old.timeout
        replica = self._choose(job)
        future.runner, future.job = replica, job
        replica.dispatcher.resubmit(job, old.submitted)

    @property
    def epoch(self) -> int:
        return (self._replicas or self._loaded)[0].epoch

    @property
    def info(self) -> RunnerInfo:
        infos = [replica.info for replica in self._replicas or self._loaded]
        notes = dict.fromkeys(note for info in infos for note in info.notes)
        return msgspec.structs.replace(
            infos[0],
            device=", ".join(info.device for info in infos),
            instances=sum(info.instances for info in infos),
            inactive_bytes=sum(info.inactive_bytes for info in infos),
            cuda_graphs=sum(info.cuda_graphs for info in infos),
            notes=tuple(notes),
            replicas=tuple(infos),
        )

    def stats(self) -> RunnerStats:
        each = {replica.device: replica.stats() for replica in self._loaded}
        serving = [replica.stats() for replica in self._replicas or self._loaded]
        sums = {
            name: sum(getattr(stats, name) for stats in each.values())
            for name in RunnerStats.__struct_fields__
            if name not in ("name", "phase", "health", "epoch", "updating", "parked", "replicas")
        }
        sums["submitted"] -= sums["withdrawn"]
        return RunnerStats(
            name=self.name,
            phase=min(Phase[stats.phase] for stats in serving).name,
            health="failing" if any(stats.health == "failing" for stats in serving) else "ok",
            epoch=self.epoch,
            updating=any(stats.updating for stats in serving),
            parked=all(stats.parked for stats in serving),
            replicas=each,
            **sums,
        )

    async def drain(self) -> None:
        self._must_be_here()
        drains = [
            replica.dispatcher.drain(replica.state, terminate=False) for replica in self._loaded
        ]
        await asyncio.shield(asyncio.gather(*drains))
