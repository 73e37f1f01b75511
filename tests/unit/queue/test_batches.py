"""Jobs that run as one: who joins, who waits for company and how long, and what becomes of a
batch that fails.
"""

from __future__ import annotations

import pytest

from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.commands import (
    BarrierReached,
    Drained,
    Expire,
    Launch,
    NextTurn,
    Revoke,
    WakeAt,
)
from aoti_sched.queue.job import IllegalFactError, Job, JobState, Priority
from aoti_sched.queue.selection.placement import LOOP, Placement, Placing
from tests.unit.queue.support import CheckedQueue, device, take_lease, teach

DELAY = 1.0


def add(queue, name="m", slots=1, rows=4, delay=0.0, placing=None):
    return queue.add_runner(
        name, slots, Bounds(None, None), placing=placing, batching=Batching(rows, delay)
    )


def job(runner, rows=1, key="k", **fields):
    return Job(runner, rows=rows, key=key, **fields)


def batches(commands):
    """The jobs of each launch, the leader first."""
    return [list(c.job.members or (c.job,)) for c in commands if type(c) is Launch]


def busy(queue, runner):
    """A job that has the runner's only slot, and the end of the turn in which it came."""
    first = job(runner)
    queue.submit(first, 0)
    queue.turn(0)
    return first


def submitted(queue, jobs, now=0.0):
    """Jobs that came in turns of their own, so that nobody is held."""
    for one in jobs:
        queue.submit(one, now)
        queue.turn(now)
    return jobs


def test_the_first_goes_at_once_and_those_that_wait_for_its_slot_go_together():
    queue = device()
    runner = add(queue)
    first = busy(queue, runner)
    assert first.state is JobState.RUNNING
    waiting = submitted(queue, [job(runner) for _ in range(3)])
    assert batches(queue.complete(first, 1)) == [waiting]
    assert queue.busy_lanes == 1
    assert [(one.lane, one.slot, one.batch) for one in waiting] == [(0, 0, 3)] * 3
    queue.complete(waiting[0], 2)
    assert all(one.state is JobState.DONE for one in waiting)
    counters = runner.counters
    assert (counters.batches, counters.batched, counters.completed) == (1, 3, 4)
    assert counters.run_seconds == pytest.approx(2.0)


def test_no_more_rows_go_together_than_may():
    queue = device()
    runner = add(queue, rows=4)
    first = busy(queue, runner)
    one, two, three = submitted(queue, [job(runner, 2), job(runner, 2), job(runner, 1)])
    assert batches(queue.complete(first, 1)) == [[one, two]]
    assert batches(queue.complete(one, 2)) == [[three]]


def test_the_first_that_does_not_fit_ends_the_batch_so_that_nobody_is_passed():
    queue = device()
    runner = add(queue, rows=4)
    first = busy(queue, runner)
    one, large, small = submitted(queue, [job(runner, 2), job(runner, 3), job(runner, 1)])
    assert batches(queue.complete(first, 1)) == [[one]]
    assert batches(queue.complete(one, 2)) == [[large, small]]


def test_one_that_is_larger_than_a_batch_goes_alone_in_its_place():
    queue = device()
    runner = add(queue, rows=4)
    first = busy(queue, runner)
    one, large, two = submitted(queue, [job(runner), job(runner, 9), job(runner)])
    assert batches(queue.complete(first, 1)) == [[one]]
    assert batches(queue.complete(one, 2)) == [[large]]
    assert batches(queue.complete(large, 3)) == [[two]]


def test_only_equal_keys_go_together_and_a_job_without_one_goes_alone():
    queue = device()
    runner = add(queue)
    first = busy(queue, runner)
    k1, other, keyless, k2 = submitted(
        queue, [job(runner), job(runner, key="l"), job(runner, key=None), job(runner)]
    )
    assert batches(queue.complete(first, 1)) == [[k1, k2]]
    assert batches(queue.complete(k1, 2)) == [[other]]
    assert batches(queue.complete(other, 3)) == [[keyless]]


def test_higher_classes_lead_and_fill_first():
    queue = device()
    runner = add(queue, rows=3)
    first = busy(queue, runner)
    low, normal, high = submitted(
        queue, [job(runner, priority=p) for p in (Priority.LOW, Priority.NORMAL, Priority.HIGH)]
    )
    assert batches(queue.complete(first, 1)) == [[high, normal, low]]


