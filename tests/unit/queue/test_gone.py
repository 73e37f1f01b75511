"""State that is gone: what was kept for tenants that ask for nothing any more is dropped, and
no order changes by that.
"""

from __future__ import annotations

import pytest

from aoti_sched.queue.job import Job, Priority
from aoti_sched.queue.selection import accounts as fair
from aoti_sched.queue.selection.job_queue import KEPT
from tests.unit.queue.support import add, check, device, launched, launches, teach

NORMAL = Priority.NORMAL


def accounts(runner):
    return runner.tenants[NORMAL].accounts


def run_each(queue, runner, tenants, *, takes=1.0):
    """One job of each, queued all together behind a run, and then run one after the other."""
    running = Job(runner)
    queue.submit(running, 0.0)
    jobs = [Job(runner, tenant=name) for name in tenants]
    for job in jobs:
        queue.submit(job, 0.0)
    for _ in range(len(jobs) + 1):
        (running,) = launches(queue.complete(running, 0.0, started=0.0, finished=takes)) or [None]
    assert running is None
    return jobs


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_of_many_tenants_that_ask_once_few_are_remembered(known, monkeypatch):
    monkeypatch.setattr(fair, "DEBTORS", 16)
    queue = device()
    runner = add(queue)
    if known:
        teach(queue, runner, 1.0)
    for start in range(0, 1000, 100):
        run_each(queue.unchecked, runner, range(start, start + 100))
        check(queue)  # after each fact would take as long as there are tenants
        assert len(accounts(runner)) <= 16 + 1
        assert len(runner.queue._buckets) <= KEPT + 101
        assert len(runner.tenants[NORMAL]._idle) <= 3 * 16 + 16


@pytest.mark.parametrize("ends", ["cancel", "expire", "grant", "terminate"])
def test_a_tenant_whose_job_ends_without_a_run_is_forgotten(ends):
    queue = device()
    runner = add(queue, slots=1)
    running = Job(runner)
    queue.submit(running, 0.0)
    job = Job(runner, tenant="a", deadline=5.0, is_lease_request=ends == "grant")
    queue.submit(job, 0.0)
    assert "a" in accounts(runner)
    if ends == "cancel":
        queue.cancel(job, 1.0)
    elif ends == "expire":
        queue.tick(5.0)
    elif ends == "grant":
        queue.complete(running, 1.0)
    else:
        queue.terminate_runner(runner, 1.0)
    assert "a" not in accounts(runner)


def test_a_tenant_that_had_more_than_others_is_not_forgotten():
    queue = device()
    runner = add(queue)
    job = Job(runner, tenant="greedy")
    queue.submit(job, 0.0)
    queue.complete(job, 10.0)
    first = Job(runner, tenant="first")
    queue.submit(first, 20.0)
    greedy, modest = Job(runner, tenant="greedy"), Job(runner, tenant="modest")
    queue.submit(greedy, 20.0)
    queue.submit(modest, 20.0)
    assert launched(queue.complete(first, 21.0)) == [modest]


def test_of_too_many_accounts_the_least_are_forgotten_and_none_begins_before_them(
    monkeypatch,
):
    monkeypatch.setattr(fair, "DEBTORS", 2)
    queue = device(lanes=4)
    runner = add(queue, slots=4)
    jobs = [Job(runner, tenant=name) for name in "abc"]
    for job in jobs:
        queue.submit(job, 0.0)
    for job, seconds in zip(jobs, (3.0, 1.0, 2.0), strict=True):
        queue.complete(job, 0.0, started=0.0, finished=seconds)
    assert {*accounts(runner)} - {None} == {"a", "c"}
    assert runner.tenants[NORMAL].floor == 1.0
    assert accounts(runner)["a"].virtual == 3.0


def test_a_tenant_that_comes_back_is_not_forgotten_while_it_has_a_job(monkeypatch):
    monkeypatch.setattr(fair, "DEBTORS", 0)
    queue = device(lanes=2)
    runner = add(queue, slots=2)
    for _ in range(40):
        job = Job(runner, tenant="a")
        queue.submit(job, 0.0)
        queue.complete(job, 0.0, started=0.0, finished=1.0)
        assert "a" not in accounts(runner)
    monkeypatch.setattr(fair, "DEBTORS", 1)
    for _ in range(40):  # entries of one that came back are dropped, too
        job = Job(runner, tenant="a")
        queue.submit(job, 0.0)
        queue.complete(job, 0.0, started=0.0, finished=1.0)
    assert len(runner.tenants[NORMAL]._idle) <= 18


def test_a_tenant_that_gives_up_again_and_again_is_known_once():
    queue = device()
    runner = add(queue)
    job = Job(runner, tenant="a")
    queue.submit(job, 0.0)
    queue.complete(job, 0.0, started=0.0, finished=5.0)
    queue.submit(Job(runner, tenant="b"), 5.0)
    for _ in range(40):
        job = Job(runner, tenant="a")
        queue.submit(job, 5.0)
        queue.cancel(job, 5.0)
        assert len(runner.tenants[NORMAL]._idle) <= 18
    assert accounts(runner)["a"].virtual == 5.0
