"""What a queue has recorded puts a new queue into the same state, by the same commands."""

from __future__ import annotations

import math
import random
import re

import msgspec
import pytest

from aoti_sched.errors import EpochError, ReplayError
from aoti_sched.flight import DeviceRecord, SavedObject, device_record
from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.facts import CHUNK, MORE, SPACING, VALUES, Asked
from aoti_sched.queue.holding import Holding
from aoti_sched.queue.job import IllegalFactError, Job, JobState
from aoti_sched.queue.memory import Claim
from aoti_sched.queue.policy import Policy
from aoti_sched.queue.recorded import MOST_VALUES, RecordedQueue
from aoti_sched.queue.runner_state import Lease, Phase, RunnerState
from aoti_sched.queue.selection.placement import Placement, Placing
from aoti_sched.queue.snapshot import take
from aoti_sched.testing import Replayed, replay_device
from tests.unit.queue import test_memory_walk, test_weight_turns
from tests.unit.queue.cases import STEPS
from tests.unit.queue.seeds import share_of_seeds
from tests.unit.queue.support import check, picture
from tests.unit.queue.walks import Player, Walk

SHARES = 4


def through_json(record):
    if not isinstance(record, DeviceRecord):
        record = device_record(record)
    return msgspec.json.decode(msgspec.json.encode(record), type=DeviceRecord)


def told(commands):
    """Return the commands of a fact as values that are equal for two queues."""
    if isinstance(commands, Exception):
        return type(commands).__name__, str(commands)
    return [(type(command).__name__, *map(_told, _fields(command))) for command in commands]


def _fields(command):
    return [getattr(command, name) for name in command.__struct_fields__]


def _told(thing):
    if isinstance(thing, Job):
        return thing.id, thing.state, thing.lane, thing.slot, thing.epoch, len(thing.members)
    if isinstance(thing, RunnerState | Claim):
        return thing.number
    if isinstance(thing, Lease):
        return thing.id
    # A record has a number in the place of each tenant.
    return re.sub(r"tenant \S+ ", "", str(thing)) if isinstance(thing, Exception) else thing


def state_of(queue, jobs):
    """Return the whole state of a queue, with numbers for tenants and keys, as a record has them.

    The payloads of jobs are the caller's own, and left out.
    """
    for job in jobs:
        job.payload = None
    return _renamed(picture(queue), numbers_of(queue))


def _renamed(value, names):
    kind = type(value)
    if kind is str:
        if value in names:
            return names[value]
        return re.sub(r" at 0x[0-9a-f]+", "", value) if " at 0x" in value else value
    if kind is not list and kind is not tuple:
        return value
    # Most are numbers, and a call for each would take most of the time.
    renamed = [_renamed(one, names) if type(one) in _MAY_HAVE_NAMES else one for one in value]
    if kind is list and value[:1] == ["set"]:
        renamed[1:] = sorted(renamed[1:])
    return renamed


_MAY_HAVE_NAMES = {str, list, tuple}


def recording_commands(queue, before_fact):
    """Let a queue note what follows from each fact, and return the list of that."""
    outcomes = []

    def noting(fact):
        def noted(*args, **kwargs):
            before_fact()
            try:
                commands = fact(*args, **kwargs)
            except Exception as error:
                outcomes.append(told(error))
                raise
            outcomes.append(told(commands if isinstance(commands, list) else []))
            return commands

        return noted

    for name in VALUES:
        setattr(queue, name, noting(getattr(queue, name)))
    return outcomes


class Noted:
    """A queue whose commands are noted, and that is otherwise itself."""

    def __init__(self, queue, seed):
        self.__dict__.update(queue=queue)
        self.snapshots = Snapshots(queue, seed)
        self.outcomes = recording_commands(self, self.snapshots.before_fact)

    def __getattr__(self, name):
        return getattr(self.__dict__["queue"], name)


def must_replay(queue, outcomes, jobs, snapshots=()):
    record = through_json(queue.record())
    numbers, state = numbers_of(queue), state_of(queue, jobs)
    for place, snapshot in snapshots:
        must_replay_from(numbers, outcomes, state, record, place, snapshot)
    replayed = Replayed(record)
    for number, (_, outcome) in enumerate(replayed.steps()):
        assert told(outcome) == outcomes[number], record.facts[number]
    assert len(replayed.outcomes) == len(outcomes)
    assert through_json(replayed.queue.record()) == record
    assert state_of(replayed.queue, replayed.jobs) == state


