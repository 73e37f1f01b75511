"""Foreign code: whatever a user's source, type, key or log processor does, it ends its own
operation, and no device stops.
"""

from __future__ import annotations

import asyncio
import collections.abc
import fractions
import functools
import gc
import logging
import subprocess
import sys
import textwrap
import threading
import types
from collections import Counter

import pytest
import structlog

import aoti_sched
from aoti_sched import ConfigError, Scheduler
from aoti_sched import events as event_log
from aoti_sched.queue.ending import SLICE
from aoti_sched.queue.invariants import check
from aoti_sched.testing import FakeBackend, settle
from tests.inside import container_of, replica_of, tenants_of
from tests.unit.engine.support import fleet, until, weights


@pytest.fixture(autouse=True)
def quiet_logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


class Blocks:
    """A source that gives one item, and then blocks until it is let go on."""

    def __init__(self):
        self._entered, self._go_on = threading.Event(), threading.Event()

    def __iter__(self):
        yield "w", 2
        self._entered.set()
        assert self._go_on.wait(60)
        yield "b", 2

    async def reached(self):
        await until(self._entered.is_set)

    def go_on(self):
        self._go_on.set()


async def no_source_is_read():
    """The threads that were left behind have come back, and ended."""
    names = ("aoti weights of", "aoti load of")
    await until(lambda: not any(t.name.startswith(names) for t in threading.enumerate()))


