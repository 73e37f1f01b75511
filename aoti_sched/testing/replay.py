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
from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.commands import Command, Grant
from aoti_sched.queue.facts import Record
from aoti_sched.queue.holding import Holding
from aoti_sched.queue.job import IllegalFactError, Job
from aoti_sched.queue.memory import Claim
from aoti_sched.queue.policy import Policy
from aoti_sched.queue.recorded import RecordedQueue
from aoti_sched.queue.runner_state import Lease, RunnerState
from aoti_sched.queue.selection.placement import Placement, Placing

Outcome = list[Command] | IllegalFactError | MemoryLimitError
"""The commands that followed from a fact, or the error that it raised."""


def replay(record: FlightRecord | str | os.PathLike[str]) -> dict[str, Replayed]:
    """Replay a record of a scheduler, and return what became of each device, by name.

    Args:
        record: What `Scheduler.flight_record` returned, or the path of a file that it was saved to.

    Raises:
        ReplayError: The record lacks its beginning, or comes from other rules than those here: the
            queue has counted something else.
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
        record = msgspec.convert(record, DeviceRecord)
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
        jobs: The jobs, in the order in which they were submitted. Their `payload` is the place in
            this list.

    Raises:
        ReplayError: The record lacks its beginning.
    """

    def __init__(self, record: DeviceRecord) -> None:
        if record.dropped:
            raise ReplayError(
                f"device {record.device!r}: the record lacks its first {record.dropped} facts, so "
                "the state that the others met is unknown. Record more of them with "
                "SchedulerConfig(flight_facts=)"
            )
        self.record = record
        self.queue = RecordedQueue(
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
        self.outcomes: list[Outcome] = []
        self.jobs: list[Job] = []
        self._by_id: dict[int, Job] = {}
        self._runners: list[RunnerState] = []
        self._leases: dict[int, Lease] = {}
        self._holdings: list[Holding] = []
        self._claims: list[Claim] = []

    def steps(self) -> Iterator[tuple[RecordedFact, Outcome]]:
        """Put one fact after the other to the queue, and yield each with what followed.

        Raises:
            ReplayError: After the last fact, the queue has counted something else than the record.
        """
        for fact in self.record.facts:
            outcome = self._outcome(fact)
            self.outcomes.append(outcome)
            yield fact, outcome
        self._must_agree()

    def _outcome(self, fact: RecordedFact) -> Outcome:
        put = getattr(self, f"_{fact.fact}", None)
        try:
            if put is not None:
                commands: list[Command] = put(fact.at, **fact.values)
            else:
                commands = self._about_a_runner(fact)
        except (IllegalFactError, MemoryLimitError) as error:
            return error
        for command in commands:
            if isinstance(command, Grant):
                self._leases[command.lease.id] = command.lease
        return commands

    def _must_agree(self) -> None:
        ours = {
            name: msgspec.structs.asdict(runner.counters)
            for name, runner in self.queue.runners.items()
        }
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
            arguments.append(self._runners[values.pop("runner")])
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
        source = self._runners[runner] if lease is None else self._leases[lease]
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

    def _release(self, at: float, lease: int) -> list[Command]:
        return self.queue.release(self._leases[lease], at)

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
        choice, *limits = placing
        limit, follow_limit, hop = map(float, limits)
        runner = self.queue.add_runner(
            name,
            slots,
            None if bounds is None else Bounds(**bounds),
            placing=Placing(Placement(choice), limit, follow_limit=follow_limit, hop=hop),
            batching=None if batching is None else _batching(**batching),
            share=float(share),
            memory=None if holding is None else self._holding(holding, holding_name),
            **rest,
        )
        self._runners.append(runner)
        if holding is None:
            self._holdings.append(runner.memory)
        return []

    def _add_behind(self, at: float, runner: int, name: str) -> list[Command]:
        self._runners.append(self.queue.add_behind(self._runners[runner], name, at))
        return []

    def _revoke_behind(self, at: float, runner: int, error: str) -> list[Command]:
        return self.queue.revoke_behind(self._runners[runner], at, AotiSchedError(error))

    def _claim(
        self, at: float, claim: int, bytes: int, holding: int, holding_name: str
    ) -> list[Command]:
        self._claims.append(Claim(self._holding(holding, holding_name), bytes))
        return self.queue.claim(self._claims[claim], at)

    def _give_up(self, at: float, claim: int) -> list[Command]:
        return self.queue.give_up(self._claims[claim], at)

    def _update_use(
        self, at: float, holding: int, holding_name: str, **values: Any
    ) -> list[Command]:
        return self.queue.update_use(self._holding(holding, holding_name), at, **values)

    def _release_memory(self, at: float, holding: int, holding_name: str) -> list[Command]:
        return self.queue.release_memory(self._holding(holding, holding_name), at)

    # --- the objects behind the numbers ---------------------------------------------------------

    def _job(self, number: int) -> Job:
        """Return a job by its number at this time, which changes when its epoch comes."""
        job = self._by_id.get(number)
        if job is None or job.id != number:
            self._by_id = {one.id: one for one in self.jobs}
            job = self._by_id.get(number)
        # A fact about a job that was never submitted is illegal, whatever the job.
        return job or Job(self._runners[0])

    def _holding(self, number: int, name: str) -> Holding:
        if number == len(self._holdings):
            self._holdings.append(Holding(name))
        return self._holdings[number]


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
