"""Admission: bounds in jobs and bytes, per runner and per device; reject or wait; nobody barges."""

from __future__ import annotations

import pytest

from aoti_sched.errors import QueueFullError
from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.commands import Launch
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.job import IllegalFactError, Job, JobState, Priority
from tests.unit.queue.support import add, device, rejected, take_lease

HIGH, NORMAL, LOW = Priority.HIGH, Priority.NORMAL, Priority.LOW


def busy(queue, name="busy"):
    """A job that keeps a lane, so that what comes next is queued; it has a runner of its own."""
    job = Job(add(queue, name))
    queue.submit(job, 0)
    assert job.state is JobState.RUNNING
    return job


def test_what_runs_at_once_takes_no_room():
    queue = device(lanes=3, jobs=1)
    runner = add(queue, slots=3, jobs=1)
    for _ in range(3):
        job = Job(runner, bytes=100)
        assert queue.submit(job, 0) == [Launch(job)]
    assert (queue.load.jobs, queue.load.bytes) == (0, 0)


def test_the_default_bound_is_1024_jobs_and_any_bytes():
    queue = DeviceQueue("cpu", 1)
    runner = queue.add_runner("m", 1)
    assert queue.load.bounds == runner.load.bounds == Bounds(jobs=1024, bytes=None)


def test_a_full_runner_rejects_with_its_numbers():
    queue = device()
    busy(queue)
    runner = add(queue, jobs=2)
    for _ in range(2):
        queue.submit(Job(runner), 0)
    job = Job(runner)
    error = rejected(queue.submit(job, 0))
    assert type(error) is QueueFullError
    assert str(error) == (
        "runner 'm' has 2 jobs queued, its bound is 2. Send less, raise the bound, or load with "
        "overflow='wait'"
    )
    assert job.state is JobState.REJECTED


def test_a_runners_bound_of_bytes_counts_the_inputs():
    queue = device()
    busy(queue)
    runner = add(queue, size=100)
    queue.submit(Job(runner, bytes=60), 0)
    assert queue.submit(Job(runner, bytes=40), 0) == []
    error = rejected(queue.submit(Job(runner, bytes=1), 0))
    assert "runner 'm' has 100 bytes of inputs queued; 1 more exceed its bound of 100" in str(error)
    assert queue.submit(Job(runner, bytes=0), 0) == []


def test_a_full_device_rejects_for_every_runner():
    queue = device(jobs=2)
    busy(queue)
    a, b = add(queue, "a"), add(queue, "b")
    queue.submit(Job(a), 0)
    queue.submit(Job(b), 0)
    error = rejected(queue.submit(Job(a), 0))
    assert str(error).startswith("runner 'a': device cpu has 2 jobs queued, its bound is 2. ")


def test_a_devices_bound_of_bytes_counts_all_its_runners():
    queue = device(size=100)
    busy(queue)
    a, b = add(queue, "a"), add(queue, "b")
    queue.submit(Job(a, bytes=70), 0)
    error = rejected(queue.submit(Job(b, bytes=31), 0))
    assert "device cpu has 70 bytes of inputs queued; 31 more exceed its bound of 100" in str(error)
    assert queue.submit(Job(b, bytes=30), 0) == []


def test_a_full_runner_takes_no_room_from_another():
    queue = device()
    busy(queue)
    a, b = add(queue, "a", jobs=1), add(queue, "b", jobs=1)
    queue.submit(Job(a), 0)
    rejected(queue.submit(Job(a), 0))
    assert queue.submit(Job(b), 0) == []


@pytest.mark.parametrize("leaves", ["launch", "cancel", "expire"])
def test_a_job_that_leaves_the_queue_frees_its_room_at_once(leaves):
    queue = device()
    running = busy(queue)
    runner = add(queue, jobs=1, size=10)
    first, second = Job(runner, deadline=5, bytes=10), Job(runner, bytes=10)
    queue.submit(first, 0)
    rejected(queue.submit(Job(runner, bytes=10), 0))
    if leaves == "launch":
        assert queue.complete(running, 1) == [Launch(first)]
    elif leaves == "cancel":
        queue.cancel(first, 1)
    else:
        queue.tick(5)
    assert queue.submit(second, 6) == []
    assert second.state is JobState.QUEUED


