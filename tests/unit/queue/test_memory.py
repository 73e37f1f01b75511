"""What the constants of models take of a device's memory, and whose are freed when others need
the room.
"""

from __future__ import annotations

import pickle

import pytest

from aoti_sched.errors import LoadError, MemoryLimitError
from aoti_sched.queue.commands import (
    BarrierReached,
    Claimed,
    Drained,
    Expire,
    Launch,
    Park,
    Return,
    Revoke,
    WakeAt,
)
from aoti_sched.queue.holding import Holding, Stay
from aoti_sched.queue.job import IllegalFactError, Job
from aoti_sched.queue.memory import STAY, Claim
from tests.unit.queue.support import add, device, launched, launches, picture, take_lease


def claim(queue, holding, size, now=0.0):
    """A claim that is answered at once."""
    wanted = Claim(holding, size)
    assert queue.claim(wanted, now) == [Claimed(wanted)]


def load(queue, name, size, now=0.0, **options):
    """A runner whose constants take so much."""
    holding = Holding(name)
    claim(queue, holding, size, now)
    return serving(queue, holding, now, **options)


def serving(queue, holding, now=0.0, **options):
    """The runner of what was loaded."""
    runner = add(queue, holding.name, memory=holding, **options)
    queue.update_use(holding, now, constants=holding.constants, inactive=0)
    return runner


def run(queue, runner, now):
    """A run that is over at once."""
    job = Job(runner)
    assert launched(queue.submit(job, now)) == [job]
    queue.complete(job, now)


def park(queue, runner, now=0.0):
    """Its constants are freed, as was commanded."""
    assert runner.memory.stay is Stay.LEAVING
    return queue.parked(runner, now)


def limited(memory=10, *, evicts=True, lanes=4, **options):
    return device(lanes, memory=memory, evicts=evicts, **options)


# --- counting -------------------------------------------------------------------------------------


def test_without_a_limit_all_is_granted_and_counted():
    queue = device()
    a = load(queue, "a", 100)
    load(queue, "b", 200)
    assert queue.memory.used == 300
    wanted = Claim(a.memory, 100)
    queue.pin(a)
    assert queue.claim(wanted, 0.0) == [Claimed(wanted)]
    assert (a.memory.constants, a.memory.inactive, queue.memory.used) == (100, 100, 400)
    queue.update_use(a.memory, 0.0, constants=100, inactive=0)
    assert queue.memory.used == 300


def test_what_was_not_known_before_the_load_is_counted_after_it():
    queue = limited(10)
    holding = Holding("a")
    claim(queue, holding, 0)
    claim(queue, holding, 7)
    queue.update_use(holding, 0.0, constants=6, inactive=0)
    assert queue.memory.used == 6
    queue.release_memory(holding, 0.0)
    assert queue.memory.used == 0


def test_a_runner_that_claimed_nothing_takes_nothing():
    queue = limited()
    runner = add(queue)
    assert queue.memory.of(runner.memory) == 0
    run(queue, runner, 0.0)


def test_who_is_closed_takes_nothing():
    queue = limited(10)
    a = load(queue, "a", 10)
    assert queue.drain_runner(a, 0.0) == [Drained(a)]
    queue.remove_runner(a)
    with pytest.raises(MemoryLimitError):
        queue.claim(Claim(Holding("b"), 1), 0.0)
    queue.release_memory(a.memory, 0.0)
    load(queue, "b", 10)


# --- refusals -------------------------------------------------------------------------------------


def test_a_load_that_does_not_fit_is_refused_with_the_numbers():
    queue = limited(10 << 20, evicts=False)
    load(queue, "a", 8 << 20)
    before = picture(queue.unchecked)
    with pytest.raises(MemoryLimitError) as caught:
        queue.claim(Claim(Holding("b"), 3 << 20), 0.0)
    assert picture(queue.unchecked) == before
    assert str(caught.value) == (
        "device 'cpu': model 'b' needs 3.0 MiB for its weights, and the memory_limit is 10.0 MiB; "
        "taken: 'a' 8.0 MiB. Close a model, or "
        "raise the limit, or let idle models be parked with evict='lru'"
    )
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.device, error.needed, error.limit, error.used) == (
        "cpu",
        3 << 20,
        10 << 20,
        8 << 20,
    )


