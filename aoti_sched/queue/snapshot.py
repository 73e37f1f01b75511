"""Snapshot: the whole state of a device's queue as plain values, and the same queue made of them.

A record of facts whose first ones were dropped begins with a snapshot (`recorded.py`), and the rest
of the facts is replayed from there. A snapshot comes from strangers, with a report, so it is JSON,
and can name nothing but what stands in this file.

**The walk.** The queue is a graph of objects. Each object, and each container that can change, has
a number: the place where it is first met. Its values are what JSON has, or refer to a number, so
that shared objects stay shared and cycles end. What a class has is read from its slots, so no
attribute is forgotten. A class that is not in `_BLANK` raises `UnknownClassError`: add it there.

**The caller's.** Payloads and holders are left out. Tenants and keys become the numbers that they
have in the facts; `_NAMED` says where they are.

**The way back.** Each object is made by its own constructor, and then gets its values. A tuple can
only refer to what has a number, so no tuple contains itself.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any

import msgspec

from aoti_sched.errors import ReplayError
from aoti_sched.queue.admission.gate import Room, _place
from aoti_sched.queue.admission.load import Bounds, Load
from aoti_sched.queue.admission.shedding import ShedHeap
from aoti_sched.queue.batching import Batching, BatchQueue, Key
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.heap import _NONE
from aoti_sched.queue.histogram import (
    _SECONDS,
    _SIZES,
    LEAST_SIZE,
    Ended,
    Histogram,
    Histograms,
)
from aoti_sched.queue.holding import Holding, Stay
from aoti_sched.queue.job import Fact, Job, JobState, Priority
from aoti_sched.queue.lanes import Lanes
from aoti_sched.queue.memory import Claim, Memory
from aoti_sched.queue.policy import Policy
from aoti_sched.queue.runner_state import Counters, EpochJobs, Lease, Phase, RunnerState
from aoti_sched.queue.selection.accounts import Account, FairClass
from aoti_sched.queue.selection.backlog import Backlog
from aoti_sched.queue.selection.choice import (
    Selector,
    _age_on_a_lane,
    _age_on_the_loop,
    _for_a_lane,
    _for_a_lease,
    _for_the_loop,
)
from aoti_sched.queue.selection.fairness import FairShares
from aoti_sched.queue.selection.forecast import Forecast
from aoti_sched.queue.selection.job_queue import (
    NO_ACCOUNT,
    Bucket,
    Buckets,
    JobQueue,
    Keyed,
    LazyHeap,
    SortedJobs,
)
from aoti_sched.queue.selection.placement import Placement, Placing
from aoti_sched.queue.selection.service_time import ServiceTime, ServiceTimes
from aoti_sched.queue.selection.urgency import Urgency, _Starts
from aoti_sched.queue.timers import Deadlines, Timers
from aoti_sched.queue.turns import Turns


class UnknownClassError(Exception):
    """A queue has an object that no snapshot can have: this file lacks its class."""


def _runner() -> RunnerState:
    return RunnerState("", 0, Load("", Bounds()), 1, Placing(), (), Holding(""))


_BLANK: dict[type, Callable[[], Any]] = {
    Account: Account,
    Backlog: Backlog,
    BatchQueue: lambda: BatchQueue(Batching(1), JobQueue()),
    Bucket: lambda: Bucket(0, NO_ACCOUNT, None, 0),
    Buckets: Buckets,
    Claim: lambda: Claim(Holding(""), 0),
    Deadlines: Deadlines,
    Ended: Ended,
    EpochJobs: EpochJobs,
    FairClass: FairClass,
    FairShares: lambda: FairShares(False),
    Forecast: lambda: Forecast(Lanes(1, 1, 0.0), fair=False),
    Histogram: lambda: Histogram(LEAST_SIZE),
    Histograms: lambda: Histograms(0, 0),
    Holding: lambda: Holding(""),
    Job: lambda: Job(_runner()),
    JobQueue: JobQueue,
    Key: Key,
    Keyed: Keyed,
    Lanes: lambda: Lanes(1, 1, 0.0),
    LazyHeap: lambda: LazyHeap(Bucket.rank),
    Lease: lambda: Lease(0, _runner(), 0, None, 0.0),
    Load: lambda: Load("", Bounds()),
    Memory: lambda: Memory(""),
    Placing: Placing,
    Room: lambda: Room("", Bounds()),
    RunnerState: _runner,
    Selector: lambda: Selector(Lanes(1, 1, 0.0), None),
    ServiceTime: ServiceTime,
    ServiceTimes: ServiceTimes,
    ShedHeap: ShedHeap,
    SortedJobs: SortedJobs,
    Timers: Timers,
    Turns: lambda: Turns(_runner(), _runner(), 0.0),
    Urgency: Urgency,
    _Starts: _Starts,
    **{kind: kind for kind in (list, deque, set, dict, OrderedDict)},
}
"""Makes an object of each class that may get values."""

_STRUCTS: tuple[type, ...] = (Batching, Bounds, Counters, Policy)
_ENUMS: tuple[type[enum.Enum], ...] = (Fact, JobState, Phase, Placement, Priority, Stay)
_KNOWN: dict[str, Any] = {
    "age on a lane": _age_on_a_lane,
    "age on the loop": _age_on_the_loop,
    "for a lane": _for_a_lane,
    "for a lease": _for_a_lease,
    "for the loop": _for_the_loop,
    "gate": _place,
    "no account": NO_ACCOUNT,
    "none": _NONE,
    "rank": Bucket.rank,
    "seconds": _SECONDS,
    "sizes": _SIZES,
}
"""What is the same in every queue, by name."""

_LEFT_OUT: dict[type, set[str]] = {
    Claim: {"payload"},
    Holding: {"payload"},
    Job: {"payload"},
    Lease: {"holder"},
}

_NAMED: dict[tuple[type, str], tuple[int, ...]] = {
    (Account, "name"): (),
    (BatchQueue, "keys"): (),
    (Bucket, "key"): (),
    (FairClass, "accounts"): (),  # of tenants; those of runners are named by us
    (Job, "key"): (),
    (Job, "tenant"): (),
    (JobQueue, "_buckets"): (1, 2),
    (JobQueue, "_by_key"): (),
    (JobQueue, "_hidden"): (),
    (JobQueue, "_names"): (1, 2),
    (RunnerState, "backlog_of"): (),
    (RunnerState, "tenant_jobs"): (),
    (RunnerState, "tenant_lines"): (),
    (RunnerState, "worst_of"): (),
    (Timers, "keys"): (3,),
}
"""Where tenants and keys are: the value, or the keys or items of the container; of tuples, which
of their items."""

_PLAIN = frozenset({bool, int, float, str})
_KINDS = {kind.__name__: kind for kind in (*_BLANK, *_STRUCTS)}
_ENUM_KINDS = {kind.__name__: kind for kind in _ENUMS}
_KNOWN_NAMES = {id(thing): name for name, thing in _KNOWN.items()}
_DEPTH = 8
"""The most tuples within each other."""


def fields_of(thing: Any) -> list[str]:
    """Return the names of a thing's attributes, whether it is compiled or not."""
    kind = type(thing)
    compiled = getattr(kind, "__mypyc_attrs__", None)
    if compiled is not None:
        names = set(compiled)
    elif isinstance(thing, msgspec.Struct):
        names = set(thing.__struct_fields__)
    else:
        names = {name for one in kind.__mro__ for name in getattr(one, "__slots__", ())}
        names |= getattr(thing, "__dict__", {}).keys()
    return sorted(names - {"__dict__", "__weakref__", "_kept"} - _LEFT_OUT.get(kind, set()))


