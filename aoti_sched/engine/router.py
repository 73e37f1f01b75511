"""Router: the 1..n replicas of one runner.

The router chooses a replica for each job, and reroutes queued jobs when a replica is removed. The
rule of the choice is in `queue/selection/routing.py`. A runner on one device has a router of one
replica, which is never asked for a choice.
"""

from __future__ import annotations

import functools
from collections import Counter
from contextlib import nullcontext
from typing import TYPE_CHECKING

import msgspec

from aoti_sched.engine.holders import Holders
from aoti_sched.engine.sessions import Sessions
from aoti_sched.engine.tenants import Tenants
from aoti_sched.errors import EpochError, RunnerClosedError
from aoti_sched.histograms import merged
from aoti_sched.queue.job import Job
from aoti_sched.queue.runner_state import Phase
from aoti_sched.queue.selection.routing import Rotation, least_crowded
from aoti_sched.stats import Phase as RunnerPhase
from aoti_sched.stats import RunnerInfo, RunnerStats

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from aoti_sched.engine.blocking import BlockingCalls
    from aoti_sched.engine.dispatcher import Clock
    from aoti_sched.engine.future import RunFuture
    from aoti_sched.engine.replica import Replica
    from aoti_sched.queue.runner_state import RunnerState, Source


_NOT_SUMS = {
    *("name", "phase", "health", "epoch", "updating", "parked"),
    *("replicas", "rejections", "ended"),
}


