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
from collections.abc import Callable, Hashable, Iterator, Sequence
from operator import attrgetter
from typing import Any

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
    _for_either,
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
)
from aoti_sched.queue.selection.placement import Placement, Placing
from aoti_sched.queue.selection.service_time import ServiceTime, ServiceTimes
from aoti_sched.queue.selection.sorted_jobs import Node, SortedJobs
from aoti_sched.queue.selection.urgency import Urgency, _Starts
from aoti_sched.queue.timers import Deadlines, Timers
from aoti_sched.queue.weight_turns import Turns


class UnknownClassError(Exception):
    """A queue has an object that no snapshot can have: this file lacks its class."""


def _runner() -> RunnerState:
    return RunnerState("", 0, Load("", Bounds()), 1, Placing(), (), Holding(""))


_CONTAINERS: tuple[type, ...] = (list, dict, OrderedDict, deque)

_BLANK: dict[type, Callable[[], Any]] = {
    Account: Account,
    Backlog: Backlog,
    BatchQueue: lambda: BatchQueue(Batching(1), JobQueue()),
    Bucket: lambda: Bucket(0, NO_ACCOUNT, None, 0, Buckets()),
    Buckets: Buckets,
    Claim: lambda: Claim(Holding(""), 0),
    Counters: Counters,
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
    Node: lambda: Node(0.0, Job(_runner())),
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
    **{kind: kind for kind in _CONTAINERS},
}
"""Makes an object of each class that may get values."""