def test_with_wait_a_full_runner_holds_the_job_at_its_gate():
    queue = device()
    running = busy(queue)
    runner = add(queue, jobs=1)
    first, second = Job(runner), Job(runner)
    queue.submit(first, 0, wait=True)
    assert queue.submit(second, 0, wait=True) == []
    assert (first.state, second.state) == (JobState.QUEUED, JobState.WAITING)
    assert queue.complete(running, 1) == [Launch(first)]
    assert second.state is JobState.QUEUED


def test_with_wait_a_full_device_holds_the_job_at_its_gate():
    queue = device(jobs=1)
    running = busy(queue)
    a, b = add(queue, "a"), add(queue, "b")
    first, second = Job(a), Job(b)
    queue.submit(first, 0, wait=True)
    queue.submit(second, 0, wait=True)
    assert second.state is JobState.WAITING
    assert queue.complete(running, 1) == [Launch(first)]
    assert second.state is JobState.QUEUED


def test_a_gate_opens_by_class_and_then_first_in_first_out():
    queue = device()
    busy(queue)
    runner = add(queue, jobs=1)
    queued = Job(runner)
    queue.submit(queued, 0, wait=True)
    at_gate = [Job(runner, priority) for priority in (NORMAL, LOW, HIGH, NORMAL)]
    for job in at_gate:
        queue.submit(job, 0, wait=True)
    normal, low, high, second_normal = at_gate
    for following in (high, normal, second_normal, low):
        assert following.state is JobState.WAITING
        queue.cancel(queued, 1)
        assert following.state is JobState.QUEUED
        queued = following


def test_the_devices_room_goes_to_the_best_gate():
    queue = device(jobs=1)
    busy(queue)
    a, b = add(queue, "a"), add(queue, "b")
    queued, low, normal = Job(a), Job(a, LOW), Job(b)
    for job in (queued, low, normal):
        queue.submit(job, 0, wait=True)
    queue.cancel(queued, 1)
    assert (low.state, normal.state) == (JobState.WAITING, JobState.QUEUED)


def test_a_small_job_does_not_pass_a_big_one_at_the_gate_of_its_runner():
    queue = device()
    busy(queue)
    runner = add(queue, size=10)
    queued, big, small = Job(runner, bytes=6), Job(runner, bytes=8), Job(runner, bytes=1)
    queue.submit(queued, 0)
    queue.submit(big, 0, wait=True)
    queue.submit(small, 0, wait=True)
    assert (big.state, small.state) == (JobState.WAITING, JobState.WAITING)
    error = rejected(queue.submit(Job(runner, bytes=1), 0))
    assert "earlier requests are waiting for room" in str(error)


def test_a_small_job_of_another_runner_does_not_pass_one_that_waits_for_the_device():
    queue = device(size=10)
    busy(queue)
    a, b = add(queue, "a"), add(queue, "b")
    queue.submit(Job(a, bytes=6), 0)
    big, small = Job(a, bytes=8), Job(b, bytes=1)
    queue.submit(big, 0, wait=True)
    queue.submit(small, 0, wait=True)
    assert (big.state, small.state) == (JobState.WAITING, JobState.WAITING)
    error = rejected(queue.submit(Job(b, bytes=1), 0))
    assert "earlier requests are waiting for room" in str(error)


def test_a_job_waiting_for_its_own_runner_holds_up_no_other_runner():
    queue = device()
    busy(queue)
    a, b = add(queue, "a", jobs=1), add(queue, "b", jobs=1)
    queue.submit(Job(a), 0, wait=True)
    queue.submit(Job(a), 0, wait=True)
    job = Job(b)
    assert queue.submit(job, 0) == []
    assert job.state is JobState.QUEUED


