"""Predictive admission: a request that would be finished too late is refused at once."""

from __future__ import annotations

import pytest

from aoti_sched.errors import (
    DeadlineUnreachableError,
    EpochError,
    QueueFullError,
    RunnerClosedError,
)
from aoti_sched.queue.commands import Expire, Launch, Reject
from aoti_sched.queue.job import Job, JobState, Priority
from aoti_sched.queue.selection.placement import Placing
from tests.unit.queue.support import (
    add,
    check,
    device,
    launched,
    launches,
    rejected,
    take_lease,
    teach,
)

HIGH, NORMAL, LOW = Priority.HIGH, Priority.NORMAL, Priority.LOW


def predicting(*, lanes=1, slots=1, seconds=1.0, policy=None, **rest):
    """A runner that predicts and knows how long its runs take."""
    queue = device(lanes, **(policy or {}))
    runner = add(queue, slots=slots, predicts=True, **rest)
    teach(queue, runner, seconds)
    return queue, runner


def refused(queue, job, now=0.0):
    """Whether it is, and for that reason."""
    commands = [command for command in queue.submit(job, now) if type(command) is Reject]
    if commands:
        assert type(commands[0].error) is DeadlineUnreachableError
        assert job.state is JobState.REJECTED
    return bool(commands)


def earliest(queue, source, now=0.0, **job):
    """In how many seconds a request is expected to be done that comes now."""
    error = rejected(queue.submit(Job(source, deadline=now + 1 / 1024, **job), now))
    assert type(error) is DeadlineUnreachableError
    return error.predicted


def test_a_run_that_would_take_too_long_is_refused():
    queue, runner = predicting()
    late = Job(runner, deadline=0.875)
    assert refused(queue, late)
    assert (runner.counters.rejected, runner.live, queue.load.jobs) == (1, 0, 0)
    job = Job(runner, deadline=1.0)
    assert launches(queue.submit(job, 0.0)) == [job]


def test_the_error_says_what_was_predicted():
    queue, runner = predicting()
    error = rejected(queue.submit(Job(runner, deadline=7.5), 7.0))
    assert isinstance(error, TimeoutError)
    assert (error.runner, error.predicted, error.timeout) == ("m", 1.0, 0.5)


def test_what_runs_and_what_is_queued_is_waited_for():
    queue, runner = predicting()
    for _ in range(3):
        queue.submit(Job(runner), 0.0)
    assert earliest(queue, runner) == 4.0
    assert earliest(queue, runner, 0.5) == 3.5  # half of what runs is over


def test_a_run_that_takes_longer_than_usual_is_expected_to_end_any_moment():
    queue, runner = predicting()
    queue.submit(Job(runner), 0.0)
    assert earliest(queue, runner, 5.0) == 1.0


def test_several_slots_and_lanes_work_it_off_side_by_side():
    queue, runner = predicting(lanes=2, slots=2)
    for _ in range(6):
        queue.submit(Job(runner), 0.0)
    assert earliest(queue, runner) == 1.0 + (2 + 4) / 2


def test_only_its_own_class_and_higher_ones_are_ahead():
    queue, runner = predicting()
    for priority in (HIGH, HIGH, NORMAL, LOW, LOW):
        queue.submit(Job(runner, priority), 0.0)
    assert earliest(queue, runner, priority=HIGH) == 1 + 1 + 1
    assert earliest(queue, runner, priority=NORMAL) == 1 + 2 + 1
    assert earliest(queue, runner, priority=LOW) == 1 + 4 + 1


def test_a_fair_share_bounds_what_others_have_queued():
    queue, runner = predicting()
    other = add(queue, "other")
    teach(queue, other, 1.0)
    for _ in range(20):
        queue.submit(Job(other), 0.0)
    assert earliest(queue, runner) == 1 + 1  # its own queue is empty: it is next
    queue.submit(Job(runner), 0.0)
    assert earliest(queue, runner) == 1 + 2 + 1  # one of its own ahead, at half the device


def test_a_greater_share_is_served_sooner():
    queue, runner = predicting(share=3.0)
    other = add(queue, "other")
    teach(queue, other, 1.0)
    for _ in range(20):
        queue.submit(Job(other), 0.0)
    for _ in range(3):
        queue.submit(Job(runner), 0.0)
    assert earliest(queue, runner) == 1 + 3 / 0.75 + 1


def test_no_sooner_than_its_own_slots_allow():
    queue, runner = predicting(lanes=4, slots=1)
    for _ in range(5):
        queue.submit(Job(runner), 0.0)
    assert earliest(queue, runner) == 5 + 1


def test_wide_runs_count_with_all_their_cores():
    queue, runner = predicting(lanes=2, width=2)
    for _ in range(3):
        queue.submit(Job(runner), 0.0)
    assert earliest(queue, runner) == 3 + 1


def test_what_leases_have_queued_is_ahead_too():
    queue, runner = predicting(slots=2)
    lease = take_lease(queue, runner)
    for _ in range(3):
        queue.submit(Job(lease), 0.0)
    assert earliest(queue, runner) == 1 + 2 + 1


def test_of_what_is_unknown_nothing_is_expected():
    queue, runner = predicting()
    other = add(queue, "other")
    for _ in range(20):
        queue.submit(Job(other), 0.0)
    assert earliest(queue, runner) == 1.0
    assert not refused(queue, Job(other, deadline=0.125))