# --- weights sources ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        asyncio.CancelledError(),
        KeyboardInterrupt(),
        SystemExit(3),
        GeneratorExit(),
        StopIteration(),
        BaseException("x"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("operation", ["update", "stage"])
async def test_whatever_a_source_raises_ends_its_own_operation_alone(error, operation):
    class Raises:
        def __iter__(self):
            return self

        def __next__(self):
            raise error

        def items(self):
            raise error

    source = (
        Raises()
        if not isinstance(error, StopIteration)
        else type("M", (dict,), {"items": Raises.items})()
    )
    async with fleet("ac") as its:
        a, c = its
        with pytest.raises((aoti_sched.UpdateError, RuntimeError), match=type(error).__name__):
            await getattr(a, operation)(source)
        await c.update(weights(2))
        its.sets[c][2] = 2
        await its.load("b")
        await its.must_be_sound()


async def test_an_error_whose_text_cannot_be_made_is_its_operations_own():
    class Mute(BaseException):
        def __str__(self):
            raise ValueError("no text")

    def source():
        yield "w", 2
        raise Mute

    async with fleet("a") as its:
        (a,) = its
        with pytest.raises(aoti_sched.UpdateError, match="Mute"):
            await a.update(source())
        await its.must_be_sound()


async def test_a_source_that_blocks_is_left_at_the_deadline_and_others_go_on():
    sources = [Blocks() for _ in range(3)]
    async with fleet() as its:
        a, *_ = its
        updates = [
            asyncio.ensure_future(r.update(s, timeout=1)) for r, s in zip(its, sources, strict=True)
        ]
        for source in sources:
            await source.reached()
        its.clock.advance(1)
        for update in updates:
            with pytest.raises(aoti_sched.DeadlineExceededError):
                await update
        await its.update(3)
        assert await a.extract() == weights(3)
        for source in sources:  # what comes back writes nothing
            source.go_on()
        await no_source_is_read()
        assert [container_of(runner).inactive for runner in its] == [weights(1)] * 3
        await its.must_be_sound()


async def test_a_source_that_blocks_is_left_by_a_caller_that_is_cancelled():
    source = Blocks()
    async with fleet("a") as its:
        (a,) = its
        update = asyncio.ensure_future(a.update(source))
        await source.reached()
        update.cancel()
        with pytest.raises(asyncio.CancelledError):
            await update
        await its.update(2)
        source.go_on()
        await no_source_is_read()
        await its.must_be_sound()


@pytest.mark.parametrize("closes", ["a", "b", "scheduler"])
async def test_closing_never_waits_for_a_source(closes):
    source = Blocks()
    async with fleet("ab") as its:
        a, b = its
        update = asyncio.ensure_future(its.scheduler.update({a: source, b: weights(2)}))
        await source.reached()
        await {"a": a, "b": b, "scheduler": its.scheduler}[closes].aclose()
        with pytest.raises(aoti_sched.RunnerClosedError):
            await update
        source.go_on()
        await no_source_is_read()
        if closes != "scheduler":
            assert await its.answer(b if closes == "a" else a) == (1, 1)


class OfMapping(collections.abc.Mapping):
    """A mapping whose items are a source's."""

    def __init__(self, items):
        self._items = items

    def items(self):
        return self._items

    def __iter__(self):
        return (name for name, _ in self._items)

    def __getitem__(self, name):
        return dict(self._items)[name]

    def __len__(self):
        return 2


@pytest.mark.parametrize("ends", ["the scheduler closes", "the caller is cancelled"])
async def test_closing_never_waits_for_the_source_of_a_load(ends):
    source = Blocks()
    async with fleet("a") as its:
        load = asyncio.ensure_future(
            its.scheduler.load("a.pt2", name="late", weights=OfMapping(source))
        )
        await source.reached()
        if ends == "the scheduler closes":
            await its.scheduler.aclose()
            with pytest.raises(aoti_sched.RunnerClosedError, match=r"'late'.*abandoned"):
                await load
        else:
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
        source.go_on()
        await no_source_is_read()
        if ends != "the scheduler closes":
            assert list(its.scheduler.runners) == ["a"]
            await its.scheduler.load("a.pt2", name="late", weights=OfMapping(weights(2).items()))


class Disk(FakeBackend):
    """A device whose files block, at the step that is named, until they are let go on."""

    def __init__(self, step=""):
        super().__init__({"m": lambda: 1}, auto=True)
        self.step = step
        self.entered, self.go_on = threading.Event(), threading.Event()

    def _read(self, step):
        if step == self.step:
            self.entered.set()
            assert self.go_on.wait(60)

    def inspect(self, request):
        self._read("inspect")
        return super().inspect(request)

    def load(self, inspected):
        container = super().load(inspected)
        try:
            with inspected.request.reading.foreign():
                self._read("load")
        except BaseException:
            container.close()
            raise
        return container


@pytest.mark.parametrize("ends", ["the scheduler closes", "the caller is cancelled"])
@pytest.mark.parametrize("step", ["inspect", "load"])
async def test_closing_never_waits_for_a_file_of_a_load(step, ends):
    """Not for the package and not for its weights file, and nothing stays of the load."""
    disk = Disk(step)
    async with Scheduler(devices={"cpu": disk}) as scheduler:
        load = asyncio.ensure_future(scheduler.load("m.pt2"))
        await until(disk.entered.is_set)
        if ends == "the scheduler closes":
            await scheduler.aclose()
            with pytest.raises(aoti_sched.RunnerClosedError, match=r"load\('m.pt2'\): abandoned"):
                await load
        else:
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
            assert scheduler.stats().devices["cpu"].memory.used == 0
        disk.go_on.set()
        await no_source_is_read()
        assert all(container.closed for container in disk.containers)
        if ends != "the scheduler closes":
            disk.step = ""
            assert await (await scheduler.load("m.pt2")).run() == 1


async def test_loads_that_are_given_up_keep_no_place():
    """Two loads at once block the third, and nothing else, until they are cancelled."""
    disk = Disk()
    async with Scheduler(devices={"cpu": disk}) as scheduler:
        first = await scheduler.load("m.pt2", name="first")
        disk.step = "inspect"
        blocked = [asyncio.ensure_future(scheduler.load("m.pt2", name=name)) for name in ("a", "b")]
        await until(lambda: threading.active_count() and disk.entered.is_set())
        waiting = asyncio.ensure_future(scheduler.load("m.pt2", name="third"))
        await settle()
        await first.aclose()
        for load in blocked:
            load.cancel()
        await asyncio.wait(blocked)
        disk.step = ""
        assert await (await waiting).run() == 1
        disk.go_on.set()
        await no_source_is_read()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), ValueError("no")], ids=repr)
