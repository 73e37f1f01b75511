"""`check()` names the invariant that is broken; here each of them is broken by hand."""

from __future__ import annotations

import pytest

from aoti_sched.queue.admission import Bounds
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.job import Job, JobState
from aoti_sched.queue.lease import Phase
from tests.queue.support import add, somewhere, take_lease


class Scene:
    """A queue with a job in every place. Lanes: a run of the lease, one of the runner, one is free."""

    def __init__(self):
        self.queue = queue = DeviceQueue("cpu", 3, Bounds(9, 99))
        self.runner = runner = add(queue, slots=3, jobs=1, size=10)
        self.busy_lease, self.idle_lease = take_lease(queue, runner), take_lease(queue, runner)
        self.running, self.queued, self.waiting = (Job(runner, bytes=5, deadline=9) for _ in range(3))
        self.held, self.held_queued, self.held_waiting = (Job(self.busy_lease, bytes=5) for _ in range(3))
        for job in (self.running, self.queued, self.waiting, self.held, self.held_queued, self.held_waiting):
            queue.submit(job, 0, wait=True)


def test_a_sound_queue_passes():
    Scene().queue.check()


def a_lane_too_many(s):
    s.queue.lanes.free.append(9)


def a_lane_twice(s):
    s.queue.lanes.free[0] = s.running.lane


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
    s.runner.awaiting[99] = somewhere(Job(s.runner, min_epoch=2), state=JobState.QUEUED)


def one_who_awaits_what_has_been(s):
    s.runner.awaiting[99] = somewhere(Job(s.runner, min_epoch=1), state=JobState.WAITING)


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
    s.queue.lanes.following[2] = somewhere(Job(s.runner), lane=2)


def a_lane_open_to_another(s):
    s.busy_lease.followed.append(s.running.lane)


def a_dead_deadline_too_many(s):
    s.queue.timers.dead += 1


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (a_lane_too_many, "each lane is free or runs one job"),
        (a_lane_twice, "each lane is free or runs one job"),
        (a_slot_too_many, "free \\+ leased = all slots"),
        (a_slot_lost, "free \\+ leased = all slots"),
        (a_busy_lease_with_a_free_slot, "a lease runs at most one job at a time"),
        (an_idle_lease_released, "a released lease with no jobs is retired"),
        (a_queued_job_done, "what is in a queue is QUEUED"),
        (a_waiting_job_queued, "what is at a gate is WAITING"),
        (a_runners_job_uncounted, "a runner's load counts its queued jobs"),
        (a_runners_byte_uncounted, "a runner's load counts its bytes"),
        (a_leases_job_uncounted, "a lease's load counts its queued jobs"),
        (a_leases_byte_uncounted, "a lease's load counts its bytes"),
        (a_smaller_bound_for_a_lease, "no bound of a lease is exceeded"),
        (a_bigger_bound_for_a_lease, "nobody waits at a lease's gate when it has room"),
        (a_job_alive_nowhere, "live jobs are somewhere"),
        (a_smaller_bound_for_the_runner, "no bound of a runner is exceeded"),
        (a_smaller_bound_of_bytes_for_the_runner, "no bound of a runner is exceeded"),
        (a_bigger_bound_for_the_runner, "nobody waits at a gate when there is room"),
        (a_busy_runner_drained, "a drained runner is idle"),
        (a_slot_for_those_in_the_queue, "no job waits while a slot and a place to run are free"),
        (a_devices_job_uncounted, "the device's load is its runners'"),
        (a_devices_byte_uncounted, "the device's load is its runners'"),
        (a_smaller_bound_for_the_device, "no bound of the device is exceeded"),
        (a_job_on_another_lane, "a job knows its lane"),
        (
            a_turn_that_nobody_asked_for,
            "a turn with inline runs, or with jobs that may have company, has a next",
        ),
        (a_closed_lease, "a held lease is never closed"),
        (one_who_awaits_an_epoch_queued, "what awaits an epoch is WAITING"),
        (one_who_awaits_what_has_been, "nobody awaits an epoch that has been"),
        (one_in_the_queue_who_can_not_have_its_epoch, "what is queued can have its epoch"),
        (a_run_on_another_epoch, "nothing runs on another epoch"),
        (an_epoch_never_published, "an epoch was published"),
        (a_barrier_reached_while_open, "a barrier is reached while it is closed and every slot is home"),
        (a_barrier_not_reached, "a barrier that can be reached is"),
        (
            one_that_follows_nothing,
            "what follows on a lane has the source, slot and epoch of what runs there",
        ),
        (
            a_lane_open_to_another,
            "a lane that may be given a next job runs one of the source and has no next",
        ),
        (a_dead_deadline_too_many, "dead deadlines are counted"),
    ],
    ids=lambda part: getattr(part, "__name__", None),
)
def test_a_broken_invariant_is_named(break_it, sentence):
    scene = Scene()
    break_it(scene)
    with pytest.raises(AssertionError, match=f"cpu: {sentence}"):
        scene.queue.check()
