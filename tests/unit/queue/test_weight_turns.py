"""Two sets of weights of one model take turns with its container: when, and for how long."""

from __future__ import annotations

import random

import pytest

from aoti_sched.errors import EpochError
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.commands import (
    BarrierReached,
    Drained,
    Expire,
    Grant,
    Launch,
    Revoke,
    Turn,
    Withdraw,
)
from aoti_sched.queue.ending import SLICE
from aoti_sched.queue.job import IllegalFactError, Job, JobState, Priority
from aoti_sched.queue.runner_state import Phase
from aoti_sched.queue.weight_turns import SHARE
from tests.unit.queue.seeds import share_of_seeds, shares
from tests.unit.queue.support import add, check, device, launched, launches, take_lease

LAST = 1000.0
SHARES, STEPS = 4, 150


def kinds(commands):
    return [type(command) for command in commands]


def two_records(queue, runner, now=0.0):
    """Publish the next epoch, and keep the one before for sessions. Returns the second record."""
    queue.close_barrier(runner, now)
    behind = queue.add_behind(runner, f"{runner.name} (sessions)", now)
    queue.withdraw_pinned(runner, now)
    queue.open_barrier(runner, now, epoch=runner.published + 1)
    assert queue.release_turns(runner, now) == []
    return behind


def pinned(record, priority=Priority.NORMAL, **rest):
    return Job(record, priority, min_epoch=record.epoch, pinned=True, **rest)


def test_jobs_of_the_set_before_run_after_a_turn_and_the_others_after_the_next():
    queue = device()
    main = add(queue)
    behind = two_records(queue, main)
    old = pinned(behind)
    assert queue.submit(old, 1.0) == [Turn(main)]
    new = Job(main)
    assert queue.submit(new, 1.0) == []
    assert launched(queue.turned(main, 2.0, exchanged=True)) == [old]
    assert old.epoch == 1
    assert queue.complete(old, 3.0) == [Turn(main)]
    assert launched(queue.turned(main, 4.0, exchanged=True)) == [new]
    assert new.epoch == 2


def test_a_turn_waits_for_what_runs_and_starts_nothing_more():
    queue = device(lanes=2)
    main = add(queue, slots=2)
    behind = two_records(queue, main)
    running, waits = Job(main), Job(main)
    queue.submit(running, 0.0)
    old = pinned(behind)
    assert queue.submit(old, 0.0) == []
    assert queue.submit(waits, 0.0) == []
    assert queue.complete(running, 1.0) == [Turn(main)]
    assert launched(queue.turned(main, 1.0, exchanged=True)) == [old]


def test_without_jobs_behind_there_is_no_turn():
    queue = device()
    main = add(queue)
    two_records(queue, main)
    job = Job(main)
    assert launched(queue.submit(job, 0.0)) == [job]
    assert queue.complete(job, 1.0) == []
    assert not queue.turns[main].turning


def fill(queue, record, count, now=0.0, make=Job):
    jobs = [make(record) for _ in range(count)]
    return jobs, [command for job in jobs for command in queue.submit(job, now)]


def test_with_jobs_on_both_a_record_serves_four_times_as_long_as_a_turn_takes():
    queue = device()
    main = add(queue)
    behind = two_records(queue, main)
    fill(queue, main, 9)
    fill(queue, behind, 9, make=pinned)
    (running,) = queue.unchecked.lanes.running.values()
    now = 1.0
    assert queue.complete(running, now) == [Turn(main)]  # no turn has been measured
    now += 0.5  # until its end the turn takes half a second
    (running,) = launched(queue.turned(main, now, exchanged=True))
    ends = now + SHARE * 0.5
    while True:
        now += 0.3
        commands = queue.complete(running, now)
        if Turn(main) in commands:
            break
        (running,) = launches(commands)
        assert running.source is behind
    assert now >= ends > now - 0.3


def test_a_job_of_a_higher_class_has_its_turn_at_once_and_one_of_a_lower_class_waits():
    queue = device()
    main = add(queue)
    behind = two_records(queue, main)
    fill(queue, main, 2)
    low, high = pinned(behind, Priority.LOW), pinned(behind, Priority.HIGH)
    queue.submit(low, 0.0)
    (running,) = queue.unchecked.lanes.running.values()
    (running,) = launched(queue.complete(running, LAST))  # `low` waits, however long
    fill(queue, main, 1)
    assert queue.submit(high, LAST) == []
    assert queue.turns[main].turning
    assert queue.complete(running, LAST) == [Turn(main)]
    assert launched(queue.turned(main, LAST, exchanged=True)) == [high]


