"""`check` names the invariant that is broken; here each of them is broken by hand."""

from __future__ import annotations

import pytest

from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.batching import Batching, Key
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.ending import SLICE
from aoti_sched.queue.job import Job, JobState, Priority
from aoti_sched.queue.policy import Policy
from aoti_sched.queue.runner_state import Phase
from tests.unit.queue.support import add, check, somewhere, take_lease


class Scene:
    """A queue with a job in every place.

    Lanes: a run of the lease, one of the runner, one is free.
    """

    def __init__(self):
        self.queue = queue = DeviceQueue("cpu", 3, Bounds(9, 99))
        self.runner = runner = add(queue, slots=3, jobs=1, size=10)
        self.busy_lease, self.idle_lease = take_lease(queue, runner), take_lease(queue, runner)
        self.running, self.queued, self.waiting = (
            Job(runner, bytes=5, deadline=9) for _ in range(3)
        )
        self.held, self.held_queued, self.held_waiting = (
            Job(self.busy_lease, bytes=5) for _ in range(3)
        )
        for job in (
            self.running,
            self.queued,
            self.waiting,
            self.held,
            self.held_queued,
            self.held_waiting,
        ):
            queue.submit(job, 0, wait=True)


def test_a_sound_queue_passes():
    check(Scene().queue)


def a_lane_too_many(s):
    s.queue.lanes.free.append(9)


def a_lane_twice(s):
    s.queue.lanes.free[0] = s.running.lane


def a_lane_that_no_slot_keeps(s):
    s.queue.lanes._claims[0] += 1


def a_lane_that_a_slot_keeps_unseen(s):
    s.runner.last_lanes[0] = 0


def a_slot_without_a_runner(s):
    s.queue.lanes._slots += 1


def a_slot_too_many(s):
    s.runner.free.append(9)


def a_slot_lost(s):
    del s.runner.leases[s.idle_lease.id]


def a_busy_lease_with_a_free_slot(s):
    s.busy_lease.free.append(s.busy_lease.slot)


def an_idle_lease_released(s):
    s.idle_lease.released = True


def a_queued_job_done(s):
    s.queued.state = JobState.DONE


def a_waiting_job_queued(s):
    s.waiting.state = JobState.QUEUED


def a_runners_job_uncounted(s):
    s.runner.load.jobs -= 1


def a_runners_byte_uncounted(s):
    s.runner.load.bytes -= 1


def a_leases_job_uncounted(s):
    s.busy_lease.load.jobs -= 1


def a_leases_byte_uncounted(s):
    s.busy_lease.load.bytes -= 1


def a_smaller_bound_for_a_lease(s):
    s.busy_lease.load.bounds = Bounds(1, 4)


def a_bigger_bound_for_a_lease(s):
    s.busy_lease.load.bounds = Bounds(2, 10)


def a_job_alive_nowhere(s):
    s.runner.live += 1


def a_smaller_bound_for_the_runner(s):
    s.runner.load.bounds = Bounds(0)


def a_smaller_bound_of_bytes_for_the_runner(s):
    s.runner.load.bounds = Bounds(None, 4)


def a_bigger_bound_for_the_runner(s):
    s.runner.load.bounds = Bounds(9)


def a_busy_runner_drained(s):
    s.runner.phase = Phase.DRAINED


def a_slot_for_those_in_the_queue(s):
    s.runner.free.append(s.runner.slots)
    s.runner.slots += 1
    s.queue.lanes._slots += 1


def a_devices_job_uncounted(s):
    s.queue.load.jobs -= 1


def a_devices_byte_uncounted(s):
    s.queue.load.bytes -= 1


def a_smaller_bound_for_the_device(s):
    s.queue.load.bounds = Bounds(0)


def a_job_on_another_lane(s):
    s.running.lane = 9


def a_turn_that_nobody_asked_for(s):
    s.queue.lanes.inline_left = 0


def a_closed_lease(s):
    s.idle_lease.closed = True