def must_replay_from(numbers, outcomes, state, record, place, snapshot):
    """The facts from a place on, put to the restored state of that place, do the same."""
    saved = msgspec.convert(snapshot.plain(numbers.__getitem__), list[SavedObject])
    rest = through_json(
        msgspec.structs.replace(record, state=saved, facts=record.facts[place:], dropped=place)
    )
    replayed = Replayed(rest)
    check(replayed.queue)
    for number, (fact, outcome) in enumerate(replayed.steps(), place):
        assert loosely(told(outcome)) == loosely(outcomes[number]), (place, number, fact)
    assert state_of(replayed.queue, replayed.jobs) == state


def loosely(outcome):
    """Return an outcome without names, since runners and jobs that are gone have lost theirs."""
    if isinstance(outcome, tuple):
        return outcome[0]
    return [tuple(map(_nameless, said)) for said in outcome]


def _nameless(said):
    return re.sub(r"runner '[^']*'|slot \d+", "", said) if isinstance(said, str) else said


def numbers_of(queue):
    """Return the numbers of tenants and keys in the record of a queue, by their names."""
    numbers = {}
    for _, _, values in queue.record().facts():
        for what in ("tenant", "key"):
            if values.get(what) is not None:
                numbers.setdefault(values[what], len(numbers))
    return numbers


class Snapshots:
    """Snapshots before one or two facts of a queue, drawn from a seed."""

    def __init__(self, queue, seed):
        self.queue = queue
        self.taken = []
        self.draw = random.Random(seed)
        self.facts = 0

    def before_fact(self):
        if len(self.taken) < 2 and self.draw.random() < 0.01 and not self.queue._endings:
            self.taken.append((self.facts, take(self.queue, 10**6)))
        self.facts += 1


@pytest.mark.long
@pytest.mark.parametrize("share", range(SHARES))
def test_a_walk_is_replayed_into_the_same_state_by_the_same_commands(share):
    for seed in share_of_seeds(share, SHARES):
        walk = Walk(seed, STEPS)
        player = Player(**walk.device)
        queue, player.queue = player.queue, Noted(player.queue, seed)
        for fact in walk.facts:
            player.play(*fact)
        noted = player.queue
        must_replay(queue, noted.outcomes, player.jobs, noted.snapshots.taken)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(30))
def test_a_walk_through_the_rules_of_memory_is_replayed(seed):
    walk = test_memory_walk.Walk(seed)
    queue, walk.queue = walk.queue.unchecked, Noted(walk.queue.unchecked, seed)
    walk.go(test_memory_walk.STEPS)
    jobs = [job for _, job in walk.jobs.values()]
    must_replay(queue, walk.queue.outcomes, jobs, walk.queue.snapshots.taken)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(30))
def test_a_walk_of_sessions_is_replayed(seed):
    walk = test_weight_turns.Walk(seed)
    noted = Noted(walk.queue.unchecked, seed)
    # The walk has begun to use the queue.
    queue, walk.queue = walk.queue.unchecked, noted
    before = replay_device(queue.record()).outcomes
    walk.walk()
    walk.finish()
    taken = [(len(before) + place, snapshot) for place, snapshot in noted.snapshots.taken]
    must_replay(queue, [*map(told, before), *noted.outcomes], walk.jobs, taken)


# --- what a record is -----------------------------------------------------------------------------


def test_every_fact_is_recorded():
    facts = {name for name in vars(RecordedQueue) if not name.startswith("_")} - {"record"}
    assert facts == {*VALUES}
    queries = {"busy_lanes", "when_finished"}
    names = {name for kind in DeviceQueue.__mro__[:-1] for name in vars(kind) if name[0] != "_"}
    methods = {name for name in names if callable(getattr(DeviceQueue, name))}
    assert methods - queries == facts


