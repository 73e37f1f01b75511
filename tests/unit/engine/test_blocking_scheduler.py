"""`BlockingScheduler`: plain calls from any thread, a loop of its own, and a clean end."""

from __future__ import annotations

import concurrent.futures
import gc
import inspect
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import pytest
import structlog

import aoti_sched
from aoti_sched import (
    BlockingRunner,
    BlockingScheduler,
    BlockingSplit,
    ConfigError,
    DeadlineExceededError,
    Limits,
    ModelConfig,
    Priority,
    QueueFullError,
    Runner,
    RunnerClosedError,
    Scheduler,
    SchedulerConfig,
    Split,
    UnsupportedLoopError,
)
from aoti_sched.testing import FakeBackend
from tests.inside import container_of
from tests.native.library import ROOT

FOREVER = 30.0
"""Seconds after which a test that waits in vain fails; no test that passes comes near."""


@pytest.fixture(autouse=True)
def quiet_logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture
def backend():
    return FakeBackend({"m": lambda x: x * 2}, auto=True)


@pytest.fixture
def scheduler(backend):
    with BlockingScheduler(devices={"cpu": backend}) as scheduler:
        yield scheduler


class Stepped:
    """A scheduler on a backend whose runs end when the test says so."""

    def __init__(self):
        self.backend = FakeBackend({"m": lambda x: x * 2})
        self.scheduler = BlockingScheduler(devices={"cpu": self.backend}).start()

    def on_loop(self, function):
        return self.scheduler._thread.ask(function)

    def step(self):
        until(lambda: self.on_loop(lambda: self.backend.running))
        self.on_loop(self.backend._executor.step)

    def finish_all(self):
        self.on_loop(self.backend.finish_all)


@pytest.fixture
def stepped():
    stepped = Stepped()
    yield stepped
    if stepped.scheduler._thread.is_open:
        stepped.finish_all()
        stepped.scheduler.terminate()


def until(condition):
    late = time.monotonic() + FOREVER
    while not condition():
        assert time.monotonic() < late, "it never came true"


def threads():
    return [one.name for one in threading.enumerate() if one.name.startswith("aoti_sched")]


# --- the same face --------------------------------------------------------------------------------


def test_a_script_loads_and_runs(scheduler):
    runner = scheduler.load("m.pt2", instances=2)
    assert runner.run(21) == 42
    assert (runner.name, runner.device, runner.epoch) == ("m", "cpu", 1)
    assert runner.info.instances == 2
    assert runner.stats().completed == 1
    assert scheduler.stats().devices["cpu"].runners["m"].completed == 1
    assert scheduler.runners == {"m": runner}
    assert repr(runner) == "<BlockingRunner of <Runner 'm' on cpu>>"


def test_futures_work_with_wait_and_as_completed(scheduler):
    runner = scheduler.load("m.pt2")
    futures = [runner.submit(i) for i in range(20)]
    done, waiting = concurrent.futures.wait(futures, timeout=FOREVER)
    assert not waiting
    assert sorted(future.result() for future in done) == [2 * i for i in range(20)]
    assert {future.trace.runner for future in concurrent.futures.as_completed(futures)} == {"m"}


def test_options_and_tenants_make_views(stepped):
    runner = stepped.scheduler.load("m.pt2")
    first = runner.submit(0)
    low = runner.options(priority=Priority.LOW).submit(1)
    high = runner.options(tenant="acme").options(priority=Priority.HIGH).submit(2)
    until(lambda: runner.stats().submitted == 3)
    for _ in range(3):
        stepped.step()
    assert [future.result(FOREVER) for future in (first, low, high)] == [0, 2, 4]
    assert first.trace.started <= high.trace.started <= low.trace.started