class _Field:
    """One attribute of a class: its name, and the places of tenants and keys; None for none."""

    __slots__ = ("name", "named")

    def __init__(self, kind: type, name: str) -> None:
        self.name = name
        self.named = _NAMED.get((kind, name))


_FIELDS: dict[type, list[_Field]] = {}


class _Ref:
    """Stands for what has a number."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class _Name:
    """Stands for a tenant or key."""

    __slots__ = ("name",)

    def __init__(self, name: Hashable) -> None:
        self.name = name


class _Known:
    """Stands for what is the same in every queue."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Snapshot:
    """The state of a queue at one time.

    Args:
        kinds: The class of each object; None for the queue, which is the first.
        contents: Their values: an object's in the order of its fields; a dict's keys and values.
        cost: How many values were read for it.
    """

    __slots__ = ("_contents", "_kinds", "_of_queue", "cost")

    def __init__(
        self, kinds: list[Any], contents: list[list[Any]], of_queue: list[_Field], cost: int
    ) -> None:
        self._kinds = kinds
        self._contents = contents
        self._of_queue = of_queue
        self.cost = cost

    def plain(self, number_of: Callable[[Hashable], int]) -> list[dict[str, Any]]:
        """Return the snapshot as JSON can have it.

        Args:
            number_of: Gives the number of a tenant or key.
        """
        plain: list[dict[str, Any]] = []
        for kind, content in zip(self._kinds, self._contents, strict=True):
            values: Any = [_for_json(value, number_of) for value in content]
            if kind is None or kind in _FIELDS:
                names = self._of_queue if kind is None else _FIELDS[kind]
                values = {
                    field.name: value
                    for field, value, kept in zip(names, values, content, strict=True)
                    if kept is not _MISSING
                }
            plain.append({"kind": "queue" if kind is None else kind.__name__, "values": values})
        return plain


