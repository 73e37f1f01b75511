"""The running totals of a runner: each job is counted once, where it ended, and time where it
went.
"""

from __future__ import annotations

from aoti_sched.queue.job import Job
from aoti_sched.queue.runner_state import Counters
from tests.unit.queue.support import add, device, take_lease


def test_a_job_is_counted_where_it_ends():
    queue = device(lanes=2)
    runner = add(queue, slots=2, jobs=4)
    done, failed, expired, cancelled = (
        Job(runner),
        Job(runner),
        Job(runner, deadline=1),
        Job(runner),
    )
    revoked, other_revoked, rejected = Job(runner), Job(runner), Job(runner)
    for job in (done, failed, expired, cancelled, revoked, other_revoked, rejected):
        queue.submit(job, 0)
    queue.cancel(cancelled, 0)
    queue.tick(1)
    queue.terminate_runner(runner, 1)
    queue.complete(done, 1)
    queue.complete(failed, 1, ok=False)
    assert runner.counters == Counters(
        submitted=7,
        completed=1,
        failed=1,
        rejected=1,
        expired=1,
        cancelled=1,
        revoked=2,
        run_seconds=2,
        in_time=1,
    )


def test_time_in_the_queue_and_on_the_lane_is_summed():
    queue = device()
    runner = add(queue)
    first, second = Job(runner), Job(runner)
    queue.submit(first, 0)
    queue.submit(second, 1)
    queue.complete(first, 4)
    queue.complete(second, 9)
    counters = runner.counters
    assert (counters.queue_seconds, counters.run_seconds, counters.wasted_seconds) == (3, 4 + 5, 0)


def test_the_lanes_own_stamps_are_used_where_it_has_them():
    queue = device()
    runner = add(queue)
    job = Job(runner)
    queue.submit(job, 0)
    queue.complete(job, 9, started=1, finished=5)
    assert (job.started, job.finished) == (1, 5)
    assert (runner.counters.queue_seconds, runner.counters.run_seconds) == (1, 4)


def test_the_run_of_a_cancelled_job_is_wasted_time():
    queue = device()
    runner = add(queue)
    job = Job(runner)
    queue.submit(job, 0)
    queue.cancel(job, 2)
    assert runner.counters.wasted_seconds == 0
    queue.complete(job, 5)
    counters = runner.counters
    assert (counters.cancelled, counters.completed, counters.failed) == (1, 0, 0)
    assert (counters.run_seconds, counters.wasted_seconds) == (5, 5)


def test_the_run_of_an_expired_job_is_wasted_time_whether_it_succeeds_or_fails():
    queue = device()
    runner = add(queue)
    for ok in (True, False):
        job = Job(runner, deadline=2)
        queue.submit(job, 0)
        queue.tick(2)
        queue.complete(job, 5, ok=ok)
    counters = runner.counters
    assert (counters.expired, counters.completed, counters.failed) == (2, 0, 0)
    assert counters.wasted_seconds == 10


def test_a_granted_lease_counts_as_completed_with_its_time_in_the_queue():
    queue = device()
    runner = add(queue)
    lease = take_lease(queue, runner, now=0)
    queue.submit(Job(runner, is_lease_request=True), 1)
    queue.release(lease, 4)
    assert runner.counters == Counters(submitted=2, completed=2, queue_seconds=3, in_time=2)


def test_the_jobs_of_a_lease_count_for_its_runner():
    queue = device()
    runner = add(queue)
    job = Job(take_lease(queue, runner))
    queue.submit(job, 0)
    queue.complete(job, 3)
    assert (runner.counters.completed, runner.counters.run_seconds) == (2, 3)
