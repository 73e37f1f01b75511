"""A runner on its way out: drained, terminated, removed."""

from __future__ import annotations

import pytest

from aoti_sched.errors import RunnerClosedError
from aoti_sched.queue.commands import Drained, Launch, Revoke
from aoti_sched.queue.job import IllegalFactError, Job, JobState
from aoti_sched.queue.runner_state import Phase
from tests.unit.queue.support import add, device, picture, rejected, take_lease


def revoked(commands):
    """The jobs revoked, in order."""
    jobs = [command.job for command in commands if type(command) is Revoke]
    errors = [command.error for command in commands if type(command) is Revoke]
    assert all(type(error) is RunnerClosedError for error in errors)
    assert all("'m' was terminated while the request was queued" in str(error) for error in errors)
    return jobs


def test_an_idle_runner_is_drained_at_once():
    queue = device()
    runner = add(queue)
    assert queue.drain_runner(runner, 1) == [Drained(runner)]
    assert runner.phase is Phase.DRAINED


def test_a_removed_runner_can_drop_its_reference_to_itself():
    queue = device()
    runner = add(queue)
    queue.drain_runner(runner, 1)
    queue.remove_runner(runner)
    assert runner.runner is runner
    runner.let_go()
    assert not hasattr(runner, "runner")


def test_a_draining_runner_finishes_everything_it_accepted():
    queue = device()
    runner = add(queue, jobs=1)
    running, queued, waiting = (Job(runner) for _ in range(3))
    for job in (running, queued, waiting):
        queue.submit(job, 0, wait=True)
    assert queue.drain_runner(runner, 1) == []
    assert queue.complete(running, 2) == [Launch(queued)]
    assert queue.complete(queued, 3) == [Launch(waiting)]
    assert queue.complete(waiting, 4) == [Drained(runner)]
    assert runner.counters.completed == 3


def test_a_draining_runner_takes_no_new_work():
    queue = device()
    runner = add(queue)
    queue.submit(Job(runner), 0)
    queue.drain_runner(runner, 1)
    for job in (Job(runner), Job(runner, is_lease_request=True)):
        error = rejected(queue.submit(job, 2, wait=True))
        assert type(error) is RunnerClosedError
        assert str(error) == "runner 'm' is draining; it takes no new requests"


def test_draining_twice_says_drained_once():
    queue = device()
    runner = add(queue)
    job = Job(runner)
    queue.submit(job, 0)
    assert queue.drain_runner(runner, 1) == []
    assert queue.drain_runner(runner, 2) == []
    assert queue.complete(job, 3) == [Drained(runner)]
    assert queue.drain_runner(runner, 4) == []


@pytest.mark.parametrize("end", ["cancel", "expire"])
def test_a_runner_is_drained_when_its_last_job_leaves_the_queue(end):
    queue = device()
    queue.submit(Job(add(queue, "busy")), 0)
    runner = add(queue)
    last = Job(runner, deadline=5)
    queue.submit(last, 0)
    queue.drain_runner(runner, 1)
    commands = queue.cancel(last, 2) if end == "cancel" else queue.tick(5)
    assert commands[-1] == Drained(runner)


def test_a_runner_is_not_drained_while_a_cancelled_job_still_runs():
    queue = device()
    runner = add(queue)
    job = Job(runner)
    queue.submit(job, 0)
    queue.cancel(job, 1)
    assert queue.drain_runner(runner, 2) == []
    assert queue.complete(job, 3) == [Drained(runner)]


def test_a_drained_runner_holds_up_no_other():
    queue = device()
    a, b = add(queue, "a"), add(queue, "b")
    queue.drain_runner(a, 1)
    job = Job(b)
    assert queue.submit(job, 2) == [Launch(job)]


def test_terminating_revokes_all_that_waits_and_lets_runs_finish():
    queue = device(lanes=2)
    runner = add(queue, slots=2, jobs=1)
    lease = take_lease(queue, runner)
    running, queued, waiting = (Job(runner) for _ in range(3))
    held, held_queued, held_waiting = (Job(lease) for _ in range(3))
    for job in (running, queued, waiting, held, held_queued, held_waiting):
        queue.submit(job, 0, wait=True)
    commands = queue.terminate_runner(runner, 1)
    assert revoked(commands) == [queued, waiting, held_queued, held_waiting]
    assert len(commands) == 4
    assert {job.state for job in revoked(commands)} == {JobState.REVOKED}
    assert queue.complete(running, 2) == []
    assert queue.complete(held, 3) == [Drained(runner)]
    assert (running.state, held.state) == (JobState.DONE, JobState.DONE)