def test_a_leases_jobs_go_alone():
    queue = device()
    runner = add(queue, slots=2)
    lease = take_lease(queue, runner)
    one, two = Job(lease, key="k"), Job(lease, key="k")
    assert batches(queue.submit(one, 0)) == [[one]]
    queue.submit(two, 0)
    assert batches(queue.complete(one, 1)) == [[two]]


def test_where_several_come_in_one_turn_they_are_gathered_from_the_second_on():
    queue = device(lanes=3)
    runner = add(queue, slots=3, rows=8)
    first, *others = [job(runner) for _ in range(4)]
    assert queue.submit(first, 0) == [NextTurn(), Launch(first)]
    for one in others:
        assert queue.submit(one, 0) == []
    assert batches(queue.turn(0)) == [others]
    again = [job(runner) for _ in range(2)]
    assert queue.submit(again[0], 1) == [NextTurn()]
    assert queue.submit(again[1], 1) == []
    assert batches(queue.turn(1)) == [again]


def test_one_that_is_late_when_it_comes_has_come_all_the_same():
    queue = device()
    runner = add(queue, slots=2)
    teach(queue, runner, 1.0)
    late, other = job(runner, deadline=0.5), job(runner)
    assert queue.submit(late, 0.0) == [NextTurn(), Expire(late, 1.0)]
    assert queue.submit(other, 0.0) == []  # the second in this turn
    assert batches(queue.turn(0.0)) == [[other]]


def test_a_turn_with_one_job_ends_the_gathering():
    queue = device(lanes=4)
    runner = add(queue, slots=4)
    for one in [job(runner), job(runner)]:
        queue.submit(one, 0)
    queue.turn(0)
    lonely, next_one = job(runner), job(runner)
    assert queue.submit(lonely, 1) == [NextTurn()]
    assert batches(queue.turn(1)) == [[lonely]]
    assert queue.submit(next_one, 2) == [NextTurn(), Launch(next_one)]


def test_one_that_comes_while_a_ripe_key_waits_for_a_slot_joins_it_at_once():
    queue = device()
    runner = add(queue)
    first = busy(queue, runner)
    ripe, *late = [job(runner) for _ in range(3)]
    submitted(queue, [ripe])
    for one in late:
        queue.submit(one, 1)
    assert batches(queue.complete(first, 1)) == [[ripe, *late]]


def test_a_delay_is_waited_for_company_and_no_longer():
    queue = device()
    runner = add(queue, delay=DELAY)
    one, two = job(runner), job(runner)
    assert WakeAt(DELAY) in queue.submit(one, 0)
    queue.turn(0)
    assert queue.submit(two, 0.5) == [NextTurn()]
    queue.turn(0.5)
    assert queue.tick(0.75) == [WakeAt(DELAY)]
    assert batches(queue.tick(DELAY)) == [[one, two]]


def test_any_fact_sees_that_the_delay_is_over():
    queue = device()
    runner, other = add(queue, delay=DELAY), add(queue, "other")
    waiting, newcomer = job(runner), job(other)
    submitted(queue, [waiting])
    assert batches(queue.submit(newcomer, DELAY)) == [[waiting]]


def test_a_launch_that_nobody_contends_for_sees_it_too():
    queue = device()
    runner = add(queue, slots=2, delay=DELAY)
    other = add(queue, "inline", placing=Placing(Placement.INLINE))
    waiting, newcomer = job(runner), job(other, key=None)
    submitted(queue, [waiting])
    assert batches(queue.submit(newcomer, DELAY)) == [[newcomer], [waiting]]


def test_a_full_batch_waits_for_nobody():
    queue = device()
    runner = add(queue, rows=2, delay=DELAY)
    one, two = job(runner), job(runner)
    submitted(queue, [one])
    queue.turn(0)
    assert batches(queue.submit(two, 0.25)) == [[one, two]]


def test_one_that_is_larger_than_a_batch_waits_for_nobody():
    queue = device()
    large = job(add(queue, rows=4, delay=DELAY), 9)
    assert batches(queue.submit(large, 0)) == [[large]]


