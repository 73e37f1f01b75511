"""Replay: puts the recorded facts of a device to the real queue, so that a report becomes a test.

def test_what_was_reported():
    replayed = replay("report.json")["cpu"]
    assert replayed.queue.load.jobs == 0
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from aoti_sched.errors import AotiSchedError, MemoryLimitError, ReplayError
from aoti_sched.flight import DeviceRecord, FlightRecord, RecordedFact, device_record
from aoti_sched.queue.admission.load import Bounds, Load
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.commands import Command, Grant
from aoti_sched.queue.facts import VALUES, Record
from aoti_sched.queue.holding import Holding
from aoti_sched.queue.job import IllegalFactError, Job, JobState
from aoti_sched.queue.memory import Claim
from aoti_sched.queue.policy import Policy
from aoti_sched.queue.recorded import RecordedQueue
from aoti_sched.queue.runner_state import Lease, Phase, RunnerState
from aoti_sched.queue.selection.placement import Placement, Placing
from aoti_sched.queue.snapshot import restore

MOST = 100_000
"""The most lanes of a device, and slots of a runner, that a replay takes as true."""

Outcome = list[Command] | IllegalFactError | MemoryLimitError
"""The commands that followed from a fact, or the error that it raised."""


def replay(record: FlightRecord | str | os.PathLike[str]) -> dict[str, Replayed]:
    """Replay a record of a scheduler, and return what became of each device, by name.

    Args:
        record: What `Scheduler.flight_record` returned, or the path of a file that it was saved to.

    Raises:
        ReplayError: The record lacks its beginning, is damaged, or comes from other rules than
            those here: the queue has counted something else.
        OSError: The file can't be read.
    """
    if not isinstance(record, FlightRecord):
        record = FlightRecord.load(record)
    if not record.devices:
        raise ReplayError(
            "the record has no device: the scheduler had opened none, or kept no facts. Keep some "
            "with SchedulerConfig(flight_facts=)"
        )
    return {name: replay_device(of) for name, of in record.devices.items()}


def replay_device(record: DeviceRecord | Record | Mapping[str, Any]) -> Replayed:
    """Replay the record of one device, as an `IllegalFactError` has it.

    Args:
        record: The record, read or not, or its plain values.

    Raises:
        ReplayError: As `replay` says.
    """
    if isinstance(record, Record):
        record = device_record(record)
    elif not isinstance(record, DeviceRecord):
        try:
            record = msgspec.convert(record, DeviceRecord)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ReplayError(f"this is no record of a device: {error}") from None
    replayed = Replayed(record)
    for _ in replayed.steps():
        pass
    return replayed


class Replayed:
    """A record and the queue that its facts were put to.

    Args:
        record: The record of one device.

    Attributes:
        queue: A queue as the device had it, after the facts so far.
        outcomes: What followed from each fact so far: commands, or an error.
        jobs: The jobs: those of the state that the record begins with, then the others in the order
            in which they were submitted. Their `payload` is the place in this list.

    Raises:
        ReplayError: The record lacks its beginning, or is damaged.
    """

    def __init__(self, record: DeviceRecord) -> None:
        if record.dropped and record.state is None:
            raise ReplayError(
                f"device {record.device!r}: the record lacks its first {record.dropped} facts, and "
                "no state was kept from which the others can be replayed: too many requests were "
                "queued. Record more facts with SchedulerConfig(flight_facts=)"
            )
        self.record = record
        self.queue = _queue_of(record)
        self.outcomes: list[Outcome] = []
        self.jobs: list[Job] = []
        self._by_id: dict[int, Job] = {}
        self._runners: dict[int, RunnerState] = {}
        self._leases: dict[int, Lease] = {}
        self._holdings: dict[int, Holding] = {}
        self._claims: dict[int, Claim] = {}
        self._holdings_before = 0
        if record.state is not None:
            saved = [(one.kind, one.values) for one in record.state]
            things = restore(saved, self.queue)
            try:
                self._begin_with(things)
            except Exception as error:
                raise self._damage(f"its state raised {error!r}") from error
            self._holdings_before = dict(record.state[0].values)["_holdings"]

    def _begin_with(self, things: list[Any]) -> None:
        """Know the objects of the state that the record begins with."""
        for thing in things:
            if isinstance(thing, Job):
                self.jobs.append(thing)
            elif isinstance(thing, RunnerState):
                self._runners[thing.number] = thing
            elif isinstance(thing, Lease):
                self._leases[thing.id] = thing
            elif isinstance(thing, Holding):
                self._holdings[thing.number] = thing
            elif isinstance(thing, Claim):
                self._claims[thing.number] = thing
        self.jobs.sort(key=lambda job: job.id)
        for place, job in enumerate(self.jobs):
            job.payload = place

    def steps(self) -> Iterator[tuple[RecordedFact, Outcome]]:
        """Put one fact after the other to the queue, and yield each with what followed.

        Raises:
            ReplayError: After the last fact, the queue has counted something else than the record.
        """
        for fact in self.record.facts:
            outcome = self._outcome(fact)
            self.outcomes.append(outcome)
            yield fact, outcome
        try:
            ours = {name: runner.counters.as_dict() for name, runner in self.queue.runners.items()}
            self._must_agree(ours)
        except ReplayError:
            raise
        except Exception as error:
            raise self._damage(f"its counters raised {error!r}") from error

    def _outcome(self, fact: RecordedFact) -> Outcome:
        if fact.fact not in VALUES:
            raise self._damage(f"there is no fact {fact.fact!r}")
        put = getattr(self, f"_{fact.fact}", None)
        try:
            if put is not None:
                commands: list[Command] = put(fact.at, **fact.values)
            else:
                commands = self._about_a_runner(fact)
        except (IllegalFactError, MemoryLimitError) as error:
            return error
        except Exception as error:
            raise self._damage(f"{fact.fact} raised {error!r}") from error
        for command in commands:
            if isinstance(command, Grant):
                self._leases[command.lease.id] = command.lease
        return commands

    def _damage(self, why: str) -> ReplayError:
        return ReplayError(
            f"device {self.record.device!r}: the replay ended before fact {len(self.outcomes)}: "
            f"{why}. The record is damaged, or the rules have a fault: see the cause of this error"
        )

    def _must_agree(self, ours: dict[str, dict[str, float]]) -> None:
        if ours != self.record.counters:
            raise ReplayError(
                f"device {self.record.device!r}: the replay has counted {_in_words(ours)}, and the "
                f"record {_in_words(self.record.counters)}. The record comes from other rules: "
                "replay it with the release that made it"
            )

    # --- facts ------------------------------------------------------------------------------------

    def _about_a_runner(self, fact: RecordedFact) -> list[Command]:
        """Put a fact whose values besides the runner are the method's own."""
        values = dict(fact.values)
        arguments: list[Any] = []
        if "runner" in values:
            arguments.append(self._runner(values.pop("runner")))
        if fact.at is not None:
            arguments.append(fact.at)
        return getattr(self.queue, fact.fact)(*arguments, **values) or []

    def _submit(
        self,
        at: float,
        job: int,
        runner: int,
        lease: int | None,
        wait: bool,
        since: float | None,
        deadline: float | str | None,
        **asked: Any,
    ) -> list[Command]:
        if job >= 0:
            return self.queue.submit(self._job(job), at, wait=wait, since=since)
        source = self._runner(runner) if lease is None else self._lease(lease, runner)
        due = None if deadline is None else float(deadline)
        new = Job(source, deadline=due, payload=len(self.jobs), **asked)
        commands = self.queue.submit(new, at, wait=wait, since=since)
        self.jobs.append(new)
        self._by_id[new.id] = new
        return commands

    def _complete(self, at: float, job: int, **values: Any) -> list[Command]:
        return self.queue.complete(self._job(job), at, **values)

    def _cancel(self, at: float, job: int) -> list[Command]:
        return self.queue.cancel(self._job(job), at)

    def _release(self, at: float, lease: int, runner: int = -1) -> list[Command]:
        return self.queue.release(self._lease(lease, runner), at)

    def _add_runner(
        self,
        _: None,
        name: str,
        slots: int,
        bounds: dict[str, Any] | None,
        placing: list[Any],
        batching: dict[str, Any] | None,
        share: float | str,
        holding: int | None,
        holding_name: str,
        **rest: Any,
    ) -> list[Command]:
        if slots > MOST:
            raise ReplayError(f"runner {name!r}: {slots} slots are too many")
        choice, *limits = placing
        limit, follow_limit, ahead_limit, hop, backlog_limit = map(float, limits)
        runner = self.queue.add_runner(
            name,
            slots,
            None if bounds is None else Bounds(**bounds),
            placing=Placing(
                Placement(choice),
                limit,
                follow_limit=follow_limit,
                ahead_limit=ahead_limit,
                hop=hop,
                backlog_limit=backlog_limit,
            ),
            batching=None if batching is None else _batching(**batching),
            share=float(share),
            memory=None if holding is None else self._holding(holding, holding_name),
            **rest,
        )
        self._runners[runner.number] = runner
        self._holdings[runner.memory.number] = runner.memory
        return []

    def _add_behind(self, at: float, runner: int, name: str) -> list[Command]:
        behind = self.queue.add_behind(self._runner(runner), name, at)
        self._runners[behind.number] = behind
        return []

    def _revoke_behind(self, at: float, runner: int, error: str) -> list[Command]:
        return self.queue.revoke_behind(self._runner(runner), at, AotiSchedError(error))

    def _claim(
        self, at: float, claim: int, bytes: int, holding: int, holding_name: str
    ) -> list[Command]:
        new = self._claims[claim] = Claim(self._holding(holding, holding_name), bytes)
        return self.queue.claim(new, at)

    def _give_up(self, at: float, claim: int) -> list[Command]:
        # A claim that the state has not was answered before, and can't be given up.
        return self.queue.give_up(self._claims.get(claim) or Claim(Holding(""), 0), at)

    def _update_use(
        self, at: float, holding: int, holding_name: str, **values: Any
    ) -> list[Command]:
        return self.queue.update_use(self._holding(holding, holding_name), at, **values)

    def _release_memory(self, at: float, holding: int, holding_name: str) -> list[Command]:
        return self.queue.release_memory(self._holding(holding, holding_name), at)

    # --- the objects behind the numbers ---------------------------------------------------------
    # A number that is not known is that of an object that was gone when the record begins.

    def _job(self, number: int) -> Job:
        """Return a job by its number at this time, which changes when its epoch comes."""
        job = self._by_id.get(number)
        if job is None or job.id != number:
            self._by_id = {one.id: one for one in self.jobs}
            job = self._by_id.get(number)
        if job is None:  # every fact about a job that has ended is illegal, whatever the job
            job = Job(self._runner(-1))
            job.state = JobState.WITHDRAWN if number >= 0 else JobState.NEW
        return job

    def _runner(self, number: int) -> RunnerState:
        runner = self._runners.get(number)
        if runner is None:
            load = Load("a runner that was removed", Bounds())
            runner = RunnerState("that was removed", 1, load, 1, Placing(), (), Holding(""))
            runner.phase = Phase.DRAINED
        return runner

    def _lease(self, number: int, runner: int) -> Lease:
        lease = self._leases.get(number)
        if lease is None:
            lease = Lease(number, self._runner(runner), 0, None, 0.0)
            lease.released = True
        return lease

    def _holding(self, number: int, name: str) -> Holding:
        holding = self._holdings.get(number)
        if holding is None:
            holding = self._holdings[number] = Holding(name)
            if number < self._holdings_before:  # a new one is numbered by the queue
                holding.number = number
        return holding


