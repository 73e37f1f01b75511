"""A child process for runs that may end the process they happen in."""

import ctypes
import os
import signal
from pathlib import Path

import pytest

from aoti_sched.backends.child import can_fork, in_child

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


def test_a_child_whose_work_raises_says_that_it_ended_early():
    def work(tell):
        raise ValueError

    assert in_child(work, 30) == ([], "it ended early")


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


def test_no_child_and_no_descriptor_is_left():
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    for _ in range(3):
        in_child(lambda tell: None, 30)
    assert {path.name for path in Path("/proc/self/fd").iterdir()} == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_child_that_has_much_to_tell_is_read_while_it_tells():
    told, end = in_child(lambda tell: [tell("x" * 1000) for _ in range(500)], 30)
    assert (len(told), end) == (500, "")