def test_terminating_an_idle_runner_drains_it_and_twice_is_fine():
    queue = device()
    runner = add(queue)
    assert queue.terminate_runner(runner, 1) == [Drained(runner)]
    assert queue.terminate_runner(runner, 2) == []


def test_a_draining_runner_can_be_terminated_but_not_the_other_way_round():
    queue = device()
    runner = add(queue)
    running, queued = Job(runner), Job(runner)
    queue.submit(running, 0)
    queue.submit(queued, 0)
    queue.drain_runner(runner, 1)
    assert revoked(queue.terminate_runner(runner, 2)) == [queued]
    assert queue.drain_runner(runner, 3) == []
    assert runner.phase is Phase.TERMINATED
    assert queue.complete(running, 4) == [Drained(runner)]


def test_a_terminated_runner_takes_no_new_work():
    queue = device()
    runner = add(queue)
    queue.submit(Job(runner), 0)
    queue.terminate_runner(runner, 1)
    assert (
        str(rejected(queue.submit(Job(runner), 2)))
        == "runner 'm' is terminated; it takes no new requests"
    )


def test_terminating_lets_other_runners_into_the_room_it_frees():
    queue = device(lanes=1, jobs=1)
    a, b = add(queue), add(queue, "b")
    queue.submit(Job(a), 0)
    queued, waiting = Job(a), Job(b)
    queue.submit(queued, 0, wait=True)
    queue.submit(waiting, 0, wait=True)
    assert revoked(queue.terminate_runner(a, 1)) == [queued]
    assert waiting.state is JobState.QUEUED


def test_revoked_jobs_do_not_expire_later():
    queue = device()
    runner = add(queue)
    queue.submit(Job(runner), 0)
    queued = Job(runner, deadline=5)
    queue.submit(queued, 0)
    queue.terminate_runner(runner, 1)
    assert queue.tick(9) == []
    assert queued.state is JobState.REVOKED


def test_a_removed_runner_leaves_its_name_free():
    queue = device()
    runner = add(queue)
    queue.drain_runner(runner, 1)
    queue.remove_runner(runner)
    assert queue.runners == {}
    successor = add(queue)
    job = Job(successor)
    assert queue.submit(job, 2) == [Launch(job)]


def test_a_removed_runner_refuses_work_even_if_its_name_is_taken_again():
    queue = device()
    runner = add(queue)
    queue.terminate_runner(runner, 1)
    queue.remove_runner(runner)
    add(queue)
    assert (
        str(rejected(queue.submit(Job(runner), 2)))
        == "runner 'm' is drained; it takes no new requests"
    )


def test_a_removed_runner_is_forgotten_everywhere():
    queue = device(lanes=1, jobs=1)
    busy = add(queue, "busy")
    queue.submit(Job(busy), 0)
    runner = add(queue)
    queue.submit(Job(runner), 0, wait=True)
    queue.submit(Job(runner), 0, wait=True)
    queue.terminate_runner(runner, 1)
    queue.remove_runner(runner)
    assert runner not in queue._selector._runs._entered
    assert runner not in queue.room.gates._entered


@pytest.mark.parametrize("phase", [Phase.OPEN, Phase.DRAINING, Phase.TERMINATED])
def test_a_runner_that_is_not_drained_cannot_be_removed(phase):
    queue = device()
    runner = add(queue)
    queue.submit(Job(runner), 0)
    if phase is Phase.DRAINING:
        queue.drain_runner(runner, 1)
    elif phase is Phase.TERMINATED:
        queue.terminate_runner(runner, 1)
    before = picture(queue)
    with pytest.raises(IllegalFactError, match=f"runner 'm' is {phase.name}, it can't be removed"):
        queue.remove_runner(runner)
    assert picture(queue) == before
