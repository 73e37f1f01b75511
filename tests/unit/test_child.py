"""A child process for runs that may end the process they happen in."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aoti_sched.child import (
    DIED,
    FAULT,
    NOT_STARTED,
    TOO_LONG,
    answers,
    can_fork,
    in_child,
    is_unknown,
)

pytestmark = pytest.mark.skipif(not can_fork(), reason="there are no child processes here")


def test_what_the_child_tells_comes_in_its_order():
    told, end = in_child(lambda tell: [tell(["size", number]) for number in range(3)], 30)
    assert (told, end) == ([["size", 0], ["size", 1], ["size", 2]], "")


def test_a_child_that_crashes_ends_nothing_else_and_what_it_told_before_is_kept():
    def work(tell):
        tell("before")
        ctypes.string_at(0)

    assert in_child(work, 30) == (["before"], "it ended by SIGSEGV")


def test_a_child_that_hangs_is_killed():
    def work(tell):
        tell("before")
        signal.pause()

    told, end = in_child(work, 0.5)
    assert (told, end) == (["before"], "it took longer than 0.5 s")


def test_an_error_of_the_work_itself_is_told_and_what_was_told_before_is_kept():
    def work(tell):
        tell("before")
        raise ValueError("first line\nsecond line")

    told, end = in_child(work, 30)
    assert (told, end) == (["before"], f"{FAULT}: ValueError: first line")
    assert is_unknown(end)


def test_a_child_that_leaves_by_itself_says_that_it_ended_early():
    assert in_child(lambda tell: os._exit(0), 30) == ([], "it ended early")


def test_an_error_of_the_preparation_is_the_answer_of_every_trial():
    def prepare():
        raise ValueError("no")

    end = f"{FAULT}: ValueError: no"
    assert answers([lambda: "one", lambda: "two"], seconds=30, prepare=prepare) == [end, end]


def test_the_child_prints_nothing(capfd):
    in_child(lambda tell: os.write(2, b"a trace\n"), 30)
    assert capfd.readouterr() == ("", "")


def test_what_the_child_writes_to_is_its_own():
    state = [1]

    def work(tell):
        state[0] += 1
        tell(state[0])

    assert in_child(work, 30) == ([2], "")
    assert state == [1]


def test_no_child_and_no_descriptor_is_left(monkeypatch):
    children, fork = [], os.fork

    def counted():
        child = fork()
        children.append(child)
        return child

    monkeypatch.setattr(os, "fork", counted)
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    for _ in range(3):
        in_child(lambda tell: None, 30)
    assert {path.name for path in Path("/proc/self/fd").iterdir()} == before
    assert len(children) == 3
    for child in children:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


def test_a_child_that_has_much_to_tell_is_read_while_it_tells():
    told, end = in_child(lambda tell: [tell("x" * 1000) for _ in range(500)], 30)
    assert (len(told), end) == (500, "")


def test_what_ends_a_child_is_an_answer_and_the_rest_is_still_tried():
    def fails():
        raise ValueError("first line\nsecond line")

    trials = [lambda: "one", os.abort, fails, lambda: os._exit(3), lambda: "five"]
    assert answers(trials, seconds=60) == ["one", DIED, "ValueError: first line", DIED, "five"]


def test_what_takes_too_long_is_ended_and_the_rest_is_not_tried():
    trials = [lambda: "one", lambda: signal.pause() or "", lambda: "three"]
    assert answers(trials, seconds=1) == ["one", TOO_LONG, TOO_LONG]


def test_an_answer_longer_than_a_pipe_arrives_whole():
    assert answers([lambda: "x" * 300_000, lambda: "two"], seconds=60) == ["x" * 300_000, "two"]


def test_each_child_is_prepared_before_its_first_trial():
    state = []
    trials = [lambda: str(state), os.abort, lambda: str(state)]
    assert answers(trials, seconds=60, prepare=lambda: state.append(1)) == ["[1]", DIED, "[1]"]


def test_a_child_that_cannot_be_forked_is_an_answer_to_every_trial(monkeypatch):
    def refuse():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    told, end = in_child(lambda tell: tell("never"), 30)
    assert (told, end) == ([], f"{NOT_STARTED} (Resource temporarily unavailable)")
    assert answers([lambda: "one", lambda: "two"], seconds=30) == [end, end]
    assert is_unknown(end)
    assert {path.name for path in Path("/proc/self/fd").iterdir()} == before


def test_no_descriptor_for_a_pipe_is_an_answer():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        found = answers([lambda: "one"], seconds=30)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found == [f"{NOT_STARTED} (Too many open files)"]


def test_the_answer_of_a_trial_that_ran_is_known():
    assert not any(map(is_unknown, ("", DIED, "ValueError: first line")))


def test_a_child_collects_no_garbage_of_its_parent_and_dumps_no_core():
    import gc

    def work(tell):
        tell([gc.isenabled(), resource.getrlimit(resource.RLIMIT_CORE)[0]])

    assert in_child(work, 30) == ([[False, 0]], "")


def test_a_closed_standard_output_hinders_no_child(monkeypatch):
    class Closed:
        def flush(self):
            raise ValueError("I/O operation on closed file")

    monkeypatch.setattr(sys, "stdout", Closed())
    assert in_child(lambda tell: tell("told"), 30) == (["told"], "")


def test_importing_it_imports_no_torch():
    code = "import sys, aoti_sched.child; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_kernels_run_in_parallel_in_a_child_of_a_process_that_ran_some():
    torch = pytest.importorskip("torch")
    a = torch.ones(512, 512)
    a @ a
    a.exp().sum()
    trials = [lambda: str(float((a @ a).sum())), lambda: str(float(a.sum()))]
    assert answers(trials, seconds=60) == [str(float(512**3)), str(float(512**2))]