def test_a_held_lease_keeps_its_weights_and_the_turn_comes_after_it():
    queue = device(lanes=2)
    main = add(queue, slots=2)
    behind = two_records(queue, main)
    lease = take_lease(queue, main)
    assert queue.submit(pinned(behind), 0.0) == []
    other = Job(main)
    assert launched(queue.submit(other, 0.0)) == [other]  # a free slot serves on
    queue.complete(other, 0.0)
    assert queue.release(lease, 1.0) == [Turn(main)]


def test_on_hold_the_first_record_serves_and_no_turn_begins():
    queue = device()
    main = add(queue)
    behind = two_records(queue, main)
    old, late = pinned(behind), pinned(behind)
    queue.submit(old, 0.0)
    queue.turned(main, 0.0, exchanged=True)
    assert queue.hold_turns(main, 0.0) == []
    assert queue.complete(old, 1.0) == [Turn(main)]
    assert queue.turned(main, 1.0, exchanged=True) == []
    assert queue.turns[main].serving is main
    assert queue.submit(late, 1.0) == []
    assert kinds(queue.close_barrier(main, 1.0)) == [BarrierReached]
    assert queue.open_barrier(main, 1.0) == []
    assert queue.release_turns(main, 1.0) == [Turn(main)]


def test_a_turn_that_waits_for_runs_is_cancelled_by_a_hold():
    queue = device()
    main = add(queue)
    behind = two_records(queue, main)
    running, waits = Job(main), Job(main)
    queue.submit(running, 0.0)
    queue.submit(pinned(behind), 0.0)
    queue.submit(waits, 0.0)
    assert queue.turns[main].turning
    assert queue.hold_turns(main, 0.0) == []
    assert not queue.turns[main].turning
    assert launched(queue.complete(running, 1.0)) == [waits]


def test_a_turn_whose_exchange_was_asked_for_ends_and_turns_back_on_hold():
    queue = device()
    main = add(queue)
    behind = two_records(queue, main)
    old = pinned(behind)
    assert queue.submit(old, 0.0) == [Turn(main)]
    assert queue.hold_turns(main, 0.0) == []
    assert launched(queue.turned(main, 0.0, exchanged=True)) == [old]
    assert queue.complete(old, 1.0) == [Turn(main)]


def test_where_the_weights_cant_be_exchanged_the_same_record_serves_on():
    queue = device()
    main = add(queue)
    behind = two_records(queue, main)
    old = pinned(behind)
    assert queue.submit(old, 0.0) == [Turn(main)]
    queue.terminate_runner(behind, 0.0)
    assert old.state is JobState.REVOKED
    assert queue.turned(main, 0.0, exchanged=False) == []
    job = Job(main)
    assert launched(queue.submit(job, 0.0)) == [job]


def test_pinned_jobs_are_taken_out_before_the_next_epoch_serves_and_the_others_stay():
    queue = device()
    main = add(queue)
    running, mine, other = Job(main), pinned(main), Job(main)
    for job in (running, mine, other):
        queue.submit(job, 0.0)
    queue.close_barrier(main, 0.0)
    assert kinds(queue.complete(running, 1.0)) == [BarrierReached]
    behind = queue.add_behind(main, "old", 1.0)
    assert queue.withdraw_pinned(main, 1.0) == [Withdraw(mine)]
    again = mine.resubmitted()
    again.source = behind
    assert again.pinned
    assert queue.submit(again, 1.0, since=0.0) == []
    assert launched(queue.open_barrier(main, 1.0, epoch=2)) == [other]
    queue.release_turns(main, 1.0)
    assert queue.complete(other, 2.0) == [Turn(main)]
    assert launched(queue.turned(main, 2.0, exchanged=True)) == [again]
    assert again.epoch == 1
    assert main.counters is behind.counters
    assert main.counters.withdrawn == 1


def test_many_pinned_jobs_are_taken_out_in_slices_before_anything_starts():
    queue = device()
    main = add(queue, epoch=3)
    fill(queue, main, 1)
    jobs, _ = fill(queue, main, SLICE + 1, make=pinned)
    (running,) = queue.unchecked.lanes.running.values()
    queue.close_barrier(main, 0.0)
    queue.complete(running, 0.0)
    queue.add_behind(main, "old", 0.0)
    out = [c.job for c in queue.withdraw_pinned(main, 0.0) if type(c) is Withdraw]
    assert launches(queue.open_barrier(main, 0.0, epoch=4)) == []
    new = Job(main)
    assert launches(queue.submit(new, 0.0)) == []
    commands = queue.go_on(0.0)
    out += [command.job for command in commands if type(command) is Withdraw]
    assert out == jobs
    assert launches(commands) == [new]