def test_one_that_alone_is_too_large_is_refused_and_nobody_is_parked_for_it():
    queue = limited(10)
    a = load(queue, "a", 5)
    with pytest.raises(
        MemoryLimitError,
        match=r"needs 11 bytes .* It would not fit if it were alone: raise the limit$",
    ):
        queue.claim(Claim(Holding("b"), 11), 0.0)
    queue.pin(a)
    with pytest.raises(
        MemoryLimitError,
        match=r"needs 6 bytes .* It would not fit if it were alone: raise the limit$",
    ):
        queue.claim(Claim(a.memory, 6), 0.0)  # beside its own
    assert a.memory.is_here


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda queue, a: queue.update_use(
                a.memory, 0.0, constants=6, inactive=0, fixed="it is dear"
            ),
            "it is dear",
        ),
        (lambda queue, a: queue.pin(a), "its weights are being changed"),
        (take_lease, "it has held leases"),
        (lambda queue, a: queue.submit(Job(a), 0.0), "it has requests"),
    ],
)
def test_who_may_not_be_parked_for_a_load_is_named(make, why):
    queue = limited(10)
    a = load(queue, "a", 6)
    make(queue, a)
    with pytest.raises(
        MemoryLimitError,
        match=rf"taken: 'a' 6 bytes \({why}\)\. Close a model, or raise the limit$",
    ):
        queue.claim(Claim(Holding("b"), 6), 0.0)
    assert a.memory.is_here


def test_those_being_loaded_and_promised_are_named():
    queue = limited(10)
    a = load(queue, "a", 5)
    claim(queue, Holding("b"), 4)
    queue.claim(Claim(Holding("c"), 5), 0.0)
    with pytest.raises(MemoryLimitError) as caught:
        queue.claim(Claim(Holding("d"), 2), 0.0)
    assert (
        "taken: 'a' 5 bytes, 'b' 4 bytes (it is being loaded), 5 bytes are promised to others."
        in str(caught.value)
    )
    assert a.memory.stay is Stay.LEAVING


# --- parking --------------------------------------------------------------------------------------


def test_the_idle_one_that_was_used_the_longest_ago_is_parked():
    queue = limited(10)
    a, b = load(queue, "a", 5), load(queue, "b", 5)
    run(queue, a, 1.0)
    run(queue, b, 2.0)
    run(queue, a, 3.0)
    wanted = Claim(Holding("c"), 4)
    assert queue.claim(wanted, 4.0) == [Park(b)]
    assert queue.parked(b, 5.0) == [Claimed(wanted)]
    assert (b.memory.stay, b.memory.parked, queue.memory.of(b.memory), queue.memory.used) == (
        Stay.AWAY,
        1,
        0,
        9,
    )


def test_having_held_a_lease_is_use():
    queue = limited(10)
    a, b = load(queue, "a", 5), load(queue, "b", 5)
    run(queue, a, 1.0)
    queue.release(take_lease(queue, b, 2.0), 2.0)
    assert queue.claim(Claim(Holding("c"), 4), 4.0) == [Park(a)]


def test_nobody_is_parked_who_would_not_have_been_needed():
    queue = limited(10)
    a, b = load(queue, "a", 2), load(queue, "b", 8)
    run(queue, a, 1.0)
    run(queue, b, 2.0)
    assert queue.claim(Claim(Holding("c"), 7), 3.0) == [Park(b)]
    assert a.memory.is_here


def test_several_are_parked_for_a_large_one():
    queue = limited(10)
    runners = [load(queue, name, 3) for name in "abc"]
    wanted = Claim(Holding("d"), 8)
    assert queue.claim(wanted, 0.0) == [Park(runner) for runner in runners]
    assert [queue.parked(runner, 0.0) for runner in runners] == [[], [], [Claimed(wanted)]]


def test_who_leaves_already_makes_room_for_the_next_too():
    queue = limited(10)
    a = load(queue, "a", 10)
    first, second = Claim(Holding("b"), 4), Claim(Holding("c"), 6)
    assert queue.claim(first, 0.0) == [Park(a)]
    assert queue.claim(second, 0.0) == []
    assert queue.parked(a, 0.0) == [Claimed(first), Claimed(second)]