def test_an_illegal_fact_has_the_record_that_leads_to_it_again():
    queue = RecordedQueue("cpu", 1)
    runner = queue.add_runner("m", 1)
    job = Job(runner)
    queue.submit(job, 1.0)
    queue.complete(job, 2.0)
    with pytest.raises(IllegalFactError) as raised:
        queue.complete(job, 3.0)
    record = raised.value.record.plain()
    assert record["error"] == str(raised.value)
    facts = [fact["fact"] for fact in record["facts"]]
    assert facts == ["add_runner", "submit", "complete", "complete"]
    replayed = replay_device(record)
    assert str(replayed.outcomes[-1]) == record["error"]
    assert replayed.jobs[0].state is JobState.DONE


@pytest.mark.parametrize("fact", ["cancel", "complete"])
def test_a_fact_about_a_job_that_was_never_submitted_is_illegal_in_the_replay_too(fact):
    queue = RecordedQueue("cpu", 1)
    runner = queue.add_runner("m", 1)
    with pytest.raises(IllegalFactError):
        getattr(queue, fact)(Job(runner), 1.0)
    (outcome,) = replay_device(queue.record()).outcomes[1:]
    assert isinstance(outcome, IllegalFactError)


ILLEGAL = {
    "drain_runner": lambda queue, other: queue.drain_runner(other, 0.0),
    "terminate_runner": lambda queue, other: queue.terminate_runner(other, 0.0),
    "withdraw": lambda queue, other: queue.withdraw(other, 0.0),
    "remove_runner": lambda queue, other: queue.remove_runner(other),
    "close_barrier": lambda queue, other: queue.close_barrier(other, 0.0),
    "open_barrier": lambda queue, other: queue.open_barrier(other, 0.0),
    "add_behind": lambda queue, other: queue.add_behind(other, "b", 0.0),
    "keep_epoch": lambda queue, other: queue.keep_epoch(other, 0.0),
    "withdraw_pinned": lambda queue, other: queue.withdraw_pinned(other, 0.0),
    "revoke_behind": lambda queue, other: queue.revoke_behind(other, 0.0, EpochError("gone")),
    "hold_turns": lambda queue, other: queue.hold_turns(other, 0.0),
    "release_turns": lambda queue, other: queue.release_turns(other, 0.0),
    "turned": lambda queue, other: queue.turned(other, 0.0, exchanged=True),
    "pin": lambda queue, other: queue.pin(other),
    "call_back": lambda queue, other: queue.call_back(other, 0.0),
    "parked": lambda queue, other: queue.parked(other, 0.0),
    "returned": lambda queue, other: queue.returned(other, 0.0),
    "submit": lambda queue, other: queue.submit(Job(other), 0.0),
    "claim": lambda queue, other: queue.claim(Claim(other.memory, 1), 0.0),
    "add_runner": lambda queue, other: queue.add_runner("m", 0),
}


@pytest.mark.parametrize("fact", ILLEGAL)
def test_whatever_fact_is_illegal_has_a_record(fact):
    """The runner is one that was removed, so no fact about it is legal."""
    queue = RecordedQueue("cpu", 1)
    other = queue.add_runner("m", 1)
    queue.drain_runner(other, 0.0)
    queue.remove_runner(other)
    if fact == "submit":
        other.phase = Phase.OPEN  # a drained one rejects
    if fact == "claim":
        queue.memory.holdings[other.memory] = other
    with pytest.raises(IllegalFactError) as raised:
        ILLEGAL[fact](queue, other)
    record = raised.value.record.plain()
    assert record["facts"][-1]["fact"] == fact
    assert record["error"] == str(raised.value)


def test_a_claim_that_is_given_up_and_an_illegal_one_are_replayed():
    queue = RecordedQueue("cpu", 1, memory_limit=10, evicts=True)
    first, second = Claim(Holding("a"), 10), Claim(Holding("b"), 10)
    queue.claim(first, 0.0)
    runner = queue.add_runner("a", 1, memory=first.holding)
    queue.update_use(first.holding, 0.0, constants=10, inactive=0)
    queue.claim(second, 1.0)  # `runner` is to be evicted for it
    queue.give_up(second, 2.0)
    queue.parked(runner, 3.0)
    with pytest.raises(IllegalFactError, match="call pin first"):
        queue.claim(Claim(first.holding, 1), 4.0)
    replayed = replay_device(queue.record())
    assert replayed.queue.memory.promised == queue.memory.promised == 0
    assert state_of(replayed.queue, []) == state_of(queue, [])


