"""A snapshot has the whole state of a queue, and nothing of a stranger's is taken for one."""

from __future__ import annotations

import importlib
import pkgutil

import msgspec
import pytest

import aoti_sched.queue
from aoti_sched.errors import ReplayError
from aoti_sched.flight import SavedObject
from aoti_sched.queue import snapshot
from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.commands import Command
from aoti_sched.queue.facts import SPACING
from aoti_sched.queue.holding import Holding
from aoti_sched.queue.job import IllegalFactError, Job
from aoti_sched.queue.memory import Claim
from aoti_sched.queue.recorded import MOST_VALUES, RecordedQueue
from aoti_sched.queue.runner_state import RunnerState
from aoti_sched.queue.snapshot import UnknownClassError, take
from tests.unit.queue.support import check, picture

NOT_IN_A_STATE = {
    *("Asked", "Group", "Kept", "Record"),  # the record itself
    *("Snapshot", "_Fields", "_Known", "_Walk"),  # the snapshot itself
    *("Growth", "Scope", "_GivesRecord"),  # made and dropped within one fact
    *("Rotation", "Shares"),  # of runners with several replicas, or of splits: beside the queues
    "Ending",  # no snapshot is taken while there is one
    "Heap",  # only its subclasses are made
    "Source",
}
"""Classes of `queue/` that no snapshot has an object of."""


def classes():
    """Return the classes of `queue/`, except commands, errors and the parts of `DeviceQueue`."""
    modules = pkgutil.walk_packages(aoti_sched.queue.__path__, "aoti_sched.queue.")
    found = {
        name: thing
        for module in modules
        for name, thing in vars(importlib.import_module(module.name)).items()
        if isinstance(thing, type) and thing.__module__ == module.name
    }
    commands = {kind.__name__ for kind in Command.__args__}
    return {
        name: kind
        for name, kind in found.items()
        if name not in commands
        and not issubclass(kind, BaseException)
        and not issubclass(RecordedQueue, kind)
    }


def test_every_class_is_known_or_in_no_state():
    known = {kind.__name__ for kind in (*snapshot._BLANK, *snapshot._RULES, *snapshot._ENUMS)}
    known -= {kind.__name__ for kind in snapshot._CONTAINERS}
    assert known | NOT_IN_A_STATE == classes().keys()
    assert not known & NOT_IN_A_STATE


@pytest.mark.parametrize("kind", snapshot._BLANK)
def test_an_object_of_each_class_is_made_with_all_its_attributes(kind):
    made = snapshot._BLANK[kind]()
    assert type(made) is kind
    for name in snapshot.fields_of(made):
        getattr(made, name)


def test_the_fields_that_have_names_exist():
    for kind, name in [
        *snapshot._NAMED,
        *[(k, n) for k, of in snapshot._LEFT_OUT.items() for n in of],
    ]:
        assert hasattr(snapshot._BLANK[kind](), name)


class Stranger:
    pass


def test_an_object_of_an_unknown_class_is_named():
    queue = busy_queue()
    queue.runners["m"].rejections["stranger"] = Stranger()
    with pytest.raises(UnknownClassError, match="Stranger"):
        take(queue, MOST_VALUES)


def test_a_queue_goes_on_without_a_snapshot_where_one_can_not_be_taken():
    queue = RecordedQueue("cpu", 1, keep=1)
    queue.add_runner("m", 1).rejections["stranger"] = Stranger()
    for now in range(5):
        queue.tick(float(now))
    assert queue.record().plain()["state"] is None
    del queue.runners["m"].rejections["stranger"]
    for now in range(SPACING * MOST_VALUES + 5):
        queue.tick(float(now))
    assert queue.record().plain()["state"] is not None


def busy_queue():
    """Return a queue with something of most kinds in its state."""
    queue = RecordedQueue("cpu", 2, Bounds(50), memory_limit=100, evicts=True)
    holding = Holding("weights")
    queue.claim(Claim(holding, 10), 0.0)
    batches, plain = (
        queue.add_runner("b", 1, Bounds(9, tenant_jobs=2), batching=Batching(4), memory=holding),
        queue.add_runner("m", 2, sheds=True, predicts=True),
    )
    queue.update_use(holding, 0.0, constants=10, inactive=0)
    queue.submit(Job(plain, is_lease_request=True), 0.0)
    for number in range(9):
        job = Job(
            batches if number % 2 else plain,
            payload=Stranger(),
            tenant=("secret", number % 3),
            key="secret key" if number % 2 else None,
            deadline=9.0 + number if number % 3 else None,
            bytes=number,
        )
        queue.submit(job, 1.0, wait=True)
    return queue


def numbering():
    numbers = {}
    return lambda name: numbers.setdefault(name, len(numbers))


def saved(queue):
    plain = take(queue, MOST_VALUES).plain(numbering())
    return msgspec.json.decode(msgspec.json.encode(plain), type=list[SavedObject])


def restore(state, queue):
    return snapshot.restore([(one.kind, one.values) for one in state], queue)


def test_a_runner_that_was_removed_and_is_still_referred_to_has_no_runner_again():
    queue = RecordedQueue("cpu", 1)
    runner = queue.add_runner("m", 1)
    job = Job(runner, deadline=9.0)
    queue.submit(job, 1.0)
    queue.complete(job, 2.0)
    queue.drain_runner(runner, 3.0)
    queue.remove_runner(runner)
    runner.let_go()  # only the obsolete deadline of its job refers to it
    new = RecordedQueue("cpu", 1)
    (restored,) = {thing for thing in restore(saved(queue), new) if isinstance(thing, RunnerState)}
    assert not hasattr(restored, "runner")
    assert saved(new) == saved(queue)