def test_a_claim_that_is_given_up_leaves_room_for_the_next():
    queue = limited(10)
    a, b = load(queue, "a", 5), load(queue, "b", 5)
    first, second = Claim(Holding("c"), 10), Claim(Holding("d"), 5)
    assert queue.claim(first, 0.0) == [Park(a), Park(b)]
    assert queue.parked(a, 0.0) == []
    assert queue.give_up(first, 0.0) == []
    assert queue.claim(second, 0.0) == [Claimed(second)]
    assert queue.give_up(second, 0.0) == []


def test_one_that_drains_is_not_parked():
    queue = limited(10, lanes=1)
    a, b = load(queue, "a", 5), load(queue, "b", 5)
    job = Job(a)
    queue.submit(job, 0.0)
    queue.drain_runner(a, 0.0)
    assert queue.claim(Claim(Holding("c"), 5), 0.0) == [Park(b)]
    assert queue.complete(job, 0.0) == [Drained(a)]


def test_who_awaits_an_epoch_is_idle():
    queue = limited(10)
    a = load(queue, "a", 6)
    job = Job(a, min_epoch=2)
    queue.submit(job, 0.0)
    assert queue.claim(Claim(Holding("b"), 6), 0.0) == [Park(a)]
    assert park(queue, a)[0].claim.bytes == 6
    assert not queue.memory.line  # it does not ask for weights that are not there yet


# --- coming back ----------------------------------------------------------------------------------


def away(queue, name="a", size=6, **options):
    """A runner that was parked for another, `other`."""
    runner = load(queue, name, size)
    holding = Holding("other")
    wanted = Claim(holding, queue.memory.limit - size + 1)
    assert queue.claim(wanted, 0.0) == [Park(runner)]
    assert queue.parked(runner, 0.0) == [Claimed(wanted)]
    return runner, serving(queue, holding, **options)


def test_a_request_brings_it_back_and_waits_for_it():
    queue = limited(10)
    a, other = away(queue)
    jobs = [Job(a), Job(a)]
    assert queue.submit(jobs[0], 1.0) == [Park(other)]
    assert queue.submit(jobs[1], 1.0) == []
    assert queue.parked(other, 2.0) == [Return(a)]
    assert a.memory.stay is Stay.COMING
    assert launched(queue.returned(a, 5.0)) == [jobs[0]]
    assert (a.memory.since, a.memory.took) == (5.0, 3.0)
    assert launched(queue.complete(jobs[0], 6.0)) == [jobs[1]]


def test_asking_for_a_lease_brings_it_back():
    queue = limited(10)
    a, other = away(queue)
    job = Job(a, is_lease_request=True)
    assert queue.submit(job, 1.0) == [Park(other)]
    assert queue.parked(other, 1.0) == [Return(a)]
    (grant,) = queue.returned(a, 2.0)
    assert grant.lease.runner is a


def test_one_that_is_just_leaving_comes_back_when_it_has_left():
    queue = limited(10)
    a = load(queue, "a", 6)
    wanted = Claim(Holding("b"), 5)
    queue.claim(wanted, 0.0)
    job = Job(a)
    assert queue.submit(job, 0.0) == []
    assert queue.parked(a, 0.0) == [Claimed(wanted)]
    assert list(queue.memory.line) == [a]
    assert queue.release_memory(wanted.holding, 1.0) == [Return(a)]
    assert launched(queue.returned(a, 1.0)) == [job]


def test_who_gives_up_while_it_is_away_does_not_bring_it_back():
    queue = limited(10)
    a, other = away(queue)
    running, job = Job(other), Job(a)
    queue.submit(running, 0.0)
    lease = Job(
        other, is_lease_request=True
    )  # held behind the run, so that it can't be made to leave
    queue.submit(lease, 0.0)
    queue.complete(running, 0.0)
    assert queue.submit(job, 0.0) == []
    queue.cancel(job, 0.0)
    assert not queue.memory.line


