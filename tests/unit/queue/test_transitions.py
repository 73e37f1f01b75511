"""The table of transitions, whole: what is in it happens, what is not raises and changes
nothing.
"""

from __future__ import annotations

import itertools

import pytest

from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.job import TRANSITIONS, Fact, IllegalFactError, Job, JobState
from tests.unit.queue.support import add, device, picture, somewhere, take_lease

PAIRS = list(itertools.product(JobState, Fact))
LEGAL = [(state, fact) for state, fact in PAIRS if fact in TRANSITIONS[state]]
ILLEGAL = [(state, fact) for state, fact in PAIRS if fact not in TRANSITIONS[state]]


def named(pair):
    return "-".join(part.name for part in pair)


def test_every_state_has_a_row():
    assert list(TRANSITIONS) == list(JobState)


def test_ends_lead_nowhere_else():
    ends = [state for state in JobState if state > JobState.RUNNING]
    assert all(following is state for state in ends for following in TRANSITIONS[state].values())


def test_every_state_can_be_reached():
    reached = {JobState.NEW} | {
        following for row in TRANSITIONS.values() for following in row.values()
    }
    assert reached == set(JobState)


@pytest.mark.parametrize("pair", LEGAL, ids=named)
def test_what_is_in_the_table_happens(pair):
    state, fact = pair
    job = somewhere(Job(add(device())), state=state)
    job.happens(fact)
    assert job.state is TRANSITIONS[state][fact]


@pytest.mark.parametrize("pair", ILLEGAL, ids=named)
def test_what_is_not_in_the_table_raises_and_changes_nothing(pair):
    state, fact = pair
    job = somewhere(Job(add(device())), state=state, id=7)
    before = picture(job)
    with pytest.raises(
        IllegalFactError, match=f"job 7 is {state.name}: {fact.name} can't happen to it"
    ):
        job.happens(fact)
    assert picture(job) == before


# --- the same through the queue's own facts -------------------------------------------------------


def new(queue, runner, job):
    """Nothing has happened to it."""


def running(queue, runner, job):
    queue.submit(job, 0)


def queued(queue, runner, job):
    queue.submit(Job(runner), 0)
    queue.submit(job, 0)


def waiting(queue, runner, job):
    queue.submit(Job(runner), 0)
    queue.submit(Job(runner), 0)
    queue.submit(job, 0, wait=True)


def done(queue, runner, job):
    running(queue, runner, job)
    queue.complete(job, 1)


def failed(queue, runner, job):
    running(queue, runner, job)
    queue.complete(job, 1, ok=False)


def granted(queue, runner, job):
    job.is_lease_request = True
    queue.submit(job, 0)


def rejected(queue, runner, job):
    queue.submit(Job(runner), 0)
    queue.submit(Job(runner), 0)
    queue.submit(job, 0)


def expired_in_the_queue(queue, runner, job):
    queued(queue, runner, job)
    queue.tick(5)


def expired_on_its_lane(queue, runner, job):
    running(queue, runner, job)
    queue.tick(5)


def expired_and_completed(queue, runner, job):
    expired_on_its_lane(queue, runner, job)
    queue.complete(job, 6)


def cancelled_in_the_queue(queue, runner, job):
    queued(queue, runner, job)
    queue.cancel(job, 1)


def cancelled_on_its_lane(queue, runner, job):
    running(queue, runner, job)
    queue.cancel(job, 1)


def cancelled_and_completed(queue, runner, job):
    cancelled_on_its_lane(queue, runner, job)
    queue.complete(job, 6)


def cancelled_and_its_lane_given_on(queue, runner, job):
    cancelled_and_completed(queue, runner, job)
    queue.submit(Job(runner), 6)


def revoked(queue, runner, job):
    queued(queue, runner, job)
    queue.terminate_runner(runner, 1)


def shed(queue, runner, job):
    runner.sheds = True
    queued(queue, runner, job)
    queue.submit(Job(runner, priority=0), 1)


def withdrawn(queue, runner, job):
    queued(queue, runner, job)
    queue.withdraw(runner, 1)