_MISSING = _Known("missing")
"""Stands for an attribute that was deleted."""


def _for_json(value: Any, number_of: Callable[[Hashable], int]) -> Any:
    if isinstance(value, _Ref):
        return {"object": value.number}
    if isinstance(value, _Name):
        return {"name": number_of(value.name)}
    if isinstance(value, _Known):
        return {"known": value.name}
    if isinstance(value, tuple):
        return [_for_json(one, number_of) for one in value]
    if isinstance(value, enum.Enum):
        return {"enum": [type(value).__name__, value.value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


class _Walk:
    """A walk over the objects of a queue."""

    __slots__ = ("cost", "found", "named", "numbers")

    def __init__(self, queue: DeviceQueue) -> None:
        self.found: list[Any] = [queue]
        self.named: list[tuple[int, ...] | None] = [None]
        self.numbers: dict[int, int] = {id(queue): 0}
        self.cost = 0

    def content(self, thing: Any, named: tuple[int, ...] | None) -> list[Any]:
        """Return the values of a container."""
        self.cost += len(thing) // 8  # of numbers; others are counted one by one
        if named is None:
            items = thing
            if isinstance(thing, dict):
                items = [item for pair in thing.items() for item in pair]
            return [item if type(item) is int else self.value(item) for item in items]
        if isinstance(thing, dict):
            values: list[Any] = []
            for key, value in thing.items():
                values.append(_with_names(self, key, named))
                values.append(self.value(value))
            return values
        return [_with_names(self, item, named) for item in thing]

    def values(self, thing: Any, fields: list[_Field]) -> list[Any]:
        """Return the values of an object."""
        values: list[Any] = []
        for field in fields:
            value = getattr(thing, field.name, _MISSING)
            named = field.named
            if named is None:
                values.append(self.value(value))
            elif isinstance(value, dict | deque | set | list):
                if isinstance(thing, FairClass) and _is_of_runners(thing):
                    named = None
                values.append(self.number(value, named))
            else:
                values.append(_name(value))
        return values

    def value(self, value: Any) -> Any:
        self.cost += 1
        kind = type(value)
        if value is None or kind in _PLAIN or value is _MISSING:
            return value
        if kind is tuple:
            return tuple([self.value(one) for one in value])
        if kind in _ENUMS:
            return value
        known = _KNOWN_NAMES.get(id(value))
        return self.number(value, None) if known is None else _Known(known)

    def number(self, thing: Any, named: tuple[int, ...] | None) -> _Ref:
        number = self.numbers.get(id(thing))
        if number is None:
            kind = type(thing)
            if kind not in _BLANK and kind not in _STRUCTS:
                raise UnknownClassError(f"a snapshot of a queue has no {kind.__qualname__}")
            number = self.numbers[id(thing)] = len(self.found)
            self.found.append(thing)
            self.named.append(named)
        return _Ref(number)


def _is_of_runners(accounts: FairClass) -> bool:
    """Return whether the accounts are of runners. Only a tenant's account has a name."""
    return any(
        name is not None and account.name is None for name, account in accounts.accounts.items()
    )


def _with_names(walk: _Walk, value: Any, named: tuple[int, ...]) -> Any:
    """Return a tenant, a key, or a tuple that has some."""
    if not named:
        return _name(value)
    return tuple(
        [_name(one) if place in named else walk.value(one) for place, one in enumerate(value)]
    )


def _name(value: Any) -> Any:
    return None if value is None else _Name(getattr(value, "number", value))


def take(queue: DeviceQueue, most: int) -> Snapshot | int:
    """Return a snapshot of a queue, between two facts, and while no ending is under way.

    Args:
        queue: The queue.
        most: The most values that are read.

    Returns:
        The snapshot; or how many values were read, when these are too many.

    Raises:
        UnknownClassError: The queue has an object of a class that is not known here.
    """
    walk = _Walk(queue)
    of_queue = [_Field(type(queue), name) for name in fields_of(queue)]
    kinds: list[Any] = [None]
    contents = [walk.values(queue, of_queue)]
    place = 1
    while place < len(walk.found):
        if walk.cost > most:
            return walk.cost
        thing = walk.found[place]
        kind = type(thing)
        kinds.append(kind)
        if isinstance(thing, list | deque | set | dict):
            contents.append(walk.content(thing, walk.named[place]))
        else:
            fields = _FIELDS.get(kind)
            if fields is None:
                fields = _FIELDS[kind] = [_Field(kind, name) for name in fields_of(thing)]
            contents.append(walk.values(thing, fields))
        place += 1
    return Snapshot(kinds, contents, of_queue, walk.cost)


# --- the way back ---------------------------------------------------------------------------------


class Saved(msgspec.Struct, frozen=True):
    """One object of a snapshot, as a file has it.

    Attributes:
        kind: The name of the class; "queue" for the first.
        values: The values of an object by name, or of a container; of a dict, keys and values.
    """

    kind: str
    values: dict[str, Any] | list[Any]


def restore(saved: list[Saved], queue: DeviceQueue) -> list[Any]:
    """Give a new queue the state of a snapshot.

    Returns:
        All objects of the queue, and the queue itself as the first.

    Raises:
        ReplayError: This is no snapshot of a queue.
    """
    try:
        things = [queue, *[_made(one) for one in saved[1:]]]
        for one, thing in zip(saved, things, strict=True):
            _fill(one, thing, things)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ReplayError(f"device {queue.name!r}: this is no state of a queue: {error}") from None
    return things


def _made(one: Saved) -> Any:
    """Make an object that has no values yet, or a struct, which refers to no object."""
    kind = _KINDS[one.kind]
    if kind in _STRUCTS:
        if not isinstance(one.values, dict):
            raise TypeError(f"a {one.kind} has names")
        values = {name: _read(value, [], 0) for name, value in one.values.items()}
        return msgspec.convert(values, kind)
    return _BLANK[kind]()


def _fill(one: Saved, thing: Any, things: list[Any]) -> None:
    if isinstance(thing, msgspec.Struct):
        return
    if isinstance(one.values, dict):
        _fill_object(one, one.values, thing, things)
        return
    values = [_read(value, things, 0) for value in one.values]
    if isinstance(thing, dict):
        for key, value in zip(values[::2], values[1::2], strict=True):
            thing[key] = value
    elif isinstance(thing, set):
        thing.update(values)
    elif isinstance(thing, list | deque):
        thing.extend(values)
    else:
        raise TypeError(f"a {one.kind} has names")


def _fill_object(one: Saved, values: dict[str, Any], thing: Any, things: list[Any]) -> None:
    names = set(fields_of(thing))
    missing = names - values.keys()
    if not names or missing - {"runner"} or values.keys() - names:
        raise ValueError(f"a {one.kind} has {', '.join(sorted(names)) or 'no names'}")
    for name, value in values.items():
        setattr(thing, name, _read(value, things, 0))
    if missing:
        del thing.runner


def _read(value: Any, things: list[Any], depth: int) -> Any:
    """Return a value of a snapshot."""
    if isinstance(value, list):
        if depth == _DEPTH:
            raise ValueError("too many lists within each other")
        return tuple([_read(one, things, depth + 1) for one in value])
    if not isinstance(value, dict):
        return value
    ((what, of),) = value.items()
    if what == "enum":
        name, number = of
        return _ENUM_KINDS[name](number)
    if what == "float" and of in ("inf", "-inf"):
        return float(of)
    if what == "known":
        return _KNOWN[of]
    if what in ("name", "object") and type(of) is int and of >= 0:
        return of if what == "name" else things[of]
    raise ValueError(f"there is no {what} {of!r}")