def test_a_rollback_exchanges_the_epochs_of_the_records():
    queue = device()
    main = add(queue)
    behind = two_records(queue, main)
    queue.hold_turns(main, 0.0)
    old, new = pinned(behind), pinned(main)
    queue.submit(old, 0.0)
    queue.close_barrier(main, 0.0)
    queue.submit(new, 0.0)
    assert queue.keep_epoch(main, 0.0) == [Withdraw(old)]
    assert behind.epoch == 2
    assert queue.withdraw_pinned(main, 0.0) == [Withdraw(new)]
    queue.open_barrier(main, 0.0, epoch=1)
    again = new.resubmitted()
    again.source = behind
    assert queue.submit(again, 0.0, since=0.0) == []
    assert queue.release_turns(main, 0.0) == [Turn(main)]
    assert launched(queue.turned(main, 0.0, exchanged=True)) == [again]
    assert again.epoch == 2


def test_jobs_of_weights_that_are_about_to_be_gone_are_revoked():
    queue = device()
    main = add(queue)
    behind = two_records(queue, main)
    queue.hold_turns(main, 0.0)
    old, error = pinned(behind), EpochError("gone")
    queue.submit(old, 0.0)
    assert queue.revoke_behind(main, 0.0, error) == [Revoke(old, error)]


def test_a_job_behind_that_expires_needs_no_turn():
    queue = device()
    main = add(queue)
    behind = two_records(queue, main)
    running = Job(main)
    queue.submit(running, 0.0)
    old = pinned(behind, deadline=1.0)
    queue.submit(old, 0.0)
    assert queue.tick(1.0) == [Expire(old)]
    assert queue.complete(running, 2.0) == [Turn(main)]  # it had begun
    assert queue.turned(main, 2.0, exchanged=True) == []
    assert queue.turns[main].serving is behind
    job = Job(main)
    assert queue.submit(job, 3.0) == [Turn(main)]


def test_a_batch_is_made_of_jobs_of_one_record():
    queue = device()
    main = add(queue, batching=Batching(8, max_seconds=float("inf")))
    behind = two_records(queue, main)
    fill(queue, main, 1)
    old, _ = fill(queue, behind, 3, make=lambda record: pinned(record, key="k"))
    new, _ = fill(queue, main, 3, make=lambda record: Job(record, key="k"))
    queue.turn(0.0)
    (running,) = queue.unchecked.lanes.running.values()
    assert queue.complete(running, 1.0) == [Turn(main)]
    (leader,) = launched(queue.turned(main, 1.0, exchanged=True))
    assert leader.members == tuple(old)
    assert queue.complete(leader, 2.0) == [Turn(main)]
    (leader,) = launched(queue.turned(main, 2.0, exchanged=True))
    assert leader.members == tuple(new)


def test_both_records_finish_what_they_accepted_before_they_are_drained():
    queue = device()
    main = add(queue)
    behind = two_records(queue, main)
    running, old, new = Job(main), pinned(behind), Job(main)
    for job in (running, old, new):
        queue.submit(job, 0.0)
    assert queue.drain_runner(main, 0.0) == []
    assert queue.drain_runner(behind, 0.0) == []
    assert queue.complete(running, 1.0) == [Turn(main)]
    queue.turned(main, 1.0, exchanged=True)
    commands = queue.complete(old, 2.0)
    assert commands == [Turn(main), Drained(behind)]
    assert launched(queue.turned(main, 2.0, exchanged=True)) == [new]
    with pytest.raises(IllegalFactError, match="can't be removed"):
        queue.remove_runner(main)
    assert queue.complete(new, 3.0) == [Drained(main)]
    with pytest.raises(IllegalFactError, match="can't be removed"):
        queue.remove_runner(behind)
    queue.remove_runner(main)
    assert not queue.runners
    assert not queue.turns


def test_a_drained_first_record_gives_way_too():
    queue = device()
    main = add(queue)
    behind = two_records(queue, main)
    queue.hold_turns(main, 0.0)
    old = pinned(behind)
    queue.submit(old, 0.0)
    assert queue.drain_runner(main, 0.0) == [Drained(main)]
    queue.drain_runner(behind, 0.0)
    with pytest.raises(IllegalFactError, match="can't be removed"):
        queue.remove_runner(main)
    assert queue.release_turns(main, 0.0) == [Turn(main)]
    assert launched(queue.turned(main, 0.0, exchanged=True)) == [old]
    assert queue.complete(old, 1.0) == [Drained(behind)]


