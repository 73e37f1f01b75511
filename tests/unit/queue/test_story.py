"""An illegal fact tells the story of its job: each fact that happened to it, with its time."""

from __future__ import annotations

import pytest

from aoti_sched.queue.batching import Batching
from aoti_sched.queue.job import Fact, IllegalFactError, Job
from tests.unit.queue.support import add, device


def names(job):
    return [fact for _, fact in job.story()]


@pytest.fixture
def queue():
    return device()


def test_a_second_completion_shows_the_whole_story(queue):
    job, other = Job(add(queue)), Job(add(queue, "other"))
    queue.submit(other, 0.5)
    queue.submit(job, 1.0)
    queue.complete(other, 2.5)
    queue.complete(job, 4.0)
    with pytest.raises(IllegalFactError) as caught:
        queue.complete(job, 5.0)
    assert caught.value.story == (
        (1.0, "SUBMIT"),
        (1.0, "ADMIT"),
        (2.5, "LAUNCH"),
        (4.0, "SUCCEED"),
    )
    assert str(caught.value) == (
        "job 2 is DONE and not on a lane: it can't complete. "
        "Its story: SUBMIT at 1, ADMIT at 1, LAUNCH at 2.5, SUCCEED at 4"
    )


def test_a_second_submission_shows_how_far_the_first_came(queue):
    job = Job(add(queue))
    queue.submit(job, 1.0)
    with pytest.raises(IllegalFactError, match=r"Its story: SUBMIT at 1, ADMIT at 1, LAUNCH at 1$"):
        queue.submit(job, 2.0)


def test_a_job_that_was_never_submitted_has_no_story(queue):
    job = Job(add(queue))
    with pytest.raises(IllegalFactError) as caught:
        job.happens(Fact.LAUNCH)
    assert caught.value.story == ()
    assert "story" not in str(caught.value)


def test_an_error_without_a_job_has_no_story(queue):
    with pytest.raises(IllegalFactError) as caught:
        add(queue, slots=0)
    assert caught.value.story == ()


def test_a_wait_at_the_gate_is_part_of_the_story(queue):
    runner = add(queue, jobs=1)
    jobs = [Job(runner) for _ in range(3)]
    for job in jobs:
        queue.submit(job, 0.0, wait=True)
    queue.complete(jobs[0], 3.0)
    queue.complete(jobs[1], 5.0, ok=False)
    assert jobs[2].story() == ((0.0, "SUBMIT"), (0.0, "HOLD"), (3.0, "ADMIT"), (5.0, "LAUNCH"))
    queue.complete(jobs[2], 6.0, ok=False)
    assert jobs[2].story()[-1] == (6.0, "FAIL")


def test_a_running_job_that_was_cancelled_has_two_ends(queue):
    job = Job(add(queue))
    queue.submit(job, 0.0)
    queue.cancel(job, 1.0)
    with pytest.raises(IllegalFactError) as caught:
        queue.cancel(job, 2.0)
    assert caught.value.story[2:] == ((0.0, "LAUNCH"), (1.0, "CANCEL"))
    queue.complete(job, 3.0)
    assert job.story()[2:] == ((0.0, "LAUNCH"), (1.0, "CANCEL"), (3.0, "SUCCEED"))


def test_a_queued_job_that_expires_was_never_launched(queue):
    runner = add(queue)
    job = Job(runner, deadline=1.0)
    queue.submit(Job(runner), 0.0)
    queue.submit(job, 0.0)
    queue.tick(1.5)
    assert job.story() == ((0.0, "SUBMIT"), (0.0, "ADMIT"), (1.5, "EXPIRE"))


@pytest.mark.parametrize(("deadline", "end"), [(0.0, "EXPIRE"), (None, "REJECT")])
def test_a_job_that_ends_at_submission_was_never_admitted(queue, deadline, end):
    runner = add(queue, jobs=None if end == "EXPIRE" else 0)
    job = Job(runner, deadline=deadline)
    queue.submit(job, 1.0)
    assert job.story() == ((1.0, "SUBMIT"), (1.0, end))


def test_a_retry_is_a_second_launch():
    queue = device()
    runner = add(queue, batching=Batching(4))
    first, *batch = [Job(runner, key="k") for _ in range(3)]
    for job in (first, *batch):
        queue.submit(job, 0.0)
    queue.turn(0.0)
    queue.complete(first, 1.0)
    queue.complete(batch[0], 2.0, ok=False)
    queue.complete(batch[0], 3.0)
    queue.complete(batch[1], 4.0, ok=False)
    assert [time for time, _ in batch[0].story()] == [0.0, 0.0, 1.0, 2.0, 3.0]
    assert names(batch[0]) == ["SUBMIT", "ADMIT", "LAUNCH", "LAUNCH", "SUCCEED"]
    assert batch[1].story()[2:] == ((1.0, "LAUNCH"), (3.0, "LAUNCH"), (4.0, "FAIL"))


def test_a_granted_lease_has_its_launch_and_its_end_at_once(queue):
    job = Job(add(queue), is_lease_request=True)
    queue.submit(job, 2.0)
    assert [time for time, _ in job.story()] == [2.0] * 4
    assert names(job) == ["SUBMIT", "ADMIT", "LAUNCH", "SUCCEED"]
