"""Facts: how a recorded queue keeps them, and what is read from them later.

Facts are kept as flat values in lists: the name of the fact, its time, then what it was about. So
no object is made that the garbage collector meets. The number of a fact's values follows from its
name.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import asdict, is_dataclass
from typing import Any, Final

from aoti_sched.queue.job import Job
from aoti_sched.queue.runner_state import Lease, Source
from aoti_sched.queue.snapshot import Snapshot

VALUES = {
    "add_runner": (
        *("name", "slots", "bounds", "epoch", "placing", "batching", "width", "share", "sheds"),
        *("predicts", "routable", "holding", "holding_name"),
    ),
    "drain_runner": ("runner",),
    "terminate_runner": ("runner",),
    "withdraw": ("runner",),
    "remove_runner": ("runner",),
    "close_barrier": ("runner", "abort"),
    "open_barrier": ("runner", "epoch"),
    "add_behind": ("runner", "name"),
    "keep_epoch": ("runner",),
    "withdraw_pinned": ("runner",),
    "revoke_behind": ("runner", "error"),
    "hold_turns": ("runner",),
    "release_turns": ("runner",),
    "turned": ("runner", "exchanged"),
    "claim": ("claim", "bytes", "holding", "holding_name"),
    "give_up": ("claim",),
    "pin": ("runner",),
    "update_use": ("holding", "holding_name", "constants", "inactive", "fixed"),
    "release_memory": ("holding", "holding_name"),
    "call_back": ("runner",),
    "parked": ("runner",),
    "returned": ("runner", "error"),
    "turn": (),
    "submit": (
        *("job", "runner", "lease", "wait", "since", "priority", "deadline", "bytes"),
        *("is_lease_request", "min_epoch", "rows", "key", "bypasses_limits", "tenant", "tokens"),
        "pinned",
    ),
    "complete": ("job", "ok", "started", "finished"),
    "cancel": ("job",),
    "tick": (),
    "go_on": (),
    "release": ("lease", "runner"),
}
"""The names of each fact's values."""

FAILED: Final = "failed"
"""The kept name of a completion that is not `ok`, which needs no value for that."""

_OF_SUBMIT: tuple[str, ...] = ("deadline", "bytes", "tenant")
"""The values that are kept of each submission, after the `Asked` that has the others."""

_OF_COMPLETE: tuple[str, ...] = ("job", "started", "finished")


class Asked:
    """What most requests of a runner have in common, kept once for all of them in a row.

    Args:
        job: The first of the requests.
        wait: Whether the job may wait for room.
        since: When it was first submitted, at another replica.
    """

    __slots__ = (
        "bypasses_limits",
        "is_lease_request",
        "job",
        "key",
        "lease",
        "min_epoch",
        "pinned",
        "priority",
        "rows",
        "runner",
        "since",
        "tokens",
        "wait",
    )

    def __init__(self, job: Job, wait: bool, since: float | None) -> None:
        self.job = job.id  # -1 of a legal submission
        self.runner = job.source.runner.number
        self.lease = lease_of(job)
        self.wait = wait
        self.since = since
        self.priority = job.priority
        self.is_lease_request = job.is_lease_request
        self.min_epoch = job.min_epoch
        self.rows = job.rows
        self.key = job.key
        self.bypasses_limits = job.bypasses_limits
        self.tokens = job.tokens
        self.pinned = job.pinned

    def fits(self, job: Job, wait: bool, since: float | None) -> bool:
        """Return whether these are the values of another job of the same source, too."""
        return (
            self.job == job.id
            and self.since is since
            and self.wait == wait
            and self.rows == job.rows
            and self.tokens == job.tokens
            and self.priority == job.priority
            and self.min_epoch == job.min_epoch
            and (self.key is job.key or self.key == job.key)
            and self.is_lease_request == job.is_lease_request
            and self.bypasses_limits == job.bypasses_limits
            and self.pinned == job.pinned
        )


def lease_of(job: Job) -> int:
    """Return the id of the lease that a job draws its slot from; -1 for a runner's own slots."""
    source = job.source
    return source.id if isinstance(source, Lease) else -1


