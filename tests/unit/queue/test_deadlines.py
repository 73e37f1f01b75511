"""Deadlines: they fire wherever the job is, and the time to wake is asked for, never polled."""

from __future__ import annotations

import math

import pytest

from aoti_sched.queue.commands import Drained, Expire, Grant, Launch, WakeAt
from aoti_sched.queue.job import IllegalFactError, Job, JobState
from tests.unit.queue.support import add, device, picture, take_lease


def test_a_queued_job_expires_at_its_deadline_and_leaves_the_queue():
    queue = device()
    runner = add(queue)
    running, queued = Job(runner), Job(runner, deadline=5)
    queue.submit(running, 0)
    assert queue.submit(queued, 0) == [WakeAt(5)]
    assert queue.tick(5) == [Expire(queued)]
    assert (queued.state, queued.finished) == (JobState.EXPIRED, 5)
    assert queue.complete(running, 6) == []


def test_a_job_at_the_gate_expires_at_its_deadline():
    queue = device()
    runner = add(queue, jobs=1)
    queue.submit(Job(runner), 0)
    queue.submit(Job(runner), 0)
    waiting, behind = Job(runner, deadline=5), Job(runner)
    queue.submit(waiting, 0, wait=True)
    queue.submit(behind, 0, wait=True)
    assert waiting.state is JobState.WAITING
    assert queue.tick(5) == [Expire(waiting)]
    assert behind.state is JobState.WAITING


def test_a_running_job_expires_at_its_deadline_and_keeps_its_lane_until_it_is_done():
    queue = device()
    runner = add(queue)
    running, queued = Job(runner, deadline=5), Job(runner)
    assert queue.submit(running, 0) == [Launch(running), WakeAt(5)]
    queue.submit(queued, 0)
    assert queue.tick(5) == [Expire(running)]
    assert (running.state, queue.busy_lanes) == (JobState.EXPIRED, 1)
    assert queue.complete(running, 8) == [Launch(queued)]
    assert running.state is JobState.EXPIRED


def test_a_deadline_is_reached_at_its_very_instant_and_not_before():
    queue = device()
    job = Job(add(queue), deadline=5)
    queue.submit(job, 0)
    assert queue.tick(4.999) == [WakeAt(5)]
    assert job.state is JobState.RUNNING
    assert queue.tick(5) == [Expire(job)]


@pytest.mark.parametrize("deadline", [3.0, 2.5, -math.inf])
def test_a_job_already_past_its_deadline_expires_at_submission(deadline):
    queue = device()
    runner = add(queue)
    job = Job(runner, deadline=deadline)
    assert queue.submit(job, 3) == [Expire(job)]
    assert (job.state, runner.live, runner.counters.expired) == (JobState.EXPIRED, 0, 1)


def test_jobs_expire_in_the_order_of_their_deadlines():
    queue = device()
    runner = add(queue)
    jobs = [Job(runner, deadline=deadline) for deadline in (9, 7, 8, 7)]
    for job in jobs:
        queue.submit(job, 0)
    assert queue.tick(8) == [Expire(jobs[1]), Expire(jobs[3]), Expire(jobs[2]), WakeAt(9)]


def test_the_time_to_wake_is_asked_for_once_and_again_when_it_moves_forward():
    queue = device()
    runner = add(queue)
    queue.submit(Job(runner), 0)
    assert queue.submit(Job(runner, deadline=8), 0) == [WakeAt(8)]
    assert queue.submit(Job(runner, deadline=9), 0) == []
    assert queue.submit(Job(runner, deadline=8), 0) == []
    assert queue.submit(Job(runner, deadline=3), 0) == [WakeAt(3)]


def test_a_tick_asks_for_the_next_wake_and_for_none_when_nothing_has_a_deadline():
    queue = device()
    runner = add(queue)
    queue.submit(Job(runner), 0)
    first, second = Job(runner, deadline=3), Job(runner, deadline=8)
    queue.submit(second, 0)
    queue.submit(first, 0)
    assert queue.tick(3) == [Expire(first), WakeAt(8)]
    assert queue.tick(8) == [Expire(second)]
    assert queue.tick(9) == []


def test_a_tick_that_comes_early_asks_to_be_woken_again():
    queue = device()
    queue.submit(Job(add(queue), deadline=5), 0)
    assert queue.tick(1) == [WakeAt(5)]
    assert queue.tick(2) == [WakeAt(5)]