def test_where_a_recording_is_on_the_loop_takes_a_trace_between_two_facts(stepped):
    runner = stepped.scheduler.load("m.pt2")
    busy, go_on, traces = threading.Event(), threading.Event(), []

    def keep_the_loop_busy(_):
        busy.set()
        go_on.wait(FOREVER)

    def take(future):
        traces.append(future.trace)

    with stepped.scheduler.record():
        first, second = runner.submit(0), runner.submit(1)
        second.add_done_callback(keep_the_loop_busy)
        until(lambda: runner.stats().submitted == 2)
        stepped.step()
        assert first.result(FOREVER) == 0
        stepped.step()
        assert busy.wait(FOREVER)
        thread = threading.Thread(target=take, args=(first,))
        thread.start()
        thread.join(0.1)
        assert not traces, "the loop is in the midst of something"
        go_on.set()
        thread.join(FOREVER)
        take(second)
    stepped.scheduler.close()
    take(first)
    during, _, after = traces
    assert during.waits
    assert after.waits == ()
    assert (after.job, after.state, after.started) == (during.job, "DONE", during.started)


def test_a_lease_holds_a_slot(scheduler):
    runner = scheduler.load("m.pt2")
    with runner.lease() as lease:
        assert lease.run(1) == 2
        assert lease.options(timeout=5).submit(2).result(FOREVER) == 4
        assert (lease.slot, lease.epoch, runner.stats().held_leases) == (0, 1, 1)
    assert runner.stats().held_leases == 0
    lease.release()


def test_weights_change_from_any_thread(backend, scheduler):
    backend.weights["w"] = {"a": 1}
    backend.models["w"] = lambda: container_of(runner._handle).weights["a"]
    runner = scheduler.load("w.pt2")
    assert runner.update({"a": 2}).epoch == 2
    assert runner.run() == 2
    assert scheduler.update({runner: {"a": 3}})[runner].epoch == 3
    assert runner.rollback().epoch == 2
    runner.free_previous()
    runner.stage({"a": 4})
    assert runner.extract(inactive=True) == {"a": 4}
    runner.discard()
    runner.stage({"a": 5})
    assert scheduler.commit(runner)[runner].epoch == runner.epoch
    assert scheduler.rollback(runner)[runner].epoch == 2
    assert (runner.run(), runner.constants()) == (2, {})
    with pytest.raises(ConfigError, match="the runner that load"):
        scheduler.update({"w": {}})


def test_requests_are_shared_out_from_any_thread(backend, scheduler):
    backend.models |= {"old": lambda x: ("old", x), "new": lambda x: ("new", x)}
    old, new = scheduler.load("old.pt2"), scheduler.load("new.pt2")
    split, copies = scheduler.split("ranker", {old: 3, new: 1}), []
    shadow = split.shadow(new, lambda *both: copies.append(both))
    futures = [split.submit(n) for n in range(4)]
    assert sorted(future.result(FOREVER) for future in futures) == [
        ("new", 2),
        ("old", 0),
        ("old", 1),
        ("old", 3),
    ]
    until(lambda: len(copies) == 4)
    shadow.close()
    split.change({new: 1})
    assert (split.name, split.shares) == ("ranker", {"new": 1.0})
    assert [split.run(5), split.options(timeout=FOREVER, tag="mine").run(6)] == [
        ("new", 5),
        ("new", 6),
    ]
    assert list(split.options(tenant="ada").map([7, 8])) == [("new", 7), ("new", 8)]
    assert split.stats().requests == {"old": 3, "new": 5}
    for shares in (None, {"new": 1}, {new: -1}):
        with pytest.raises(ConfigError):
            split.change(shares)


def public(kind):
    return {name for name in dir(kind) if not name.startswith("_")}


def test_nothing_of_the_asyncio_face_is_missing():
    asyncio_only = {"aclose", "run_blocking"}
    assert public(Runner) - asyncio_only <= public(BlockingRunner)
    assert public(Scheduler) - asyncio_only <= public(BlockingScheduler)
    assert public(Split) - asyncio_only == public(BlockingSplit)
    for kind, other in (
        (Runner, BlockingRunner),
        (Scheduler, BlockingScheduler),
        (Split, BlockingSplit),
    ):
        for name in public(kind) - asyncio_only - {"load"}:
            mine, theirs = getattr(kind, name), getattr(other, name)
            if callable(mine):
                assert list(inspect.signature(mine).parameters) == list(
                    inspect.signature(theirs).parameters
                ), name


# --- errors and ends ------------------------------------------------------------------------------