class Router:
    """Routes the jobs of one runner over its replicas.

    Args:
        replicas: One for each device.
        clock: The scheduler's.
        blocking: Calls of other threads into the scheduler.

    Attributes:
        replicas: All replicas there were from the beginning.
        serving: The replicas that take requests.
        tenants: The tenants of the runner.
        holders: The held leases of the runner.
        sessions: The sessions of the runner.
    """

    __slots__ = (
        "_clock",
        "_of_state",
        "_rotation",
        "blocking",
        "device",
        "holders",
        "loop",
        "name",
        "replicas",
        "serving",
        "sessions",
        "tenants",
    )

    def __init__(self, replicas: Sequence[Replica], clock: Clock, blocking: BlockingCalls) -> None:
        first = replicas[0]
        self.name = first.name
        self.device = ", ".join(replica.device for replica in replicas)
        self.loop = first.loop
        self.replicas = tuple(replicas)
        self.serving = list(replicas)
        self.tenants = Tenants()
        self.holders = Holders(first.name, self.serving, clock)
        self.sessions = Sessions(first.name, first.epoch, clock)
        self.blocking = blocking
        self._clock = clock
        self._rotation = Rotation([(one.dispatcher.queue, one.state) for one in replicas])
        self._of_state: dict[Source, Replica] = {one.state: one for one in replicas}
        for replica in replicas:
            replica.peers = self.serving
            replica.sessions = self.sessions
            replica.place_again = self._place_soon
            replica.leave = functools.partial(self.remove, replica)
            replica.route = self.choose if len(replicas) > 1 else None

    def choose(self, job: Job) -> Replica:
        """Choose the replica that would finish a new job first."""
        self._rotation.place(job, self._clock.time())
        return self._of_state[job.source]

    def place_of(self, epoch: int) -> tuple[Replica, RunnerState]:
        """Return where a request that is pinned to an epoch goes.

        Raises:
            EpochError: The weights are gone.
        """
        first = self._shown[0]
        if first.epoch == epoch:
            return first, first.state
        able = [
            (replica, replica.behind.state)
            for replica in self._shown
            if replica.behind is not None and replica.kept_epoch == epoch
        ]
        if not able:
            raise self.sessions.gone(epoch)
        return able[least_crowded([state for _, state in able])]

    def remove(self, replica: Replica, why: str) -> int:
        """Give a replica no more requests, and reroute its queued jobs where another serves.

        Returns:
            The number of jobs that are rerouted.
        """
        replica.removed_because = why
        self.serving.remove(replica)
        self._rotation.leave(replica.state)
        if not self.serving:
            for one in self.replicas:
                one.route = self._refuse
        if not any(one.state.phase is Phase.OPEN for one in self.serving):
            return 0  # accepted jobs end where they are
        return replica.withdraw(self._reroute)

    def close(self) -> None:
        """Refuse jobs from now on, and drop what makes reference cycles. The runner is closed."""
        why = f"runner {self.name!r} is closed" if self.serving else self._no_replica_left()
        refuse = functools.partial(_refuse, why)
        self.holders.close()
        for replica in self.replicas:
            replica.route = refuse
            replica.leave = None
            replica.place_again = None
            replica.peers = []
            replica.state.let_go()
            if replica.behind is not None:
                replica.behind.state.let_go()
                replica.behind = None  # it refers to the replica

    def inherit_stream(self) -> AbstractContextManager[object]:
        """Return a context that makes the calling thread's stream current where it is entered.

        Several devices take inputs from the host and return outputs to the host, so no stream
        matters there.
        """
        if len(self.replicas) > 1:
            return nullcontext()
        return self.replicas[0].inherit_stream()

    @property
    def epoch(self) -> int:
        """The epoch that serves."""
        return self._shown[0].epoch

    @property
    def info(self) -> RunnerInfo:
        """What is known of the model; on several devices, of all replicas together."""
        infos = [replica.info for replica in self._shown]
        if len(self.replicas) == 1:
            return infos[0]
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
        """Return the runner's numbers; on several devices, the sums with each replica's own."""
        if len(self.replicas) == 1:
            return self.replicas[0].stats()
        each = {replica.device: replica.stats() for replica in self.replicas}
        serving = [replica.stats() for replica in self._shown]
        sums = {
            name: sum(getattr(stats, name) for stats in each.values())
            for name in RunnerStats.__struct_fields__
            if name not in _NOT_SUMS
        }
        rejections: Counter[str] = Counter()
        for one in each.values():
            rejections.update(one.rejections)
        return RunnerStats(
            name=self.name,
            phase=RunnerPhase[min(Phase[stats.phase.name] for stats in serving).name],
            health="failing" if any(stats.health == "failing" for stats in serving) else "ok",
            epoch=self.epoch,
            updating=any(stats.updating for stats in serving),
            parked=all(stats.parked for stats in serving),
            replicas=each,
            rejections=dict(rejections),
            ended=merged(part for one in each.values() for part in one.ended),
            **sums,
        )

    @property
    def _shown(self) -> Sequence[Replica]:
        """The replicas that serve; all of them when none is left."""
        return self.serving or self.replicas

    def _reroute(self, old: Job) -> None:
        """Submit a job that was withdrawn at one replica to another, for the same future."""
        future: RunFuture = old.payload
        job = old.resubmitted()
        old.payload = None
        if not job.pinned:
            replica = self.choose(job)
        else:
            try:
                replica, job.source = self.place_of(job.min_epoch)
            except EpochError as error:
                future._refuse(error)
                return
            if job.source is replica.state:
                replica = self.choose(job)
        future._replica, future._job = replica, job
        replica.dispatcher.resubmit(job, old.submitted)

    def _place_soon(self, old: Job) -> None:
        """Submit a pinned job anew once the epoch that is being published serves."""
        self.loop.call_soon(self._place, old)

    def _place(self, old: Job) -> None:
        if not old.payload.done():  # the caller may have given up meanwhile
            self._reroute(old)

    def _refuse(self, job: Job) -> Replica:
        """Refuse a job, since no replica is left."""
        del job
        raise RunnerClosedError(self._no_replica_left())

    def _no_replica_left(self) -> str:
        why = "; ".join(replica.removed_because for replica in self.replicas)
        return f"runner {self.name!r}: no device is left to run on: {why}"


def _refuse(why: str, job: Job) -> Replica:
    del job
    raise RunnerClosedError(why)