def one_who_awaits_an_epoch_queued(s):
    s.runner.awaiting.add(somewhere(Job(s.runner, min_epoch=2), id=99, state=JobState.QUEUED))


def one_who_awaits_what_has_been(s):
    s.runner.awaiting.add(somewhere(Job(s.runner, min_epoch=1), id=99, state=JobState.WAITING))


def one_that_is_not_queued_for_its_epoch(s):
    s.runner.epoch_bound.add(Job(s.runner, min_epoch=2))


def one_in_the_queue_who_can_not_have_its_epoch(s):
    s.queued.min_epoch = 2


def a_run_on_another_epoch(s):
    s.running.epoch = 2


def an_epoch_never_published(s):
    s.runner.epoch = s.running.epoch = 2


def a_barrier_reached_while_open(s):
    s.runner.reached = True


def a_barrier_not_reached(s):
    idle = add(s.queue, "idle")
    idle.closed = True


def one_that_follows_nothing(s):
    s.queue.lanes.handed_ahead[2] = [somewhere(Job(s.runner), lane=2)]


def too_many_ahead(s):
    running = s.queue.lanes.running[s.running.lane]
    ahead = [somewhere(Job(s.runner), lane=running.lane) for _ in range(8)]
    for job in ahead:
        job.slot, job.epoch = running.slot, running.epoch
    s.queue.lanes.handed_ahead[running.lane] = ahead


def a_lane_open_to_another(s):
    s.busy_lease.open_for_next.append(s.running.lane)


def a_live_deadline_too_many(s):
    s.queue.timers.deadlines.alive += 1


def granted(s):
    """Return the histograms of the two lease requests, the only jobs of the scene that ended."""
    return s.runner.histograms.of(JobState.DONE, Priority.NORMAL)


def an_ended_job_in_two_buckets(s):
    granted(s).queue.add(1.0)


def a_run_without_a_batch_size(s):
    granted(s).run.add(1.0)


def an_ended_job_without_histograms(s):
    s.runner.counters.completed += 1


def a_job_rejected_for_no_reason(s):
    s.runner.rejections["QueueFullError"] = 1


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (a_lane_too_many, "each lane is free or runs one job"),
        (an_ended_job_in_two_buckets, "each ended job is in one bucket of its histograms"),
        (a_run_without_a_batch_size, "each run is in one bucket of its histograms"),
        (an_ended_job_without_histograms, "the histograms have all jobs that the counters have"),
        (a_job_rejected_for_no_reason, "each rejected job has one reason"),
        (a_lane_twice, "each lane is free or runs one job"),
        (a_lane_that_no_slot_keeps, "each lane knows how many slots ran there last"),
        (a_lane_that_a_slot_keeps_unseen, "each lane knows how many slots ran there last"),
        (a_slot_without_a_runner, "the lanes know how many slots there are"),
        (a_slot_too_many, "free \\+ leased = all slots"),
        (a_slot_lost, "free \\+ leased = all slots"),
        (a_busy_lease_with_a_free_slot, "a lease runs at most one job at a time"),
        (an_idle_lease_released, "a released lease with no jobs is retired"),
        (a_queued_job_done, "each job in a queue is QUEUED"),
        (a_waiting_job_queued, "each job at a gate is WAITING"),
        (a_runners_job_uncounted, "a runner's load counts its queued jobs"),
        (a_runners_byte_uncounted, "a runner's load counts its bytes"),
        (a_leases_job_uncounted, "a lease's load counts its queued jobs"),
        (a_leases_byte_uncounted, "a lease's load counts its bytes"),
        (a_smaller_bound_for_a_lease, "no bound of a lease is exceeded"),
        (a_bigger_bound_for_a_lease, "no job waits at a lease's gate when the lease has room"),
        (a_job_alive_nowhere, "each live job is at a gate, in a queue or on a lane"),
        (a_smaller_bound_for_the_runner, "no bound of a runner is exceeded"),
        (a_smaller_bound_of_bytes_for_the_runner, "no bound of a runner is exceeded"),
        (a_bigger_bound_for_the_runner, "no job waits at a gate when there is room"),
        (a_busy_runner_drained, "a drained runner is idle"),
        (a_slot_for_those_in_the_queue, "no job waits while a slot and a place to run are free"),
        (a_devices_job_uncounted, "the device's load is its runners'"),
        (a_devices_byte_uncounted, "the device's load is its runners'"),
        (a_smaller_bound_for_the_device, "no bound of the device is exceeded"),
        (a_job_on_another_lane, "a job's lane and inline fields say where the job runs"),
        (
            a_turn_that_nobody_asked_for,
            "a turn with inline runs, or with jobs that may share a run, has a next turn",
        ),
        (a_closed_lease, "a held lease is never closed"),
        (one_who_awaits_an_epoch_queued, "each job that awaits an epoch is WAITING"),
        (one_who_awaits_what_has_been, "no job awaits an epoch that has been published"),
        (one_in_the_queue_who_can_not_have_its_epoch, "each queued job can have its epoch"),
        (
            one_that_is_not_queued_for_its_epoch,
            "each queued job that asks for an epoch is listed under the epoch",
        ),
        (a_run_on_another_epoch, "nothing runs on another epoch"),
        (an_epoch_never_published, "the present epoch was published"),
        (
            a_barrier_reached_while_open,
            "a reached barrier is closed, and every slot is free",
        ),
        (a_barrier_not_reached, "a barrier that can be reached is reached"),
        (
            one_that_follows_nothing,
            "a job handed ahead has the source, slot and epoch of the job on its lane",
        ),
        (too_many_ahead, "no more jobs are handed ahead to a lane than it takes"),
        (
            a_lane_open_to_another,
            "a lane that is open for a source's next job runs one of its jobs and takes more",
        ),
        (a_live_deadline_too_many, "live deadlines are counted"),
    ],
    ids=lambda part: getattr(part, "__name__", None),
)
def test_a_broken_invariant_is_named(break_it, sentence):
    scene = Scene()
    break_it(scene)
    with pytest.raises(AssertionError, match=f"cpu: {sentence}"):
        check(scene.queue)


