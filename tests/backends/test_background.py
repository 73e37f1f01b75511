"""Long work runs at a lower priority, and nothing else does because of it."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from aoti_sched.backends.background import NICENESS, give_way


def niceness():
    return os.getpriority(os.PRIO_PROCESS, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own here")
def test_the_call_has_a_lower_priority_and_its_caller_keeps_its_own():
    before = niceness()
    assert give_way(niceness) == min(before + NICENESS, 19)
    assert niceness() == before


def test_what_it_returns_and_what_it_raises_are_the_callers():
    assert give_way(lambda: 42) == 42
    with pytest.raises(KeyError, match="lost"):
        give_way(lambda: {}["lost"])


def test_no_thread_is_left():
    give_way(lambda: None)
    for thread in threading.enumerate():
        if thread.name == "aoti:background":
            thread.join(10)
    assert not any(thread.name == "aoti:background" for thread in threading.enumerate())


def test_where_threads_have_no_priorities_the_call_is_made_right_here(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert give_way(threading.current_thread) is threading.current_thread()