def test_a_record_of_nothing_but_the_last_facts_is_no_beginning():
    queue = RecordedQueue("cpu", 1)
    queue.tick(1.0)
    queue.tick(2.0)
    record = msgspec.structs.replace(through_json(queue.record()), dropped=2)
    with pytest.raises(ReplayError, match="lacks its first 2 facts"):
        Replayed(record)


def ticked(keep, facts, look):
    """Return a queue after this many facts, and call `look` with it now and then."""
    queue = RecordedQueue("cpu", 1, keep=keep)
    for count in range(1, facts):
        queue.tick(float(count))
        if count % 97 == 0:
            look(queue, count)
    return queue


@pytest.mark.parametrize("keep", [1, 100, CHUNK, 3 * CHUNK - 1])
def test_at_least_as_many_facts_are_kept_as_were_asked_for_and_back_to_a_state(keep):
    numbers = set()

    def look(queue, count):
        record = queue.record()
        times = [at for _, at, _ in record.facts()]
        assert times == [*range(count - len(times) + 1, count + 1)]
        assert len(times) >= min(keep, count)
        assert record.dropped == count - len(times)
        assert (record.plain()["state"] is None) == (not record.dropped)
        numbers.add(len(times))

    queue = ticked(keep, 5000, look)
    cost = take(queue, MOST_VALUES).cost
    assert max(numbers) <= keep + SPACING * cost + 2 * CHUNK
    assert queue.record().dropped > 0
    assert replay_device(queue.record()).queue.runners == {}


def test_each_fact_of_a_request_may_begin_a_chunk():
    queue = RecordedQueue("cpu", 1, keep=1)  # each fact does
    runner = queue.add_runner("m", 1)
    for now in map(float, range(2000)):
        job = Job(runner)
        queue.submit(job, now)
        queue.turn(now)
        queue.complete(job, now + 0.5, ok=now > 1000)
    record = queue.record()
    assert record.dropped > 0
    assert len(record.facts()) + record.dropped == 6001
    replayed = replay_device(record)
    assert replayed.queue.runners["m"].counters.failed == 1001
    assert state_of(replayed.queue, replayed.jobs) == state_of(queue, [])


def test_a_state_that_is_too_large_is_not_taken_and_tried_again_later():
    queue = RecordedQueue("cpu", 1, keep=CHUNK)
    runner = queue.add_runner("m", 1)
    jobs = [Job(runner) for _ in range(1000)]
    for job in jobs:
        queue.submit(job, 1.0)
    cost = take(queue, MOST_VALUES)
    assert MOST_VALUES < cost < MOST_VALUES + 200
    for _ in range(MORE + CHUNK):
        queue.tick(2.0)
    record, happened = queue.record(), 1 + len(jobs) + MORE + CHUNK
    assert CHUNK + MORE <= happened - record.dropped <= CHUNK + MORE + CHUNK
    assert record._state is None  # so it can't be replayed
    for job in jobs:
        queue.cancel(job, 3.0)
    for _ in range(SPACING * cost):
        queue.tick(4.0)
    record, happened = queue.record(), happened + len(jobs) + SPACING * cost
    assert happened - record.dropped < SPACING * cost
    assert replay_device(record).queue.load.jobs == 0


def test_a_record_is_of_the_time_when_it_was_taken():
    queue = RecordedQueue("cpu", 1)
    queue.tick(1.0)
    record = queue.record()
    for now in range(2, 2 * CHUNK):
        queue.tick(float(now))
    assert [at for _, at, _ in record.facts()] == [1.0]