def publish(queue, runner, epoch):
    queue.close_barrier(runner, 1.0)
    return queue.open_barrier(runner, 1.0, epoch=epoch)


def half_rolled_back():
    """A queue whose runner was rolled back.

    A slice of the jobs that asked for the old epoch has ended; the others are to end.
    """
    queue = DeviceQueue("cpu", 1)
    runner = add(queue)
    jobs = [Job(runner, min_epoch=2) for _ in range(3 * SLICE)]
    for job in jobs:
        queue.submit(job, 0.0)
    publish(queue, runner, 2)
    publish(queue, runner, 1)
    assert runner.halted == 1
    return queue, runner


def half_published():
    """A queue of which a slice of jobs has moved to its runner's new epoch, and the rest is to."""
    queue = DeviceQueue("cpu", 1)
    runner = add(queue, epoch=2)
    queue.submit(Job(runner, min_epoch=2), 0.0)
    for _ in range(3 * SLICE):
        queue.submit(Job(runner, min_epoch=3), 0.0)
    (running,) = queue.lanes.running.values()
    queue.complete(running, 1.0)
    publish(queue, runner, 3)
    assert len(runner.awaiting) == 2 * SLICE
    return queue, runner


@pytest.mark.parametrize("scene", [half_rolled_back, half_published])
def test_a_sound_queue_passes_between_slices(scene):
    queue, _ = scene()
    check(queue)


def test_a_job_that_came_after_a_rollback_must_not_await_what_was():
    queue, runner = half_rolled_back()
    runner.awaiting.add(somewhere(Job(runner, min_epoch=2), id=99, state=JobState.WAITING))
    with pytest.raises(AssertionError, match="no job awaits an epoch that has been published"):
        check(queue)


def test_a_job_that_came_after_a_rollback_must_not_be_queued_for_what_was():
    queue, runner = half_rolled_back()
    job = Job(runner)
    queue.submit(job, 1.0)
    assert job.state is JobState.QUEUED
    job.min_epoch = 2
    with pytest.raises(AssertionError, match="each queued job can have its epoch"):
        check(queue)


