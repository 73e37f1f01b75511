"""Live weights through the real front on fake devices: one instant for all, nothing lost,
nothing mixed, a way back.
"""

from __future__ import annotations

import asyncio

import pytest
import structlog

import aoti_sched
from aoti_sched import Limits, Priority, Scheduler
from aoti_sched.engine.weights import staging
from aoti_sched.testing import FakeBackend, settle
from tests.inside import container_of, replica_of
from tests.unit.engine.support import Held, fleet, until, weights


@pytest.fixture(autouse=True)
def quiet_logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


def later(awaitable):
    return asyncio.ensure_future(awaitable)


async def gone(task):
    """Cancel it, and see that it leaves at once."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- what an update is ----------------------------------------------------------------------------


async def test_an_update_brings_the_new_set_and_the_next_epoch():
    async with fleet("a") as its:
        (a,) = its
        assert await its.answer(a) == (1, 1)
        report = await a.update(weights(2))
        assert (report.runner, report.epoch, report.bytes, report.waited) == ("a", 2, 2, 0)
        assert a.epoch == a.info.epoch == a.stats().epoch == 2
        assert await its.answer(a) == (2, 2)


async def test_several_runners_on_two_devices_change_together():
    async with fleet() as its:
        a, b, c = its
        reports = await its.scheduler.update({c: weights(4), b: weights(3), a: weights(2)})
        assert {runner.name: report.epoch for runner, report in reports.items()} == {
            "a": 2,
            "b": 2,
            "c": 2,
        }
        assert [await its.answer(runner) for runner in (a, b, c)] == [(2, 2), (2, 3), (2, 4)]


async def test_the_report_tells_what_each_step_took():
    async with fleet("a", auto=False) as its:
        (a,) = its
        container_of(a).folds = True
        for step, seconds in [("stage", 8), ("fold", 4), ("swap", 1)]:
            takes(its.clock, container_of(a), step, seconds)
        running, queued = a.submit(), a.submit()
        updating = later(a.update(weights(2)))
        await until(lambda: a.stats().queued == 2)  # the fold's lease goes first
        await its.backends["cpu"].step()
        await until(lambda: a.stats().updating)
        more = [a.submit(), a.submit()]
        its.clock.advance(2)
        await its.backends["cpu"].step()
        report = await updating
        assert (report.stage_seconds, report.fold_seconds) == (8, 4)
        assert (report.drain_seconds, report.swap_seconds, report.pause_seconds) == (2, 1, 3)
        assert report.waited == 2
        its.backends["cpu"].finish_all()
        assert await asyncio.gather(running, queued, *more) == [(1, 1), (1, 1), (2, 2), (2, 2)]


def takes(clock, container, step, seconds):
    call = getattr(container, step)

    def slow(*args, **kwargs):
        clock.advance(seconds)
        return call(*args, **kwargs)

    setattr(container, step, slow)


async def test_a_commit_tells_what_its_staging_took_and_a_rollback_staged_nothing():
    async with fleet("a") as its:
        (a,) = its
        takes(its.clock, container_of(a), "stage", 8)
        await a.stage(weights(2))
        its.clock.advance(100)
        report = await a.commit()
        assert (report.stage_seconds, report.bytes, report.pause_seconds) == (8, 2, 0)
        report = await a.rollback()
        assert (report.epoch, report.stage_seconds, report.fold_seconds, report.bytes) == (
            1,
            0,
            0,
            0,
        )


async def test_each_published_set_is_one_line_in_the_log(quiet_logs):
    async with fleet("ab") as its:
        quiet_logs.clear()
        await its.update(2)
        lines = [
            (e["runner"], e["device"], e["epoch"])
            for e in quiet_logs
            if e["event"] == "weights published"
        ]
        assert lines == [("a", "cpu", 2), ("b", "other", 2)]
        assert len(quiet_logs) == 2


async def test_a_partial_update_keeps_what_it_does_not_name():
    async with fleet("a") as its:
        (a,) = its
        await a.update({"w": 7}, partial=True)
        assert await a.extract() == {"w": 7, "b": 1}


async def test_a_set_that_does_not_fit_is_refused_with_every_fault_and_nothing_changes():
    async with fleet() as its:
        a, b, c = its
        with pytest.raises(aoti_sched.ConstantMismatchError) as caught:
            await its.scheduler.update({a: weights(2), b: {"w": 2, "x": 2}, c: weights(2)})
        assert caught.value.faults == (("x", "is unknown"), ("b", "is missing"))
        assert its.epochs == [1, 1, 1]
        await its.must_be_sound()
        await its.update(2)
        await its.must_be_sound()


async def test_a_model_that_cannot_be_updated_says_why():
    async with fleet("ab") as its:
        a, b = its
        container_of(b).updatable = "it was compiled with freeze=True"
        with pytest.raises(aoti_sched.UpdateError, match=r"runner 'b': .* freeze=True"):
            await its.scheduler.update({a: weights(2), b: weights(2)})
        await its.must_be_sound()
        assert its.epochs == [1, 1]


async def test_extract_gives_copies_of_either_set():
    async with fleet("a") as its:
        (a,) = its
        with pytest.raises(
            aoti_sched.UpdateError, match=r"'a': extract\(inactive=True\).* holds nothing"
        ):
            await a.extract(inactive=True)
        await a.update(weights(2))
        copy = await a.extract()
        copy["w"] = 9
        assert (await a.extract(), await a.extract(inactive=True)) == (weights(2), weights(1))


# --- the way back ---------------------------------------------------------------------------------


async def test_a_rollback_goes_back_to_the_old_number_and_the_next_set_gets_a_new_one():
    async with fleet("a") as its:
        (a,) = its
        await its.update(2)
        assert (await a.rollback()).epoch == a.epoch == 1
        assert await its.answer(a) == (1, 1)
        assert (await a.update(weights(3))).epoch == 3
        assert await its.answer(a) == (3, 3)
        assert (await a.rollback()).epoch == 1


async def test_a_second_rollback_returns():
    async with fleet() as its:
        await its.update(2)
        for epoch in (1, 2, 1, 2):
            reports = await its.scheduler.rollback(*its)
            assert [report.epoch for report in reports.values()] == its.epochs == [epoch] * 3
            await its.must_be_sound()


async def test_without_a_previous_set_nothing_is_rolled_back_anywhere():
    async with fleet("ab") as its:
        a, b = its
        await its.update(2, a)
        with pytest.raises(
            aoti_sched.UpdateError, match=r"'b': rollback\(\) has nothing .* holds nothing"
        ):
            await its.scheduler.rollback(a, b)
        assert its.epochs == [2, 1]
        await its.must_be_sound()
        await a.rollback()


async def test_what_is_kept_is_told_and_given_back():
    async with fleet("a") as its:
        (a,) = its
        assert (a.info.staged, a.info.previous_epoch, a.info.inactive_bytes) == (False, None, 0)
        await its.update(2)
        assert (a.info.staged, a.info.previous_epoch, a.info.inactive_bytes) == (False, 1, 2)
        await a.free_previous()
        await a.free_previous()
        assert (a.info.staged, a.info.previous_epoch, a.info.inactive_bytes) == (False, None, 0)
        with pytest.raises(aoti_sched.UpdateError, match="nothing to go back to"):
            await a.rollback()


async def test_keep_previous_off_gives_the_old_set_back_on_every_runner():
    async with fleet() as its:
        await its.update(2, keep_previous=False)
        assert [runner.info.inactive_bytes for runner in its] == [0, 0, 0]
        await its.must_be_sound()


async def test_a_staged_set_waits_until_it_is_committed_or_dropped():
    async with fleet("ab") as its:
        a, b = its
        await a.stage(weights(2))
        await b.stage(weights(2))
        assert (a.info.staged, a.info.inactive_bytes, await its.answer(a)) == (True, 2, (1, 1))
        await b.discard()
        await b.discard()
        assert (b.info.staged, b.info.inactive_bytes) == (False, 0)
        with pytest.raises(aoti_sched.UpdateError, match=r"'b': commit\(\) has nothing to publish"):
            await its.scheduler.commit(a, b)
        assert (a.info.staged, its.epochs) == (True, [1, 1])
        its.published(await its.scheduler.commit(a), 2)
        await its.must_be_sound()


async def test_discard_leaves_a_previous_set_and_free_previous_a_staged_one():
    async with fleet("a") as its:
        (a,) = its
        await its.update(2)
        await a.discard()
        assert a.info.previous_epoch == 1
        await a.stage(weights(3))
        await a.free_previous()
        assert (a.info.staged, a.info.previous_epoch) == (True, None)


async def test_a_runner_given_twice_counts_once():
    async with fleet("a") as its:
        (a,) = its
        await a.stage(weights(2))
        its.published(await its.scheduler.commit(a, a), 2)
        assert list(await its.scheduler.rollback(a, a)) == [a]
        await its.must_be_sound()


async def test_a_refused_set_leaves_what_was_staged_or_kept_before():
    async with fleet("ab") as its:
        a, b = its
        await its.update(2, a)
        await b.stage(weights(2))
        for call in (
            a.stage({}),
            b.stage({}),
            a.update({}),
            b.update({}),
            its.scheduler.update({a: {}, b: {}}),
        ):
            with pytest.raises(aoti_sched.ConstantMismatchError):
                await call
            assert (a.info.previous_epoch, b.info.staged) == (1, True)
        await its.must_be_sound()
        await a.rollback()
        its.published({b: await b.commit()}, 2)
        await its.must_be_sound()


# --- what is asked for wrongly --------------------------------------------------------------------


async def test_no_runner_is_a_mistake_and_is_told():
    async with fleet("a") as its:
        for nothing in (its.scheduler.update({}), its.scheduler.commit(), its.scheduler.rollback()):
            with pytest.raises(aoti_sched.UpdateError, match="no runner was given"):
                await nothing


async def test_a_timeout_that_is_no_time_is_refused():
    async with fleet("a") as its:
        (a,) = its
        for timeout in (-1, float("nan")):
            with pytest.raises(ValueError, match="seconds, not negative"):
                await a.update(weights(2), timeout=timeout)
        await its.must_be_sound()


async def test_a_runner_of_another_scheduler_is_refused():
    async with fleet("a") as its, fleet("a") as others:
        (mine,), (other,) = its, others
        for call in (
            its.scheduler.update({mine: weights(2), other: weights(2)}),
            its.scheduler.commit(mine, other),
            its.scheduler.rollback(other),
        ):
            with pytest.raises(
                aoti_sched.RunnerClosedError, match="'a' is closed, or belongs to another scheduler"
            ):
                await call
        assert (mine.epoch, other.epoch) == (1, 1)


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["stage", "fold", "swap"])
@pytest.mark.parametrize("name", ["a", "b", "c"])
async def test_a_fault_on_one_of_three_runners_changes_none(step, name):
    async with fleet() as its:
        container_of(its.runners[name]).folds = True
        container_of(its.runners[name]).faults[step] = RuntimeError(f"{step} failed")
        with pytest.raises(RuntimeError, match=f"{step} failed"):
            await its.update(2)
        assert its.epochs == [1, 1, 1]
        assert [runner.info.inactive_bytes for runner in its] == [0, 0, 0]
        await its.must_be_sound()
        await its.update(3)
        await its.must_be_sound()


async def test_a_container_that_cannot_go_back_leaves_rather_than_serve_what_the_others_do_not():
    async with fleet() as its:
        a, b, c = its
        swap = container_of(a).swap

        def swap_once():
            container_of(a).faults["swap"] = RuntimeError("no way back")
            container_of(a).swap = swap
            container_of(a).inactive, container_of(a).weights = (
                container_of(a).weights,
                container_of(a).inactive,
            )

        container_of(a).swap = swap_once
        container_of(c).faults["swap"] = RuntimeError("swap failed")
        with pytest.raises(RuntimeError, match="swap failed"):
            await its.update(2)
        with pytest.raises(aoti_sched.RunnerClosedError):
            a.submit()
        del its.runners["a"]
        await its.must_be_sound()
        await its.update(3, b, c)
        await its.must_be_sound()


async def test_memory_that_is_not_given_back_does_not_undo_an_update(quiet_logs):
    async with fleet() as its:
        container_of(its.runners["a"]).faults["free_inactive"] = RuntimeError("not now")
        await its.update(2, keep_previous=False)
        assert its.epochs == [2, 2, 2]
        assert [r.info.inactive_bytes for r in its] == [2, 0, 0]
        assert [e["runner"] for e in quiet_logs if "freed" in e["event"]] == ["a"]
        await its.must_be_sound()
        await its.runners["a"].free_previous()
        await its.must_be_sound()


async def test_a_failed_update_whose_memory_stays_raises_its_own_error_and_stages_nothing():
    async with fleet() as its:
        a, b, c = its
        container_of(a).faults["free_inactive"] = RuntimeError("not now")
        with pytest.raises(aoti_sched.ConstantMismatchError):
            await its.scheduler.update({a: weights(2), b: weights(2), c: {}})
        assert [r.info.staged for r in its] == [False, False, False]
        assert b.info.inactive_bytes == 0
        await its.update(3)
        await its.must_be_sound()


async def test_a_discard_that_fails_can_be_tried_again():
    async with fleet("a") as its:
        (a,) = its
        await a.stage(weights(2))
        container_of(a).faults["free_inactive"] = RuntimeError("not now")
        with pytest.raises(RuntimeError, match="not now"):
            await a.discard()
        assert (a.info.staged, a.info.inactive_bytes) == (True, 2)
        await a.discard()
        await its.must_be_sound()


async def test_a_failed_fold_has_the_container_rebuilt_before_anything_starts_on_it():
    async with fleet("a", auto=False) as its:
        (a,) = its
        await its.update(2)
        rebuilt = []
        rebuild = container_of(a).rebuild

        def noted():
            rebuilt.append((its.backends["cpu"].running, a.stats().updating))
            rebuild()

        container_of(a).rebuild = noted
        container_of(a).folds = True
        container_of(a).faults["fold"] = RuntimeError("fold failed")
        running, queued = a.submit(), a.submit()
        updating = later(a.update(weights(3)))
        await its.backends["cpu"].step()
        await until(lambda: its.backends["cpu"].running or updating.done())
        its.backends["cpu"].finish_all()
        with pytest.raises(RuntimeError, match="fold failed"):
            await updating
        assert rebuilt == [(0, True)]
        assert await asyncio.gather(running, queued) == [(2, 2), (2, 2)]
        await its.must_be_sound()


async def test_a_container_that_cannot_be_rebuilt_serves_no_more_and_can_be_closed(quiet_logs):
    async with fleet("ab") as its:
        a, b = its
        container_of(a).folds = True
        container_of(a).faults.update(
            fold=RuntimeError("fold failed"), rebuild=RuntimeError("rebuild failed")
        )
        with pytest.raises(RuntimeError, match="rebuild failed"):
            await its.update(2)
        with pytest.raises(aoti_sched.RunnerClosedError):
            a.submit()
        with pytest.raises(aoti_sched.RunnerClosedError):
            await a.update(weights(2))
        assert any(e["log_level"] == "error" and e["runner"] == "a" for e in quiet_logs)
        await a.aclose()
        del its.runners["a"]
        await its.must_be_sound()
        await its.update(3, b)


async def test_a_rebuild_waits_for_held_leases_but_not_so_the_caller():
    async with fleet("a", instances=2) as its:
        (a,) = its
        container_of(a).folds = True
        container_of(a).faults["fold"] = RuntimeError("fold failed")
        async with a.lease() as lease:
            updating = later(a.update(weights(2), timeout=5))
            await until(lambda: a.stats().updating)
            its.clock.advance(5)
            with pytest.raises(aoti_sched.DeadlineExceededError):
                await updating
            assert await lease.run() == (1, 1)
            assert a.stats().updating, "an instance is on the inactive buffer"
        await its.must_be_sound()
        await its.update(3)


# --- the fold's lease, when the queue is full -----------------------------------------------------


async def test_an_update_that_folds_works_while_the_queue_is_full():
    async with fleet("a", auto=False, limits=Limits(jobs=2)) as its:
        (a,) = its
        container_of(a).folds = True
        running, *queued = [a.submit() for _ in range(3)]
        updating = later(its.update(2))
        await until(lambda: a.stats().queued == 3)
        with pytest.raises(aoti_sched.QueueFullError):  # callers are bounded as before
            a.submit()
        its.backends["cpu"].finish_all()
        await updating
        for future in (running, *queued):
            assert await future == (future.trace.epoch,) * 2
        assert a.stats().rejected == 1
        await its.must_be_sound()


async def test_a_fold_waits_for_nothing_but_a_slot_when_another_runner_has_filled_the_device():
    async with fleet("ac", auto=False, lanes=1, room=2) as its:
        a, c = its
        container_of(a).folds = True
        others = [c.submit() for _ in range(3)]
        await its.update(2, a)
        assert not any(future.done() for future in others)
        its.backends["cpu"].finish_all()
        await asyncio.gather(*others)
        await its.must_be_sound()


async def test_a_fold_goes_before_those_who_are_queued_and_those_who_wait_for_room():
    async with fleet("a", auto=False, limits=Limits(jobs=1), overflow="wait") as its:
        (a,) = its
        container_of(a).folds = True
        running, queued = a.submit(), a.submit()
        urgent = a.options(priority=Priority.HIGH).submit()
        waiting = [a.submit() for _ in range(3)]
        held = Held(a, "fold")
        updating = later(its.update(2))
        await until(lambda: a.stats().queued == 2)
        its.backends["cpu"].finish_all()
        await held.reached()
        assert running.done()
        assert not any(future.done() for future in (queued, urgent, *waiting)), (
            "the fold has the slot"
        )
        held.go_on()
        await updating
        await asyncio.gather(queued, urgent, *waiting)
        await its.must_be_sound()


async def test_a_fold_at_a_full_queue_waits_for_a_held_lease_whose_runs_go_on():
    async with fleet("a", limits=Limits(jobs=1)) as its:
        (a,) = its
        container_of(a).folds = True
        async with a.lease() as lease:
            queued = a.submit()
            updating = later(its.update(2))
            await until(lambda: a.stats().queued == 2)
            assert await lease.run() == (1, 1)
            assert not queued.done()
            assert not updating.done()
        await updating
        assert await queued == (1, 1)
        await its.must_be_sound()


async def test_updates_that_fold_side_by_side_on_a_full_device_all_come_through():
    async with fleet("ac", auto=False, room=1, limits=Limits(jobs=1)) as its:
        for runner in its:
            container_of(runner).folds = True
        a, c = its
        running = [a.submit(), c.submit(), a.submit()]
        both = its.update(2), its.update(3, c), its.update(4, a)
        updating = [later(update) for update in both]
        await until(lambda: a.stats().queued == 2)
        its.backends["cpu"].finish_all()
        await asyncio.gather(*updating, *running)
        assert its.epochs == [3, 3]
        await its.must_be_sound()


@pytest.mark.parametrize("how", ["cancel", "timeout"])
async def test_a_fold_that_waits_behind_a_full_queue_can_be_given_up(how):
    async with fleet("a", auto=False, limits=Limits(jobs=1)) as its:
        (a,) = its
        container_of(a).folds = True
        futures = [a.submit(), a.submit()]
        updating = later(a.update(weights(2), timeout=5))
        await until(lambda: a.stats().queued == 2)
        if how == "cancel":
            await gone(updating)
        else:
            its.clock.advance(5)
            with pytest.raises(aoti_sched.DeadlineExceededError):
                await updating
        await its.quiet()
        assert (a.stats().queued, a.info.inactive_bytes) == (1, 0)
        its.backends["cpu"].finish_all()
        assert await asyncio.gather(*futures) == [(1, 1), (1, 1)]
        await its.must_be_sound()
        await its.update(3)


@pytest.mark.parametrize("way", ["aclose", "terminate"])
async def test_closing_while_a_fold_waits_for_a_slot_ends_the_update(way):
    async with fleet("a", auto=False, limits=Limits(jobs=1)) as its:
        (a,) = its
        container_of(a).folds = True
        running, queued = a.submit(), a.submit()
        updating = later(a.update(weights(2)))
        await until(lambda: a.stats().queued == 2)
        closing = later(getattr(a, way)())
        await settle()
        its.backends["cpu"].finish_all()
        with pytest.raises(aoti_sched.RunnerClosedError):
            await updating
        await closing
        assert await running == (1, 1)
        if way == "aclose":
            assert await queued == (1, 1)
        else:
            with pytest.raises(aoti_sched.RunnerClosedError):
                await queued
        its.runners.clear()


# --- giving up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["stage", "fold"])
async def test_a_step_in_its_thread_is_given_up_after_it_and_the_caller_leaves_at_once(step):
    async with fleet("a", instances=2) as its:  # folding has one of them
        (a,) = its
        container_of(a).folds = True
        await its.update(2)
        held = Held(a, step)
        updating = later(a.update(weights(3)))
        await held.reached()
        await gone(updating)
        assert await its.answer(a) == (2, 2)
        held.go_on()
        await its.must_be_sound()
        assert its.epochs == [2]
        await its.update(4)
        await its.must_be_sound()


@pytest.mark.parametrize("step", ["stage", "fold"])
async def test_what_timed_out_in_its_thread_is_never_published(step):
    async with fleet("a") as its:
        (a,) = its
        container_of(a).folds = True
        held = Held(a, step)
        updating = later(a.update(weights(2), timeout=5))
        await held.reached()
        its.clock.advance(5)
        with pytest.raises(
            aoti_sched.DeadlineExceededError, match=r"update of 'a': the timeout of 5 s passed"
        ):
            await updating
        held.go_on()
        await its.must_be_sound()
        assert (its.epochs, a.info.staged, a.info.inactive_bytes) == ([1], False, 0)


async def test_a_stage_that_is_given_up_leaves_nothing_staged():
    async with fleet("a") as its:
        (a,) = its
        held = Held(a, "stage")
        for leave in ("cancel", "timeout"):
            staging = later(a.stage(weights(2), timeout=5))
            await held.reached()
            if leave == "cancel":
                await gone(staging)
            else:
                its.clock.advance(5)
                with pytest.raises(aoti_sched.DeadlineExceededError):
                    await staging
            held.go_on()
            await its.must_be_sound()
            assert (a.info.staged, a.info.inactive_bytes) == (False, 0)
            held = Held(a, "stage")


async def test_a_timeout_at_the_barrier_opens_it_again():
    async with fleet(auto=False) as its:
        b = its.runners["b"]
        running = b.submit()
        updating = later(its.update(2, timeout=5))
        await until(lambda: b.stats().updating)
        waiting = [runner.submit() for runner in its]
        its.clock.advance(5)
        with pytest.raises(aoti_sched.DeadlineExceededError, match="update of 'a', 'b', 'c'"):
            await updating
        await settle()
        assert [runner.stats().updating for runner in its] == [False, False, False]
        for backend in its.backends.values():
            backend.finish_all()
        assert await asyncio.gather(running, *waiting) == [(1, 1)] * 4
        await its.must_be_sound()
        await its.update(3)


async def test_a_timeout_while_another_update_has_its_turn_leaves_that_one_alone():
    async with fleet("a") as its:
        (a,) = its
        held = Held(a, "stage")
        first = later(its.update(2))
        await held.reached()
        second = later(a.update(weights(3), timeout=5))
        await settle()
        its.clock.advance(5)
        with pytest.raises(aoti_sched.DeadlineExceededError):
            await second
        held.go_on()
        await first
        await its.must_be_sound()
        assert its.epochs == [2]


async def test_a_timeout_in_the_very_moment_the_barrier_is_reached_still_changes_nothing():
    async with fleet("a", auto=False) as its:
        (a,) = its
        running = a.submit()
        updating = later(a.update(weights(2), timeout=5))
        await until(lambda: a.stats().updating)
        its.backends["cpu"]._executor.step()
        replica_of(
            a
        ).dispatcher._collect()  # the last slot is home, the update has not yet been told
        its.clock.advance(5)
        with pytest.raises(aoti_sched.DeadlineExceededError):
            await updating
        assert await running == (1, 1)
        await its.must_be_sound()
        assert its.epochs == [1]


async def test_a_timeout_after_the_exchange_is_none():
    async with fleet("a") as its:
        (a,) = its
        held = Held(a, "free_inactive")
        updating = later(its.update(2, keep_previous=False, timeout=5))
        await held.reached()
        its.clock.advance(10)
        await settle()
        assert not updating.done()
        held.go_on()
        assert (await updating)[a].epoch == 2
        await its.must_be_sound()


async def test_memory_is_given_back_even_when_nobody_waits_for_it():
    async with fleet("a") as its:
        (a,) = its
        held = Held(a, "free_inactive")
        updating = later(a.update(weights(2), keep_previous=False))
        await held.reached()
        await gone(updating)
        held.go_on()
        its.sets[a][2] = 2
        await its.must_be_sound()
        assert (a.epoch, a.info.inactive_bytes) == (2, 0)


@pytest.fixture
def without_threads(monkeypatch):
    """What blocks is called on the loop, after one turn: an update then takes the same turns
    each time.
    """

    async def here(self, call):
        await asyncio.sleep(0)
        return call()

    async def read_here(runner, attempt, call):
        await asyncio.sleep(0)
        return call(None)

    monkeypatch.setattr(staging.InactiveBuffers, "in_thread", here)
    monkeypatch.setattr(staging, "_read", read_here)


@pytest.mark.parametrize("how", ["cancel", "timeout"])
@pytest.mark.parametrize("options", [{}, {"keep_previous": False}], ids=["kept", "freed"])
async def test_an_update_given_up_at_any_turn_of_the_loop_has_changed_all_or_nothing(
    how, options, without_threads
):
    """Of three runners on two devices, all of which fold and are in use: so this is every await
    there is.
    """
    turns, finished, outcomes, held_up = 0, False, set(), 0
    while not finished:
        async with fleet(auto=False, instances=2) as its:
            for runner in its:
                container_of(runner).folds = True
            await its.update(2)
            in_use = [runner.submit() for runner in its]
            updating = later(
                its.scheduler.update({r: weights(3) for r in its}, timeout=5, **options)
            )
            for turn in range(turns):
                if turn == 40:
                    for backend in its.backends.values():
                        backend.finish_all()
                await asyncio.sleep(0)
            finished = updating.done()
            held_up += all(runner.stats().updating for runner in its)
            if how == "cancel":
                updating.cancel()
            else:
                its.clock.advance(5)
            for backend in its.backends.values():
                backend.finish_all()
            (end,) = await asyncio.gather(updating, return_exceptions=True)
            await its.quiet()
            outcomes.add((type(end).__name__, its.epochs[0]))
            assert len(set(its.epochs)) == 1, "all or none"
            if its.epochs[0] == 3:
                for runner in its:
                    its.sets[runner][3] = 3
            for future in in_use:
                assert await future == (2, 2)
            await its.must_be_sound()
            await its.update(4)
            await its.must_be_sound()
        turns += 1
    gave_up = "CancelledError" if how == "cancel" else "DeadlineExceededError"
    assert {(gave_up, 2), ("dict", 3)} <= outcomes
    assert outcomes <= {(gave_up, 2), ("dict", 3), ("CancelledError", 3)}, (
        "a timeout says that nothing has changed"
    )
    assert held_up > 5


# --- held leases ----------------------------------------------------------------------------------


async def test_an_update_waits_for_a_held_lease_whose_runs_go_on_at_its_epoch():
    async with fleet("a", instances=2) as its:
        (a,) = its
        async with a.lease() as lease:
            updating = later(its.update(2))
            await until(lambda: a.stats().updating)
            queued = a.submit()
            assert await asyncio.gather(lease.run(), lease.run()) == [(1, 1), (1, 1)]
            await settle()
            assert not updating.done()
            assert not queued.done()
            assert lease.epoch == 1
        assert (await updating)[a].waited == 1
        assert await queued == (2, 2)
        async with a.lease() as lease:
            assert (lease.epoch, await lease.run()) == (2, (2, 2))
        await its.must_be_sound()


async def test_the_timeout_applies_to_waiting_for_a_lease_and_the_lease_is_not_touched():
    async with fleet("ab") as its:
        a, _ = its
        async with a.lease() as lease:
            updating = later(its.update(2, timeout=5))
            await until(lambda: a.stats().updating)
            its.clock.advance(5)
            with pytest.raises(aoti_sched.DeadlineExceededError):
                await updating
            await settle()
            assert await lease.run() == (1, 1)
        await its.must_be_sound()
        await its.update(3)
        await its.must_be_sound()


async def test_a_lease_asked_for_at_a_closed_barrier_is_of_the_new_epoch():
    async with fleet("a", instances=2) as its:
        (a,) = its
        async with a.lease():
            updating = later(its.update(2))
            await until(lambda: a.stats().updating)
            entering = later(a.lease().__aenter__())
            await settle()
            assert not entering.done()
        lease = await entering
        assert (lease.epoch, await lease.run()) == (2, (2, 2))
        lease.release()
        await updating
        await its.must_be_sound()


async def test_a_fold_takes_a_slot_of_its_own_and_gives_it_back():
    async with fleet("a", instances=2, auto=False) as its:
        (a,) = its
        container_of(a).folds = True
        held = Held(a, "fold")
        updating = later(its.update(2))
        await held.reached()
        assert a.stats().held_leases == 1
        running, queued = a.submit(), a.submit()
        assert its.backends["cpu"].running == 1
        held.go_on()
        its.backends["cpu"].finish_all()
        await updating
        await asyncio.gather(running, queued)
        await its.must_be_sound()


async def test_fold_can_be_left_to_the_first_request():
    async with fleet("a") as its:
        (a,) = its
        container_of(a).folds = True
        container_of(a).faults["fold"] = RuntimeError("it was not to be called")
        await its.update(2, fold=False)
        await its.must_be_sound()


async def test_a_fold_that_waits_for_a_slot_can_be_given_up():
    async with fleet("a") as its:
        (a,) = its
        container_of(a).folds = True
        async with a.lease():
            updating = later(a.update(weights(2)))
            await until(lambda: a.stats().queued)
            await gone(updating)
            await its.quiet()
            assert (a.stats().queued, a.info.inactive_bytes) == (0, 0)
        await its.must_be_sound()
        await its.update(3)


# --- several at once ------------------------------------------------------------------------------


async def test_updates_of_one_runner_take_effect_in_the_order_of_their_calls():
    async with fleet("a") as its:
        (a,) = its
        reports = await asyncio.gather(*(a.update(weights(n)) for n in range(2, 12)))
        assert [report.epoch for report in reports] == list(range(2, 12))
        its.sets[a] = {epoch: epoch for epoch in range(1, 12)}
        await its.must_be_sound()


async def test_crossing_updates_do_not_wait_for_each_other_for_ever():
    async with fleet() as its:
        a, b, c = its
        orders = [(a, b), (b, a), (b, c, a), (c, b), (a, c), (c, a, b)] * 5
        results = await asyncio.gather(
            *(
                its.scheduler.update({r: weights(n) for r in order})
                for n, order in enumerate(orders, 2)
            )
        )
        for number, reports in enumerate(results, 2):
            its.published(reports, number)
        assert its.epochs == [1 + sum(r in order for order in orders) for r in its]
        await its.must_be_sound()


async def test_updates_of_different_runners_go_on_side_by_side():
    async with fleet("ab") as its:
        a, b = its
        held = Held(a, "stage")
        first = later(its.update(2, a))
        await held.reached()
        await its.update(3, b)
        assert not first.done()
        held.go_on()
        await first
        await its.must_be_sound()


async def test_what_is_asked_for_during_an_update_waits_for_its_turn():
    async with fleet("a") as its:
        (a,) = its
        held = Held(a, "stage")
        updating = later(its.update(2))
        await held.reached()
        others = [
            later(call)
            for call in (a.rollback(), a.extract(), a.discard(), a.stage(weights(3)), a.commit())
        ]
        await settle()
        assert not any(task.done() for task in others)
        held.go_on()
        await updating
        back, extracted, _, _, committed = await asyncio.gather(*others)
        assert (back.epoch, extracted, committed.epoch) == (1, weights(1), 3)


# --- leaving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["aclose", "terminate"])
@pytest.mark.parametrize("step", ["stage", "fold", "free_inactive"])
async def test_closing_waits_for_the_step_of_an_update_that_is_under_way(way, step):
    async with fleet("ab") as its:
        a, b = its
        container_of(a).folds = True
        held = Held(a, step)
        updating = later(its.update(2, keep_previous=False))
        await held.reached()
        closing = later(getattr(a, way)())
        await settle()
        assert not closing.done()
        assert not container_of(a).closed
        held.go_on()
        await closing
        if step == "free_inactive":  # it was published before
            await updating
        else:
            with pytest.raises(
                aoti_sched.RunnerClosedError, match=r"'a' is .*its weights can't be changed"
            ):
                await updating
        assert container_of(a).closed
        del its.runners["a"]
        await its.must_be_sound()
        await its.update(3, b)


@pytest.mark.parametrize("way", ["aclose", "terminate"])
async def test_closing_at_the_barrier_lets_the_update_end_first(way):
    async with fleet("ab", auto=False) as its:
        a = its.runners["a"]
        running = a.submit()
        updating = later(its.update(2))
        await until(lambda: a.stats().updating)
        queued = a.submit()
        closing = later(getattr(a, way)())
        await settle()
        assert not closing.done()
        for backend in its.backends.values():
            backend.finish_all()
        await updating
        await closing
        assert await running == (1, 1)
        if way == "aclose":
            assert await queued == (2, 2), "it was accepted, and is finished on what serves now"
        else:
            with pytest.raises(aoti_sched.RunnerClosedError):
                await queued
        del its.runners["a"]
        await its.must_be_sound()


async def test_a_terminated_runner_takes_its_leases_back_and_the_update_goes_on():
    async with fleet("ab") as its:
        a, _ = its
        async with a.lease():
            updating = later(its.update(2))
            await until(lambda: a.stats().updating)
            await a.terminate()
            await updating
        del its.runners["a"]
        await its.must_be_sound()


async def test_an_update_that_waits_for_its_turn_finds_the_runner_closed():
    async with fleet("a") as its:
        (a,) = its
        held = Held(a, "stage")
        first = later(a.update(weights(2)))
        await held.reached()
        second = later(a.update(weights(3)))
        closing = later(a.aclose())
        await settle()
        held.go_on()
        for task in (first, second):
            with pytest.raises(aoti_sched.RunnerClosedError):
                await task
        await closing


@pytest.mark.parametrize(
    "call",
    [
        lambda a: a.update(weights(2)),
        lambda a: a.stage(weights(2)),
        lambda a: a.commit(),
        lambda a: a.rollback(),
        lambda a: a.discard(),
        lambda a: a.free_previous(),
        lambda a: a.extract(),
    ],
)
async def test_a_closed_runner_says_so_before_and_after_its_scheduler_is_left(call):
    backend = FakeBackend({"a": lambda: 1}, auto=True)
    async with Scheduler(devices={"cpu": backend}) as scheduler:
        runner = await scheduler.load("a.pt2")
        other = await scheduler.load("a.pt2", name="other")
        await runner.aclose()
        with pytest.raises(aoti_sched.RunnerClosedError, match="'a' is drained"):
            await call(runner)
    with pytest.raises(aoti_sched.RunnerClosedError, match="'other' is drained"):
        await call(other)


async def test_a_draining_runner_takes_no_new_weights_and_drain_ends():
    async with fleet("a", auto=False) as its:
        (a,) = its
        running = a.submit()
        draining = later(a.drain())
        await settle()
        with pytest.raises(aoti_sched.RunnerClosedError, match="'a' is draining"):
            await a.update(weights(2))
        its.backends["cpu"].finish_all()
        await draining
        assert await running == (1, 1)


async def test_leaving_the_scheduler_waits_for_an_update_under_way():
    backend = FakeBackend({"a": lambda: 1}, weights={"a": weights(1)}, auto=True)
    async with Scheduler(devices={"cpu": backend}) as scheduler:
        runner = await scheduler.load("a.pt2")
        held = Held(runner, "stage")
        updating = later(runner.update(weights(2)))
        await held.reached()
        asyncio.get_running_loop().call_later(0, held.go_on)
    with pytest.raises(aoti_sched.RunnerClosedError):
        await updating
    assert backend.containers[0].closed


async def test_a_load_goes_on_beside_an_update():
    async with fleet("a") as its:
        (a,) = its
        held = Held(a, "stage")
        updating = later(its.update(2))
        await held.reached()
        b = await its.load("b")
        assert await its.answer(b) == (1, 1)
        held.go_on()
        await updating
        await its.must_be_sound()


# --- the barrier ----------------------------------------------------------------------------------


async def test_a_drain_barrier_keeps_order_and_priorities():
    async with fleet("a", auto=False) as its:
        (a,) = its
        order = []
        running = a.submit()
        updating = later(its.update(2))
        await until(lambda: a.stats().updating)
        for name, priority in [("low", 2), ("normal a", 1), ("high", 0), ("normal b", 1)]:
            future = a.options(priority=Priority(priority)).submit()
            future.add_done_callback(lambda _, name=name: order.append(name))
        its.backends["cpu"].finish_all()
        await updating
        await until(lambda: len(order) == 4)
        assert order == ["high", "normal a", "normal b", "low"]
        assert running.trace.epoch == 1
        await its.must_be_sound()


async def test_abort_fails_what_is_queued_in_words_but_not_what_runs_or_comes_later():
    async with fleet("ab", auto=False) as its:
        a, b = its
        running, queued, elsewhere = a.submit(), a.submit(), b.submit()
        leasing = later(a.lease().__aenter__())
        await settle()
        updating = later(its.update(2, a, barrier="abort"))
        await until(lambda: a.stats().updating)
        later_one = a.submit()
        for refused in (queued, leasing):
            with pytest.raises(
                aoti_sched.UpdateAbortedError, match=r"runner 'a'.*Send the request again"
            ):
                await refused
        assert queued.trace.state == "REVOKED"
        for backend in its.backends.values():
            backend.finish_all()
        await updating
        assert await asyncio.gather(running, later_one, elsewhere) == [(1, 1), (2, 2), (1, 1)]
        assert a.stats().revoked == 2
        await its.must_be_sound()


async def test_abort_leaves_the_runs_of_a_held_lease_alone():
    async with fleet("a", auto=False) as its:
        (a,) = its
        async with a.lease() as lease:
            runs, queued = [lease.submit(), lease.submit()], a.submit()
            updating = later(its.update(2, barrier="abort"))
            await until(lambda: a.stats().updating)
            with pytest.raises(aoti_sched.UpdateAbortedError):
                await queued
            its.backends["cpu"].finish_all()
            assert await asyncio.gather(*runs) == [(1, 1), (1, 1)]
        await updating
        await its.must_be_sound()


async def test_abort_leaves_who_waits_for_the_epoch_that_comes():
    async with fleet("a", auto=False) as its:
        (a,) = its
        running, future = a.submit(), a.options(min_epoch=2).submit()
        updating = later(its.update(2, barrier="abort"))
        its.backends["cpu"].finish_all()
        await updating
        assert (await running, await future) == ((1, 1), (2, 2))


async def test_a_rollback_may_abort_too():
    async with fleet("a", auto=False) as its:
        (a,) = its
        await its.update(2)
        running, queued = a.submit(), a.submit()
        going_back = later(a.rollback(barrier="abort"))
        with pytest.raises(aoti_sched.UpdateAbortedError):
            await queued
        its.backends["cpu"].finish_all()
        await going_back
        assert await running == (2, 2)
        await its.must_be_sound()


async def test_requests_time_out_at_a_closed_barrier_and_can_be_cancelled():
    async with fleet("a", auto=False) as its:
        (a,) = its
        running = a.submit()
        updating = later(its.update(2))
        await until(lambda: a.stats().updating)
        short, long, left = a.options(timeout=1).submit(), a.options(timeout=9).submit(), a.submit()
        its.clock.advance(1)
        with pytest.raises(aoti_sched.DeadlineExceededError, match="while it was queued"):
            await short
        left.cancel()
        its.backends["cpu"].finish_all()
        assert (await updating)[a].waited == 1
        assert (await running, await long) == ((1, 1), (2, 2))
        await its.must_be_sound()


async def test_bounds_hold_at_a_closed_barrier():
    async with fleet("a", auto=False, limits=Limits(jobs=1)) as its:
        (a,) = its
        running = a.submit()
        updating = later(its.update(2))
        await until(lambda: a.stats().updating)
        queued = a.submit()
        with pytest.raises(aoti_sched.QueueFullError):
            a.submit()
        its.backends["cpu"].finish_all()
        await updating
        assert await asyncio.gather(running, queued) == [(1, 1), (2, 2)]


async def test_with_overflow_wait_those_at_the_gate_count_as_waiting_and_go_on_in_turn():
    async with fleet("a", auto=False, limits=Limits(jobs=1), overflow="wait") as its:
        (a,) = its
        running = a.submit()
        updating = later(its.update(2))
        await until(lambda: a.stats().updating)
        waiting = [a.submit() for _ in range(3)]
        its.backends["cpu"].finish_all()
        assert (await updating)[a].waited == 3
        assert await asyncio.gather(running, *waiting) == [(1, 1), (2, 2), (2, 2), (2, 2)]
        await its.must_be_sound()


async def test_only_the_runners_that_change_are_held_up():
    async with fleet() as its:
        a, b, c = its
        async with a.lease():
            updating = later(its.update(2, a, b))
            await until(lambda: b.stats().updating)
            assert await c.run() == (1, 1)
            waiting = b.submit()
            await settle()
            assert not waiting.done()
        await updating
        assert await waiting == (2, 2)
        await its.must_be_sound()


# --- the epoch a request asks for -----------------------------------------------------------------


async def test_a_request_waits_for_the_epoch_it_asks_for():
    async with fleet("a") as its:
        (a,) = its
        third, second = a.options(min_epoch=3).submit(), a.options(min_epoch=2).submit()
        await settle()
        assert (a.stats().waiting, a.stats().queued) == (2, 0)
        await its.update(2)
        assert await second == (2, 2)
        assert not third.done()
        await its.update(3)
        assert await third == (3, 3)
        assert await a.options(min_epoch=2).run() == (3, 3)
        await its.must_be_sound()


async def test_a_lease_may_wait_for_an_epoch_too():
    async with fleet("a") as its:
        (a,) = its
        entering = later(a.options(min_epoch=2).lease().__aenter__())
        await settle()
        assert not entering.done()
        await its.update(2)
        lease = await entering
        assert lease.epoch == 2
        with pytest.raises(aoti_sched.EpochError, match="granted at epoch 2 stays there"):
            await lease.options(min_epoch=3).run()
        lease.release()
        await its.must_be_sound()


async def test_an_epoch_that_was_rolled_back_is_refused_and_told():
    async with fleet("a", auto=False) as its:
        (a,) = its
        await its.update(2)
        running, queued = a.submit(), a.options(min_epoch=2).submit()
        going_back = later(a.rollback())
        await until(lambda: a.stats().updating)
        its.backends["cpu"].finish_all()
        await going_back
        assert await running == (2, 2)
        text = "epoch 2 was rolled back, epoch 1 serves"
        with pytest.raises(aoti_sched.EpochError, match=text):
            await queued
        with pytest.raises(aoti_sched.EpochError, match=text):
            await a.options(min_epoch=2).run()
        await its.update(3)
        assert await a.options(min_epoch=2).run() == (3, 3)
        await its.must_be_sound()


async def test_waiting_for_an_epoch_ends_by_timeout_cancellation_or_closing():
    async with fleet("a") as its:
        (a,) = its
        view = a.options(min_epoch=2)
        timed, left, closed = view.options(timeout=1).submit(), view.submit(), view.submit()
        its.clock.advance(1)
        with pytest.raises(aoti_sched.DeadlineExceededError):
            await timed
        left.cancel()
        assert a.stats().waiting == 1
        await a.aclose()
        with pytest.raises(
            aoti_sched.RunnerClosedError,
            match="epoch 2, which the request waits for, was not published",
        ):
            await closed


async def test_a_failed_update_keeps_those_waiting_who_wait_for_its_epoch():
    async with fleet("a") as its:
        (a,) = its
        future = a.options(min_epoch=2).submit()
        container_of(a).faults["swap"] = RuntimeError("swap failed")
        with pytest.raises(RuntimeError):
            await a.update(weights(2))
        await settle()
        assert not future.done()
        await its.update(3)
        assert await future == (3, 3)