@pytest.mark.parametrize("first", ["the lease's run", "release"])
def test_a_busy_runner_is_evicted_once_its_last_lease_has_ended(first):
    queue = limited(10)
    a, other = away(queue, slots=2)
    lease = take_lease(queue, other)
    running, leased, job = Job(other), Job(lease), Job(a)
    assert launched(queue.submit(running, 0.0)) == [running]
    assert launched(queue.submit(leased, 0.0)) == [leased]
    assert queue.submit(job, 0.0) == []
    ends = [lambda: queue.complete(leased, 1.0), lambda: queue.release(lease, 1.0)]
    for end in ends if first == "the lease's run" else reversed(ends):
        assert other.memory.stay is Stay.HERE
        assert end() == []
    assert other.memory.stay is Stay.LEAVING
    assert queue.complete(running, 2.0) == [Park(other)]
    assert park(queue, other, 2.0) == [Return(a)]
    assert launched(queue.returned(a, 2.0)) == [job]


def test_its_deadline_counts_while_it_is_away():
    queue = limited(10)
    a, other = away(queue)
    take_lease(queue, other)
    job = Job(a, deadline=2.0)
    assert queue.submit(job, 1.0) == [WakeAt(2.0)]
    assert queue.tick(2.0) == [Expire(job)]


def test_weights_that_cant_be_brought_fail_what_is_queued_and_the_next_request_tries_again():
    queue = limited(10, jobs=2)
    a, other = away(queue)
    jobs = [Job(a) for _ in range(3)]
    queue.submit(jobs[0], 1.0)
    queue.submit(jobs[1], 1.0)
    queue.submit(jobs[2], 1.0, wait=True)
    assert queue.parked(other, 1.0) == [Return(a)]
    commands = queue.returned(a, 2.0, error="the disk is gone")
    assert sorted(command.job.id for command in commands) == [1, 2, 3]
    assert all(type(command) is Revoke for command in commands)
    assert isinstance(commands[0].error, LoadError)
    assert "runner 'a' was parked, and its weights can't be brought back: the disk is gone" in str(
        commands[0].error
    )
    assert (queue.memory.used, a.memory.stay) == (0, Stay.AWAY)
    again = Job(a)
    assert queue.submit(again, 3.0) == [Return(a)]
    assert launched(queue.returned(a, 4.0)) == [again]


def test_requests_for_one_that_can_never_come_back_fail():
    queue = limited(10)
    a, other = away(queue)
    queue.update_use(other.memory, 0.0, constants=5, inactive=0, fixed="it was updated")
    job = Job(a)
    (revoke,) = queue.submit(job, 1.0)
    assert type(revoke) is Revoke
    assert (
        "needs 6 bytes for its weights, and the memory_limit is 10 bytes; taken: 'other' 5 bytes "
        "(it was updated)" in str(revoke.error)
    )
    queue.update_use(other.memory, 0.0, constants=5, inactive=0)
    assert queue.submit(Job(a), 1.0) == [Park(other)]


def test_one_that_drains_while_it_is_away_finishes_what_it_accepted():
    queue = limited(10)
    a, other = away(queue)
    job = Job(a)
    queue.submit(job, 0.0)
    assert queue.drain_runner(a, 0.0) == []
    queue.parked(other, 0.0)
    assert launched(queue.returned(a, 0.0)) == [job]
    assert queue.complete(job, 0.0) == [Drained(a)]


def test_one_that_is_away_and_idle_is_drained_at_once():
    queue = limited(10)
    a, _ = away(queue)
    assert queue.drain_runner(a, 0.0) == [Drained(a)]
    queue.remove_runner(a)
    assert queue.release_memory(a.memory, 0.0) == []
    assert queue.memory.used == 5


def test_one_that_is_terminated_on_its_way_is_drained_and_comes_all_the_same():
    queue = limited(10)
    a, other = away(queue)
    job = Job(a)
    queue.submit(job, 0.0)
    queue.parked(other, 0.0)
    revoke, drained = queue.terminate_runner(a, 0.0)
    assert (revoke.job, drained) == (job, Drained(a))
    assert queue.returned(a, 1.0) == []
    queue.remove_runner(a)
    queue.release_memory(a.memory, 1.0)
    assert queue.memory.used == 0


# --- busy ones ------------------------------------------------------------------------------------