WAYS = {
    new: JobState.NEW,
    waiting: JobState.WAITING,
    queued: JobState.QUEUED,
    running: JobState.RUNNING,
    done: JobState.DONE,
    failed: JobState.FAILED,
    granted: JobState.DONE,
    rejected: JobState.REJECTED,
    expired_in_the_queue: JobState.EXPIRED,
    expired_on_its_lane: JobState.EXPIRED,
    expired_and_completed: JobState.EXPIRED,
    cancelled_in_the_queue: JobState.CANCELLED,
    cancelled_on_its_lane: JobState.CANCELLED,
    cancelled_and_completed: JobState.CANCELLED,
    cancelled_and_its_lane_given_on: JobState.CANCELLED,
    revoked: JobState.REVOKED,
    shed: JobState.SHED,
    withdrawn: JobState.WITHDRAWN,
}
FACTS = {
    "submit": (lambda queue, job: queue.submit(job, 7), [new]),
    "cancel": (lambda queue, job: queue.cancel(job, 7), [waiting, queued, running]),
    "succeed": (
        lambda queue, job: queue.complete(job, 7),
        [running, expired_on_its_lane, cancelled_on_its_lane],
    ),
    "fail": (
        lambda queue, job: queue.complete(job, 7, ok=False),
        [running, expired_on_its_lane, cancelled_on_its_lane],
    ),
}


def brought(way):
    queue = device()
    runner = queue.add_runner("m", 1, Bounds(jobs=1))
    job = Job(runner, deadline=5)
    way(queue, runner, job)
    assert job.state is WAYS[way]
    return queue, job


def test_the_ways_lead_to_every_state():
    assert set(WAYS.values()) == set(JobState)


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_fact_is_taken_where_it_can_happen_and_else_raises_and_changes_nothing(way, fact):
    perform, legal = FACTS[fact]
    queue, job = brought(way)
    if way in legal:
        perform(queue, job)
        assert job.state is not JobState.NEW
        return
    before = picture([queue, job])
    with pytest.raises(IllegalFactError):
        perform(queue, job)
    assert picture([queue, job]) == before


# --- other facts that can't be --------------------------------------------------------------------


def a_priority_above_all(queue, runner, lease):
    queue.submit(Job(runner, priority=-1), 1)


def a_priority_below_all(queue, runner, lease):
    queue.submit(Job(runner, priority=3), 1)


def fewer_than_no_bytes(queue, runner, lease):
    queue.submit(Job(runner, bytes=-1), 1)


def a_lease_of_a_lease(queue, runner, lease):
    queue.submit(Job(lease, is_lease_request=True), 1)


def a_name_taken_twice(queue, runner, lease):
    queue.add_runner("m", 1)


def a_runner_without_slots(queue, runner, lease):
    queue.add_runner("n", 0)


def a_job_for_another_devices_runner(queue, runner, lease):
    queue.submit(Job(add(device())), 1)


def draining_another_devices_runner(queue, runner, lease):
    queue.drain_runner(add(device()), 1)


def terminating_another_devices_runner(queue, runner, lease):
    queue.terminate_runner(add(device()), 1)


def withdrawing_from_another_devices_runner(queue, runner, lease):
    queue.withdraw(add(device()), 1)


def removing_another_devices_runner(queue, runner, lease):
    queue.remove_runner(add(device()))


@pytest.mark.parametrize(
    ("fact", "sentence"),
    [
        (a_priority_above_all, "there is no priority class -1"),
        (a_priority_below_all, "there is no priority class 3"),
        (fewer_than_no_bytes, "a job's inputs have -1 bytes"),
        (a_lease_of_a_lease, "lease 1 holds one slot and can't lease it again"),
        (a_name_taken_twice, "cpu has a runner 'm' already"),
        (a_runner_without_slots, "runner 'n': a runner has at least one slot, not 0"),
        (a_job_for_another_devices_runner, "cpu has no runner 'm'"),
        (draining_another_devices_runner, "cpu has no runner 'm'"),
        (terminating_another_devices_runner, "cpu has no runner 'm'"),
        (withdrawing_from_another_devices_runner, "cpu has no runner 'm'"),
        (removing_another_devices_runner, "cpu has no runner 'm'"),
    ],
    ids=lambda part: getattr(part, "__name__", None),
)
def test_an_impossible_fact_raises_and_changes_nothing(fact, sentence):
    queue = device()
    runner = add(queue, slots=2)
    lease = take_lease(queue, runner)
    queue.submit(Job(lease, deadline=9), 0)
    before = picture(queue)
    with pytest.raises(IllegalFactError, match=sentence):
        fact(queue, runner, lease)
    assert picture(queue) == before