def test_a_job_whose_epoch_was_published_must_be_about_to_move():
    queue, _ = half_published()
    queue._moving.clear()
    with pytest.raises(AssertionError, match="no job awaits an epoch that has been published"):
        check(queue)


class Shared:
    """A queue whose runner has tenants, makes batches, predicts and sheds.

    A batch of two runs on one lane, the other is free.

    One job waits for company, and behind it, in line, another of the same tenant.
    """

    def __init__(self):
        self.queue = queue = DeviceQueue("cpu", 2, policy=Policy(max_wait=9.0))
        self.runner = runner = add(
            queue,
            slots=2,
            tenant_jobs=1,
            batching=Batching(4, 1.0, max_tokens=8),
            sheds=True,
            predicts=True,
        )
        self.leader, self.rider, self.queued, self.in_line = (
            Job(runner, key="k", tenant=tenant) for tenant in ("a", "b", "a", "a")
        )
        queue.submit(self.leader, 0.0)
        queue.submit(self.rider, 0.0)
        queue.turn(0.0)
        queue.tick(1.0)
        queue.submit(self.queued, 1.0)
        queue.turn(1.0)
        queue.submit(self.in_line, 1.0, wait=True)


def test_a_sound_queue_with_all_rules_passes():
    scene = Shared()
    check(scene.queue)
    assert scene.leader.members == (scene.leader, scene.rider)
    states = [job.state for job in (scene.rider, scene.queued, scene.in_line)]
    assert states == [JobState.RUNNING, JobState.QUEUED, JobState.WAITING]


def a_core_too_many(s):
    s.queue.lanes.free_cores += 1


def more_on_lanes_than_there_are_cores(s):
    s.queue.lanes.cores = 0
    s.queue.lanes.free_cores = -1


def a_tenants_job_counted_twice(s):
    s.runner.tenant_jobs["a"] += 1


def a_job_in_line_counted_twice(s):
    s.runner.lined += 1


def a_smaller_bound_for_tenants(s):
    s.runner.load.bounds = Bounds(None, None, 0)


def a_bigger_bound_for_tenants(s):
    s.runner.load.bounds = Bounds(None, None, 2)


def one_in_line_queued(s):
    s.in_line.state = JobState.QUEUED


def one_in_the_line_of_another_tenant(s):
    s.in_line.tenant = "b"


def a_job_that_is_not_on_its_runners_account(s):
    s.runner.accounts[s.queued.priority].queued -= 1


def a_run_that_is_not_on_its_runners_account(s):
    s.runner.accounts[s.leader.priority].running -= 1


def a_debt(s):
    s.runner.accounts[s.leader.priority].balance = 1.0


def a_job_that_is_not_on_its_tenants_account(s):
    s.queued.account.queued -= 1


def a_run_that_is_not_on_its_tenants_account(s):
    s.rider.account.running -= 1


def an_idle_tenant_that_is_not_known_as_one(s):
    s.runner.tenants[Priority.NORMAL].of("idle")


def idle_tenants_that_are_miscounted(s):
    s.runner.tenants[Priority.NORMAL]._resting += 1


def a_job_on_another_account(s):
    s.queued.account = s.rider.account


def a_job_unforeseen(s):
    s.runner.backlog.jobs -= 1


def one_whose_age_nobody_knows(s):
    s.runner.arrivals.remove(s.queued.age_node)


def one_that_can_not_be_shed(s):
    s.runner.worst.alive -= 1


def one_that_can_not_be_shed_for_its_tenant(s):
    s.runner.worst_of["a"].alive -= 1


def a_batch_led_by_another(s):
    s.leader.members = (s.rider, s.leader)


def a_batch_of_one(s):
    s.leader.members = (s.leader,)
    s.rider.state = JobState.DONE


def a_batch_of_two_keys(s):
    s.rider.key = "l"


def a_batch_too_large(s):
    s.rider.rows = 4


def a_batch_of_too_many_tokens(s):
    s.rider.tokens = 5