def test_a_busy_one_leaves_for_one_that_is_asked_for_and_finishes_what_runs():
    queue = limited(10, lanes=1)
    a, other = away(queue)
    running, waiting, asking = Job(other), Job(other), Job(a)
    queue.submit(running, 0.0)
    queue.submit(waiting, 0.0)
    assert queue.submit(asking, 0.0) == []
    assert other.memory.stay is Stay.LEAVING
    assert queue.complete(running, 1.0) == [Park(other)]
    assert queue.parked(other, 1.0) == [Return(a)]
    assert list(queue.memory.line) == [other]
    assert launches(queue.returned(a, 2.0)) == [asking]
    assert queue.complete(asking, 2.0) == [Park(a)]  # nobody wants it, and another does
    assert queue.parked(a, 2.0) == [Return(other)]
    assert launched(queue.returned(other, 3.0)) == [waiting]


def test_a_busy_one_that_came_back_stays_for_a_while():
    queue = limited(10, lanes=1)
    a, other = away(queue)
    first = Job(a)
    queue.submit(first, 0.0)
    queue.parked(other, 0.0)
    queue.returned(a, 1.0)  # it took a second
    queue.submit(Job(a), 1.0)
    asking = Job(other)
    assert queue.submit(asking, 1.5) == [WakeAt(1.0 + STAY)]
    assert queue.tick(1.0 + STAY) == []
    assert a.memory.stay is Stay.LEAVING
    assert queue.complete(first, 6.0) == [Park(a)]


def test_for_a_load_no_busy_one_leaves():
    queue = limited(10)
    a = load(queue, "a", 6)
    queue.submit(Job(a), 0.0)
    with pytest.raises(MemoryLimitError):
        queue.claim(Claim(Holding("b"), 6), 0.0)


def test_idle_ones_leave_before_busy_ones_and_those_that_came_first_before_others():
    queue = limited(12, lanes=4)
    runners = {name: load(queue, name, 3) for name in "abcd"}
    for runner in runners.values():
        run(queue, runner, 1.0)
    e = Claim(Holding("e"), 12)
    queue.claim(e, 1.0)
    for runner in runners.values():
        queue.parked(runner, 1.0)
    queue.release_memory(e.holding, 1.0)
    for when, name in enumerate("cabd", 2):
        queue.submit(Job(runners[name]), when)
        queue.returned(runners[name], when)  # in no time
    (job,) = [job for job in queue.lanes.running.values() if job.source is runners["d"]]
    queue.complete(job, 9.0)
    holding = Holding("f")
    with pytest.raises(MemoryLimitError):
        queue.claim(Claim(holding, 6), 9.0)
    f = serving(queue, holding)
    queue.update_use(
        holding, 9.0, constants=6, inactive=0
    )  # more than there is: it was not known before
    holding.stay, queue.memory.used = Stay.AWAY, queue.memory.used - 6
    f.closed = f.reached = True
    assert queue.submit(Job(f), 9.0) == [Park(runners["d"])]
    leaving = [name for name, runner in runners.items() if runner.memory.stay is Stay.LEAVING]
    assert leaving == ["c", "d"]


def test_who_stands_in_line_first_comes_first():
    queue = limited(10, lanes=4)
    a, other = away(queue)
    b = serving(queue, Holding("b"))
    lease = take_lease(queue, other)
    job, later = Job(a), Job(b)
    assert queue.submit(job, 0.0) == []
    assert launched(queue.submit(later, 0.0)) == [later]  # it takes nothing
    assert queue.release(lease, 1.0) == [Park(other)]
    assert queue.parked(other, 1.0) == [Return(a)]


# --- updates --------------------------------------------------------------------------------------


def test_new_weights_claim_as_much_beside_those_that_serve():
    queue = limited(10)
    a, b = load(queue, "a", 5), load(queue, "b", 5)
    queue.pin(a)
    wanted = Claim(a.memory, 5)
    assert queue.claim(wanted, 0.0) == [Park(b)]
    assert queue.parked(b, 0.0) == [Claimed(wanted)]
    assert (a.memory.constants, a.memory.inactive) == (5, 5)
    assert queue.update_use(a.memory, 0.0, constants=5, inactive=0) == []


def test_one_that_is_held_is_not_parked_until_it_is_settled():
    queue = limited(10)
    a = load(queue, "a", 6)
    queue.pin(a)
    b = serving(queue, Holding("b"))
    queue.pin(b)
    with pytest.raises(MemoryLimitError):
        queue.claim(Claim(b.memory, 6), 0.0)
    queue.update_use(a.memory, 0.0, constants=6, inactive=0)
    assert queue.claim(Claim(b.memory, 6), 0.0) == [Park(a)]