def test_what_was_given_ahead_is_expected_too():
    queue, runner = predicting(placing=Placing(follow_limit=9.0))
    first, second = Job(runner), Job(runner)
    queue.submit(first, 0.0)
    assert launched(queue.submit(second, 0.0)) == [second]
    assert earliest(queue, runner) == 3.0


@pytest.mark.parametrize("exempt", ["no deadline", "a lease's", "asks for a lease", "unknown size"])
def test_some_are_not_predicted(exempt):
    queue, runner = predicting(slots=2, policy={"expire_late": False})
    source = take_lease(queue, runner) if exempt == "a lease's" else runner
    job = Job(
        source,
        deadline=None if exempt == "no deadline" else 0.5,
        bytes=1000 if exempt == "unknown size" else 0,
        is_lease_request=exempt == "asks for a lease",
    )
    assert not refused(queue, job)


def test_a_runner_that_does_not_predict_refuses_nobody():
    queue = device(expire_late=False)
    runner = add(queue)
    teach(queue, runner, 1.0)
    assert not refused(queue, Job(runner, deadline=0.5))


def test_a_deadline_that_has_passed_is_no_matter_of_prediction():
    queue, runner = predicting()
    job = Job(runner, deadline=1.0)
    assert queue.submit(job, 2.0) == [Expire(job)]


def test_one_is_let_through_when_none_ran_for_long_and_runs_though_it_is_late():
    queue, runner = predicting()
    first = Job(runner)
    queue.submit(first, 0.0)
    assert refused(queue, Job(runner, deadline=8.0), 7.5)
    tried = Job(runner, deadline=8.75)
    assert not refused(queue, tried, 8.0)
    assert tried.state is JobState.QUEUED
    assert refused(queue, Job(runner, deadline=8.75), 8.0)
    assert launched(queue.complete(first, 8.0, ok=False)) == [tried]


def test_a_job_that_was_let_through_by_what_was_believed_may_be_late_when_its_turn_comes():
    queue, runner = predicting()
    first, late = Job(runner), Job(runner, deadline=2.0)
    queue.submit(first, 0.0)
    assert not refused(queue, late)
    assert queue.complete(first, 1.5, ok=False) == [Expire(late, 1.0)]


@pytest.mark.parametrize(("fair", "predicted"), [(True, 2.0), (False, 7.0)])
def test_a_tenant_waits_for_as_much_of_the_others_as_it_has_itself(fair, predicted):
    queue, runner = predicting(policy={"fair": fair})
    for _ in range(6):
        queue.submit(Job(runner, tenant="floods"), 0.0)
    assert earliest(queue, runner, tenant="modest") == predicted
    assert earliest(queue, runner, tenant="floods") == 7.0
    queue.submit(Job(runner, tenant="modest"), 0.0)
    assert earliest(queue, runner, tenant="modest") == (1 + 2 + 1 if fair else 8.0)


def test_other_reasons_come_before_and_want_of_room_after():
    queue, runner = predicting(size=10)
    assert type(rejected(queue.submit(Job(runner, deadline=0.5, bytes=11), 0.0))) is QueueFullError
    job = Job(runner, deadline=0.5, min_epoch=1)
    assert type(rejected(queue.submit(job, 0.0))) is DeadlineUnreachableError
    queue.close_barrier(runner, 0.0)
    queue.open_barrier(runner, 0.0, epoch=2)
    queue.close_barrier(runner, 0.0)
    queue.open_barrier(runner, 0.0, epoch=1)
    assert type(rejected(queue.submit(Job(runner, deadline=0.5, min_epoch=2), 0.0))) is EpochError
    queue.drain_runner(runner, 0.0)
    assert type(rejected(queue.submit(Job(runner, deadline=0.5), 0.0))) is RunnerClosedError


def test_it_is_refused_for_its_deadline_rather_than_for_want_of_room():
    queue, runner = predicting(jobs=1)
    queue.submit(Job(runner), 0.0)
    queue.submit(Job(runner), 0.0)
    assert type(rejected(queue.submit(Job(runner, deadline=0.5), 0.0))) is DeadlineUnreachableError
    assert type(rejected(queue.submit(Job(runner, deadline=99.0), 0.0))) is QueueFullError


def test_what_is_to_await_an_epoch_is_not_predicted():
    queue, runner = predicting()
    job = Job(runner, deadline=0.5, min_epoch=2)
    assert not refused(queue, job)
    assert job.state is JobState.WAITING


def test_an_idle_device_with_other_places_taken_is_asked_for_the_wait():
    queue, runner = predicting(lanes=2, slots=1)
    first = Job(runner)
    assert queue.submit(first, 0.0) == [Launch(first)]
    assert earliest(queue, runner) == 1 + 1  # one core is free, but no slot


def test_what_is_queued_when_the_first_runner_that_predicts_comes_is_foreseen():
    queue = device(1)
    plain = add(queue, "plain")
    teach(queue, plain, 1.0)
    running, *queued = [Job(plain) for _ in range(3)]
    assert launched(queue.submit(running, 0.0)) == [running]
    for job in queued:
        queue.submit(job, 0.0)
    add(queue, "predicts", predicts=True)
    check(queue)
    assert queue._forecast.kept