def test_errors_of_a_request_come_from_its_future(stepped):
    runner = stepped.scheduler.load("m.pt2", limits=Limits(jobs=1))
    futures = [runner.submit(i) for i in range(3)]
    until(lambda: runner.stats().submitted == 3)
    assert isinstance(futures[2].exception(FOREVER), QueueFullError)
    assert futures[2].trace is None


def test_a_timeout_ends_a_request_of_a_thread(stepped):
    runner = stepped.scheduler.load("m.pt2")
    late = runner.options(timeout=0.01)
    with pytest.raises(DeadlineExceededError):
        late.run(1)
    assert isinstance(late.submit(1).exception(FOREVER), DeadlineExceededError)


def test_a_cancelled_future_frees_its_place(stepped):
    runner = stepped.scheduler.load("m.pt2")
    running, queued = runner.submit(1), runner.submit(2)
    until(lambda: runner.stats().running == 1 and runner.stats().queued == 1)
    assert queued.cancel()
    assert queued.cancel()  # and again
    assert running.cancel()
    assert {*concurrent.futures.wait([running, queued], FOREVER).done} == {running, queued}
    until(lambda: runner.stats().cancelled == 2)
    assert runner.stats().queued == 0
    stepped.step()
    done = runner.submit(3)
    stepped.step()
    assert done.result(FOREVER) == 6
    assert not done.cancel()


def test_a_callback_may_not_block_the_loop(stepped):
    scheduler = stepped.scheduler
    runner = scheduler.load("m.pt2")
    raised = []

    def callback(future):
        for call in (lambda: runner.run(1), scheduler.close):
            try:
                call()
            except UnsupportedLoopError as error:
                raised.append(str(error))
        raised.append(runner.stats().completed)  # what does not wait is allowed

    runner.submit(1).add_done_callback(callback)
    stepped.step()
    until(lambda: len(raised) == 3)
    assert "own thread" in raised[0]
    assert "would wait for itself" in raised[1]
    assert raised[2] == 1


def test_closing_finishes_what_was_accepted_and_refuses_the_rest(stepped):
    runner = stepped.scheduler.load("m.pt2")
    futures = [runner.submit(i) for i in range(3)]
    until(lambda: runner.stats().submitted == 3)
    closing = threading.Thread(target=stepped.scheduler.close)
    closing.start()
    until(lambda: runner.stats().phase == "DRAINING")
    stepped.finish_all()
    closing.join(FOREVER)
    assert [future.result(FOREVER) for future in futures] == [0, 2, 4]
    for call in (runner.run, runner.submit):
        with pytest.raises(RunnerClosedError, match="scheduler is closed"):
            call(1)
    with pytest.raises(RunnerClosedError, match="BlockingScheduler is closed"):
        stepped.scheduler.load("m.pt2")
    assert runner.stats().completed == 3  # the last numbers
    stepped.scheduler.close()
    stepped.scheduler.terminate()
    assert threads() == []


def test_a_block_that_raises_fails_what_is_queued(stepped):
    runner = stepped.scheduler.load("m.pt2")
    first, queued = runner.submit(1), runner.submit(2)
    until(lambda: runner.stats().submitted == 2)
    queued.add_done_callback(lambda _: stepped.backend.finish_all())
    with pytest.raises(ValueError, match="mine"), stepped.scheduler:
        raise ValueError("mine")
    assert first.result(FOREVER) == 2
    assert isinstance(queued.exception(FOREVER), RunnerClosedError)


def test_runners_close_one_by_one(scheduler):
    first, second = scheduler.load("m.pt2"), scheduler.load("m.pt2", name="other")
    first.drain()
    with pytest.raises(RunnerClosedError, match="drained"):
        first.run(1)
    first.close()
    second.terminate()
    assert scheduler.runners == {}


def test_a_scheduler_is_started_once(backend):
    scheduler = BlockingScheduler(devices={"cpu": backend})
    with pytest.raises(RunnerClosedError, match=r"is not running. Call start\(\)"):
        scheduler.load("m.pt2")
    assert scheduler.stats().devices == {}
    with scheduler.start() as same:
        assert same is scheduler
        with pytest.raises(UnsupportedLoopError, match="started once"):
            scheduler.start()
    with pytest.raises(UnsupportedLoopError, match="started once"):
        scheduler.start()