class Seconds(float):
    """A number like numpy's."""


def test_a_number_of_the_callers_own_class_is_a_plain_one():
    queue = busy_queue()
    plain = queue.runners["m"]
    queue.submit(Job(plain, deadline=Seconds(99.5)), 1.0)
    new = RecordedQueue("cpu", 2)
    things = restore(saved(queue), new)
    (deadline,) = {job.deadline for job in things if isinstance(job, Job) and job.id == 11}
    assert (deadline, type(deadline)) == (99.5, float)


def test_nothing_of_the_caller_is_in_a_snapshot():
    text = msgspec.json.encode(saved(busy_queue())).decode()
    assert "secret" not in text
    assert "Stranger" not in text


def test_a_restored_queue_is_the_same_and_its_snapshot_too():
    queue = busy_queue()
    state = saved(queue)
    new = RecordedQueue("cpu", 2)
    things = restore(state, new)
    check(new)
    assert things[0] is new
    assert saved(new) == state
    for one in things:
        if isinstance(one, Job):
            assert one.payload is None
    assert new.runners["m"].runner is new.runners["m"]
    assert new.lanes.running.keys() == queue.lanes.running.keys()
    assert new.load is new.room.load
    assert picture(new.lanes.free) == picture(queue.lanes.free)


def test_a_snapshot_does_not_change_with_the_queue():
    queue = busy_queue()
    taken = take(queue, MOST_VALUES)
    before = taken.plain(numbering())
    for job in queue.lanes.launched():
        queue.complete(job, 2.0)
    assert taken.plain(numbering()) == before
    assert take(queue, MOST_VALUES).plain(numbering()) != before


def changed(state, place, **fields):
    new = list(state)
    new[place] = msgspec.structs.replace(state[place], **fields)
    return new


def find(state, kind):
    return next(place for place, one in enumerate(state) if one.kind == kind)


def with_value(kind, name, value):
    """Return a damage: one value of the first object of a class is another."""

    def damage(state):
        place = find(state, kind)
        return changed(state, place, values={**state[place].values, name: value})

    return damage


def without_value(kind, name):
    def damage(state):
        place = find(state, kind)
        values = {what: of for what, of in state[place].values.items() if what != name}
        return changed(state, place, values=values)

    return damage


def with_kind(kind, new):
    return lambda state: changed(state, find(state, kind), kind=new)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


DAMAGES = {
    "nothing": lambda _: [],
    "no names for the queue": lambda state: changed(state, 0, values=[]),
    "a class of another module": with_kind("Job", "os.system"),
    "a class that is no part of a queue": with_kind("Job", "Stranger"),
    "a command": with_kind("Job", "Launch"),
    "a builtin": with_kind("list", "type"),
    "another class": with_kind("Job", "Lease"),
    "a list with names": with_kind("Job", "list"),
    "an object with items": with_kind("list", "Job"),
    "a struct with items": with_kind("list", "Bounds"),
    "a struct with another name": with_value("Bounds", "job", 1),
    "a struct that refers to an object": with_value("Bounds", "jobs", {"object": 0}),
    "one name more": with_value("Job", "__class__", 1),
    "one name less": without_value("Job", "source"),
    "a number that is too high": with_value("Job", "source", {"object": 10**9}),
    "a huge number": with_value("Job", "source", {"object": 10**30}),
    "a number below zero": with_value("Job", "source", {"object": -1}),
    "a number that is none": with_value("Job", "source", {"object": True}),
    "a number that is text": with_value("Job", "source", {"object": "1"}),
    "two meanings": with_value("Job", "source", {"object": 1, "name": 1}),
    "no meaning": with_value("Job", "source", {}),
    "a meaning that is not known": with_value("Job", "source", {"import": "os"}),
    "a state that is not known": with_value("Job", "state", {"enum": ["JobState", 99]}),
    "an enum that is not known": with_value("Job", "state", {"enum": ["Color", 1]}),
    "an enum that is none": with_value("Job", "state", {"enum": 5}),
    "a number that is not one": with_value("Job", "due", {"float": "nan"}),
    "a float that is none": with_value("Job", "due", {"float": []}),
    "a function that is not known": with_value("LazyHeap", "_rank_of", {"known": "print"}),
    "a function that is none": with_value("LazyHeap", "_rank_of", {"known": []}),
    "lists within each other": with_value("Job", "members", nested(100)),
    "a dict without its last value": lambda state: changed(
        state, find(state, "dict"), values=[1, 2, 3]
    ),
    "a dict with a list as key": lambda state: changed(
        state, find(state, "dict"), values=[{"object": find(state, "list")}, 2]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused(damage):
    with pytest.raises(ReplayError, match="no state of a queue"):
        restore(DAMAGES[damage](saved(busy_queue())), RecordedQueue("cpu", 2))


def test_an_illegal_fact_of_a_restored_queue_is_illegal_as_before():
    queue = busy_queue()
    new = RecordedQueue("cpu", 2)
    restore(saved(queue), new)
    with pytest.raises(IllegalFactError, match="has a runner 'm' already"):
        new.add_runner("m", 1)