ILLEGAL = {
    "open": lambda queue, main, _: queue.keep_epoch(main, 0.0),
    "second": lambda queue, main, _: queue.add_behind(main, "x", 0.0),
    "taken": lambda queue, main, _: queue.add_behind(queue.runners["other"], "m", 0.0),
    "barrier": lambda queue, main, _: queue.add_behind(queue.runners["other"], "x", 0.0),
    "none": lambda queue, main, _: queue.hold_turns(queue.runners["other"], 0.0),
    "not main": lambda queue, _, behind: queue.release_turns(behind, 0.0),
    "no turn": lambda queue, main, _: queue.turned(main, 0.0, exchanged=True),
}


@pytest.mark.parametrize("fact", ILLEGAL)
def test_what_cant_happen_changes_nothing(fact):
    queue = device()
    main = add(queue)
    add(queue, "other")
    behind = two_records(queue, main)
    with pytest.raises(IllegalFactError):
        ILLEGAL[fact](queue, main, behind)
    check(queue)


def test_a_turn_that_waits_for_runs_is_not_over():
    queue = device()
    main = add(queue)
    behind = two_records(queue, main)
    queue.submit(Job(main), 0.0)
    queue.submit(pinned(behind), 0.0)
    with pytest.raises(IllegalFactError, match="was not to turn"):
        queue.turned(main, 0.0, exchanged=True)