def test_a_full_batch_that_came_in_one_turn_goes_at_its_end():
    queue = device()
    runner = add(queue, rows=3, delay=DELAY)
    jobs = [job(runner) for _ in range(3)]
    assert [batches(queue.submit(one, 0)) for one in jobs] == [[], [], []]
    assert batches(queue.turn(0)) == [jobs]


def test_what_a_full_batch_leaves_goes_next():
    queue = device()
    runner = add(queue, rows=2, delay=DELAY)
    one, two, three = submitted(queue, [job(runner), job(runner), job(runner)])
    assert (one.state, two.state) == (JobState.RUNNING, JobState.RUNNING)
    assert three.state is JobState.QUEUED
    assert queue.complete(one, 0.25) == []  # a key that is queued anew waits anew
    assert batches(queue.tick(DELAY)) == [[three]]


def test_nobody_is_made_to_wait_past_a_deadline():
    queue = device()
    runner = add(queue, delay=DELAY, placing=Placing(follow_limit=1e-9))  # which makes it learn
    hurried = job(runner, deadline=0.5)
    assert batches(queue.submit(hurried, 0)) == [[hurried]], "how long it takes is not known"
    queue.turn(0)
    queue.complete(hurried, 0.25)
    for _ in range(8):
        lesson = job(runner, key=None)
        queue.submit(lesson, 1)
        queue.complete(lesson, 1, started=0, finished=0.25)
    late, patient = job(runner, deadline=3), job(runner)
    submitted(queue, [patient], now=2)
    queue.submit(late, 2)
    assert queue.tick(2) == [WakeAt(2.25)]  # time for two runs, and a third that is not used
    assert batches(queue.tick(2.25)) == [[late, patient]]


def test_members_that_leave_before_the_launch_are_left_out():
    queue = device()
    runner = add(queue)
    first = busy(queue, runner)
    stays, cancelled, expired = submitted(
        queue, [job(runner), job(runner), job(runner, deadline=1)]
    )
    queue.cancel(cancelled, 0.5)
    commands = queue.complete(first, 1)
    assert Expire(expired) in commands
    assert batches(commands) == [[stays]]


def test_members_that_leave_while_it_runs_are_dropped_and_their_time_is_wasted():
    queue = device()
    runner = add(queue)
    first = busy(queue, runner)
    stays, cancelled, expired = submitted(
        queue, [job(runner), job(runner), job(runner, deadline=2)]
    )
    queue.complete(first, 1, started=1)
    queue.cancel(cancelled, 1.5)
    assert Expire(expired) in queue.tick(2)
    queue.complete(expired, 4)  # it was due first, and led
    assert [one.state for one in (stays, cancelled, expired)] == [
        JobState.DONE,
        JobState.CANCELLED,
        JobState.EXPIRED,
    ]
    assert runner.counters.wasted_seconds == pytest.approx(2.0)


def failed_batch(count=3, **fields):
    queue = device()
    runner = add(queue, **fields)
    first = busy(queue, runner)
    members = submitted(queue, [job(runner) for _ in range(count)])
    queue.complete(first, 1)
    return queue, runner, members


def test_members_of_a_failed_batch_are_run_again_one_by_one_and_only_the_bad_one_fails():
    queue, runner, (one, bad, two) = failed_batch()
    assert queue.complete(one, 2, ok=False) == [Launch(one)]
    assert (one.members, one.batch, one.state) == ((), 1, JobState.RUNNING)
    assert queue.complete(one, 3) == [Launch(bad)]
    assert queue.complete(bad, 4, ok=False) == [Launch(two)]
    assert queue.busy_lanes == 1
    assert queue.complete(two, 5) == []
    assert queue.busy_lanes == 0
    assert [m.state for m in (one, bad, two)] == [JobState.DONE, JobState.FAILED, JobState.DONE]
    counters = runner.counters
    assert (counters.completed, counters.failed, counters.retried, counters.wasted_seconds) == (
        3,
        1,
        3,
        1.0,
    )


def test_who_is_run_again_was_in_the_queue_until_its_batch_ran():
    queue, runner, (one, two) = failed_batch(2)
    queue.complete(one, 2, ok=False)
    queue.complete(one, 3)
    queue.complete(two, 4)
    assert runner.counters.queue_seconds == pytest.approx(2.0)  # each up to the launch of the batch
    assert runner.counters.run_seconds == pytest.approx(1 + 1 + 2)


