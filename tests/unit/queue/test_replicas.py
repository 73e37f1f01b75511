"""Replicas: a request goes where it would be finished first, and what is withdrawn at one loses
nothing on its way to another.
"""

from __future__ import annotations

import pytest

from aoti_sched.errors import QueueFullError
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.commands import Expire, Grant, Launch, WakeAt, Withdraw
from aoti_sched.queue.job import Job, JobState, Priority
from aoti_sched.queue.selection.routing import Rotation, least_crowded
from tests.unit.queue.support import add, device, launched, launches, rejected, take_lease, teach

HIGH, NORMAL, LOW = Priority.HIGH, Priority.NORMAL, Priority.LOW


def replicas(*seconds, lanes=1, slots=1, **rest):
    """One for each, whose runs are known to take so long; nothing is known of one with None."""
    queues = [device(lanes) for _ in seconds]
    runners = [add(queue, slots=slots, routable=True, **rest) for queue in queues]
    for queue, runner, each in zip(queues, runners, seconds, strict=True):
        if each is not None:
            teach(queue, runner, each)
    rotation = Rotation(
        [(queue.unchecked, runner) for queue, runner in zip(queues, runners, strict=True)]
    )
    return queues, runners, rotation


def placed(rotation, runners, now=0.0, **job):
    """Which replica a new job is for."""
    job = Job(runners[0], **job)
    rotation.place(job, now)
    return job, runners.index(job.source)


def send(rotation, queues, runners, count=1, now=0.0, **job):
    """Jobs that come one after the other: to which replicas they went."""
    places = []
    for _ in range(count):
        one, place = placed(rotation, runners, now, **job)
        queues[place].submit(one, now)
        places.append(place)
    return places


