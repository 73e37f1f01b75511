"""Recorded: a device's queue that keeps its last facts, so that they can be replayed.

The same facts give the same commands, so a state and the facts that follow on it are all that it
takes to have a queue in the same state again. A bounded number of facts is kept, in chunks of flat
values (`facts.py`): jobs, runners, leases, claims and memory records are numbers there. At the
beginning of some chunks, the state of the queue is kept, too (`snapshot.py`). Tenants and keys
become numbers when the record is read, so that no user's data is in it.

`testing/replay.py` replays a record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aoti_sched.errors import AotiSchedError
from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.commands import Command
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.facts import FAILED, Kept, Record, for_json
from aoti_sched.queue.holding import Holding
from aoti_sched.queue.job import IllegalFactError, Job
from aoti_sched.queue.memory import Claim
from aoti_sched.queue.policy import Policy
from aoti_sched.queue.runner_state import Lease, RunnerState
from aoti_sched.queue.selection.placement import INLINE_BUDGET, Placing
from aoti_sched.queue.snapshot import Snapshot, UnknownClassError, take

if TYPE_CHECKING:
    from types import TracebackType

FACTS_KEPT: Final = 1_000
"""Facts that are kept by default: some 300 requests, and those back to the last snapshot.

So few stay in the processor's cache. With 10,000, a request of a tiny model takes 1.04 times as
long.
"""

MOST_VALUES: Final = 20_000
"""The most values of a snapshot. With more, for example with 1,000 jobs queued, none is taken."""


class RecordedQueue(DeviceQueue):
    """A `DeviceQueue` that keeps its last facts. An `IllegalFactError` of a fact has its record.

    Args:
        name: The device's name, and so on as for `DeviceQueue`.
        lanes: The number of lanes.
        bounds: The most that may be queued over all runners.
        inline_budget: Seconds of inline runs in one turn of the loop.
        cores: Cores that runs on lanes may take together.
        policy: The device's choices among the rules.
        memory_limit: Bytes that the models may take.
        evicts: Whether idle runners are evicted when others need their memory.
        keep: The least number of the last facts that are kept.
    """

    def __init__(
        self,
        name: str,
        lanes: int,
        bounds: Bounds | None = None,
        *,
        inline_budget: float = INLINE_BUDGET,
        cores: int | None = None,
        policy: Policy | None = None,
        memory_limit: int | None = None,
        evicts: bool = False,
        keep: int = FACTS_KEPT,
    ) -> None:
        super().__init__(
            name,
            lanes,
            bounds,
            inline_budget=inline_budget,
            cores=cores,
            policy=policy,
            memory_limit=memory_limit,
            evicts=evicts,
        )
        self._kept = Kept(keep)
        self._first = (lanes, self.lanes.cores)  # before runners came, with which lanes may come
        self._runners = 0
        self._holdings = 0
        self._claims = 0

    def record(self, error: str = "") -> Record:
        """Return the facts that are kept, and how the queue was made.

        References are taken, and the totals of the runners. The facts are read later.

        Args:
            error: The text of the error that the last fact has raised.
        """
        made = {
            "device": self.name,
            "lanes": self._first[0],
            "cores": self._first[1],
            "bounds": for_json(self.load.bounds),
            "inline_budget": self.lanes.inline_budget,
            "policy": for_json(self.policy),
            "memory_limit": self.memory.limit,
            "evicts": self.memory.evicts,
        }
        counters = {name: runner.counters.as_dict() for name, runner in self.runners.items()}
        return self._kept.record(made, counters, error)

    def _make_room(self) -> None:
        """Begin a new chunk if the present one is full. Comes before all else of a fact."""
        kept = self._kept
        if kept.left:
            return
        state: Snapshot | None = None
        if kept.wants_state() and not self._endings:  # an ending has an error, which is no value
            try:
                taken = take(self, MOST_VALUES)
            except UnknownClassError:  # a fault of ours, which must not stop the scheduler
                taken = MOST_VALUES
            state = taken if isinstance(taken, Snapshot) else None
            kept.spent(taken.cost if isinstance(taken, Snapshot) else taken)
        kept.begin_chunk(state)

    def _keep(self, *fact: Any) -> None:
        """Keep a rare fact that is never illegal."""
        self._make_room()
        self._kept.add(fact)

    def _fact(self, *fact: Any) -> _GivesRecord:
        """Keep a rare fact, and return the block in which it happens."""
        self._make_room()
        self._kept.add(fact)
        return _GivesRecord(self)

    # --- what every request brings ----------------------------------------------------------------

    def submit(
        self, job: Job, now: float, *, wait: bool = False, since: float | None = None
    ) -> list[Command]:
        kept = self._kept
        if not kept.left:
            self._make_room()
        asked = kept.asked
        if job.source is not kept.source or asked is None or not asked.fits(job, wait, since):
            asked = kept.asked_by(job, wait, since)
        tenant: Any = job.tenant
        if tenant is not None:  # kept by its number, where it has one, so that it can be forgotten
            tenant = getattr(tenant, "number", tenant)
        chunk, at = kept.chunk, kept.at
        chunk[at] = asked  # stands for the fact's name, too
        chunk[at + 1] = now
        chunk[at + 2] = job.deadline
        chunk[at + 3] = job.bytes
        chunk[at + 4] = tenant
        kept.at = at + 5
        kept.left -= 1
        try:
            return super().submit(job, now, wait=wait, since=since)
        except IllegalFactError as error:
            error.record = self.record(str(error))
            raise

    def complete(
        self,
        job: Job,
        now: float,
        *,
        ok: bool = True,
        started: float | None = None,
        finished: float | None = None,
    ) -> list[Command]:
        kept = self._kept
        if not kept.left:
            self._make_room()
        chunk, at = kept.chunk, kept.at
        chunk[at] = "complete" if ok else FAILED
        chunk[at + 1] = now
        chunk[at + 2] = job.id
        chunk[at + 3] = started
        chunk[at + 4] = finished
        kept.at = at + 5
        kept.left -= 1
        try:
            return super().complete(job, now, ok=ok, started=started, finished=finished)
        except IllegalFactError as error:
            error.record = self.record(str(error))
            raise

    def cancel(self, job: Job, now: float) -> list[Command]:
        with self._fact("cancel", now, job.id):
            return super().cancel(job, now)

    def tick(self, now: float) -> list[Command]:
        self._keep("tick", now)
        return super().tick(now)

    def turn(self, now: float) -> list[Command]:
        self._keep("turn", now)
        return super().turn(now)

    def go_on(self, now: float) -> list[Command]:
        self._keep("go_on", now)
        return super().go_on(now)

    def release(self, lease: Lease, now: float) -> list[Command]:
        self._keep("release", now, lease.id, lease.runner.number)
        return super().release(lease, now)

    # --- runners ----------------------------------------------------------------------------------

    def add_runner(
        self,
        name: str,
        slots: int,
        bounds: Bounds | None = None,
        *,
        epoch: int = 1,
        placing: Placing | None = None,
        batching: Batching | None = None,
        width: int = 1,
        share: float = 1.0,
        sheds: bool = False,
        predicts: bool = False,
        routable: bool = False,
        memory: Holding | None = None,
    ) -> RunnerState:
        placing = placing or Placing()
        self._make_room()
        with self._fact(
            "add_runner",
            None,
            name,
            slots,
            bounds,
            epoch,
            (
                placing.choice.value,
                placing.limit,
                placing.follow_limit,
                placing.ahead_limit,
                placing.hop,
                placing.backlog_limit,
            ),
            batching,
            width,
            share,
            sheds,
            predicts,
            routable,
            None if memory is None else self._numbered(memory),
            "" if memory is None else memory.name,
        ):
            runner = super().add_runner(
                name,
                slots,
                bounds,
                epoch=epoch,
                placing=placing,
                batching=batching,
                width=width,
                share=share,
                sheds=sheds,
                predicts=predicts,
                routable=routable,
                memory=memory,
            )
        self._numbered(runner.memory)
        return self._counted(runner)

    def drain_runner(self, runner: RunnerState, now: float) -> list[Command]:
        with self._fact("drain_runner", now, runner.number):
            return super().drain_runner(runner, now)

    def terminate_runner(self, runner: RunnerState, now: float) -> list[Command]:
        with self._fact("terminate_runner", now, runner.number):
            return super().terminate_runner(runner, now)

    def withdraw(self, runner: RunnerState, now: float) -> list[Command]:
        with self._fact("withdraw", now, runner.number):
            return super().withdraw(runner, now)

    def remove_runner(self, runner: RunnerState) -> None:
        self._kept.source = None  # so that a runner that is gone is not kept
        with self._fact("remove_runner", None, runner.number):
            super().remove_runner(runner)

    def close_barrier(
        self, runner: RunnerState, now: float, *, abort: bool = False
    ) -> list[Command]:
        with self._fact("close_barrier", now, runner.number, abort):
            return super().close_barrier(runner, now, abort=abort)

    def open_barrier(
        self, runner: RunnerState, now: float, *, epoch: int | None = None
    ) -> list[Command]:
        with self._fact("open_barrier", now, runner.number, epoch):
            return super().open_barrier(runner, now, epoch=epoch)

    def _counted(self, runner: RunnerState) -> RunnerState:
        runner.number = self._runners
        self._runners += 1
        return runner

    # --- sessions ---------------------------------------------------------------------------------

    def add_behind(self, main: RunnerState, name: str, now: float) -> RunnerState:
        with self._fact("add_behind", now, main.number, name):
            return self._counted(super().add_behind(main, name, now))

    def keep_epoch(self, main: RunnerState, now: float) -> list[Command]:
        with self._fact("keep_epoch", now, main.number):
            return super().keep_epoch(main, now)

    def withdraw_pinned(self, runner: RunnerState, now: float) -> list[Command]:
        with self._fact("withdraw_pinned", now, runner.number):
            return super().withdraw_pinned(runner, now)

    def revoke_behind(self, main: RunnerState, now: float, error: AotiSchedError) -> list[Command]:
        with self._fact("revoke_behind", now, main.number, str(error)):
            return super().revoke_behind(main, now, error)

    def hold_turns(self, main: RunnerState, now: float) -> list[Command]:
        with self._fact("hold_turns", now, main.number):
            return super().hold_turns(main, now)

    def release_turns(self, main: RunnerState, now: float) -> list[Command]:
        with self._fact("release_turns", now, main.number):
            return super().release_turns(main, now)

    def turned(self, main: RunnerState, now: float, *, exchanged: bool) -> list[Command]:
        with self._fact("turned", now, main.number, exchanged):
            return super().turned(main, now, exchanged=exchanged)

    # --- memory -----------------------------------------------------------------------------------

    def claim(self, claim: Claim, now: float) -> list[Command]:
        self._make_room()  # the chunk before it does not know the claim's number
        holding = claim.holding
        claim.number = self._claims
        self._claims += 1
        with self._fact(
            "claim", now, claim.number, claim.bytes, self._numbered(holding), holding.name
        ):
            return super().claim(claim, now)

    def give_up(self, claim: Claim, now: float) -> list[Command]:
        self._keep("give_up", now, claim.number)
        return super().give_up(claim, now)

    def pin(self, runner: RunnerState) -> None:
        with self._fact("pin", None, runner.number):
            super().pin(runner)

    def update_use(
        self, holding: Holding, now: float, *, constants: int, inactive: int, fixed: str = ""
    ) -> list[Command]:
        self._make_room()
        number = self._numbered(holding)
        self._keep("update_use", now, number, holding.name, constants, inactive, fixed)
        return super().update_use(holding, now, constants=constants, inactive=inactive, fixed=fixed)

    def release_memory(self, holding: Holding, now: float) -> list[Command]:
        self._make_room()
        self._keep("release_memory", now, self._numbered(holding), holding.name)
        return super().release_memory(holding, now)

    def call_back(self, runner: RunnerState, now: float) -> list[Command]:
        with self._fact("call_back", now, runner.number):
            return super().call_back(runner, now)

    def parked(self, runner: RunnerState, now: float) -> list[Command]:
        with self._fact("parked", now, runner.number):
            return super().parked(runner, now)

    def returned(self, runner: RunnerState, now: float, *, error: str = "") -> list[Command]:
        with self._fact("returned", now, runner.number, error):
            return super().returned(runner, now, error=error)

    def _numbered(self, holding: Holding) -> int:
        if holding.number < 0:
            holding.number = self._holdings
            self._holdings += 1
        return holding.number


class _GivesRecord:
    """A block in which a fact happens. Its `IllegalFactError` gets the record of the queue."""

    __slots__ = ("_queue",)

    def __init__(self, queue: RecordedQueue) -> None:
        self._queue = queue

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, IllegalFactError):
            error.record = self._queue.record(str(error))