def _queue_of(record: DeviceRecord) -> RecordedQueue:
    """Return a queue as that of the device was made."""
    try:
        if record.lanes > MOST:
            raise ValueError(f"{record.lanes} lanes are too many")  # noqa: TRY301
        return RecordedQueue(
            record.device,
            record.lanes,
            Bounds(**record.bounds),
            inline_budget=record.inline_budget,
            cores=record.cores,
            policy=_policy(**record.policy),
            memory_limit=record.memory_limit,
            evicts=record.evicts,
            keep=len(record.facts),
        )
    except (TypeError, ValueError, IllegalFactError) as error:
        raise ReplayError(f"device {record.device!r}: this is no device: {error}") from None


def _batching(
    max_rows: int, max_delay: float | str, max_seconds: float | str | None, max_tokens: int | None
) -> Batching:
    seconds = None if max_seconds is None else float(max_seconds)
    return Batching(max_rows, float(max_delay), seconds, max_tokens)


def _policy(max_wait: float | str | None, **others: Any) -> Policy:
    return Policy(max_wait=None if max_wait is None else float(max_wait), **others)


def _in_words(counters: Mapping[str, Mapping[str, float]]) -> str:
    return "; ".join(f"{name}: {_counts(of)}" for name, of in counters.items()) or "nothing"


def _counts(counters: Mapping[str, float]) -> str:
    return ", ".join(f"{count:g} {what}" for what, count in counters.items() if count) or "nothing"