def test_the_barrier_of_an_update_is_not_a_parking():
    queue = limited(10)
    a = load(queue, "a", 6)
    queue.pin(a)
    assert queue.close_barrier(a, 0.0) == [BarrierReached(a)]
    queue.open_barrier(a, 0.0, epoch=2)


def test_an_update_calls_one_back_that_is_away():
    queue = limited(10)
    a, other = away(queue)
    queue.pin(a)
    assert queue.call_back(a, 0.0) == [Park(other)]
    assert queue.call_back(a, 0.0) == []  # it comes already
    assert queue.parked(other, 0.0) == [Return(a)]
    assert queue.returned(a, 0.0) == []
    assert queue.call_back(a, 0.0) == []


def test_an_update_does_not_wait_for_memory_that_busy_ones_have():
    queue = limited(10)
    a, other = away(queue)
    queue.submit(Job(other), 0.0)
    with pytest.raises(MemoryLimitError, match="it has requests"):
        queue.call_back(a, 0.0)
    assert a.memory.stay is Stay.AWAY


def test_memory_that_an_update_gives_back_lets_others_in():
    queue = limited(10)
    a = load(queue, "a", 4)
    b = load(queue, "b", 4)
    queue.pin(a)
    wanted = Claim(a.memory, 4)
    assert queue.claim(wanted, 0.0) == [Park(b)]
    queue.parked(b, 0.0)
    queue.update_use(a.memory, 0.0, constants=4, inactive=4, fixed="it keeps the previous set")
    queue.update_use(a.memory, 0.0, constants=4, inactive=4)
    lease = take_lease(queue, a)
    job = Job(b)
    assert queue.submit(job, 0.0) == []
    assert queue.update_use(a.memory, 0.0, constants=4, inactive=0) == [Return(b)]
    queue.release(lease, 0.0)


# --- illegal facts --------------------------------------------------------------------------------


@pytest.mark.parametrize("fact", ["parked", "returned"])
def test_what_was_not_commanded_did_not_happen(fact):
    queue = limited(10)
    a = load(queue, "a", 6)
    before = picture(queue.unchecked)
    with pytest.raises(IllegalFactError, match="'a' was not to"):
        getattr(queue, fact)(a, 0.0)
    assert picture(queue.unchecked) == before


def test_memory_for_new_weights_is_claimed_while_the_runner_is_held():
    queue = limited(10)
    a = load(queue, "a", 6)
    with pytest.raises(IllegalFactError, match="hold"):
        queue.claim(Claim(a.memory, 6), 0.0)


def test_one_is_not_parked_before_its_slots_are_home():
    queue = limited(10, lanes=1)
    a, other = away(queue)
    queue.submit(Job(other), 0.0)
    queue.submit(Job(a), 0.0)
    assert other.memory.stay is Stay.LEAVING
    with pytest.raises(IllegalFactError):
        queue.parked(other, 0.0)


def test_a_run_of_one_that_is_leaving_is_no_launch_for_it():
    queue = limited(10)
    a = load(queue, "a", 6)
    queue.claim(Claim(Holding("b"), 6), 0.0)
    assert not any(type(command) is Launch for command in queue.submit(Job(a), 0.0))


def test_an_update_that_gives_up_on_one_that_is_leaving_changes_nothing():
    queue = limited(10)
    a = load(queue, "a", 6)
    queue.claim(Claim(Holding("b"), 6), 0.0)
    queue.pin(a)
    assert queue.update_use(a.memory, 0.0, constants=5, inactive=0) == []
    assert (queue.memory.leaving, queue.memory.used) == (5, 5)


@pytest.mark.parametrize("sinces", [(3.0, 2.0), (2.0, 3.0)])
def test_the_earliest_of_the_busy_ones_is_waited_for(sinces):
    queue = limited(10, lanes=4)
    a, other = away(queue, size=5)
    b = load(queue, "b", 4)
    queue.pin(b)
    for runner, since in zip((other, b), sinces, strict=True):
        queue.submit(Job(runner), 4.0)
        runner.memory.since, runner.memory.took = since, 1.0
    queue.update_use(b.memory, 4.0, constants=4, inactive=0)
    assert queue.submit(Job(a), 4.0) == [WakeAt(2.0 + STAY)]
