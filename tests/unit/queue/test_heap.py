"""The heap whose entries may come to nothing: its least is right, and no call looks at many of
those that are over.
"""

from __future__ import annotations

import random

import pytest

from aoti_sched.queue.heap import MOVED, SPARE
from aoti_sched.queue.job import Job, JobState
from aoti_sched.queue.timers import Timers
from tests.unit.queue.support import add, device

MANY = 1000


def orders(count):
    """In which many may end: the least first, the least last, and any."""
    draw = random.Random(7)
    return [range(count), range(count - 1, -1, -1), draw.sample(range(count), count)]


@pytest.mark.parametrize("order", range(3), ids=["least first", "least last", "any"])
@pytest.mark.parametrize("arrival", range(3), ids=["rising", "falling", "any"])
def test_what_is_over_is_dropped_a_few_at_a_time(arrival, order):
    runner = add(device())
    timers, jobs = Timers(), {}
    for number in orders(MANY)[arrival]:
        jobs[number] = job = Job(runner, deadline=float(number))
        job.id = number
        timers.watch(job, float(number))
    alive = dict(sorted(jobs.items()))
    for number in orders(MANY)[order]:
        before = len(timers.deadlines.entries())
        job = alive.pop(number)
        job.state = JobState.CANCELLED
        timers.ended(job)
        left = len(timers.deadlines.entries())
        assert before - left <= 2 + MOVED
        assert left <= 3 * len(alive) + 2 * SPARE
    assert timers.next() is None
    assert not timers.deadlines.entries()


@pytest.mark.parametrize("seed", [*range(8), None])
def test_the_least_is_found_while_entries_move(seed):
    seed = random.randrange(2**32) if seed is None else seed
    draw = random.Random(seed)
    runner = add(device())
    timers, alive = Timers(), {}
    for number in range(2000):
        if draw.random() < (0.9 if number % 500 < 250 else 0.1):
            job = Job(runner, deadline=float(draw.randrange(100)))
            job.id = number
            alive[number] = job
            timers.watch(job, job.deadline)
        elif alive:
            job = alive.pop(draw.choice(list(alive)))
            job.state = JobState.CANCELLED
            timers.ended(job)
        if draw.random() < 0.1:
            wanted = min(((job.deadline, job.id) for job in alive.values()), default=None)
            found = timers.due(100.0)
            assert (None if found is None else (found.deadline, found.id)) == wanted, f"seed {seed}"
