"""The Python executor and the fake one keep the contract; the wake-up descriptor that both set;
the end of the interpreter.
"""

import os
import select
import subprocess
import sys
import threading

import pytest

from aoti_sched.backends.contracts import Work
from aoti_sched.backends.executors.batches import Batch
from aoti_sched.backends.executors.threads import ThreadsExecutor
from aoti_sched.backends.executors.wakeup_fd import WakeupFd
from aoti_sched.errors import RunError
from aoti_sched.testing import FakeExecutor, ManualClock
from tests.compiled.backends.batch_contract import BatchContract, Rows, StagingContract, plan
from tests.compiled.backends.executor_contract import ExecutorContract, LanesContract, collect, work
from tests.models import ROOT


class TestThreadsExecutor(LanesContract):
    def open(self, lanes):
        self.thread_calls = []

        def set_threads(count):
            self.thread_calls.append((threading.current_thread().name, count))

        return ThreadsExecutor("cpu", lanes, set_threads)

    def test_a_thread_count_that_can_not_be_set_fails_the_run_and_is_tried_again(self):
        counts = []

        def set_threads(count):
            counts.append(count)
            if len(counts) == 1:
                raise OSError("no threads today")

        executor = ThreadsExecutor("cpu", 1, set_threads)
        completions = self.run(
            executor, work(lambda: ["a"], threads=2), work(lambda: ["b"], threads=2)
        )
        executor.close()
        assert isinstance(completions[0].error, OSError)
        assert completions[1].outputs == ["b"]
        assert counts == [2, 2]

    def test_at_the_interpreters_exit_what_runs_is_waited_for(self):
        script = """
import threading
from aoti_sched.backends.contracts import HostContainer, Work
from aoti_sched.backends.executors.threads import ThreadsExecutor

class Container(HostContainer):
    def run_raw(self, inputs):
        running.set()
        threading.main_thread().join()
        print("finished", flush=True)

running = threading.Event()
executor = ThreadsExecutor("cpu", 1, lambda count: None)
executor.submit(0, Work(Container(), [], 1, None))
running.wait()
"""
        result = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (result.stdout, result.stderr, result.returncode) == ("finished\n", "", 0)


class TestFakeExecutor(ExecutorContract):
    def open(self, lanes):
        return FakeExecutor(lanes, ManualClock(), auto=False)

    def finish(self, executor):
        while executor.pending:
            executor.step()


class TestAutomaticFakeExecutor(ExecutorContract):
    def open(self, lanes):
        return FakeExecutor(lanes, None, auto=True)


# --- batches --------------------------------------------------------------------------------------


class TestBatchesOnThreads(StagingContract):
    def open(self, lanes):
        return ThreadsExecutor("cpu", lanes, lambda count: None)


class TestBatchesOnTheFakeExecutor(BatchContract):
    """It calls the function for each member."""

    def open(self, lanes):
        return FakeExecutor(lanes, ManualClock(), auto=False)

    def finish(self, executor):
        while executor.pending:
            executor.step()


def test_a_step_of_the_fake_executor_finishes_a_batch_or_fails_it_whole():
    called = []
    executor = FakeExecutor(1, ManualClock(), auto=False)
    model = Rows(lambda x: [called.append(x)], 1, lambda outputs: outputs)
    batches = [Work(model, (), 1, n, Batch(plan(), [[1], [2]], [1, 1], 2, 0)) for n in range(2)]
    for one in batches:
        executor.submit(0, one)
    assert (len(executor.pending), called) == (2, [])
    executor.step()
    executor.step(RunError("no"))
    first, second = executor.drain()
    assert (first.outputs, called) == ([[None], [None]], [1, 2])
    assert (second.outputs, str(second.error)) == (None, "no")
    executor.close()


class TestBatchesOnTheAutomaticFakeExecutor(BatchContract):
    def open(self, lanes):
        return FakeExecutor(lanes, None, auto=True)


# --- the wake-up descriptor -----------------------------------------------------------------------


@pytest.fixture(params=["eventfd", "pipe"] if hasattr(os, "eventfd") else ["pipe"])
def wakeup(request, monkeypatch):
    if request.param == "pipe":
        monkeypatch.delattr(os, "eventfd", raising=False)
    wakeup = WakeupFd()
    yield wakeup
    wakeup.close()


def readable(wakeup):
    return bool(select.select([wakeup.fd], [], [], 0)[0])


def test_a_descriptor_is_not_readable_until_it_is_set(wakeup):
    assert not readable(wakeup)


def test_a_set_descriptor_is_readable_until_it_is_cleared(wakeup):
    wakeup.set()
    assert readable(wakeup)
    assert readable(wakeup)
    wakeup.clear()
    assert not readable(wakeup)


def test_a_descriptor_set_many_times_is_cleared_once(wakeup):
    for _ in range(100_000):  # more bytes than a pipe holds, were each written
        wakeup.set()
    wakeup.clear()
    assert not readable(wakeup)


def test_a_cleared_descriptor_can_be_set_again(wakeup):
    for _ in range(3):
        wakeup.set()
        wakeup.clear()
    wakeup.set()
    assert readable(wakeup)


def test_clearing_an_unset_descriptor_does_not_block(wakeup):
    wakeup.clear()
    assert not readable(wakeup)


def test_a_descriptor_is_set_across_threads(wakeup):
    setter = threading.Thread(target=wakeup.set)
    setter.start()
    assert select.select([wakeup.fd], [], [], 60)[0]
    setter.join()


def test_no_wake_up_is_lost_between_threads(wakeup):
    """Threads add to a list and set the descriptor; the reader clears it, then takes the list.

    In the end all is taken.
    """
    items, taken = [], []

    def ring_often():
        for _ in range(2000):
            items.append(1)
            wakeup.set()

    setters = [threading.Thread(target=ring_often) for _ in range(3)]
    for setter in setters:
        setter.start()
    while len(taken) < 6000:
        assert select.select([wakeup.fd], [], [], 60)[0], (
            f"{len(taken)} were taken, and the descriptor is not readable"
        )
        wakeup.clear()
        while items:
            taken.append(items.pop())
    for setter in setters:
        setter.join()


def test_a_closed_wakeup_gives_its_descriptors_back(wakeup):
    fds = {wakeup.fd, wakeup._write_end}
    other = WakeupFd()
    others = {other.fd, other._write_end}
    other.close()
    other.close()
    other.set()
    other.clear()
    assert other.fd == -1
    again = WakeupFd()
    assert {again.fd, again._write_end} == others
    assert others.isdisjoint(fds)
    again.close()


def test_a_wakeup_that_is_let_go_gives_its_descriptors_back(wakeup):
    fd = wakeup.fd
    del wakeup
    again = WakeupFd()
    assert again.fd != fd, "the fixture keeps the first one"
    dropped = again.fd
    del again
    assert WakeupFd().fd == dropped


def test_completions_of_two_executors_are_their_own():
    one, two = (ThreadsExecutor(name, 1, lambda count: None) for name in ("one", "two"))
    one.submit(0, work(lambda: [1]))
    two.submit(0, work(lambda: [2]))
    assert (collect(one, 1)[0].outputs, collect(two, 1)[0].outputs) == ([1], [2])
    one.close()
    two.close()
