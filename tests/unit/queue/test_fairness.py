"""Who shares what: runners a device's time by their shares, tenants a runner's time equally,
each in its class.
"""

from __future__ import annotations

import math

import pytest

from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.job import IllegalFactError, Job, Priority
from aoti_sched.queue.policy import Policy
from tests.unit.queue.load import Load, Stream
from tests.unit.queue.support import add, device, launched, launches, take_lease, teach

HIGH, NORMAL, LOW = Priority.HIGH, Priority.NORMAL, Priority.LOW
JOBS = 10_000
QUICK, SLOW = 1 / 1024, 100 / 1024


def unchecked(lanes, cores=None):
    """`check()` after each of so many facts would take minutes."""
    return DeviceQueue("cpu", lanes, Bounds(None, None), cores=cores, policy=Policy())


def stream_of(queue, name, seconds, *, slots=2, **rest):
    runner = add(queue, name, slots=slots, **rest)
    return Stream(lambda: Job(runner), seconds)


def parts(streams):
    total = sum(stream.served for stream in streams)
    return [stream.served / total for stream in streams]


def run_all(queue, first):
    """Complete what runs, each after a second, and return the jobs in the order of their
    launches.
    """
    order, now = [first], first.started
    for job in order:
        now += 1
        order += launched(queue.complete(job, now))
    return order


# --- runners --------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("shares", [(1.0, 1.0), (1.0, 3.0), (3.0, 1.0), (0.5, 0.25)])
def test_runners_share_a_device_by_their_weights_though_their_runs_are_a_hundredfold_apart(
    lanes, shares
):
    queue = unchecked(lanes)
    streams = [
        stream_of(queue, name, seconds, slots=lanes, share=share)
        for name, seconds, share in zip("ab", (QUICK, SLOW), shares, strict=True)
    ]
    Load(queue, streams).run(JOBS)
    assert parts(streams) == pytest.approx([share / sum(shares) for share in shares], rel=0.05)


@pytest.mark.long
def test_six_runners_share_two_lanes_by_their_weights():
    queue = unchecked(2)
    shares = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    seconds = [QUICK, SLOW, QUICK, SLOW / 10, QUICK, SLOW / 3]
    streams = [
        stream_of(queue, f"r{number}", *one[:1], share=one[1])
        for number, one in enumerate(zip(seconds, shares, strict=True))
    ]
    Load(queue, streams).run(JOBS)
    assert parts(streams) == pytest.approx([share / 12 for share in shares], rel=0.05)


@pytest.mark.long
def test_a_runner_with_wide_runs_pays_for_all_their_cores():
    queue = unchecked(2, cores=2)
    wide = stream_of(queue, "wide", SLOW, width=2)
    narrow = stream_of(queue, "narrow", QUICK)
    Load(queue, [wide, narrow]).run(JOBS)
    assert 2 * wide.served == pytest.approx(narrow.served, rel=0.05)


def test_without_fair_the_order_is_that_of_due_times():
    queue = device(fair=False)
    a, b = add(queue, "a"), add(queue, "b")
    jobs = [Job(a), Job(a), Job(a), Job(b), Job(b, deadline=9.0)]
    for job in jobs:
        queue.submit(job, 0.0)
    first, second, third, other, hurried = jobs
    assert run_all(queue, first) == [first, hurried, second, third, other]


def test_runners_take_turns_where_one_has_queued_much():
    queue = device()
    a, b = add(queue, "a"), add(queue, "b")
    many, few = [Job(a) for _ in range(5)], [Job(b) for _ in range(2)]
    for job in (*many, *few):
        queue.submit(job, 0.0)
    assert run_all(queue, many[0]) == [many[0], few[0], many[1], few[1], many[2], many[3], many[4]]


def test_equals_go_by_their_due_times():
    queue = device(lanes=1)
    blocker = Job(add(queue, "busy"))
    a, b = add(queue, "a"), add(queue, "b")
    unhurried, hurried = Job(a), Job(b, deadline=9.0)
    for job in (blocker, unhurried, hurried):
        queue.submit(job, 0.0)
    assert launched(queue.complete(blocker, 1.0)) == [hurried]


def test_what_is_expected_is_charged_at_the_launch():
    queue = device(lanes=2)
    known, other = add(queue, "known", slots=2), add(queue, "other", slots=2)
    blockers = [Job(add(queue, f"busy {number}")) for number in range(2)]
    for _ in range(8):  # both have had as much
        for runner in (known, other):
            teach(queue, runner, 1.0, runs=1)
    for job in blockers:
        queue.submit(job, 0.0)
    jobs = [Job(known), Job(known), Job(other), Job(other)]
    for job in jobs:
        queue.submit(job, 0.0)
    assert launched(queue.complete(blockers[0], 1.0)) == [jobs[0]]
    assert launched(queue.complete(blockers[1], 1.0)) == [jobs[2]]