def test_runs_on_the_loop_count_for_each_member_and_each_rerun():
    queue = device()
    runner = add(queue, placing=Placing(Placement.INLINE))
    first = busy(queue, runner)
    one, two = submitted(queue, [job(runner), job(runner)])
    queue.complete(first, 0)
    queue.complete(one, 0, ok=False)
    assert runner.counters.inline == 3
    queue.complete(one, 0)
    queue.complete(two, 0)
    assert runner.counters.inline == 5


def test_who_has_left_is_not_run_again():
    queue, runner, (one, two, three) = failed_batch()
    queue.cancel(one, 1.5)
    assert queue.complete(one, 2, ok=False) == [Launch(two)]
    queue.cancel(three, 2.5)
    assert queue.complete(two, 3) == []
    assert (queue.busy_lanes, runner.idle) == (0, True)


def test_nobody_is_run_again_when_all_have_left():
    queue, runner, members = failed_batch()
    for member in members:
        queue.cancel(member, 1.5)
    assert queue.complete(members[0], 2, ok=False) == []
    assert (queue.busy_lanes, runner.idle) == (0, True)


def test_a_job_that_ran_alone_is_not_run_again():
    queue = device()
    runner = add(queue)
    first = busy(queue, runner)
    assert queue.complete(first, 1, ok=False) == []
    assert first.state is JobState.FAILED


def test_a_barrier_and_a_drain_wait_for_those_that_are_run_again():
    queue, runner, (one, two) = failed_batch(2)
    queue.close_barrier(runner, 1)
    queue.drain_runner(runner, 1)
    assert queue.complete(one, 2, ok=False) == [Launch(one)]
    assert queue.complete(one, 3) == [Launch(two)]
    assert queue.complete(two, 4) == [BarrierReached(runner)]
    assert queue.open_barrier(runner, 4) == [Drained(runner)]


def test_a_draining_runner_waits_for_nobody():
    queue = device()
    runner = add(queue, delay=DELAY)
    one = job(runner)
    submitted(queue, [one])
    assert batches(queue.drain_runner(runner, 0.25)) == [[one]]


def test_terminating_revokes_what_waits_for_company():
    queue = device()
    runner = add(queue, delay=DELAY)
    one = job(runner)
    submitted(queue, [one])
    revoke, drained = queue.terminate_runner(runner, 0.25)
    assert type(revoke) is Revoke
    assert drained == Drained(runner)


SHORT, LIMIT, BUDGET = 1.0, 16.0, 1000.0


def learned(queue, runner, size):
    """Eight runs of one job of `size` bytes."""
    for _ in range(8):
        lesson = Job(runner, bytes=size)
        queue.submit(lesson, 0)
        queue.complete(lesson, 0, started=0, finished=SHORT)


def inline_device():
    return CheckedQueue("cpu", 1, Bounds(None, None), inline_budget=BUDGET)


def gathered(queue, runner, count, size):
    """So many come in one turn; whoever came first went alone."""
    jobs = [job(runner, bytes=size) for _ in range(count)]
    for one in jobs:
        queue.submit(one, 0)
    queue.complete(jobs[0], 0, started=0, finished=SHORT)
    return jobs[1:]


def test_a_batch_on_the_loops_thread_grows_as_far_as_its_run_is_likely_to_be_short():
    """A run is believed to take no longer per byte than a smaller one: 8 jobs of 1 s, and not
    16, may be below 16 s.
    """
    queue = inline_device()
    runner = add(queue, rows=64, placing=Placing(Placement.AUTO, LIMIT))
    learned(queue, runner, 1)
    queue.submit(Job(add(queue, "other")), 0)  # it has the lane
    jobs = gathered(queue, runner, 40, 1)
    (batch,) = batches(queue.turn(0))
    assert batch[0].lane == LOOP
    assert (
        len(batch) == 15
    )  # of 8 to 15 bytes, which may take 8 s; 16 bytes may take as long as the limit
    for _ in range(8):
        runner.placing.times.learn(15, SHORT, 0.0)
    queue.complete(batch[0], 0, started=0, finished=SHORT)
    assert queue.lanes.running[LOOP].batch == len(jobs) - 15, (
        "15 bytes are known to take as long as one, so the rest may go at once"
    )


