"""Which executor a device gets: by what is installed, and by the environment."""

import importlib.util

import pytest
import structlog

from aoti_sched.backends.executor import open_executor
from aoti_sched.errors import ConfigError
from tests.backends.executor_contract import collect, work

NATIVE = "aoti_sched.backends.native._native"


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.delenv("AOTI_SCHED_EXECUTOR", raising=False)


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
        importlib.util, "find_spec", lambda name, *rest: None if name == NATIVE else find_spec(name, *rest)
    )


def open_one():
    """The kind of the executor, which must work too, and what was logged."""
    with structlog.testing.capture_logs() as logs:
        executor = open_executor("cpu", 1, 2, lambda count: None)
    return executor, logs


def close(executor):
    kind = executor.kind
    executor.close()
    return kind


def test_without_a_compiler_lanes_are_python_threads_and_one_warning_says_what_to_do(without_compiler):
    executor, (warning,) = open_one()
    executor.submit(0, work(lambda: ["ran"]))
    assert collect(executor, 1)[0].outputs == ["ran"]
    assert close(executor) == "threads"
    assert (warning["log_level"], warning["event"]) == ("warning", "lanes are Python threads")
    assert warning["device"] == "cpu"
    assert "without a C++ compiler" in warning["why"]
    assert "install a compiler (g++) and reinstall aoti_sched" in warning["cost"]


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
    with pytest.raises(ConfigError, match=r"AOTI_SCHED_EXECUTOR=native, but .* without a C\+\+ compiler"):
        open_one()


def test_an_unknown_choice_is_refused_with_those_there_are(choose):
    choose("fast")
    with pytest.raises(ConfigError, match=r"AOTI_SCHED_EXECUTOR='fast': expected 'native' or 'threads'"):
        open_one()
