"""Facts: how a recorded queue keeps them, and what is read from them later.

Facts are kept as flat values in lists: the name of the fact, its time, then what it was about. So
no object is made that the garbage collector meets. The number of a fact's values follows from its
name.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from typing import Any

import msgspec

from aoti_sched.queue.job import Job
from aoti_sched.queue.runner_state import Lease

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
    "release": ("lease",),
}
"""The names of each fact's values."""

FAILED = "failed"
"""The kept name of a completion that is not `ok`, which needs no value for that."""

_OF_SUBMIT = ("deadline", "bytes", "tenant")
"""The values that are kept of each submission, after the `Asked` that has the others."""

_OF_COMPLETE = ("job", "started", "finished")


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


class Record:
    """The facts that a queue has kept at one time. Nothing is read before `plain` or `facts`.

    Args:
        made: How the queue was made, by the names of `flight.DeviceRecord`, as JSON can have it.
        chunks: The kept facts as flat values.
        dropped: How many earlier facts are not kept.
        counters: The totals of the runners by name.
        error: The text of the error that the last fact has raised; "" where none is meant.
    """

    __slots__ = ("_chunks", "counters", "dropped", "error", "made")

    def __init__(
        self,
        made: dict[str, Any],
        chunks: list[list[Any]],
        dropped: int,
        counters: dict[str, dict[str, float]],
        error: str,
    ) -> None:
        self.made = made
        self._chunks = chunks
        self.dropped = dropped
        self.counters = counters
        self.error = error

    def facts(self) -> list[tuple[str, float | None, dict[str, Any]]]:
        """Return each fact's name, time and values, as JSON can have them.

        Tenants and keys are numbers, in the order in which they first came.
        """
        tenants: dict[Hashable, int] = {}
        keys: dict[Hashable, int] = {}
        facts = []
        for chunk in self._chunks:
            for name, at, values in unpacked(chunk):
                for what, numbers in (("tenant", tenants), ("key", keys)):
                    if values.get(what) is not None:
                        values[what] = numbers.setdefault(values[what], len(numbers))
                facts.append((name, at, {what: for_json(of) for what, of in values.items()}))
        return facts

    def plain(self) -> dict[str, Any]:
        """Return the record as JSON can have it; `flight.DeviceRecord` describes the values."""
        facts = [{"fact": name, "at": at, "values": values} for name, at, values in self.facts()]
        return {
            **self.made,
            "facts": facts,
            "dropped": self.dropped,
            "counters": self.counters,
            "error": self.error,
        }


def unpacked(chunk: list[Any]) -> Iterator[tuple[str, float | None, dict[str, Any]]]:
    """Yield the facts of a chunk, each with its name, its time and its values by name."""
    place = 0
    while place < len(chunk):
        name, at = chunk[place], chunk[place + 1]
        asked, names = None, VALUES.get(name)
        if isinstance(name, Asked):
            asked, name, names = name, "submit", _OF_SUBMIT
        elif names is None or name == "complete":
            names = _OF_COMPLETE
        end = place + 2 + len(names)
        values = dict(zip(names, chunk[place + 2 : end], strict=True))
        if asked is not None:
            values = {
                what: values[what] if what in values else getattr(asked, what)
                for what in VALUES["submit"]
            }
            if asked.lease < 0:
                values["lease"] = None
        elif names is _OF_COMPLETE:
            values["ok"] = name != FAILED
            name = "complete"
        yield name, at, values
        place = end


def for_json(value: Any) -> Any:
    """Return a value of a fact as JSON can have it, which knows no infinite number."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, msgspec.Struct):
        return {what: for_json(of) for what, of in msgspec.structs.asdict(value).items()}
    return [for_json(one) for one in value] if isinstance(value, tuple) else value