def test_a_run_that_was_shorter_than_expected_is_paid_back():
    queue = device()
    a, b = add(queue, "a"), add(queue, "b")
    for _ in range(8):
        for runner in (a, b):
            teach(queue, runner, 4.0, runs=1)
    of_a, of_b = [Job(a) for _ in range(7)], [Job(b) for _ in range(3)]
    for job in (*of_a, *of_b):
        queue.submit(job, 0.0)
    order, now = [of_a[0]], 0.0
    for job in order:
        now += 4.0 if job in of_b else 1.0
        order += launched(queue.complete(job, now))
    said = "".join("a" if job in of_a else "b" for job in order)
    assert said == "ababaaaaba"  # one run of b takes as long as four of a


def test_a_newcomer_gets_no_credit_for_the_past():
    queue = device()
    old = stream_of(queue, "old", 1.0)
    load = Load(queue, [old])
    load.run(100)
    new = stream_of(queue, "new", 1.0)
    load.join(new)
    load.run(20)
    assert 9 <= len(new.runs) <= 11
    launched_since = load.launched[-20:]
    longest = max(map(len, "".join("on"[job in new.runs] for job in launched_since).split("o")))
    assert longest <= 2


def test_who_comes_back_gets_no_credit_for_its_absence():
    queue = device()
    busy, away = stream_of(queue, "busy", 1.0), stream_of(queue, "away", 1.0)
    load = Load(queue, [busy, away])
    load.run(10)
    away.depth = 0
    load.run(100)
    runs = len(away.runs)
    away.depth = 4
    load.join(away)
    load.run(20)
    assert 9 <= len(away.runs) - runs <= 11


def test_who_waits_all_the_time_keeps_its_turn_when_more_of_it_comes():
    """What it has queued could not run, so it has not had its part: this is no absence."""
    queue = device()
    a, b = add(queue, "a"), add(queue, "b")
    queue.close_barrier(a, 0.0)
    of_b, of_a = [Job(b) for _ in range(6)], [Job(a) for _ in range(5)]
    queue.submit(of_b[0], 0.0)
    queue.submit(of_a[0], 0.0)
    for job in of_b[1:]:
        queue.submit(job, 0.0)
    for now in range(3):
        queue.complete(of_b[now], now + 1.0)
    for job in of_a[1:]:
        queue.submit(job, 3.0)
    queue.open_barrier(a, 3.0)
    order = run_all(queue, of_b[3])[1:]
    assert (
        "".join("a" if job in of_a else "b" for job in order) == "aaaabab"
    )  # b has had four seconds


def test_what_is_paid_back_is_lost_to_one_that_is_away():
    queue = device()
    a, b = add(queue, "a"), add(queue, "b")
    teach(queue, a, 4.0)
    teach(queue, b, 1.0)
    quick = Job(a)
    queue.submit(quick, 0.0)
    queue.complete(quick, 0.0)  # four seconds were charged, and none was used
    for _ in range(50):
        alone = Job(b)
        queue.submit(alone, 0.0)
        queue.complete(alone, 0.0, started=0.0, finished=1.0)
    of_b, of_a = [Job(b) for _ in range(6)], [Job(a) for _ in range(2)]
    for job in (of_b[0], *of_a, *of_b[1:]):
        queue.submit(job, 0.0)
    order = run_all(queue, of_b[0])
    assert (
        "".join("a" if job in of_a else "b" for job in order) == "babbbabb"
    )  # the first of a cost four seconds


def test_who_had_more_than_its_part_while_alone_is_not_made_to_wait_for_it():
    queue = device()
    a, b = stream_of(queue, "a", 1.0), stream_of(queue, "b", 1.0)
    load = Load(queue, [a])
    load.run(500)
    load.join(b)
    load.run(40)
    assert len(a.runs) - 500 >= 19


def test_a_class_always_goes_first_whatever_its_runner_has_had():
    queue = device()
    greedy, modest = add(queue, "greedy"), add(queue, "modest")
    teach(queue, greedy, 100.0)
    first = Job(modest)
    queue.submit(first, 0.0)
    normal, high, low = Job(modest), Job(greedy, HIGH), Job(modest, LOW)
    for job in (normal, high, low):
        queue.submit(job, 0.0)
    assert run_all(queue, first) == [first, high, normal, low]


def test_what_a_runner_has_had_in_one_class_counts_in_no_other():
    queue = device()
    a, b = add(queue, "a"), add(queue, "b")
    for _ in range(5):
        job = Job(a, HIGH)
        queue.submit(job, 0.0)
        queue.complete(job, 0.0, started=0.0, finished=100.0)
    blocker = Job(add(queue, "busy"))
    queue.submit(blocker, 0.0)
    normal, other = Job(a), Job(b)
    queue.submit(normal, 0.0)
    queue.submit(other, 0.0)
    assert launched(queue.complete(blocker, 1.0)) == [normal]


def test_a_held_lease_is_on_its_runners_account():
    queue = device()
    runner, other = add(queue, "m", slots=2), add(queue, "other")
    lease = take_lease(queue, runner)
    first, held, plain, foreign = Job(lease), Job(lease), Job(runner), Job(other)
    for job in (first, held, plain, foreign):
        queue.submit(job, 0.0)
    assert run_all(queue, first) == [first, foreign, held, plain]