def test_a_batch_of_inline_runs_that_were_asked_for_grows_to_its_bound():
    queue = inline_device()
    runner = add(queue, rows=8, placing=Placing(Placement.INLINE))
    jobs = gathered(queue, runner, 20, 1)
    assert [len(batch) for batch in batches(queue.turn(0))] == [8]
    assert jobs[0].inline


def test_a_batch_that_the_loop_can_not_take_whole_goes_to_a_lane_that_nobody_wants():
    queue = inline_device()
    runner = add(queue, rows=64, placing=Placing(Placement.AUTO, LIMIT))
    learned(queue, runner, 1)
    jobs = gathered(queue, runner, 40, 1)
    (batch,) = batches(queue.turn(0))
    assert (batch, batch[0].lane) == (jobs, 0)


def test_a_batch_that_the_loop_can_take_whole_stays_there_though_a_lane_is_free():
    queue = inline_device()
    runner = add(queue, rows=64, placing=Placing(Placement.AUTO, LIMIT))
    learned(queue, runner, 1)
    jobs = gathered(queue, runner, 16, 1)
    (batch,) = batches(queue.turn(0))
    assert (batch, batch[0].lane) == (jobs, LOOP)


def test_no_batch_goes_to_a_lane_that_another_waits_for():
    queue = inline_device()
    runner, wide = (
        add(queue, rows=64, placing=Placing(Placement.AUTO, LIMIT)),
        queue.add_runner("other", 1, Bounds(None, None)),
    )
    learned(queue, runner, 1)
    running, waiting = Job(wide), Job(wide, priority=Priority.LOW)
    queue.submit(running, 0)
    queue.submit(waiting, 0)
    gathered(queue, runner, 40, 1)
    (batch,) = batches(queue.turn(0))
    assert batch[0].lane == LOOP
    assert len(batch) == 15


def test_what_many_take_together_tells_that_one_alone_is_short():
    """Where requests always come together, one alone is never seen, and it would go to the
    lanes for ever.
    """
    placing = Placing(Placement.AUTO, LIMIT)
    for _ in range(8):
        placing.times.learn(64, SHORT, 0.0)
    assert placing.inline(1)
    assert placing.grows(3, 3)
    assert not placing.inline(128)


def test_each_request_of_a_batch_may_take_as_much_longer_as_it_would_cost_on_a_lane():
    placing = Placing(Placement.AUTO, LIMIT, hop=1.0)
    for _ in range(8):
        placing.times.learn(64, LIMIT + 60, 0.0)
    assert not placing.inline(64)
    assert placing.inline(1)
    assert not placing.grows(64, 61)
    assert placing.grows(64, 62)


def test_one_run_that_takes_all_the_budget_says_that_larger_ones_are_not_short():
    placing = Placing(Placement.AUTO, LIMIT)
    for size in (1, 64):
        for _ in range(8):
            placing.times.learn(size, SHORT, 0.0)
    assert placing.learn(1, BUDGET + 1, 0.0, too_long=True)
    assert not placing.inline(1)
    assert not placing.inline(64)


def test_too_few_runs_tell_nothing():
    placing = Placing(Placement.AUTO, LIMIT)
    for size in (1, 100):
        for _ in range(7):
            placing.times.learn(size, SHORT, 0.0)
    assert not placing.inline(1)
    assert not placing.grows(3, 1)
    assert not placing.grows(200, 1)


def following():
    """A lane that runs a short job, and may be given the next ones of its runner ahead."""
    queue = device()
    runner = add(queue, placing=Placing(Placement.LANE, follow_limit=2.0))
    for _ in range(8):
        lesson = Job(runner)
        queue.submit(lesson, 0)
        queue.complete(lesson, 0, started=0, finished=1)
    first = job(runner)
    queue.submit(first, 0)
    queue.turn(0)
    return queue, runner, first


def test_a_batch_is_handed_ahead():
    queue, runner, first = following()
    behind = [job(runner) for _ in range(3)]
    assert batches(queue.submit(behind[0], 0)) == [[behind[0]]]
    queue.submit(behind[1], 0)
    queue.submit(behind[2], 0)
    queue.turn(0)
    assert batches(queue.complete(first, 1)) == [behind[1:]]
    assert queue.lanes.handed_ahead == {0: [behind[1]]}
    queue.complete(behind[0], 2)
    queue.complete(behind[1], 3)
    assert all(one.state is JobState.DONE for one in behind)