CHUNK: Final = 256
"""Facts of a chunk. Facts are dropped a chunk at a time."""

USUAL: Final = 5
"""Values of the facts that each request has, at most."""

SPACING: Final = 5
"""Facts for each value of a snapshot before the next one is tried: 1 % of the loop's time.

A value takes 700 instructions (callgrind, rules compiled), and the loop 15,000 for each fact of a
tiny request.
"""

MORE: Final = 100_000
"""The most facts that are kept beyond those asked for, back to a state that a replay can begin at.

They take 10 MB, at 100 bytes a fact.
"""


class Group:
    """Chunks that follow on each other.

    Attributes:
        state: The state of the queue before the first of them, if it is kept.
        is_start: Whether a replay can begin with them.
    """

    __slots__ = ("chunks", "is_start", "state")

    def __init__(self, state: Snapshot | None) -> None:
        self.state = state
        self.is_start = True
        self.chunks: deque[list[Any]] = deque()


class Kept:
    """The last facts of a queue, in chunks.

    Args:
        keep: The least number of the last facts that are kept.

    Attributes:
        chunk: The present chunk. It has its full length from the beginning, since a list that grows
            is copied again and again.
        at: The place of the next value in it.
        left: Facts that it still takes.
        source: The source of the last submission.
        asked: What that one asked for.
    """

    __slots__ = (
        "_asked_of",
        "_dropped",
        "_groups",
        "_keep",
        "_over",
        "_size",
        "_spacing",
        "_whole",
        "asked",
        "at",
        "chunk",
        "left",
        "source",
    )

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._size = max(1, min(CHUNK, keep))
        self._groups: deque[Group] = deque((Group(None),))  # the oldest first
        self._over: deque[list[Any]] = deque()  # dropped chunks: a few are freed with each new one
        self._whole = 0  # whole chunks
        self._dropped = 0  # chunks
        self._spacing = 0  # facts until the next snapshot is tried
        self._open()

    def _open(self) -> None:
        self.chunk: list[Any] = [None] * (self._size * USUAL)
        self.at = 0
        self.left = self._size
        self.source: Source | None = None
        self.asked: Asked | None = None
        # The last of each runner and priority, since requests of several classes alternate.
        self._asked_of: dict[tuple[int, int], Asked] = {}

    def asked_by(self, job: Job, wait: bool, since: float | None) -> Asked:
        """Return what a job of another source asks for, or of the same one something else."""
        source = job.source
        name = (source.runner.number, job.priority)
        asked = self._asked_of.get(name)
        if asked is None or asked.lease != lease_of(job) or not asked.fits(job, wait, since):
            asked = self._asked_of[name] = Asked(job, wait, since)
        self.source, self.asked = source, asked
        return asked

    def add(self, fact: tuple[Any, ...]) -> None:
        """Add a rare fact, for which there is room."""
        chunk = self.chunk
        if len(fact) > USUAL:  # the other facts of the chunk keep their room
            chunk.extend([None] * (len(fact) - USUAL))
        for value in fact:
            chunk[self.at] = value
            self.at += 1
        self.left -= 1

    def wants_state(self) -> bool:
        """Return whether a snapshot is due with the next chunk."""
        self._spacing -= self._size
        return self._spacing <= 0

    def spent(self, cost: int) -> None:
        """Note how many values were read for a snapshot."""
        self._spacing = SPACING * cost

    def begin_chunk(self, state: Snapshot | None) -> None:
        """Begin a chunk, and drop what is not needed any more.

        Args:
            state: The present state of the queue, if it was taken.
        """
        del self.chunk[self.at :]
        groups = self._groups
        groups[-1].chunks.append(self.chunk)
        self._whole += 1
        self._open()
        if state is not None:
            groups.append(Group(state))
        first = groups[0]
        while (self._whole - 1) * self._size >= self._keep + MORE:
            self._drop(first, 1)
            first.is_start, first.state = False, None
        while len(groups) > 1 and (
            not first.is_start or (self._whole - len(first.chunks)) * self._size >= self._keep
        ):
            self._drop(first, len(first.chunks))
            groups.popleft()
            first = groups[0]
        for _ in range(min(2, len(self._over))):
            self._over.popleft()

    def _drop(self, group: Group, chunks: int) -> None:
        self._whole -= chunks
        self._dropped += chunks
        for _ in range(chunks):
            self._over.append(group.chunks.popleft())

    def record(
        self, made: dict[str, Any], counters: dict[str, dict[str, float]], error: str
    ) -> Record:
        """Return the kept facts, without reading them; the arguments are those of `Record`."""
        chunks = [chunk for group in self._groups for chunk in group.chunks]
        chunks.append(self.chunk[: self.at])
        dropped = self._dropped * self._size
        return Record(made, self._groups[0].state, chunks, dropped, counters, error)