async def test_whatever_the_source_of_a_load_raises_ends_the_load_alone(error):
    def items():
        yield "w", 2
        raise error

    async with fleet("a") as its:
        expected = ValueError if isinstance(error, ValueError) else aoti_sched.LoadError
        with pytest.raises(expected):
            await its.scheduler.load("a.pt2", name="late", weights=OfMapping(items()))
        await its.must_be_sound()


@pytest.mark.parametrize("items", [["w"], [("w", 1), ("w", 2)], [([], 1)]], ids=repr)
async def test_a_mapping_that_is_none_is_refused_by_a_load(items):
    async with fleet("a") as its:
        with pytest.raises(aoti_sched.WeightsTypeError):
            await its.scheduler.load("a.pt2", name="late", weights=OfMapping(items))
        await its.must_be_sound()


@pytest.mark.parametrize("operation", ["update", "commit"])
async def test_closing_never_waits_for_a_turn_behind_a_source_of_another_runner(operation):
    source = Blocks()
    async with fleet("ab") as its:
        a, b = its
        reading = asyncio.ensure_future(b.stage(source))
        await source.reached()
        if operation == "update":
            waiting = asyncio.ensure_future(its.scheduler.update({a: weights(2), b: weights(2)}))
        else:
            waiting = asyncio.ensure_future(its.scheduler.commit(a, b))
        await until(replica_of(a).weights.lock.locked)
        await a.aclose()
        with pytest.raises(aoti_sched.RunnerClosedError, match="'a'"):
            await waiting
        source.go_on()
        await reading
        await b.discard()
        assert await its.answer(b) == (1, 1)


async def test_an_update_of_a_runner_that_closes_takes_no_turn_at_another():
    source, other = Blocks(), Blocks()
    async with fleet("ab") as its:
        a, b = its
        readings = [asyncio.ensure_future(a.stage(other)), asyncio.ensure_future(b.stage(source))]
        await source.reached()
        await other.reached()
        waiting = asyncio.ensure_future(its.scheduler.update({a: weights(2), b: weights(2)}))
        await settle()
        await a.aclose()
        for ended in (readings[0], waiting):
            with pytest.raises(aoti_sched.RunnerClosedError, match="'a'"):
                await ended
        source.go_on()
        other.go_on()
        await readings[1]