def a_deadline_that_is_not_reckoned_with(s):
    s.queue._urgency._classes[Priority.NORMAL].alive += 1


def a_batch_in_two_places(s):
    s.rider.slot = s.leader.slot + 1


def a_key_without_jobs(s):
    s.runner.batch_queue.keys["l"] = Key()


def a_keys_job_uncounted(s):
    s.runner.batch_queue.keys["k"].jobs -= 1


def a_keys_row_uncounted(s):
    s.runner.batch_queue.keys["k"].rows -= 1


def a_key_held_for_ever(s):
    s.runner.batch_queue.keys["k"].held = True


def a_key_forgotten(s):
    s.queue._wake = None


def a_turn_of_which_one_does_not_hear(s):
    s.runner.batch_queue.arrived = 1


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (a_core_too_many, "each run on a lane has its cores"),
        (more_on_lanes_than_there_are_cores, "each run on a lane has its cores"),
        (a_tenants_job_counted_twice, "a tenant's jobs at the gate and in the queue are counted"),
        (a_smaller_bound_for_tenants, "no bound of a tenant is exceeded"),
        (a_bigger_bound_for_tenants, "no job waits for its tenant when there is room"),
        (a_job_in_line_counted_twice, "jobs in tenants' lines are counted"),
        (one_in_line_queued, "each job in a tenant's line is WAITING"),
        (one_in_the_line_of_another_tenant, "each job in a tenant's line is WAITING"),
        (
            a_job_that_is_not_on_its_runners_account,
            "a runner's account counts its queued and running jobs",
        ),
        (
            a_run_that_is_not_on_its_runners_account,
            "a runner's account counts its queued and running jobs",
        ),
        (a_debt, "no account owes time that was used"),
        (
            a_job_that_is_not_on_its_tenants_account,
            "a tenant's account counts its queued and running jobs",
        ),
        (
            a_run_that_is_not_on_its_tenants_account,
            "a tenant's account counts its queued and running jobs",
        ),
        (
            an_idle_tenant_that_is_not_known_as_one,
            "an idle tenant's account says that the tenant is idle",
        ),
        (
            idle_tenants_that_are_miscounted,
            "idle tenants are counted, and are no more than are kept",
        ),
        (a_job_on_another_account, "each queued or running job is on its tenant's account"),
        (a_job_unforeseen, "each queued job is part of the forecast"),
        (one_whose_age_nobody_knows, "each job that may become overdue is watched"),
        (one_that_can_not_be_shed, "each job that may be shed is listed"),
        (one_that_can_not_be_shed_for_its_tenant, "each job that may be shed is listed"),
        (a_batch_led_by_another, "a batch has several members and is led by the first"),
        (a_batch_of_one, "a batch has several members and is led by the first"),
        (a_batch_of_two_keys, "the members of a batch have one key"),
        (a_batch_too_large, "a batch has at most max_rows rows"),
        (a_batch_of_too_many_tokens, "a batch has at most max_tokens tokens"),
        (
            a_deadline_that_is_not_reckoned_with,
            "each queued job with a deadline is reckoned with in batches",
        ),
        (a_batch_in_two_places, "the members of a batch have one lane, slot and epoch"),
        (a_key_without_jobs, "exactly the keys that have jobs are listed"),
        (a_keys_job_uncounted, "a key counts its jobs, rows and tokens"),
        (a_keys_row_uncounted, "a key counts its jobs, rows and tokens"),
        (a_key_held_for_ever, "a next turn comes for each key that is held until then"),
        (a_key_forgotten, "the device wakes for each key that waits for more jobs"),
        (
            a_turn_of_which_one_does_not_hear,
            "a runner with new batchable jobs is listed until the turn ends",
        ),
    ],
    ids=lambda part: getattr(part, "__name__", None),
)
def test_a_broken_invariant_of_sharing_and_batches_is_named(break_it, sentence):
    scene = Shared()
    break_it(scene)
    with pytest.raises(AssertionError, match=f"cpu: {sentence}"):
        check(scene.queue)