def test_a_higher_class_passes_those_at_the_gate_when_it_fits():
    queue = device()
    busy(queue)
    runner = add(queue, size=10)
    queue.submit(Job(runner, bytes=6), 0)
    big, urgent = Job(runner, bytes=8), Job(runner, HIGH, bytes=4)
    queue.submit(big, 0, wait=True)
    queue.submit(urgent, 0, wait=True)
    assert (big.state, urgent.state) == (JobState.WAITING, JobState.QUEUED)


def test_a_cancelled_head_of_a_gate_lets_the_next_one_in():
    queue = device()
    busy(queue)
    runner = add(queue, size=10)
    queue.submit(Job(runner, bytes=6), 0)
    big, small = Job(runner, bytes=8), Job(runner, bytes=4)
    queue.submit(big, 0, wait=True)
    queue.submit(small, 0, wait=True)
    queue.cancel(big, 1)
    assert small.state is JobState.QUEUED


def test_a_cancelled_head_of_one_gate_lets_another_runners_in():
    queue = device(size=10)
    busy(queue)
    a, b = add(queue, "a"), add(queue, "b")
    queue.submit(Job(a, bytes=6), 0)
    big, small = Job(a, bytes=8), Job(b, bytes=4)
    queue.submit(big, 0, wait=True)
    queue.submit(small, 0, wait=True)
    queue.cancel(big, 1)
    assert small.state is JobState.QUEUED


def test_room_lets_in_as_many_as_fit():
    queue = device()
    busy(queue)
    runner = add(queue, size=10)
    big, *small = (Job(runner, bytes=size) for size in (10, 3, 3, 3, 3))
    for job in (big, *small):
        queue.submit(job, 0, wait=True)
    queue.cancel(big, 1)
    assert [job.state for job in small] == [JobState.QUEUED] * 3 + [JobState.WAITING]


@pytest.mark.parametrize("wait", [False, True])
def test_a_job_bigger_than_its_runners_bound_is_rejected_even_if_it_may_wait(wait):
    queue = device()
    runner = add(queue, size=10)
    error = rejected(queue.submit(Job(runner, bytes=11), 0, wait=wait))
    assert type(error) is QueueFullError
    assert (
        str(error)
        == "runner 'm': the request can never be queued: its inputs are 11 bytes, and runner "
        "'m' queues at most 10. Raise the bound"
    )


@pytest.mark.parametrize("wait", [False, True])
def test_a_job_bigger_than_the_devices_bound_is_rejected_even_if_it_may_wait(wait):
    queue = device(size=10)
    error = rejected(queue.submit(Job(add(queue), bytes=11), 0, wait=wait))
    assert "its inputs are 11 bytes, and device cpu queues at most 10" in str(error)


@pytest.mark.parametrize("wait", [False, True])
def test_a_bound_of_no_jobs_rejects_every_job(wait):
    queue = device()
    runner = add(queue, jobs=0)
    assert "runner 'm' queues no jobs" in str(rejected(queue.submit(Job(runner), 0, wait=wait)))


def test_a_rejected_job_leaves_no_trace_but_its_count():
    queue = device()
    runner = add(queue, size=10)
    rejected(queue.submit(Job(runner, bytes=11, deadline=9), 0))
    assert (queue.load.jobs, runner.live, runner.counters.rejected) == (0, 0, 1)
    assert queue.tick(10) == []


def test_a_lease_request_takes_room_while_it_waits():
    queue = device()
    runner = add(queue, jobs=1)
    take_lease(queue, runner)
    assert queue.submit(Job(runner, is_lease_request=True), 0) == []
    assert "has 1 jobs queued" in str(rejected(queue.submit(Job(runner, is_lease_request=True), 0)))