class Walk:
    """A random walk: two runners of one device, of which one is updated while sessions go on.

    Knows which set the container has, and that each job must run on the right one.
    """

    def __init__(self, seed):
        self.draw = draw = random.Random(seed)
        lanes = draw.randint(1, 3)
        self.queue = device(lanes, max_wait=draw.choice([None, 2.0]))
        batching = Batching(4, draw.choice([0.0, 0.5]))
        self.keyed = draw.random() < 0.5
        self.main = add(
            self.queue,
            slots=draw.randint(1, 3),
            jobs=draw.choice([None, 6]),
            batching=batching if self.keyed else None,
        )
        self.other = add(self.queue, "other")
        self.behind = None
        self.now, self.loaded = 0.0, 1
        self.jobs, self.running, self.leases = [], [], []
        self.step_of_update, self.to_turn, self.later = None, 0, []
        self.draining = False

    def perform(self, commands):
        for command in commands:
            match command:
                case Launch(job=job):
                    if job.source.runner is not self.other:
                        assert job.epoch == job.source.epoch == self.loaded
                    for member in job.members or (job,):
                        assert not member.pinned or member.epoch == member.min_epoch
                    self.running.append(job)
                case Grant(lease=lease):
                    assert lease.runner is not self.main or lease.epoch == self.loaded
                    self.leases.append(lease)
                case Turn(runner=runner):
                    assert runner is self.main
                    self.to_turn += 1
                case BarrierReached(runner=runner):
                    assert runner is self.main
                    self.step_of_update = "reached"
                case Withdraw(job=job):
                    self.later.append(job)
        in_use = {job.source.runner for job in self.running} - {self.other}
        in_use |= {lease.runner for lease in self.leases} - {self.other}
        assert len(in_use) <= 1

    def place(self):
        """Submit what was withdrawn to the record that has its weights now."""
        later, self.later = self.later, []
        for old in later:
            job = old.resubmitted()
            self.jobs.append(job)
            job.source = self.main if job.min_epoch == self.main.epoch else self.behind
            assert job.source.epoch == job.min_epoch
            self.perform(self.queue.submit(job, self.now, wait=True, since=old.submitted))

    def submit(self):
        draw = self.draw
        record = draw.choice([self.main, self.main, self.other, self.behind or self.main])
        job = Job(record, draw.choice(list(Priority)))
        if record is not self.other and (record is self.behind or draw.random() < 0.5):
            job.min_epoch, job.pinned = record.epoch, True
        if self.keyed and record is not self.other:
            job.key = "k"
        elif draw.random() < 0.2 and record is not self.behind and not job.pinned:
            job.is_lease_request = True
        if draw.random() < 0.2:
            job.deadline = self.now + draw.choice([0.5, 1.0, 2.0])
        self.jobs.append(job)
        self.perform(self.queue.submit(job, self.now, wait=draw.random() < 0.5))

    def complete(self):
        if self.running:
            job = self.running.pop(self.draw.randrange(len(self.running)))
            self.perform(self.queue.complete(job, self.now, ok=self.draw.random() < 0.9))

    def cancel(self):
        alive = [job for job in self.jobs if job.state <= JobState.RUNNING]
        if alive:
            self.perform(self.queue.cancel(self.draw.choice(alive), self.now))

    def release(self):
        if self.leases:
            lease = self.leases.pop(self.draw.randrange(len(self.leases)))
            self.perform(self.queue.release(lease, self.now))

    def turned(self):
        if self.to_turn:
            self.to_turn -= 1
            exchanged = self.draw.random() < 0.97
            if exchanged:
                serving = self.queue.turns[self.main].other
                self.loaded = serving.epoch
            else:  # no request may run on the wrong weights any more
                self.draining = True
                for record in (self.main, self.behind):
                    self.perform(self.queue.terminate_runner(record, self.now))
            self.perform(self.queue.turned(self.main, self.now, exchanged=exchanged))

    def update(self):
        """The next step of a change of the weights: hold, close, exchange, open, release."""
        queue, main, now, step = self.queue, self.main, self.now, self.step_of_update
        if step is None and not self.draining:
            if self.behind is not None:
                self.perform(queue.hold_turns(main, now))
            self.step_of_update = "held"
        elif step == "held":
            turns = queue.turns.get(main)
            if turns is not None and turns.broken:
                self.step_of_update = "open"  # the update fails
                return
            if turns is not None and (turns.serving is not main or turns.turning):
                return
            if main.phase is not Phase.DRAINED:
                self.step_of_update = "closed"
                self.perform(queue.close_barrier(main, now))
        elif step == "reached" and main.phase is not Phase.DRAINED:
            back = self.behind is not None and self.draw.random() < 0.5
            epoch = self.behind.epoch if back else main.published + 1
            if self.behind is None:
                self.behind = queue.add_behind(main, "m (sessions)", now)
            else:
                if not back:
                    gone = EpochError("gone")
                    self.perform(queue.revoke_behind(main, now, gone))
                self.perform(queue.keep_epoch(main, now))
            self.perform(queue.withdraw_pinned(main, now))
            self.loaded = epoch
            self.perform(queue.open_barrier(main, now, epoch=epoch))
            self.step_of_update = "open"
        elif step == "open":
            self.perform(queue.release_turns(main, now))
            self.step_of_update = None

    def drain(self):
        if self.draw.random() < 0.1 and self.step_of_update is None:
            self.draining = True
            fact = self.draw.choice([self.queue.drain_runner, self.queue.terminate_runner])
            self.perform(fact(self.main, self.now))
            if self.behind is not None:
                self.perform(fact(self.behind, self.now))

    def beat(self):
        self.perform(self.queue.turn(self.now))
        self.perform(self.queue.go_on(self.now))
        self.perform(self.queue.tick(self.now))

    def walk(self):
        acts = [
            *(self.submit, self.submit, self.submit, self.complete, self.complete, self.turned),
            *(self.cancel, self.release, self.update, self.beat, self.drain),
        ]
        for _ in range(STEPS):
            self.now += self.draw.choice([0.0, 0.125, 0.5])
            self.draw.choice(acts)()
            self.place()

    def finish(self):
        """Let everything come to its end: no job is left behind."""
        for _ in range(100 * STEPS):
            if self.step_of_update is not None:
                self.update()
            self.now += 0.125
            for act in (self.turned, self.complete, self.release, self.beat, self.place):
                act()
            ended = all(job.state > JobState.RUNNING for job in self.jobs) and not self.running
            if ended and not self.draining:
                return
            drained = [one for one in (self.main, self.behind) if one is not None]
            if ended and all(one.phase is Phase.DRAINED for one in drained):
                self.queue.remove_runner(self.main)
                return
        raise AssertionError("jobs are left behind")


@pytest.mark.parametrize("share", shares(SHARES))
def test_in_random_walks_each_job_runs_on_its_weights_and_ends(share):
    for seed in share_of_seeds(share, SHARES):
        walk = Walk(seed)
        try:
            walk.walk()
            walk.finish()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_the_walks_meet_turns_moves_and_drains():
    walks = [Walk(seed) for seed in range(20)]
    for walk in walks:
        walk.walk()
    assert any(walk.queue.turns and walk.queue.turns[walk.main].ran for walk in walks)
    assert any(JobState.WITHDRAWN in {job.state for job in walk.jobs} for walk in walks)
    assert any(walk.draining and walk.behind is not None for walk in walks)