def test_a_start_that_fails_leaves_no_thread(backend):
    config = SchedulerConfig(models={"missing": ModelConfig(path="missing.pt2")})
    with pytest.raises(aoti_sched.PackageNotFoundError):
        BlockingScheduler(config, devices={"cpu": backend}).start()
    assert threads() == []


def test_models_of_the_settings_are_loaded_by_start(backend):
    config = SchedulerConfig(models={"m": ModelConfig(path="m.pt2", instances=2)})
    with BlockingScheduler(config, devices={"cpu": backend}) as scheduler:
        assert scheduler.runners["m"].run(4) == 8


def test_settings_may_come_from_a_file(tmp_path):
    file = tmp_path / "scheduler.toml"
    file.write_text("log_requests = true\n")
    with BlockingScheduler.from_config(file) as scheduler:
        assert scheduler.runners == {}
    file.write_text("lanes = 3\n")
    with pytest.raises(ConfigError, match="lanes"):
        BlockingScheduler.from_config(file)


def test_a_scheduler_that_is_forgotten_ends_its_thread(backend):
    scheduler = BlockingScheduler(devices={"cpu": backend}).start()
    gone = weakref.ref(scheduler)
    runner = scheduler.load("m.pt2")
    del scheduler
    gc.collect()
    assert runner.run(1) == 2  # a runner keeps it
    del runner
    gc.collect()
    assert gone() is None
    until(lambda: threads() == [])


def test_requests_leave_nothing_behind(backend, scheduler):
    """With the collector off, no argument outlives its request."""
    backend.models["m"] = lambda x: None

    class Argument:
        pass

    alive = weakref.WeakSet()

    def argument():
        alive.add(one := Argument())
        return one

    runner = scheduler.load("m.pt2")
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            future = runner.submit(argument())
            future.result(FOREVER)
            runner.submit(argument()).cancel()
        scheduler.close()
        assert len(alive) == 0
    finally:
        gc.enable()


def test_many_threads_share_one_scheduler(scheduler):
    runner = scheduler.load("m.pt2")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(runner.run, range(400)))
    assert answers == [2 * i for i in range(400)]


def test_threads_that_use_a_scheduler_while_it_closes_all_end(backend):
    for _ in range(20):
        scheduler = BlockingScheduler(devices={"cpu": backend}).start()
        runner = scheduler.load("m.pt2")
        ready = threading.Barrier(5)

        def work(runner=runner, scheduler=scheduler, ready=ready):
            ready.wait(FOREVER)
            for call in range(100_000):
                try:
                    if call % 3:
                        runner.submit(call).result(FOREVER)
                    else:
                        scheduler.load("m.pt2", name=f"{threading.get_ident()}").terminate()
                except RunnerClosedError:
                    return "refused"
            return None

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            ends = [pool.submit(work) for _ in range(4)]
            ready.wait(FOREVER)
            scheduler.close()
            assert [end.result(FOREVER) for end in ends] == ["refused"] * 4


# --- the process ----------------------------------------------------------------------------------

PRELUDE = """
import os, signal, sys, threading, time
import aoti_sched
from aoti_sched import BlockingScheduler
from aoti_sched.testing import FakeBackend

backend = FakeBackend({"m": lambda x: x * 2}, auto=True)
scheduler = BlockingScheduler(devices={"cpu": backend}).start()
runner = scheduler.load("m.pt2")
"""


def run_program(lines):
    program = textwrap.dedent(PRELUDE) + textwrap.dedent(lines)
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60, env={**os.environ},
    )  # fmt: skip


def test_a_program_that_never_closes_ends():
    process = run_program("print(runner.run(21))")
    assert (process.returncode, process.stdout, process.stderr) == (0, "42\n", "")


def test_a_program_that_ends_with_leases_and_queued_requests_ends():
    lines = """
    backend._auto = backend._executor.auto = False
    lease = runner.lease().__enter__()
    queued = runner.submit(1)
    while not runner.stats().queued:
        pass
    queued.add_done_callback(lambda future: print(type(future.exception()).__name__))
    sys.exit(3)
    """
    process = run_program(lines)
    assert (process.returncode, process.stdout) == (3, "RunnerClosedError\n"), process.stderr


