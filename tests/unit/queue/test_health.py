"""A runner whose runs fail one after the other is failing; it is said once, until one succeeds."""

from __future__ import annotations

from aoti_sched.queue.batching import Batching
from aoti_sched.queue.commands import Failing
from aoti_sched.queue.job import Job
from aoti_sched.queue.selection.placement import Placing
from tests.unit.queue.support import add, device, launches, take_lease, teach


def fail(queue, source, times=1, *, ok=False):
    """Runs that end so; gives how often it was said that the runner is failing."""
    said = 0
    for _ in range(times):
        job = Job(source)
        assert job in launches(queue.submit(job, 0.0))
        said += queue.complete(job, 0.0, ok=ok).count(Failing(source.runner))
    return said


def test_five_failed_runs_in_a_row_are_said_once():
    queue = device()
    runner = add(queue)
    assert [fail(queue, runner) for _ in range(12)] == [0, 0, 0, 0, 1] + [0] * 7


def test_a_success_between_starts_the_count_anew():
    queue = device()
    runner = add(queue)
    for _ in range(5):
        assert fail(queue, runner, 4) == 0
        fail(queue, runner, ok=True)


def test_after_a_success_it_is_said_again():
    queue = device()
    runner = add(queue)
    fail(queue, runner, 5)
    fail(queue, runner, ok=True)
    assert [fail(queue, runner) for _ in range(5)] == [0, 0, 0, 0, 1]


def test_runners_are_counted_apart():
    queue = device()
    runner, other = add(queue), add(queue, "other")
    fail(queue, runner, 4)
    assert fail(queue, other, 4) == 0
    assert fail(queue, runner) == 1


def test_a_leases_runs_count_for_its_runner():
    queue = device()
    runner = add(queue, slots=2)
    lease = take_lease(queue, runner)
    assert fail(queue, runner, 2) + fail(queue, lease, 2) == 0
    assert fail(queue, lease) == 1


def test_runs_whose_caller_has_left_count():
    queue = device()
    runner = add(queue)
    fail(queue, runner, 4)
    job = Job(runner)
    queue.submit(job, 0.0)
    queue.cancel(job, 0.0)
    assert queue.complete(job, 0.0, ok=False) == [Failing(runner)]


def test_runs_that_were_handed_ahead_count():
    queue = device()
    runner = add(queue, placing=Placing(follow_limit=1.0))
    teach(queue, runner, 0.125)
    fail(queue, runner, 3)
    first, second = Job(runner), Job(runner)
    queue.submit(first, 0.0)
    queue.submit(second, 0.0)
    assert Failing(runner) not in queue.complete(second, 0.0, ok=False)
    assert Failing(runner) in queue.complete(first, 0.0, ok=False)


def batch_of(queue, runner, jobs):
    """A batch that runs."""
    first = Job(runner)
    queue.submit(first, 0.0)
    batch = [Job(runner, key="k") for _ in range(jobs)]
    for job in batch:
        queue.submit(job, 0.0)
    queue.turn(0.0)
    assert launches(queue.complete(first, 0.0, ok=False)) == [batch[0]]
    assert batch[0].members == tuple(batch)
    return batch


def test_a_failed_batch_does_not_count_but_what_is_run_again_does():
    queue = device()
    runner = add(queue, batching=Batching(8))
    batch = batch_of(queue, runner, 4)  # one has failed
    said = [queue.complete(batch[0], 0.0, ok=False).count(Failing(runner))]
    said += [queue.complete(job, 0.0, ok=False).count(Failing(runner)) for job in batch]
    assert said == [0, 0, 0, 0, 1]


def test_a_failed_batch_is_no_success_either():
    queue = device()
    runner = add(queue, batching=Batching(8))
    fail(queue, runner, 3)
    batch = batch_of(queue, runner, 2)  # four have failed
    queue.complete(batch[0], 0.0, ok=False)
    assert queue.complete(batch[0], 0.0, ok=False)[0] == Failing(runner)


def test_a_batch_that_succeeds_is_a_success():
    queue = device()
    runner = add(queue, batching=Batching(8))
    fail(queue, runner, 3)
    batch = batch_of(queue, runner, 2)
    queue.complete(batch[0], 0.0)
    assert fail(queue, runner, 4) == 0