class Record:
    """The facts that a queue has kept at one time. Nothing is read before `plain` or `facts`.

    Args:
        made: How the queue was made, by the names of `flight.DeviceRecord`, as JSON can have it.
        state: The state of the queue before the first fact, if it is kept.
        chunks: The kept facts as flat values.
        dropped: How many earlier facts are not kept.
        counters: The totals of the runners by name.
        error: The text of the error that the last fact has raised; "" where none is meant.
    """

    __slots__ = ("_chunks", "_state", "counters", "dropped", "error", "made")

    def __init__(
        self,
        made: dict[str, Any],
        state: Snapshot | None,
        chunks: list[list[Any]],
        dropped: int,
        counters: dict[str, dict[str, float]],
        error: str,
    ) -> None:
        self.made = made
        self._state = state
        self._chunks = chunks
        self.dropped = dropped
        self.counters = counters
        self.error = error

    def facts(self) -> list[tuple[str, float | None, dict[str, Any]]]:
        """Return each fact's name, time and values, with the tenants and keys themselves."""
        return [fact for chunk in self._chunks for fact in _unpacked(chunk)]

    def plain(self) -> dict[str, Any]:
        """Return the record as JSON can have it; `flight.DeviceRecord` describes the values.

        Tenants and keys are numbers, in the order in which they first came.
        """
        numbers: dict[Hashable, int] = {}

        def number_of(name: Hashable) -> int:
            return numbers.setdefault(name, len(numbers))

        state = None if self._state is None else self._state.plain(number_of)
        facts = []
        for name, at, values in self.facts():
            if name == "submit":
                for what in ("tenant", "key"):
                    if values[what] is not None:
                        values[what] = number_of(values[what])
            plain = {what: for_json(of) for what, of in values.items()}
            facts.append({"fact": name, "at": at, "values": plain})
        return {
            **self.made,
            "state": state,
            "facts": facts,
            "dropped": self.dropped,
            "counters": self.counters,
            "error": self.error,
        }


def _unpacked(chunk: list[Any]) -> Iterator[tuple[str, float | None, dict[str, Any]]]:
    """Yield the facts of a chunk, each with its name, its time and its values by name."""
    place = 0
    while place < len(chunk):
        name, at = chunk[place], chunk[place + 1]
        asked: Asked | None = None
        if isinstance(name, Asked):
            asked, name, names = name, "submit", _OF_SUBMIT
        elif name in ("complete", FAILED):
            names = _OF_COMPLETE
        else:
            names = VALUES[name]
        end = place + 2 + len(names)
        values = dict(zip(names, chunk[place + 2 : end], strict=True))
        if asked is not None:
            values = {
                what: values[what] if what in values else getattr(asked, what)
                for what in VALUES["submit"]
            }
            if asked.lease < 0:
                values["lease"] = None
        elif name in ("complete", FAILED):
            values["ok"] = name != FAILED
            name = "complete"
        yield name, at, values
        place = end


def for_json(value: Any) -> Any:
    """Return a value of a fact as JSON can have it, which knows no infinite number."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {what: for_json(of) for what, of in asdict(value).items()}
    return [for_json(one) for one in value] if isinstance(value, tuple) else value