def test_deadlines_of_ended_jobs_wake_nobody():
    queue = device()
    runner = add(queue, slots=2)
    done, cancelled, alive = (
        Job(runner, deadline=3),
        Job(runner, deadline=4),
        Job(runner, deadline=9),
    )
    for job in (done, cancelled, alive):
        queue.submit(job, 0)
    queue.complete(done, 1)
    queue.cancel(cancelled, 1)
    assert queue.tick(2) == [WakeAt(9)]


def test_a_tick_does_not_ask_to_be_woken_for_a_lease_it_grants():
    queue = device()
    queue.submit(Job(add(queue, "busy")), 0)
    runner = add(queue)
    lease = take_lease(queue, runner)
    held, request = Job(lease, deadline=5), Job(runner, is_lease_request=True, deadline=7)
    queue.submit(held, 0)
    queue.submit(request, 0)
    queue.release(lease, 1)
    expire, grant = queue.tick(5)
    assert (expire, grant.job) == (Expire(held), request)


def test_deadlines_of_ended_jobs_do_not_pile_up():
    queue = device()
    runner = add(queue)
    alive = Job(runner, deadline=500)
    queue.submit(alive, 0)
    for number in range(1000):
        job = Job(runner, deadline=1000 + number)
        queue.submit(job, 0)
        queue.cancel(job, 0)
        assert len(queue.timers.deadlines.entries()) < 40
    assert queue.tick(500) == [Expire(alive)]


def test_a_granted_request_has_no_deadline_any_more():
    queue = device()
    request = Job(add(queue), is_lease_request=True, deadline=5)
    (grant,) = queue.submit(request, 0)
    assert type(grant) is Grant
    assert queue.tick(6) == []
    assert request.state is JobState.DONE


def test_an_expired_job_makes_room_for_those_at_the_gate():
    queue = device()
    runner = add(queue, jobs=1)
    queue.submit(Job(runner), 0)
    queued, waiting = Job(runner, deadline=5), Job(runner)
    queue.submit(queued, 0, wait=True)
    queue.submit(waiting, 0, wait=True)
    assert queue.tick(5) == [Expire(queued)]
    assert waiting.state is JobState.QUEUED


def test_a_job_past_its_deadline_is_not_launched_when_a_completion_comes_before_the_tick():
    queue = device()
    runner = add(queue)
    running, late, alive = Job(runner), Job(runner, deadline=5), Job(runner)
    for job in (running, late, alive):
        queue.submit(job, 0)
    assert queue.complete(running, 5) == [Expire(late), Launch(alive)]
    assert queue.tick(5) == []
    assert runner.counters.expired == 1


def test_a_lease_is_not_granted_past_its_deadline_when_a_release_comes_before_the_tick():
    queue = device()
    runner = add(queue)
    lease = take_lease(queue, runner)
    late = Job(runner, is_lease_request=True, deadline=5)
    queue.submit(late, 0)
    assert queue.release(lease, 6) == [Expire(late)]
    assert runner.free == [0]


def test_a_late_job_found_by_another_runners_fact_can_be_the_last_of_its_runner():
    queue = device()
    a, b = add(queue, "a"), add(queue, "b")
    running, late = Job(a), Job(b, deadline=5)
    queue.submit(running, 0)
    queue.submit(late, 0)
    queue.drain_runner(b, 1)
    assert queue.complete(running, 6) == [Expire(late), Drained(b)]


def test_a_result_that_comes_before_the_tick_is_not_dropped():
    queue = device()
    job = Job(add(queue), deadline=5)
    queue.submit(job, 0)
    assert queue.complete(job, 6, started=1, finished=4) == []
    assert job.state is JobState.DONE


def test_a_deadline_that_never_comes_is_allowed():
    queue = device()
    job = Job(add(queue), deadline=math.inf)
    assert queue.submit(job, 0) == [Launch(job), WakeAt(math.inf)]


def test_a_deadline_that_is_not_a_number_is_illegal():
    queue = device()
    job = Job(add(queue), deadline=math.nan)
    before = picture(queue)
    with pytest.raises(IllegalFactError, match="deadline is not a number"):
        queue.submit(job, 0)
    assert (picture(queue), job.state) == (before, JobState.NEW)