def failed_with_one_behind():
    """A batch that has failed on a lane where another job was handed ahead."""
    queue, runner, first = following()
    one, two, three = (job(runner) for _ in range(3))
    queue.submit(one, 0)  # behind the first
    queue.submit(two, 0)
    queue.submit(three, 0)
    queue.turn(0)
    queue.complete(first, 1)  # one runs, the batch is behind it
    last = job(runner)
    queue.complete(one, 2)
    queue.submit(last, 2)
    queue.turn(2)
    assert queue.lanes.handed_ahead == {0: [last]}
    return queue, runner, (two, three), last


def test_reruns_go_behind_what_the_lane_was_given_already():
    queue, runner, (two, three), last = failed_with_one_behind()
    assert queue.complete(two, 3, ok=False) == [Launch(two)]
    assert queue.lanes.handed_ahead == {0: [two]}
    assert queue.complete(last, 4) == []
    assert queue.complete(two, 5) == [Launch(three)]
    assert queue.complete(three, 6) == []
    assert (queue.busy_lanes, runner.idle) == (0, True)


def test_a_lane_that_runs_something_again_is_given_nothing_ahead():
    queue, runner, (two, three), last = failed_with_one_behind()
    queue.complete(two, 3, ok=False)
    queue.complete(last, 4, started=3, finished=4)  # short as ever: a lane might be given another
    newcomer = job(runner)
    assert batches(queue.submit(newcomer, 4)) == []
    queue.turn(4)
    queue.complete(two, 5)
    assert batches(queue.complete(three, 6)) == [[newcomer]]


def test_nor_is_one_where_the_last_of_a_batch_is_run_again():
    queue, runner, (two, three), last = failed_with_one_behind()
    queue.cancel(three, 2)
    queue.complete(two, 3, ok=False)
    queue.complete(last, 4, started=3, finished=4)  # short as ever: a lane might be given another
    newcomer = job(runner)
    assert batches(queue.submit(newcomer, 4)) == []
    queue.turn(4)
    assert batches(queue.complete(two, 5)) == [[newcomer]]


def test_a_lane_where_a_batch_is_run_again_is_given_nothing_ahead_when_what_was_behind_ends_first():
    queue, runner, first = following()
    one, other = [job(runner) for _ in range(2)], [job(runner) for _ in range(2)]
    second = job(runner, key=None)
    queue.submit(second, 0)
    for each in one:
        queue.submit(each, 0)
    queue.turn(0)
    queue.complete(first, 1)  # second runs, the one batch is behind it
    queue.complete(second, 2)
    for each in other:
        queue.submit(each, 2)
    queue.turn(2)
    queue.submit(job(runner, key=None, priority=Priority.LOW), 2)
    assert (queue.lanes.running, queue.lanes.handed_ahead) == ({0: one[0]}, {0: [other[0]]})
    assert queue.complete(one[0], 3, ok=False) == [Launch(one[0])]  # behind the other batch
    assert queue.complete(other[0], 4, ok=False) == [
        Launch(other[0])
    ]  # behind the first of the one
    assert queue.complete(other[0], 5) == [Launch(other[1])]
    assert queue.complete(other[1], 5) == []
    assert queue.complete(one[0], 6) == [Launch(one[1])]


def test_a_rerun_that_its_lane_would_not_take_fails_and_the_next_is_tried():
    queue, _, (two, three), last = failed_with_one_behind()
    queue.complete(two, 3, ok=False)
    assert queue.complete(two, 3, ok=False) == [
        Launch(three)
    ]  # refused: what runs there is still running
    assert queue.complete(three, 3, ok=False) == []
    assert queue.complete(last, 4) == []
    assert [two.state, three.state, last.state] == [JobState.FAILED, JobState.FAILED, JobState.DONE]


@pytest.mark.parametrize("fields", [{"rows": 0}, {"is_lease_request": True}])
def test_a_job_with_a_key_that_has_no_rows_or_does_not_run_is_illegal(fields):
    queue = device()
    runner = add(queue)
    with pytest.raises(IllegalFactError):
        queue.submit(Job(runner, key="k", **fields), 0)
    assert runner.counters.submitted == 0
