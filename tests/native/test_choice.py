"""Which executor a device gets: by what is installed, and by the environment."""

import contextlib
import importlib.util
import os
import re
import threading
from pathlib import Path

import pytest
import structlog

from aoti_sched.backends.contracts import HostContainer, Work
from aoti_sched.backends.executors.choose import open_executor, warn_of_threads
from aoti_sched.errors import ConfigError
from tests.compiled.backends.executor_contract import collect, work

NATIVE = "aoti_sched.backends.native._native"


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch):
    monkeypatch.delenv("AOTI_SCHED_EXECUTOR", raising=False)
    warn_of_threads.cache_clear()


@pytest.fixture
def choose(monkeypatch):
    def choose(kind):
        monkeypatch.setenv("AOTI_SCHED_EXECUTOR", kind)

    return choose


@pytest.fixture
def without_compiler(monkeypatch):
    """As after an install without one: the compiled module is missing."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == NATIVE else find_spec(name, *rest),
    )


def open_one(lanes=1, affinity=None):
    """An executor, and what was logged."""
    with structlog.testing.capture_logs() as logs:
        executor = open_executor("cpu", lanes, 2, lambda count: None, affinity)
    return executor, logs


def close(executor):
    kind = executor.kind
    executor.close()
    return kind


def test_without_a_compiler_lanes_are_python_threads_and_one_warning_says_what_to_do(
    without_compiler,
):
    executor, (warning,) = open_one()
    executor.submit(0, work(lambda: ["ran"]))
    assert collect(executor, 1)[0].outputs == ["ran"]
    assert close(executor) == "threads"
    assert (warning["log_level"], warning["event"]) == ("warning", "lanes are Python threads")
    assert "without a C++ compiler" in warning["why"]
    assert "install a compiler (g++) and reinstall aoti_sched" in warning["cost"]


def test_a_process_is_warned_once(without_compiler):
    logs = []
    for _ in range(3):
        executor, more = open_one()
        executor.close()
        logs += more
    assert len(logs) == 1


def test_threads_that_were_asked_for_need_no_warning(choose):
    choose("threads")
    executor, logs = open_one()
    assert (close(executor), logs) == ("threads", [])


def test_threads_that_were_asked_for_need_no_compiler(choose, without_compiler):
    choose("threads")
    executor, logs = open_one()
    assert (close(executor), logs) == ("threads", [])


def test_an_empty_choice_is_none(choose, without_compiler):
    choose("")
    executor, logs = open_one()
    assert (close(executor), len(logs)) == ("threads", 1)


def test_native_lanes_that_are_asked_for_and_missing_are_refused(choose, without_compiler):
    choose("native")
    with pytest.raises(
        ConfigError, match=r"AOTI_SCHED_EXECUTOR=native, but .* without a C\+\+ compiler"
    ):
        open_one()


def test_an_unknown_choice_is_refused_with_those_there_are(choose):
    choose("fast")
    with pytest.raises(
        ConfigError, match=r"AOTI_SCHED_EXECUTOR='fast': expected 'native' or 'threads'"
    ):
        open_one()


# --- cores ----------------------------------------------------------------------------------------


KINDS = ["threads", *(["native"] if importlib.util.find_spec(NATIVE) else [])]


class Tid(HostContainer):
    """A container whose run tells the thread it is on, by the system's number."""

    c_run = None

    def run_raw(self, inputs):
        return [threading.get_native_id()]


def tids():
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_each_lane_stays_on_its_core(choose, kind):
    choose(kind)
    cores = sorted(os.sched_getaffinity(0))
    affinity = [cores[-1], cores[0], cores[-1]]
    executor, _ = open_one(3, affinity)
    with contextlib.closing(executor):
        for lane in range(3):
            executor.submit(lane, Work(Tid(), [], 1, lane))
        on = {completion.token: completion.outputs[0] for completion in collect(executor, 3)}
        assert [os.sched_getaffinity(on[lane]) for lane in range(3)] == [
            {core} for core in affinity
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_wish_lanes_stay_where_the_process_is(choose, kind):
    choose(kind)
    before = tids()
    executor, _ = open_one(2)
    with contextlib.closing(executor):
        assert {frozenset(os.sched_getaffinity(tid)) for tid in tids() - before} == {
            frozenset(os.sched_getaffinity(0))
        }


@pytest.mark.parametrize("affinity", [[], [0], [0, 0, 0]])
def test_as_many_cores_as_lanes_are_wanted(affinity):
    words = re.escape(f"device 'cpu': affinity={affinity}: expected one core for each of 2 lanes")
    with pytest.raises(ConfigError, match=words):
        open_one(2, affinity)


@pytest.mark.parametrize("core", [-1, 100_000])
def test_a_core_that_is_not_the_processes_is_refused_with_those_that_are(core):
    cores = sorted(os.sched_getaffinity(0))
    words = re.escape(
        f"device 'cpu': affinity={[core]}: this process may use the cores {cores} only"
    )
    with pytest.raises(ConfigError, match=words):
        open_one(1, [core])


def test_where_threads_can_not_be_kept_on_a_core_the_wish_is_refused(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    with pytest.raises(ConfigError, match="this system can't bind a thread to a core"):
        open_one(1, [0])
