"""Helpers of the queue's tests: a queue that checks itself, jobs, and pictures of state."""

from __future__ import annotations

import enum
import functools
from collections import deque

import msgspec

from aoti_sched.queue import invariants
from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.commands import Grant, Launch, Reject
from aoti_sched.queue.job import Job
from aoti_sched.queue.policy import Policy
from aoti_sched.queue.recorded import RecordedQueue

FACTS = (
    "drain_runner",
    "terminate_runner",
    "withdraw",
    "remove_runner",
    "submit",
    "complete",
    "cancel",
    "tick",
    "release",
    "close_barrier",
    "open_barrier",
    "turn",
    "go_on",
    "claim",
    "give_up",
    "pin",
    "update_use",
    "release_memory",
    "call_back",
    "parked",
    "returned",
    "add_behind",
    "keep_epoch",
    "withdraw_pinned",
    "revoke_behind",
    "hold_turns",
    "release_turns",
    "turned",
)


class CheckedQueue:
    """A `RecordedQueue` whose invariants are checked after every fact, also after one that raised.

    The class wraps a queue, since Python classes can't extend a class that mypyc has compiled.
    """

    def __init__(self, *args, **kwargs):
        self.unchecked = RecordedQueue(*args, **kwargs)

    def __getattr__(self, name):
        thing = getattr(self.unchecked, name)
        return _checked(self.unchecked, thing) if name in FACTS else thing


def _checked(queue, fact):
    @functools.wraps(fact)
    def then_check(*args, **kwargs):
        try:
            return fact(*args, **kwargs)
        finally:
            check(queue)

    return then_check


def check(queue):
    """Raise AssertionError unless the invariants hold, whether the queue checks itself or not."""
    invariants.check(getattr(queue, "unchecked", queue))


def device(lanes=1, jobs=None, size=None, *, cores=None, memory=None, evicts=False, **policy):
    """Return a device's checked queue, with no bounds except the given ones."""
    bounds, rules = Bounds(jobs, size), Policy(**policy)
    return CheckedQueue(
        "cpu", lanes, bounds, cores=cores, policy=rules, memory_limit=memory, evicts=evicts
    )


def add(queue, name="m", slots=1, jobs=None, size=None, *, tenant_jobs=None, waiting=None, **rest):
    """Add a runner with no bounds except the given ones."""
    return queue.add_runner(name, slots, Bounds(jobs, size, tenant_jobs, waiting), **rest)


def teach(queue, runner, seconds, *, size=0, runs=8, now=0.0):
    """Run jobs of this length, one after the other, on a queue without other jobs."""
    for _ in range(runs):
        queue.turn(now)
        job = Job(runner, bytes=size)
        assert job in launches(queue.submit(job, now))
        queue.complete(job, now, started=now, finished=now + seconds)


def launches(commands):
    """Return the launched jobs, in order, and ignore other commands."""
    return [command.job for command in commands if type(command) is Launch]


def launched(commands):
    """Return the launched jobs, in order, and assert that there are no other commands."""
    assert all(type(command) is Launch for command in commands), commands
    return [command.job for command in commands]


def rejected(commands):
    """Return the error of the only command, a `Reject`."""
    (command,) = commands
    assert type(command) is Reject, command
    return command.error


def take_lease(queue, runner, now=0.0):
    """Return a lease, which is granted at once."""
    (command,) = queue.submit(Job(runner, is_lease_request=True), now)
    assert type(command) is Grant, command
    return command.lease


def somewhere(job, **fields):
    """Set fields of a job, as if it had come to that state, and return the job."""
    for name, value in fields.items():
        setattr(job, name, value)
    return job


def picture(thing, seen=None):
    """Return the whole state of a queue as plain values that can be compared.

    An object that was met before is the number of its first meeting.
    """
    seen = {} if seen is None else seen
    if type(thing) in _PLAIN or isinstance(thing, (enum.Enum, str, int, float)):
        return thing
    if isinstance(thing, (list, tuple, deque)):
        return [picture(item, seen) for item in thing]
    if isinstance(thing, (set, frozenset)):
        return ["set", *[picture(item, seen) for item in sorted(thing, key=str)]]
    if isinstance(thing, dict):
        return [(picture(key, seen), picture(value, seen)) for key, value in thing.items()]
    if id(thing) in seen:
        return ("seen", seen[id(thing)])
    seen[id(thing)] = len(seen)
    if isinstance(thing, msgspec.Struct):
        return [picture(getattr(thing, name), seen) for name in thing.__struct_fields__]
    if type(thing).__module__.startswith(("aoti_sched.queue", "tests.unit.queue")) and not callable(
        thing
    ):
        names = sorted({*_fields(type(thing)), *getattr(thing, "__dict__", {})} - _RECORDED)
        return [(name, picture(getattr(thing, name), seen)) for name in names]
    return repr(thing)


_PLAIN = {bool, int, float, str, type(None)}

_RECORDED = {"_kept", "_runners", "_holdings", "_claims", "holder"}
"""What a `RecordedQueue` notes of facts, illegal ones included; holders are the callers' own.

No rule reads these.
"""


@functools.cache
def _fields(kind):
    """Return the names of a class's slots, or of the attributes of a compiled class."""
    compiled = getattr(kind, "__mypyc_attrs__", None)
    if compiled is not None:
        return [name for name in compiled if name != "__dict__"]
    return [name for one in kind.__mro__ for name in getattr(one, "__slots__", ())]