async def test_an_update_says_so_when_no_thread_can_be_started(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    async with fleet("a") as its:
        (a,) = its
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(aoti_sched.UpdateError, match="no thread"):
                await a.update(weights(2))
        await its.update(2)
        await its.must_be_sound()


def test_a_source_that_blocks_does_not_hold_the_interpreter():
    program = """
        import asyncio, threading
        from aoti_sched.testing import FakeBackend, fake_scheduler

        def source(entered):
            yield "w", 2
            entered.set()
            threading.Event().wait()

        async def main():
            backend = FakeBackend({"a": lambda: 1}, weights={"a": {"w": 1}}, auto=True)
            async with fake_scheduler(backend) as scheduler:
                runner = await scheduler.load("a.pt2")
                entered = threading.Event()
                update = asyncio.ensure_future(runner.update(source(entered)))
                await asyncio.to_thread(entered.wait)
            try:
                await update
            except Exception as error:
                print(type(error).__name__)

        asyncio.run(main())
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "RunnerClosedError"), ran.stderr


# --- log processors -------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch):
    """What `sys.unraisablehook` is told of lost events."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    monkeypatch.setattr(event_log.log, "_complained", False)
    return told


def fails():
    raise ValueError("this run fails")


async def all_ends(futures):
    return [type(end).__name__ for end in await asyncio.gather(*futures, return_exceptions=True)]


@pytest.mark.parametrize(
    "error", [ValueError, asyncio.CancelledError, GeneratorExit, StopIteration]
)
async def test_a_log_processor_that_raises_changes_nothing_and_is_told_of_once(error, told):
    def processor(logger, name, event):
        raise error("no")

    structlog.configure(processors=[processor])
    async with fleet() as its:
        a, b, _ = its
        its.backends["cpu"].models["a"] = container_of(a).function = fails
        ends = await all_ends([runner.submit() for _ in range(80) for runner in (a, b)])
        assert ends == ["ValueError", "tuple"] * 80
        await its.update(2)
        await a.terminate()
    assert [str(one.exc_value).rpartition("raised ")[2] for one in told] == [
        f"{error.__name__}: no"
    ]


async def test_the_interpreters_own_hook_tells_of_a_lost_event(monkeypatch, capsys):
    def processor(logger, name, event):
        raise ValueError("no such field")

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    monkeypatch.setattr(event_log.log, "_complained", False)
    structlog.configure(processors=[processor])
    async with fleet("a"):
        await settle()
    told = capsys.readouterr().err
    assert told.count("an event of aoti_sched was lost") == 1
    assert "raised ValueError: no such field" in told


async def test_a_logging_filter_that_raises_changes_nothing(told):
    def refuse(record):
        raise RuntimeError(record)

    structlog.reset_defaults()
    logger = logging.getLogger("aoti_sched")
    logger.addFilter(refuse)
    try:
        async with fleet() as its:
            a, b, _ = its
            container_of(a).function = fails
            ends = await all_ends([runner.submit() for _ in range(80) for runner in (a, b)])
            assert ends == ["ValueError", "tuple"] * 80
    finally:
        logger.removeFilter(refuse)
    (one,) = told
    assert "raised RuntimeError: <LogRecord" in str(one.exc_value)


async def test_a_log_processor_meets_no_fact_half_way_and_may_call_the_scheduler(told):
    seen, submitted = [], []

    def processor(logger, name, event):
        seen.append(event["event"])
        for runner in its:
            check(replica_of(runner).dispatcher.queue)
        if event["event"] == "run failed" and len(submitted) < 200:
            submitted.append(b.submit())
        raise structlog.DropEvent

    async with fleet() as its:
        a, b, _ = its
        structlog.configure(processors=[processor])
        container_of(a).function = fails
        first = [runner.submit() for _ in range(80) for runner in (a, b)]
        assert not seen
        await all_ends(first)
        assert await all_ends(submitted) == ["tuple"] * 80
        await its.update(2)
        await a.aclose()
        assert {"run failed", "runs fail again and again", "weights published", "model closed"} <= {
            *seen
        }
    assert not told


def test_an_exit_asked_for_by_a_log_processor_leaves_the_loop_and_no_request_is_lost():
    def processor(logger, name, event):
        if event["event"] == "run failed":
            raise SystemExit(7)
        raise structlog.DropEvent

    async def main():
        async with fleet() as its:
            a, b, _ = its
            structlog.configure(processors=[processor])
            container_of(a).function = fails
            ends = await all_ends([a.submit(), b.submit(), b.submit()])
            structlog.reset_defaults()
            return ends

    loop = asyncio.new_event_loop()
    try:
        task = loop.create_task(main())
        with pytest.raises(SystemExit):
            loop.run_until_complete(task)
        assert loop.run_until_complete(task) == ["ValueError", "tuple", "tuple"]
    finally:
        loop.close()


def test_an_event_whose_level_is_off_costs_a_comparison(monkeypatch):
    monkeypatch.setattr(structlog, "is_configured", lambda: False)
    monkeypatch.setattr(event_log.log, "_emit", None)
    event_log.log.info("nothing is made of this", error=ValueError())


# --- in the midst of a fact -----------------------------------------------------------------------


class Mute(Exception):
    """Nothing can be asked of it."""

    def __str__(self):
        raise GeneratorExit

    __repr__ = __str__


ERRORS = [Mute(), asyncio.CancelledError("x"), GeneratorExit(), StopIteration(), BaseException("x")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "place", ["run", "unflatten", "submit", "swap", "stage", "fold", "free_inactive"]
)
async def test_whatever_is_raised_in_a_fact_is_its_own_operations_error(place, error):
    def raises(*args, **kwargs):
        raise error

    expected = type(error).__name__
    async with fleet("ab") as its:
        a, b = its
        replica, was = replica_of(a), None
        container = replica.container
        if place == "run":
            was, container.function = container.function, raises
        elif place == "unflatten":
            was, replica.call_spec = (
                replica.call_spec,
                types.SimpleNamespace(flatten=replica.call_spec.flatten, unflatten=raises),
            )
        elif place == "submit":
            replica.dispatcher.executor.submit = raises
        else:
            container.folds = True
            setattr(container, place, raises)
        calls = {
            "swap": a.update,
            "stage": a.update,
            "fold": a.update,
            "free_inactive": functools.partial(a.update, keep_previous=False),
        }
        call = calls.get(place, lambda _: a.submit())
        both = await asyncio.gather(call(weights(2)), b.submit(), return_exceptions=True)
        assert both[1] == (1, 1)
        if place != "free_inactive":  # that is a warning in the log
            assert isinstance(both[0], Exception)
            assert type(both[0]) is type(error) or f"raised {expected}" in str(both[0])
        if place in ("run", "unflatten"):
            container.function, replica.call_spec = (
                (was, replica.call_spec) if place == "run" else (container.function, was)
            )
        elif place == "submit":
            del replica.dispatcher.executor.submit
        else:
            delattr(container, place)
        await b.update(weights(2))
        assert (await b.run()) == (2, 2)
        await a.update(weights(3))
        assert (await a.run()) == (3, 3)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_a_model_that_cannot_be_closed_is_closings_own_error_and_others_close(error):
    def raises():
        raise error

    refusal = (type(error), aoti_sched.LoadError, RuntimeError)
    backends = {name: FakeBackend({name: lambda: 1}, auto=True, name=name) for name in "ab"}
    scheduler = await Scheduler(devices=backends).__aenter__()
    a, b = [await scheduler.load(f"{name}.pt2", device=name) for name in "ab"]
    container_of(a).close = raises
    with pytest.raises(refusal):
        await a.aclose()
    assert await b.run() == 1
    with pytest.raises(refusal):
        await scheduler.__aexit__(None, None, None)
    assert container_of(b).closed


# --- keys and numbers of users --------------------------------------------------------------------


class Key:
    """A tenant's key that counts what is asked of it; it raises, or has another hash, once it
    is `spoiled`.
    """

    def __init__(self):
        self.asked = 0
        self.spoiled = None

    def __hash__(self):
        self.asked += 1
        if self.spoiled == "raises":
            raise RuntimeError("no hash")
        return self.asked if self.spoiled == "changes" else 7

    def __eq__(self, other):
        self.asked += 1
        if self.spoiled:
            raise RuntimeError("no equality")
        return self is other

    def __repr__(self):
        if self.spoiled:
            raise RuntimeError("no text")
        return "Key()"


@pytest.mark.parametrize("spoiled", ["raises", "changes"])
@pytest.mark.parametrize("ends", ["run", "cancel", "shed", "terminate", "timeout", "refuse"])
async def test_a_key_is_asked_nothing_after_options(spoiled, ends):
    overflow = "shed" if ends == "shed" else "reject"
    limits = aoti_sched.Limits(jobs=8 if ends == "shed" else None, tenant_jobs=4)
    async with fleet(
        "a", auto=False, overflow=overflow, limits=limits, admission="predictive"
    ) as its:
        (a,) = its
        keys = [Key() for _ in range(2)]
        views = [a.options(tenant=key, timeout=5) for key in keys]
        again = [a.options(tenant=key) for key in keys]
        futures = [a.submit()]
        for key in keys:
            key.spoiled, key.asked = spoiled, 0
        futures += [view.submit() for view in (*views, *again, *views, *again)]
        if ends == "refuse":
            with pytest.raises(aoti_sched.QueueFullError, match=r"tenant Key\(\)"):
                views[0].submit()
        elif ends == "shed":
            futures.append(a.options(priority=aoti_sched.Priority.HIGH).submit())
        elif ends == "cancel":
            for future in futures[1:]:
                future.cancel()
        elif ends == "timeout":
            its.clock.advance(5)
        elif ends == "terminate":
            terminating = asyncio.ensure_future(a.terminate())
            await asyncio.sleep(0)
        its.backends["cpu"].finish_all()
        await asyncio.gather(*futures, return_exceptions=True)
        if ends == "terminate":
            await terminating
        else:
            check(replica_of(a).dispatcher.queue)
        assert [key.asked for key in keys] == [0, 0]


async def test_a_key_that_cannot_be_hashed_or_compared_is_refused_by_options():
    async with fleet("a") as its:
        (a,) = its
        bad, good = Key(), Key()
        bad.spoiled = "raises"
        with pytest.raises(RuntimeError, match="no hash"):
            a.options(tenant=bad)
        good_view = a.options(tenant=good)
        good.spoiled = "compares"
        with pytest.raises(RuntimeError, match="no equality"):
            a.options(tenant=Key())
        assert await good_view.run() == (1, 1)


async def test_tenants_that_are_gone_are_forgotten_with_their_keys():
    async with fleet("ab", limits=aoti_sched.Limits(jobs=None)) as its:
        a, _ = its
        kept = a.options(tenant="kept")
        for start in range(0, 6000, 100):
            await asyncio.gather(
                *[a.options(tenant=number).run() for number in range(start, start + 100)]
            )
        gc.collect()
        a.options(tenant="one more")
        known = len(tenants_of(a))
        assert known <= 2000
        assert kept._options.tenant is a.options(tenant="kept")._options.tenant
        assert kept._options.tenant is not a.options(tenant=5)._options.tenant


async def test_tenants_that_are_gone_at_once_are_forgotten_in_slices():
    async with fleet("a") as its:
        (a,) = its
        views = [a.options(tenant=number) for number in range(1000)]
        del views
        a.options(tenant="one more")
        assert len(tenants_of(a)) > 800
        for number in range(20):
            a.options(tenant=f"another {number}")
        assert len(tenants_of(a)) < 100


class Odd(float):
    """A number whose comparisons raise."""

    def __lt__(self, other):
        raise RuntimeError

    __le__ = __gt__ = __ge__ = __eq__ = __add__ = __radd__ = __lt__
    __hash__ = None


@pytest.mark.parametrize("timeout", [Odd(3), fractions.Fraction(3), 3])
async def test_a_timeout_is_a_plain_number_from_options_on(timeout):
    async with fleet("a") as its:
        (a,) = its
        view = a.options(timeout=timeout)
        assert type(view._options.timeout) is float
        assert await view.run() == (1, 1)


@pytest.mark.parametrize("timeout", ["3", b"3", [], True, 10**400, float("nan"), Odd(-1)])
async def test_what_is_no_number_of_seconds_is_refused_by_options(timeout):
    async with fleet("a") as its:
        (a,) = its
        with pytest.raises(ConfigError, match="timeout"):
            a.options(timeout=timeout)
        with pytest.raises(ConfigError, match="min_epoch"):
            a.options(min_epoch="1")


# --- operations over all jobs ---------------------------------------------------------------------


async def turns_until(done):
    turns = 0
    while not done():
        await asyncio.sleep(0)
        turns += 1
    return turns


@pytest.mark.parametrize("how", ["terminate", "abort", "timeout"])
async def test_the_loop_turns_while_a_crowd_ends(how):
    """Each turn ends a slice: the others are served meanwhile."""
    count = 50 * SLICE
    async with fleet("ab", auto=False, limits=aoti_sched.Limits(jobs=None)) as its:
        a, b = its
        first = a.submit()
        ends = Counter()
        futures = [a.options(timeout=9, tenant=number % 100).submit() for number in range(count)]
        for future in futures:
            future.add_done_callback(lambda future: ends.update([type(future.exception())]))
        if how == "terminate":
            ending = asyncio.ensure_future(a.terminate())
        elif how == "abort":
            ending = asyncio.ensure_future(a.update(weights(2), barrier="abort"))
        else:
            its.clock.advance(9)
        turns = await turns_until(lambda: ends.total() == count)
        assert turns >= count // SLICE
        assert len(ends) == 1
        its.backends["cpu"].finish_all()
        await asyncio.gather(first, return_exceptions=True)
        if how != "timeout":
            await ending
        assert await its.answer(b) == (1, 1)