def test_granted_leases_cost_nothing():
    queue = device()
    a, b = add(queue, "a", slots=3), add(queue, "b")
    blocker = Job(add(queue, "busy"))
    queue.submit(blocker, 0.0)
    for _ in range(2):
        take_lease(queue, a)
    of_a, of_b = Job(a), Job(b)
    queue.submit(of_a, 0.0)
    queue.submit(of_b, 0.0)
    assert launched(queue.complete(blocker, 1.0)) == [of_a]


# --- tenants --------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("lanes", [1, 2])
def test_tenants_share_a_runner_equally_though_their_runs_are_a_hundredfold_apart(lanes):
    queue = unchecked(lanes)
    runner = add(queue, slots=lanes)
    quick = Stream(lambda: Job(runner, tenant="quick"), QUICK)
    slow = Stream(lambda: Job(runner, tenant="slow", bytes=1000), SLOW)
    nameless = Stream(lambda: Job(runner, bytes=50), SLOW / 10)
    streams = [quick, slow, nameless]
    Load(queue, streams).run(JOBS)
    assert parts(streams) == pytest.approx([1 / 3] * 3, rel=0.05)


def test_many_requests_of_one_tenant_do_not_hold_up_another():
    queue = device()
    runner = add(queue)
    crowd, lone = [Job(runner, tenant="a") for _ in range(6)], Job(runner, tenant="b")
    for job in (*crowd, lone):
        queue.submit(job, 0.0)
    assert run_all(queue, crowd[0])[:3] == [crowd[0], lone, crowd[1]]


@pytest.mark.long
def test_tenants_of_one_runner_take_nothing_from_another_runner():
    queue = unchecked(1)
    crowded = add(queue, "crowded", slots=1)
    streams = [Stream(lambda name=name: Job(crowded, tenant=name), QUICK) for name in "abc"]
    lone = stream_of(queue, "lone", SLOW)
    Load(queue, [*streams, lone]).run(JOBS)
    assert parts([*streams, lone]) == pytest.approx([1 / 6] * 3 + [1 / 2], rel=0.05)


def test_a_new_tenant_gets_no_credit_for_the_past():
    queue = device()
    runner = add(queue)
    old = Stream(lambda: Job(runner, tenant="old"), 1.0)
    load = Load(queue, [old])
    load.run(100)
    new = Stream(lambda: Job(runner, tenant="new"), 1.0)
    load.join(new)
    load.run(20)
    assert 9 <= len(new.runs) <= 11


def test_within_a_tenant_the_earliest_due_goes_first():
    queue = device()
    runner = add(queue)
    first = Job(runner, tenant="a")
    jobs = [Job(runner, tenant="a", deadline=at) for at in (None, 30.0, 8.0, 9.0)]
    for job in (first, *jobs):
        queue.submit(job, 0.0)
    unhurried, late, hurried, next_one = jobs
    assert run_all(queue, first) == [first, hurried, next_one, unhurried, late]


def test_in_the_order_of_arrival_deadlines_count_for_nothing():
    queue = device(order="arrival")
    runner = add(queue)
    jobs = [Job(runner, deadline=at) for at in (None, 30.0, 8.0, None)]
    for job in jobs:
        queue.submit(job, 0.0)
    assert run_all(queue, jobs[0]) == jobs


def test_a_lease_knows_no_tenants():
    queue = device()
    runner = add(queue)
    lease = take_lease(queue, runner)
    jobs = [Job(lease, tenant=name) for name in ("a", "a", "a", "b")]
    for job in jobs:
        queue.submit(job, 0.0)
    assert run_all(queue, jobs[0]) == jobs


def test_a_batch_is_paid_by_its_tenants_according_to_their_rows():
    queue = device()
    runner = add(queue, batching=Batching(8))
    blocker = Job(runner)
    queue.submit(blocker, 0.0)
    big, small = (
        Job(runner, tenant="big", key="k", rows=6),
        Job(runner, tenant="small", key="k", rows=2),
    )
    for job in (big, small):
        queue.submit(job, 0.0)
    queue.turn(0.0)
    assert launches(queue.complete(blocker, 0.0)) == [big]
    assert big.members == (big, small)
    rest = [Job(runner, tenant=name) for name in ("big", "big", "small", "small", "small")]
    for job in rest:
        queue.submit(job, 1.0)
    order, now = [big], 8.0  # six seconds are big's, two are small's
    for job in order:
        order += launched(queue.complete(job, now))
        now += 2.0
    big_1, big_2, *small_ones = rest
    assert order[1:] == [*small_ones[:2], big_1, small_ones[2], big_2]


@pytest.mark.parametrize("share", [0.0, -1.0, math.inf, math.nan])
def test_a_share_is_a_positive_number(share):
    with pytest.raises(IllegalFactError, match=r"runner 'm': a share is a positive number, not "):
        add(device(), share=share)