def test_what_a_request_asks_is_recorded_whatever_the_one_before_it_asked():
    """Equal wishes are kept once; each of these differs from the ones before it."""
    queue = RecordedQueue("cpu", 4)
    batched = queue.add_runner("b", 4, batching=Batching(8))
    plain = queue.add_runner("p", 4)
    (grant,) = queue.submit(Job(plain, is_lease_request=True), 0.0)
    wishes = [
        {},
        {"priority": 0},
        {"deadline": 9.0},
        {"bytes": 7},
        {"is_lease_request": True},
        {"is_lease_request": True, "bypasses_limits": True},
        {"min_epoch": 1},
        {"min_epoch": 1, "pinned": True},
        {"rows": 3},
        {"key": ("k", 1)},
        {"key": ("k", 2)},
        {"tenant": "a"},
        {"tenant": "b"},
        {"tokens": 5},
    ]
    expected = []
    for source in (batched, plain, grant.lease, batched):
        for wish in wishes:
            for further in ({}, {}, {"wait": True}, {"since": -1.0}, {"since": -2.0}):
                try:
                    queue.submit(Job(source, **wish), 1.0, **further)
                except IllegalFactError:
                    assert source is grant.lease
                expected.append((source, {**wish, **further}))
    usual = {"priority": 1, "deadline": None, "bytes": 0, "is_lease_request": False}
    usual |= {"min_epoch": 0, "rows": 1, "key": None, "bypasses_limits": False, "tenant": None}
    usual |= {"tokens": 1, "pinned": False, "wait": False, "since": None, "job": -1}
    submitted = [values for name, _, values in queue.record().facts() if name == "submit"]
    for values, (source, wish) in zip(submitted[1:], expected, strict=True):
        lease = source.id if source is grant.lease else None
        assert values == {**usual, **wish, "lease": lease, "runner": source.runner.number}


def test_a_record_that_counts_something_else_comes_from_other_rules():
    queue = RecordedQueue("cpu", 1)
    runner = queue.add_runner("m", 1)
    queue.submit(Job(runner), 1.0)
    record = queue.record().plain()
    record["counters"]["m"]["completed"] = 7
    with pytest.raises(
        ReplayError, match="1 submitted, and the record m: 1 submitted, 7 completed"
    ):
        replay_device(record)
    assert queue.runners["m"].counters.completed == 0


def test_numbers_that_json_has_not_and_every_setting_come_through():
    queue = RecordedQueue(
        "cpu",
        3,
        Bounds(9, 99),
        inline_budget=0.5,
        cores=5,
        memory_limit=100,
        policy=Policy(order="arrival", max_wait=math.inf, keeps_lanes=True, most_lanes=7),
    )
    queue.add_runner(
        "m",
        6,
        Bounds(3, 4, 5, 6),
        placing=Placing(
            Placement.AUTO,
            math.inf,
            follow_limit=0.25,
            ahead_limit=0.5,
            hop=0.125,
            backlog_limit=2.0,
        ),
        batching=Batching(4, 0.5, math.inf, 6),
        width=2,
        share=2.0,
        sheds=True,
        predicts=True,
        routable=True,
        memory=Holding("weights"),
    )
    with pytest.raises(IllegalFactError):
        queue.submit(Job(queue.runners["m"], deadline=math.nan), 1.0)
    queue.submit(Job(queue.runners["m"], deadline=math.inf, tenant="secret", key="s"), 1.0)
    record = through_json(queue.record())
    assert "secret" not in str(record)
    replayed = replay_device(record)
    ours, theirs = queue.runners["m"], replayed.queue.runners["m"]
    for name in ("slots", "width", "share", "sheds", "predicts"):
        assert getattr(theirs, name) == getattr(ours, name)
    assert theirs.load.bounds == ours.load.bounds
    assert theirs.batch_queue.rule == ours.batch_queue.rule
    for name in ("choice", "limit", "follow_limit", "ahead_limit", "hop", "backlog_limit"):
        assert getattr(theirs.placing, name) == getattr(ours.placing, name)
    assert (theirs.memory.name, replayed.jobs[0].deadline) == ("weights", math.inf)
    assert through_json(replayed.queue.record()) == record
    assert replayed.queue.lanes.inline_budget == 0.5
    assert replayed.queue.policy == queue.policy
    assert (replayed.queue.lanes.count, replayed.queue.lanes.cores) == (6, 8)


def test_requests_of_several_classes_share_what_they_ask_for():
    """Such an object for each request would be met by the garbage collector again and again."""
    queue = RecordedQueue("cpu", 1)
    runner = queue.add_runner("m", 1)
    for number in range(60):
        queue.submit(Job(runner, priority=number % 3, tenant=number, deadline=number + 9.0), 0.0)
    asked = [value for value in queue._kept.chunk if isinstance(value, Asked)]
    assert len(asked) == 60
    assert len(set(map(id, asked))) == 3