_RULES: tuple[type, ...] = (Batching, Bounds, Policy)
"""Classes whose objects never change."""
_ENUMS: tuple[type[enum.Enum], ...] = (Fact, JobState, Phase, Placement, Priority, Stay)
_KNOWN: dict[str, Any] = {
    "age on a lane": _age_on_a_lane,
    "age on the loop": _age_on_the_loop,
    "for a lane": _for_a_lane,
    "for a lease": _for_a_lease,
    "for either": _for_either,
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

_KINDS = {kind.__name__: kind for kind in (*_BLANK, *_RULES)}
_ENUM_KINDS = {kind.__name__: kind for kind in _ENUMS}
_DEPTH = 8
"""The most tuples within each other."""


def fields_of(thing: Any) -> list[str]:
    """Return the names of a thing's attributes, whether its class is compiled or not."""
    kind = type(thing)
    names = {name for one in kind.__mro__ for name in vars(one).get("__slots__", ())}
    names.update(getattr(kind, "__mypyc_attrs__", ()))
    names |= getattr(thing, "__dict__", {}).keys()
    return sorted(names - {"__dict__", "__weakref__", "_kept"} - _LEFT_OUT.get(kind, set()))


class _Fields:
    """The attributes of a class.

    Attributes:
        names: Their names, in the order in which the values are kept.
        all_of: Returns the values of an object, if none was deleted.
        named: For each, the places of tenants and keys; None for none.
    """

    __slots__ = ("all_of", "named", "names")

    def __init__(self, thing: Any) -> None:
        kind = type(thing)
        self.names = fields_of(thing)
        self.all_of = attrgetter(*self.names, "__class__")  # a tuple, however few they are
        self.named = [_NAMED.get((kind, name)) for name in self.names]

    def values_of(self, thing: Any) -> tuple[Any, ...]:
        try:
            return self.all_of(thing)[:-1]
        except AttributeError:
            return tuple([getattr(thing, name, _MISSING) for name in self.names])


_FIELDS: dict[type, _Fields] = {}


def _fields(thing: Any) -> _Fields:
    kind = type(thing)
    fields = _FIELDS.get(kind)
    if fields is None:
        fields = _FIELDS[kind] = _Fields(thing)
    return fields


class _Known:
    """Stands for what is the same in every queue; with other names, says what follows."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


_OBJECT = _Known("object")  # a number follows
_NAME = _Known("name")  # a tenant or key follows
_TUPLE = _Known("tuple")  # its length and its values follow
_MISSING = _Known("missing")  # an attribute that was deleted

_PLAIN = frozenset({type(None), bool, int, float, str, *_ENUMS})
"""Classes whose values are kept as they are."""

_KNOWN_IDS = {id(thing): _Known(name) for name, thing in _KNOWN.items()}


class Snapshot:
    """The state of a queue at one time, in two lists: objects would cost the garbage collector.

    Args:
        kinds: The class of each object; None for the queue, which is the first.
        values: Their values, one after the other: an object's in the order of its fields, and a
            container's after their number.
        of_queue: The fields of the queue.
        cost: How many values were read for it.
    """

    __slots__ = ("_kinds", "_of_queue", "_values", "cost")

    def __init__(self, kinds: list[Any], values: list[Any], of_queue: _Fields, cost: int) -> None:
        self._kinds = kinds
        self._values = values
        self._of_queue = of_queue
        self.cost = cost

    def plain(self, number_of: Callable[[Hashable], int]) -> list[dict[str, Any]]:
        """Return the snapshot as JSON can have it.

        Args:
            number_of: Gives the number of a tenant or key.
        """
        values = iter(self._values)
        plain: list[dict[str, Any]] = []
        for kind in self._kinds:
            if kind in _CONTAINERS:
                content = [_for_json(next(values), values, number_of) for _ in range(next(values))]
                plain.append({"kind": kind.__name__, "values": content})
                continue
            fields = self._of_queue if kind is None else _FIELDS[kind]
            of = {name: _for_json(next(values), values, number_of) for name in fields.names}
            present = {name: value for name, value in of.items() if value != _GONE}
            plain.append({"kind": "queue" if kind is None else kind.__name__, "values": present})
        return plain


_GONE = {"known": "missing"}


def _for_json(value: Any, values: Iterator[Any], number_of: Callable[[Hashable], int]) -> Any:
    """Return a value as JSON can have it, which takes further values where it says so."""
    if isinstance(value, _Known):
        if value is _OBJECT:
            return {"object": next(values)}
        if value is _NAME:
            return {"name": number_of(next(values))}
        if value is _TUPLE:
            return [_for_json(next(values), values, number_of) for _ in range(next(values))]
        return {"known": value.name}
    if isinstance(value, enum.Enum):
        return {"enum": [type(value).__name__, value.value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


class _Walk:
    """A walk over the objects of a queue."""

    __slots__ = ("cost", "found", "named", "numbers", "values")

    def __init__(self, queue: DeviceQueue) -> None:
        self.found: list[Any] = [queue]
        self.named: list[tuple[int, ...] | None] = [None]
        self.numbers: dict[int, int] = {id(queue): 0}
        self.values: list[Any] = []
        self.cost = 0

    def read_container(self, thing: Any, named: tuple[int, ...] | None) -> None:
        size = len(thing)
        self.cost += size
        values = self.values
        if isinstance(thing, dict):
            values.append(2 * size)
            for key, value in thing.items():
                self.add_named(key, named)
                self.add(value)
            return
        values.append(size)
        if named is not None:
            for item in thing:
                self.add_named(item, named)
            return
        for item in thing:
            if type(item) in _PLAIN:
                values.append(item)
            else:
                self.add(item)

    def read_object(self, thing: Any, fields: _Fields) -> None:
        values = self.values
        named = fields.named
        self.cost += len(named)
        for place, value in enumerate(fields.values_of(thing)):
            if type(value) in _PLAIN and named[place] is None:
                values.append(value)
            elif named[place] is None:
                self.add(value)
            elif type(value) in _CONTAINERS:
                of_runners = isinstance(thing, FairClass) and _is_of_runners(thing)
                self.add_object(value, None if of_runners else named[place])
            else:
                self.add_name(value)

    def add(self, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN:
            self.values.append(value)
        elif kind is tuple:
            self.cost += len(value)
            self.values.append(_TUPLE)
            self.values.append(len(value))
            for one in value:
                self.add(one)
        elif id(value) in _KNOWN_IDS:
            self.values.append(_KNOWN_IDS[id(value)])
        elif value is _MISSING:
            self.values.append(value)
        elif isinstance(value, float):  # of numpy, as a caller's deadline
            self.values.append(float(value))
        else:
            self.add_object(value, None)

    def add_object(self, thing: Any, named: tuple[int, ...] | None) -> None:
        number = self.numbers.get(id(thing))
        if number is None:
            kind = type(thing)
            if kind not in _BLANK and kind not in _RULES:
                raise UnknownClassError(f"a snapshot of a queue has no {kind.__qualname__}")
            number = self.numbers[id(thing)] = len(self.found)
            self.found.append(thing)
            self.named.append(named)
        self.values.append(_OBJECT)
        self.values.append(number)

    def add_named(self, value: Any, named: tuple[int, ...] | None) -> None:
        """Add a tenant, a key, or a tuple that has some."""
        if named is None:
            self.add(value)
        elif not named:
            self.add_name(value)
        else:
            self.values.append(_TUPLE)
            self.values.append(len(value))
            for place, one in enumerate(value):
                if place in named:
                    self.add_name(one)
                else:
                    self.add(one)

    def add_name(self, value: Any) -> None:
        if value is not None:
            self.values.append(_NAME)
            value = getattr(value, "number", value)
        self.values.append(value)


def _is_of_runners(accounts: FairClass) -> bool:
    """Return whether the accounts are of runners. Only a tenant's account has a name."""
    return any(
        name is not None and account.name is None for name, account in accounts.accounts.items()
    )


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
    of_queue = _fields(queue)
    kinds: list[Any] = [None]
    walk.read_object(queue, of_queue)
    place = 1
    while place < len(walk.found):
        if walk.cost > most:
            return walk.cost
        thing = walk.found[place]
        kind = type(thing)
        kinds.append(kind)
        if kind in _CONTAINERS:
            walk.read_container(thing, walk.named[place])
        else:
            walk.read_object(thing, _fields(thing))
        place += 1
    return Snapshot(kinds, walk.values, of_queue, walk.cost)


# --- the way back ---------------------------------------------------------------------------------


def restore(saved: Sequence[tuple[str, Any]], queue: DeviceQueue) -> list[Any]:
    """Give a new queue the state of a snapshot.

    Args:
        saved: The objects, each with the name of its class and its values, as `Snapshot.plain` has
            them.
        queue: The queue.

    Returns:
        All objects of the queue, and the queue itself as the first.

    Raises:
        ReplayError: This is no snapshot of a queue.
    """
    try:
        things = [queue, *[_made(kind, values) for kind, values in saved[1:]]]
        for (kind, values), thing in zip(saved, things, strict=True):
            _fill(kind, values, thing, things)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ReplayError(f"device {queue.name!r}: this is no state of a queue: {error}") from None
    return things


def _made(name: str, values: Any) -> Any:
    """Make an object that has no values yet, or a rule, which refers to no object."""
    kind = _KINDS[name]
    if kind in _RULES:
        return kind(**{name: _read(value, [], 0) for name, value in values.items()})
    return _BLANK[kind]()


def _fill(kind: str, values: Any, thing: Any, things: list[Any]) -> None:
    if isinstance(thing, _RULES):
        return
    if isinstance(values, dict):
        names = set(fields_of(thing))
        missing = names - values.keys()
        if not names or missing - {"runner"} or values.keys() - names:
            raise ValueError(f"a {kind} has {', '.join(sorted(names)) or 'no names'}")
        for name, value in values.items():
            setattr(thing, name, _read(value, things, 0))
        if missing:
            del thing.runner
        return
    items = [_read(value, things, 0) for value in values]
    if isinstance(thing, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            thing[key] = value
    elif isinstance(thing, list | deque):
        thing.extend(items)
    else:
        raise TypeError(f"a {kind} has names")


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
