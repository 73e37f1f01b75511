"""Cancellation: a queued job leaves at once; a running one leaves its lane to finish for nobody."""

from __future__ import annotations

import pytest

from aoti_sched.queue.commands import Launch
from aoti_sched.queue.job import Job, JobState
from tests.unit.queue.support import add, device, take_lease


def test_a_cancelled_queued_job_frees_its_place_at_once():
    queue = device()
    runner = add(queue, jobs=1, size=10)
    running, queued, other = Job(runner), Job(runner, bytes=10), Job(runner, bytes=10)
    queue.submit(running, 0)
    queue.submit(queued, 0)
    assert queue.cancel(queued, 2) == []
    assert (queued.state, queued.finished, runner.load.jobs, runner.load.bytes) == (
        JobState.CANCELLED,
        2,
        0,
        0,
    )
    assert queue.submit(other, 3) == []
    assert queue.complete(running, 4) == [Launch(other)]


def test_a_cancelled_job_at_the_gate_is_never_admitted():
    queue = device()
    runner = add(queue, jobs=1)
    running, queued, waiting = (Job(runner) for _ in range(3))
    for job in (running, queued, waiting):
        queue.submit(job, 0, wait=True)
    assert queue.cancel(waiting, 1) == []
    assert waiting.state is JobState.CANCELLED
    assert queue.complete(running, 2) == [Launch(queued)]
    assert (runner.load.jobs, runner.live) == (0, 1)


def test_a_cancelled_running_job_keeps_its_lane_and_slot_until_it_is_done():
    queue = device()
    runner = add(queue)
    running, queued = Job(runner), Job(runner)
    queue.submit(running, 0)
    queue.submit(queued, 0)
    assert queue.cancel(running, 1) == []
    assert (running.state, queue.busy_lanes, runner.free) == (JobState.CANCELLED, 1, [])
    assert queue.complete(running, 3) == [Launch(queued)]
    assert running.state is JobState.CANCELLED


def test_a_cancelled_run_of_a_lease_keeps_the_next_one_waiting():
    queue = device(lanes=2)
    lease = take_lease(queue, add(queue))
    running, following = Job(lease), Job(lease)
    queue.submit(running, 0)
    queue.submit(following, 0)
    assert queue.cancel(running, 1) == []
    assert queue.complete(running, 2) == [Launch(following)]


@pytest.mark.parametrize("state", [JobState.WAITING, JobState.QUEUED, JobState.RUNNING])
def test_a_cancelled_job_does_not_expire_as_well(state):
    queue = device()
    runner = add(queue, jobs=1)
    jobs = {
        where: Job(runner, deadline=5)
        for where in (JobState.RUNNING, JobState.QUEUED, JobState.WAITING)
    }
    for job in jobs.values():
        queue.submit(job, 0, wait=True)
    assert jobs[state].state is state
    queue.cancel(jobs[state], 1)
    queue.tick(9)
    assert jobs[state].state is JobState.CANCELLED
    assert runner.counters.expired == 2
    assert runner.counters.cancelled == 1