# --- where a request goes -------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [None, 1.0])
def test_equal_replicas_take_turns(seconds):
    _, runners, rotation = replicas(seconds, seconds, seconds)
    assert [placed(rotation, runners)[1] for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_a_hair_does_not_decide():
    _, runners, rotation = replicas(1.0, 1.125)
    assert [placed(rotation, runners)[1] for _ in range(4)] == [0, 1, 0, 1]
    _, runners, rotation = replicas(1.0, 1.25)
    assert [placed(rotation, runners)[1] for _ in range(4)] == [0, 0, 0, 0]


def test_a_slower_device_gets_less():
    queues, runners, rotation = replicas(1.0, 3.0)
    assert send(rotation, queues, runners, 8).count(1) == 2


def test_it_goes_where_it_would_be_finished_and_not_where_it_would_begin_first():
    queues, runners, rotation = replicas(1.0, 4.0)
    assert send(rotation, queues, runners, 3) == [0, 0, 0]  # the other one is idle all the while


def test_one_that_was_slow_is_tried_when_it_has_run_nothing_for_long():
    queues, runners, rotation = replicas(0.25, 1.0)
    assert [placed(rotation, runners, now)[1] for now in (0.0, 7.75, 8.0, 8.0, 15.75, 16.0)] == [
        0,
        0,
        1,
        0,
        0,
        1,
    ]
    teach(queues[1], runners[1], 0.25, runs=32, now=16.0)  # it is as quick as the other now
    assert [placed(rotation, runners, 16.0)[1] for _ in range(4)] == [0, 1, 0, 1]


def test_one_whose_deadline_would_pass_is_not_there_to_try():
    _, runners, rotation = replicas(0.25, 1.0)
    assert placed(rotation, runners, 9.0, deadline=9.75)[1] == 0
    assert placed(rotation, runners, 9.0, deadline=10.0)[1] == 1


def test_one_where_it_would_wait_is_not_tried():
    queues, runners, rotation = replicas(0.25, 1.0)
    queues[1].submit(Job(runners[1]), 9.0)
    assert placed(rotation, runners, 9.0)[1] == 0


def test_one_that_is_held_at_a_barrier_is_not_tried():
    queues, runners, rotation = replicas(0.25, 1.0)
    queues[1].close_barrier(runners[1], 9.0)
    assert placed(rotation, runners, 9.0)[1] == 0


def test_what_is_of_a_lower_class_is_not_waited_for():
    queues, runners, rotation = replicas(1.0, 3.0)
    send(rotation, queues, runners, 9, priority=LOW)
    assert placed(rotation, runners, priority=HIGH)[1] == 0


def test_other_models_on_the_device_count():
    queues, runners, rotation = replicas(1.0, 1.0)
    other = add(queues[0], "other")
    teach(queues[0], other, 2.0)
    queues[0].submit(Job(other), 0.0)
    assert send(rotation, queues, runners, 2) == [1, 1]  # the second would wait on either


def test_a_tenant_does_not_wait_for_all_that_another_has_queued():
    queues, runners, rotation = replicas(1.0, 3.0)
    for _ in range(6):
        queues[0].submit(Job(runners[0], tenant="floods"), 0.0)
    assert placed(rotation, runners, tenant="modest")[1] == 0
    assert placed(rotation, runners, tenant="floods")[1] == 1


def test_as_long_as_one_is_unknown_each_gets_as_much():
    queues, runners, rotation = replicas(1.0, None)
    assert sorted(send(rotation, queues, runners, 20)) == [0] * 10 + [1] * 10


def test_a_replica_with_more_slots_gets_more_while_nothing_is_known():
    queues = [device(3), device(1)]
    runners = [add(queues[0], slots=3, routable=True), add(queues[1], routable=True)]
    rotation = Rotation(
        [(queue.unchecked, runner) for queue, runner in zip(queues, runners, strict=True)]
    )
    assert sorted(send(rotation, queues, runners, 16)) == [0] * 12 + [1] * 4


def test_one_without_room_is_passed_over_as_long_as_another_has_some():
    queues, runners, rotation = replicas(1.0, 9.0, jobs=1)
    assert send(rotation, queues, runners, 5) == [0, 0, 1, 1, 0]
    job, place = placed(rotation, runners)
    assert type(rejected(queues[place].submit(job, 0.0))) is QueueFullError


def test_one_whose_slots_are_all_leased_is_passed_over():
    queues, runners, rotation = replicas(1.0, 5.0)
    take_lease(queues[0], runners[0])
    assert send(rotation, queues, runners, 3) == [1, 1, 1]
    take_lease(queues[1], add(queues[1], "n"))  # another runner's does not matter
    assert placed(rotation, runners)[1] == 1


def test_one_that_is_held_at_a_barrier_is_passed_over_unless_all_are():
    queues, runners, rotation = replicas(1.0, 5.0)
    queues[0].close_barrier(runners[0], 0.0)
    assert placed(rotation, runners)[1] == 1
    queues[1].close_barrier(runners[1], 0.0)
    assert placed(rotation, runners)[1] == 0


def test_one_that_is_on_its_way_out_is_passed_over():
    queues, runners, rotation = replicas(1.0, 5.0)
    queues[0].terminate_runner(runners[0], 0.0)
    assert placed(rotation, runners)[1] == 1


def test_a_lease_is_granted_where_the_fewest_are():
    queues, runners, rotation = replicas(1.0, 9.0, slots=2)
    assert send(rotation, queues, runners, 4, is_lease_request=True) == [0, 1, 0, 1]
    assert [len(runner.leases) for runner in runners] == [2, 2]


def test_asking_changes_nothing():
    queues, runners, _ = replicas(1.0)
    queues[0].submit(Job(runners[0]), 0.0)
    job = Job(runners[0])
    assert [queues[0].when_finished(job, 0.5) for _ in range(3)] == [1.5, 1.5, 1.5]
    assert (job.state, job.id, runners[0].counters.submitted) == (JobState.NEW, -1, 9)


@pytest.mark.parametrize(("gone", "turns"), [(0, [2, 1, 2]), (1, [2, 0, 2]), (2, [0, 1, 0])])
def test_the_turns_go_on_when_one_leaves(gone, turns):
    _, runners, rotation = replicas(None, None, None)
    assert [placed(rotation, runners)[1] for _ in range(2)] == [0, 1]
    rotation.leave(runners[gone])
    assert [placed(rotation, runners)[1] for _ in range(3)] == turns


def test_the_last_one_is_asked_for_nothing():
    queues, runners, rotation = replicas(1.0, 9.0, jobs=1)
    rotation.leave(runners[0])
    queues[1].close_barrier(runners[1], 0.0)
    assert send(rotation, queues, runners, 1) == [1]
    assert placed(rotation, runners)[1] == 1


# --- what is withdrawn ----------------------------------------------------------------------------


def test_what_is_queued_is_withdrawn_and_what_runs_is_not():
    queue = device()
    runner = add(queue)
    jobs = [Job(runner, priority) for priority in (NORMAL, LOW, HIGH, NORMAL)]
    for job in jobs:
        queue.submit(job, 0.0)
    assert queue.withdraw(runner, 1.0) == [Withdraw(job) for job in jobs[1:]]  # as they came
    assert [job.state for job in jobs] == [JobState.RUNNING] + [JobState.WITHDRAWN] * 3
    assert (runner.counters.withdrawn, runner.live, queue.load.jobs) == (3, 1, 0)
    assert queue.complete(jobs[0], 2.0) == []


def test_what_waits_for_room_or_for_an_epoch_is_withdrawn_too():
    queue = device()
    runner = add(queue, jobs=1, tenant_jobs=1)
    jobs = [Job(runner, tenant=tenant) for tenant in ("a", "a", "b", "a")] + [
        Job(runner, min_epoch=2)
    ]
    for job in jobs:
        queue.submit(job, 0.0, wait=True)
    assert [job.state.name for job in jobs] == [
        "RUNNING",
        "QUEUED",
        "WAITING",
        "WAITING",
        "WAITING",
    ]
    assert queue.withdraw(runner, 1.0) == [Withdraw(job) for job in jobs[1:]]


def test_a_held_leases_jobs_stay_and_so_does_what_the_library_needs_itself():
    queue = device(slots := 2)
    runner = add(queue, slots=slots)
    lease = take_lease(queue, runner)
    running, behind, other = Job(lease), Job(lease), Job(runner)
    for job in (running, behind, other):
        queue.submit(job, 0.0)
    wanted, exempt = (
        Job(runner, is_lease_request=True),
        Job(runner, is_lease_request=True, bypasses_limits=True),
    )
    queue.submit(wanted, 0.0)
    queue.submit(exempt, 0.0)
    assert queue.withdraw(runner, 1.0) == [Withdraw(wanted)]
    assert launched(queue.complete(running, 2.0)) == [behind]
    (granted,) = queue.complete(other, 2.0)
    assert type(granted) is Grant
    assert granted.job is exempt


def test_others_may_have_the_room_of_what_is_withdrawn():
    queue = device(jobs=1)
    runner, other = add(queue), add(queue, "n")
    first, queued, waiting = Job(runner), Job(runner), Job(other)
    for job in (first, queued, waiting):
        queue.submit(job, 0.0, wait=True)
    assert queue.withdraw(runner, 1.0) == [Withdraw(queued)]
    assert waiting.state is JobState.QUEUED


def test_what_waits_for_company_is_withdrawn():
    queue = device()
    runner = add(queue, batching=Batching(4, 1.0))
    job = Job(runner, key="k")
    queue.submit(job, 0.0)
    assert queue.withdraw(runner, 0.5) == [Withdraw(job)]
    queue.turn(0.5)
    assert queue.tick(1.0) == []


def test_behind_a_closed_barrier_there_is_something_to_withdraw_as_well():
    queue = device()
    runner = add(queue)
    queue.close_barrier(runner, 0.0)
    job = Job(runner)
    queue.submit(job, 0.0)
    assert queue.withdraw(runner, 1.0) == [Withdraw(job)]
    assert queue.open_barrier(runner, 2.0, epoch=2) == []


def test_a_runner_that_drains_is_drained_when_nothing_is_left_to_withdraw():
    queue = device()
    runner = add(queue)
    queue.close_barrier(runner, 0.0)
    job = Job(runner)
    queue.submit(job, 0.0)
    queue.drain_runner(runner, 0.0)
    queue.withdraw(runner, 1.0)
    assert [type(command).__name__ for command in queue.open_barrier(runner, 2.0)] == ["Drained"]


# --- what is submitted anew -----------------------------------------------------------------------


def test_a_resubmitted_job_asks_for_the_same_and_has_no_past():
    queue = device()
    runner = add(queue, batching=Batching(8, 1.0))
    asked = {
        "source": runner,
        "priority": LOW,
        "deadline": 60.0,
        "bytes": 7,
        "is_lease_request": False,
        "payload": object(),
        "min_epoch": 1,
        "rows": 3,
        "key": "a",
        "bypasses_limits": False,
        "tenant": "them",
    }
    queue.submit(Job(runner), 1.0)
    job = Job(**asked)
    job.timeout = asked["timeout"] = 59.0
    queue.submit(job, 1.0)
    assert Withdraw(job) in queue.withdraw(runner, 2.0)
    assert job.story()
    fresh, again = Job(runner), job.resubmitted()
    assert again.story() == ()
    names = [name for name in dir(fresh) if not name.startswith("_")]
    for name in names:
        if not callable(getattr(fresh, name)):
            wanted = asked[name] if name in asked else getattr(fresh, name)
            assert getattr(again, name) == wanted, name
    assert asked.keys() <= set(names)
    for flag in ("is_lease_request", "bypasses_limits"):
        assert getattr(Job(runner, **{flag: True}).resubmitted(), flag)


def test_who_has_waited_elsewhere_has_waited():
    queue = device()
    runner = add(queue)
    first, here, moved = Job(runner), Job(runner), Job(runner)
    queue.submit(first, 3.0)
    queue.submit(here, 3.0)
    queue.submit(moved, 4.0, wait=True, since=1.0)
    assert moved.submitted == 1.0
    assert launched(queue.complete(first, 5.0)) == [moved]
    queue.complete(moved, 6.0)
    assert runner.counters.queue_seconds == 5 - 1  # the other one still runs


def test_who_has_waited_elsewhere_is_overdue_in_its_turn():
    queue = device(max_wait=2.0)
    runner = add(queue)
    first, urgent, moved = Job(runner), Job(runner, HIGH), Job(runner, LOW)
    queue.submit(first, 3.0)
    queue.submit(urgent, 3.0)
    queue.submit(moved, 4.0, wait=True, since=1.0)
    assert launched(queue.complete(first, 4.0)) == [moved]


def test_the_deadline_is_what_it_was():
    queue = device()
    runner = add(queue)
    queue.submit(Job(runner), 0.0)
    moved, late = Job(runner, deadline=5.0), Job(runner, deadline=4.0)
    assert queue.submit(moved, 4.0, wait=True, since=1.0) == [WakeAt(5.0)]
    assert queue.submit(late, 4.0, wait=True, since=1.0) == [Expire(late)]
    assert queue.tick(5.0) == [Expire(moved)]


def test_what_was_accepted_is_not_refused_by_prediction_or_for_want_of_room():
    queue = device()
    runner = add(queue, jobs=1, predicts=True)
    teach(queue, runner, 1.0)
    first, second = Job(runner), Job(runner)
    queue.submit(first, 0.0)
    queue.submit(second, 0.0)
    moved = Job(runner, deadline=2.5)
    assert queue.submit(moved, 0.0, wait=True, since=0.0) == [WakeAt(2.5)]
    assert moved.state is JobState.WAITING
    assert launches(queue.complete(first, 0.5)) == [second]
    assert queue.complete(second, 1.0) == [Launch(moved)]


def test_what_was_accepted_is_not_refused_for_others_who_await_the_epoch():
    queue = device()
    runner = add(queue, jobs=1)
    assert queue.submit(Job(runner, min_epoch=2), 0.0, wait=True) == []
    assert type(rejected(queue.submit(Job(runner, min_epoch=2), 0.0, wait=True))) is QueueFullError
    assert queue.submit(Job(runner, min_epoch=2), 0.0, wait=True, since=0.0) == []


def test_the_least_crowded_has_the_fewest_jobs_and_leases_for_each_slot():
    queue = device(lanes=4)
    runners = [add(queue, name, slots=slots) for name, slots in (("a", 1), ("b", 2), ("c", 2))]
    assert least_crowded(runners) == 0
    for runner in (runners[0], runners[1], runners[1]):
        queue.submit(Job(runner), 0.0)
    assert least_crowded(runners) == 2
    take_lease(queue, runners[2])
    queue.submit(Job(runners[2]), 0.0)
    queue.submit(Job(runners[2]), 0.0)
    assert least_crowded(runners) == 0