def test_the_holder_of_a_lease_runs_though_those_who_wait_for_its_slot_fill_the_queue():
    queue = device(jobs=1)
    runner = add(queue, jobs=1)
    lease = take_lease(queue, runner)
    queued, at_gate = Job(runner), Job(runner)
    queue.submit(queued, 0, wait=True)
    queue.submit(at_gate, 0, wait=True)
    assert (queued.state, at_gate.state) == (JobState.QUEUED, JobState.WAITING)
    for wait in (True, False):
        held = Job(lease)
        assert queue.submit(held, 1, wait=wait) == [Launch(held)]
        queue.complete(held, 2)
    assert queue.release(lease, 3) == [Launch(queued)]
    assert at_gate.state is JobState.QUEUED


def test_what_a_lease_queues_counts_for_its_runner_and_device():
    queue = device()
    runner = add(queue, slots=2, jobs=1)
    lease = take_lease(queue, runner)
    queue.submit(Job(lease), 0)
    queue.submit(Job(lease, bytes=5), 0)
    assert (runner.load.jobs, runner.load.bytes, queue.load.jobs, queue.load.bytes) == (1, 5, 1, 5)
    assert "runner 'm' has 1 jobs queued" in str(rejected(queue.submit(Job(runner), 0)))


def test_a_lease_has_its_runners_bounds_for_itself():
    queue = device()
    runner = add(queue, slots=2, jobs=2, size=10)
    lease, other = take_lease(queue, runner), take_lease(queue, runner)
    queue.submit(Job(lease), 0)
    for _ in range(2):
        assert queue.submit(Job(lease, bytes=1), 0) == []
    error = rejected(queue.submit(Job(lease, bytes=1), 0))
    assert str(error).startswith("lease 1 of runner 'm' has 2 jobs queued, its bound is 2. ")
    assert queue.submit(Job(other, bytes=1), 0) == []
    assert "lease 2 of runner 'm' queues at most 10" in str(
        rejected(queue.submit(Job(other, bytes=11), 0))
    )


def test_a_job_of_a_full_lease_may_wait_at_the_leases_gate():
    queue = device()
    runner = add(queue, size=10)
    lease = take_lease(queue, runner)
    running, queued, big, small = (Job(lease, bytes=size) for size in (0, 6, 8, 2))
    for job in (running, queued, big, small):
        queue.submit(job, 0, wait=True)
    assert (queued.state, big.state, small.state) == (
        JobState.QUEUED,
        JobState.WAITING,
        JobState.WAITING,
    )
    error = rejected(queue.submit(Job(lease, bytes=1), 0))
    assert "earlier requests are waiting for room" in str(error)
    assert queue.complete(running, 1) == [Launch(queued)]
    assert (big.state, small.state) == (JobState.QUEUED, JobState.QUEUED)


def test_a_cancelled_head_of_a_leases_gate_lets_the_next_one_in():
    queue = device()
    runner = add(queue, size=10)
    lease = take_lease(queue, runner)
    running, queued, big, small = (Job(lease, bytes=size) for size in (0, 6, 8, 4))
    for job in (running, queued, big, small):
        queue.submit(job, 0, wait=True)
    queue.cancel(big, 1)
    assert small.state is JobState.QUEUED


def test_what_is_exempt_is_held_back_by_no_bound_and_takes_no_room_from_others():
    queue = device(jobs=2)
    runner = add(queue, jobs=1)
    running, queued, second = Job(runner), Job(runner), Job(runner)
    queue.submit(running, 0)
    queue.submit(queued, 0)
    leases = [
        Job(runner, Priority.HIGH, is_lease_request=True, bypasses_limits=True) for _ in range(3)
    ]
    for lease in leases:
        assert queue.submit(lease, 0) == []
        assert lease.state is JobState.QUEUED
    assert "has 1 jobs queued, its bound is 1" in str(rejected(queue.submit(second, 0)))
    assert [command.job for command in queue.complete(running, 1)] == [leases[0]]


def test_what_is_exempt_passes_those_who_wait_at_a_gate():
    queue = device()
    runner = add(queue, jobs=1)
    running, queued, waiting = (Job(runner) for _ in range(3))
    lease = Job(runner, Priority.HIGH, is_lease_request=True, bypasses_limits=True)
    for job in (running, queued, waiting, lease):
        queue.submit(job, 0, wait=True)
    assert [job.state.name for job in (queued, waiting, lease)] == ["QUEUED", "WAITING", "QUEUED"]