def test_a_program_whose_threads_still_call_ends():
    lines = """
    def work():
        while True:
            try:
                runner.run(1)
            except aoti_sched.RunnerClosedError:
                return print("refused")

    threading.Thread(target=work).start()
    """
    process = run_program(lines)
    assert (process.returncode, process.stdout, process.stderr) == (0, "refused\n", "")


def test_a_forked_child_is_refused_and_ends():
    lines = """
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        for call in (lambda: runner.run(1), lambda: runner.submit(1), lambda: runner.stats(),
                     lambda: scheduler.load("m.pt2"), lambda: runner.lease().__enter__()):
            try:
                call()
            except aoti_sched.UnsupportedLoopError as error:
                print(error)
        scheduler.close()
        with BlockingScheduler(devices={"cpu": FakeBackend({"m": abs}, auto=True)}) as own:
            print(own.load("m.pt2").run(-7))
        sys.exit(5)
    _, status = os.waitpid(child, 0)
    print(runner.run(1))
    sys.exit(os.waitstatus_to_exitcode(status))
    """
    process = run_program(lines)
    assert process.returncode == 5, process.stderr
    assert process.stdout.count("the process was forked") == 5
    assert process.stdout.split()[-2:] == ["7", "2"]


INTERRUPT = """
def interrupt(*_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupt)

def interrupt_when(condition):
    while not condition():
        pass
    # More than once: a thread does not wake for a signal that comes just before it waits.
    while signal.getsignal(signal.SIGINT) is interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
"""


def test_ctrl_c_takes_requests_and_lease_requests_back():
    lines = """
    backend._auto = backend._executor.auto = False
    leases = []
    holder = threading.Thread(target=lambda: leases.append(runner.lease().__enter__()))
    holder.start()
    holder.join()
    for call in (lambda: runner.run(1), lambda: runner.submit(1).result(),
                 lambda: runner.lease().__enter__()):
        signal.signal(signal.SIGINT, interrupt)
        submitted = runner.stats().submitted
        thread = threading.Thread(target=interrupt_when, args=(
            lambda: runner.stats().submitted > submitted,))
        thread.start()
        try:
            call()
        except KeyboardInterrupt:
            print("interrupted")
        thread.join()
    leases[0].release()
    scheduler._thread.ask(backend.finish_all)
    while runner.stats().completed < 2:  # the lease, and the request whose future was left
        pass
    print(runner.stats().held_leases, runner.stats().cancelled)
    """
    process = run_program(INTERRUPT + textwrap.dedent(lines))
    assert process.returncode == 0, process.stderr
    words = process.stdout.split()
    assert words[:3] == ["interrupted"] * 3
    assert words[3:] == ["0", "2"]


def test_ctrl_c_gives_a_load_up():
    lines = """
    began, go_on = threading.Event(), threading.Event()
    load = backend.load
    def slow(inspected):
        began.set()
        go_on.wait(30)
        return load(inspected)
    backend.load = slow

    def interrupter():
        began.wait(30)
        interrupt_when(lambda: True)
        go_on.set()

    threading.Thread(target=interrupter).start()
    try:
        scheduler.load("m.pt2", name="other")
    except KeyboardInterrupt:
        print("given up")
    while "other" in scheduler.runners:
        pass
    backend.load = load
    print(scheduler.load("m.pt2", name="other").run(4))
    """
    process = run_program(INTERRUPT + textwrap.dedent(lines))
    assert (process.returncode, process.stdout) == (0, "given up\n8\n"), process.stderr


def test_ctrl_c_in_a_close_leaves_the_rest_to_the_end_of_the_program():
    lines = """
    backend._auto = backend._executor.auto = False
    running = runner.submit(1)
    while not runner.stats().running:
        pass
    thread = threading.Thread(target=interrupt_when, args=(
        lambda: runner.stats().phase == "DRAINING",))
    thread.start()
    try:
        scheduler.close()
    except KeyboardInterrupt:
        print(runner.stats().phase)
    thread.join()
    running.add_done_callback(lambda future: print(future.result()))
    scheduler._thread.post(backend.finish_all)
    """
    process = run_program(INTERRUPT + textwrap.dedent(lines))
    assert (process.returncode, process.stdout) == (0, "DRAINING\n2\n"), process.stderr
