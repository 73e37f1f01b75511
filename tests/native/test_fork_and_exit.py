"""Forked children and the interpreter's end: each in a process of its own, which must neither
hang nor crash.
"""

import subprocess
import sys
import textwrap

import pytest

from tests.native.library import ROOT, library

PRELUDE = """
import gc, os, sys
from tests.native.harness import collect, drain, model, open_lanes, readable
from tests.native.harness import run_here, submit, tensors
from tests.native.library import Container, capsule, library

c = library()

def in_child(function):
    # The child ends as any program does, destructors and all; an alarm ends one that hangs.
    import signal
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        function()
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    print("child", os.waitstatus_to_exitcode(status), flush=True)

def expect_refusal(function):
    try:
        function()
    except RuntimeError as error:
        print(error, flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def compiled():
    library()  # once, here, and not in the process under test


def run(lines):
    result = subprocess.run(
        [
            sys.executable,
            "-X",
            "faulthandler",
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            PRELUDE + textwrap.dedent(lines),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return result.stdout.splitlines(), result.stderr, result.returncode


REFUSAL = "the process was forked after the lanes were made; make a new Scheduler in the child"


# --- fork -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    ["submit(lanes, model(Container()))", "lanes.drain(1)", "run_here(lanes, model(Container()))"],
)
def test_a_forked_child_is_refused_in_words(use):
    lines = f"""
    lanes = open_lanes()
    in_child(lambda: expect_refusal(lambda: {use}))
    lanes.close()
    """
    assert run(lines) == ([REFUSAL, "child 0"], "", 0)


def test_closing_in_a_forked_child_does_nothing_to_the_parent():
    lines = """
    lanes = open_lanes()
    in_child(lanes.close)
    submit(lanes, model(Container()), token=7)
    print(collect(lanes, 1)[0].token)
    lanes.close()
    """
    assert run(lines) == (["child 0", "7"], "", 0)


def test_lanes_let_go_in_a_forked_child_are_not_joined_while_the_parents_work_runs():
    lines = """
    lanes = open_lanes()
    gated = Container(gated=1)
    submit(lanes, model(gated), token=7)
    c.wait_until_inside(gated)

    def let_go():
        global lanes
        del lanes
        gc.collect()

    in_child(let_go)
    c.open_gate(gated)
    print(collect(lanes, 1)[0].token)
    """
    assert run(lines) == (["child 0", "7"], "", 0)


def test_lanes_made_in_a_forked_child_work():
    lines = """
    parents = open_lanes()

    def work():
        lanes = open_lanes()
        submit(lanes, model(Container()), token=8)
        print(collect(lanes, 1)[0].token, flush=True)

    in_child(work)
    """
    assert run(lines) == (["8", "child 0"], "", 0)


# --- exit -----------------------------------------------------------------------------------------


def test_the_interpreter_ends_with_work_in_flight():
    lines = """
    lanes = open_lanes()
    gated = Container(gated=1)
    one = model(gated, outputs=1)
    submit(lanes, one)
    submit(lanes, one)
    c.wait_until_inside(gated)

    import atexit
    atexit.register(c.open_gate, gated)
    """
    assert run(lines) == ([], "", 0)


PYTHON_IN_A_RUN = """
    import ctypes, threading
    lanes = open_lanes()
    entered = threading.Event()

    @ctypes.CFUNCTYPE(ctypes.c_int)
    def operator():
        entered.set()
        for _ in range(100):
            threading.Event().wait(0)  # the GIL goes to and fro
        print("the operator is done", flush=True)
        return 1

    container = Container(probe=ctypes.cast(operator, ctypes.c_void_p))
    submit(lanes, model(container))
    entered.wait()
"""


@pytest.mark.parametrize(
    "end",
    ["lanes.close()", "del lanes; gc.collect()", "import atexit; atexit.register(lanes.close)"],
)
def test_lanes_that_end_while_a_run_calls_python_wait_for_it_without_the_gil(end):
    """An operator may be written in Python."""
    output, _, code = run(
        PYTHON_IN_A_RUN + f"    {end}\n"
    )  # what the operator refers to leaks then
    assert (output, code) == (["the operator is done"], 0)


def test_the_interpreter_ends_with_completions_that_nobody_drained():
    lines = """
    lanes = open_lanes()
    one = model(Container(made=1), outputs=1)
    submit(lanes, one)
    submit(lanes, one)
    lanes.close()
    """
    assert run(lines) == ([], "", 0)


def test_the_interpreter_ends_under_a_run_that_nobody_waits_for():
    lines = """
    lanes = open_lanes()
    gated = Container(gated=1)
    submit(lanes, model(gated))
    c.wait_until_inside(gated)
    import ctypes
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(lanes))
    """
    output, _, code = run(lines)  # nanobind says that the lanes leaked
    assert (output, code) == ([], 0)