@pytest.mark.parametrize(
    "fields",
    [
        {"is_lease_request": False},
        {"is_lease_request": True, "bytes": 1},
        {"is_lease_request": True, "min_epoch": 2},
    ],
)
def test_only_what_takes_a_lease_and_has_no_inputs_and_waits_for_no_epoch_is_exempt(fields):
    queue = device()
    runner = add(queue)
    with pytest.raises(IllegalFactError, match="bypasses_limits"):
        queue.submit(Job(runner, bypasses_limits=True, **fields), 0)


def test_a_bound_of_those_who_wait_rejects_the_next():
    queue = device()
    runner = add(queue, jobs=1, waiting=2)
    running, queued, first, second, third = (Job(runner) for _ in range(5))
    for job in (running, queued, first, second):
        queue.submit(job, 0, wait=True)
    assert runner.waits == 2
    error = rejected(queue.submit(third, 0, wait=True))
    assert str(error) == (
        "runner 'm': 2 requests wait for room, the bound is 2. Send less, or raise Limits(waiting=)"
    )
    queue.cancel(first, 1)
    assert queue.submit(Job(runner), 1, wait=True) == []
    queue.complete(running, 2)  # the queued one starts, and one that waits is queued
    assert (queued.state, second.state) == (JobState.RUNNING, JobState.QUEUED)
    assert queue.submit(Job(runner), 2, wait=True) == []
    assert rejected(queue.submit(Job(runner), 2, wait=True))


def test_those_who_wait_for_their_tenant_count_among_those_who_wait():
    queue = device()
    busy(queue)
    runner = add(queue, tenant_jobs=1, waiting=2)
    queued, first, second = (Job(runner, tenant="a") for _ in range(3))
    for job in (queued, first, second):
        queue.submit(job, 0, wait=True)
    assert (runner.waits, runner.lined) == (2, 2)
    assert rejected(queue.submit(Job(runner, tenant="a"), 0, wait=True))
    assert queue.submit(Job(runner, tenant="b"), 0, wait=True) == []  # it need not wait
    queue.cancel(first, 1)
    assert (runner.waits, runner.lined) == (1, 1)
    queue.cancel(queued, 2)
    assert (second.state, runner.waits, runner.lined) == (JobState.QUEUED, 0, 0)


def test_a_lease_has_the_bound_of_those_who_wait_for_itself():
    queue = device()
    runner = add(queue, slots=2, jobs=1, waiting=1)
    lease = take_lease(queue, runner)
    running, queued, waiting = (Job(lease) for _ in range(3))
    for job in (running, queued, waiting):
        queue.submit(job, 0, wait=True)
    assert (waiting.state, lease.waits, runner.waits) == (JobState.WAITING, 1, 0)
    assert "1 requests wait for room" in str(rejected(queue.submit(Job(lease), 0, wait=True)))
    own = Job(runner)
    queue.submit(own, 0, wait=True)
    assert own.state is JobState.WAITING


def test_a_job_from_another_replica_was_accepted_there_and_may_wait():
    queue = device()
    runner = add(queue, jobs=1, waiting=1)
    for _ in range(3):
        queue.submit(Job(runner), 0, wait=True)
    assert queue.submit(Job(runner), 1, wait=True, since=0) == []
    assert runner.waits == 2
    assert rejected(queue.submit(Job(runner), 1, wait=True))


def test_what_is_exempt_need_not_wait():
    queue = device()
    runner = add(queue, jobs=1, waiting=1)
    for _ in range(3):
        queue.submit(Job(runner), 0, wait=True)
    lease = Job(runner, Priority.HIGH, is_lease_request=True, bypasses_limits=True)
    assert queue.submit(lease, 0, wait=True) == []
    assert lease.state is JobState.QUEUED
