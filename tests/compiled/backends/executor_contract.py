"""What every executor keeps to, and what those with lanes of their own keep to besides.

A test class derives from a contract and gives `open`, which makes an executor of so many lanes.
Containers are Python functions; what must wait waits for events, so that nothing here depends on
how fast anything is.
"""

import contextlib
import select
import threading
import time
import traceback
import weakref

import psutil
import pytest
import torch

from aoti_sched.backends.aoti.c_abi import libtorch
from aoti_sched.backends.contracts import HostContainer, Work
from aoti_sched.errors import RunError

FOREVER = 60.0
"""Seconds after which a test that waits in vain fails; no test that passes comes near."""


class Function(HostContainer):
    """A container that calls a function with its inputs."""

    c_run = None

    def __init__(self, function):
        self.function = function

    def run_raw(self, inputs):
        return self.function(*inputs)


def work(function, *inputs, token=None, threads=1):
    return Work(Function(function), inputs, threads, token)


class Tensor:
    """Something that can be watched for being let go."""


set_mkl_threads = getattr(
    libtorch, "MKL_Set_Num_Threads_Local", lambda count: 0
)  # not every torch has MKL
MKL = hasattr(libtorch, "MKL_Set_Num_Threads_Local")


def thread_counts():
    """The calling thread's intra-op threads: OpenMP's and MKL's (0 where it has none of its
    own).
    """
    mkl = set_mkl_threads(0)
    set_mkl_threads(mkl)
    return libtorch.omp_get_max_threads(), mkl


def set_thread_counts(openmp, mkl):
    torch.get_num_threads()  # or it sets the count when it is asked later
    libtorch.omp_set_num_threads(openmp)
    set_mkl_threads(mkl)


def readable(executor):
    return bool(select.select([executor], [], [], 0)[0])


def collect(executor, count):
    """The next `count` completions, waited for through the descriptor as an event loop does."""
    completions = []
    until = time.monotonic() + FOREVER
    while len(completions) < count:
        assert time.monotonic() < until, f"{len(completions)} of {count} completions came"
        if select.select([executor], [], [], FOREVER)[0]:
            completions += executor.drain()
    return completions


def must(event):
    assert event.wait(FOREVER)


class ExecutorContract:
    """What the front relies on."""

    lanes = 2
    """How many it is opened with."""

    def open(self, lanes):
        """An executor of so many lanes, `finish` and all."""
        raise TypeError(f"{type(self).__name__} does not say which executor it tests")

    def finish(self, executor):
        """Let what was submitted run, where it does not by itself."""

    @pytest.fixture
    def executor(self):
        with contextlib.closing(self.open(self.lanes)) as executor:
            yield executor

    def run(self, executor, *works, lane=0):
        for one in works:
            executor.submit(lane, one)
        self.finish(executor)
        return collect(executor, len(works))

    def test_it_has_the_lanes_it_was_asked_for(self, executor):
        assert executor.lanes == self.lanes

    def test_a_run_comes_back_with_its_token_and_outputs(self, executor):
        token = object()
        (completion,) = self.run(executor, work(lambda a, b: [a + b], 1, 2, token=token))
        assert completion.token is token
        assert (completion.outputs, completion.error) == ([3], None)

    def test_a_failed_run_comes_back_with_its_token_and_error(self, executor):
        error = RunError("no")

        def fail():
            raise error

        (completion,) = self.run(executor, work(fail, token="mine"))
        assert (completion.token, completion.outputs, completion.error) == ("mine", None, error)

    def test_a_failed_run_is_followed_by_the_next(self, executor):
        completions = self.run(executor, work(lambda: 1 / 0), work(lambda: ["fine"]))
        assert isinstance(completions[0].error, ZeroDivisionError)
        assert completions[1].outputs == ["fine"]

    def test_the_works_of_a_lane_run_in_the_order_they_were_submitted(self, executor):
        ran = []
        works = [work(lambda n=n: ran.append(n), token=n) for n in range(20)]
        assert [completion.token for completion in self.run(executor, *works)] == list(range(20))
        assert ran == list(range(20))

    def test_the_descriptor_is_readable_while_completions_wait_and_only_then(self, executor):
        assert not readable(executor)
        executor.submit(0, work(list))
        self.finish(executor)
        assert select.select([executor], [], [], FOREVER)[0]
        assert len(executor.drain()) == 1
        assert not readable(executor)

    def test_draining_when_nothing_is_there_gives_nothing(self, executor):
        assert executor.drain() == []

    def test_inputs_are_let_go_before_the_completion_is_seen(self, executor):
        inputs = [Tensor(), Tensor()]
        watched = [weakref.ref(tensor) for tensor in inputs]
        executor.submit(0, work(lambda *_: [], *inputs))
        inputs.clear()
        self.finish(executor)
        (completion,) = collect(executor, 1)
        assert completion.error is None
        assert [tensor() for tensor in watched] == [None, None]

    def test_outputs_are_let_go_with_the_completion(self, executor):
        (completion,) = self.run(executor, work(lambda: [Tensor()]))
        watched = weakref.ref(completion.outputs[0])
        del completion
        assert watched() is None

    def test_a_run_here_is_over_when_it_comes_back(self, executor):
        token = object()
        completion = executor.run_here(work(lambda a, b: [a + b], 1, 2, token=token))
        assert completion.token is token
        assert (completion.outputs, completion.error) == ([3], None)
        assert not readable(executor)
        assert executor.drain() == []

    def test_a_run_here_runs_on_the_thread_that_calls(self, executor):
        completion = executor.run_here(work(lambda: [threading.get_ident()]))
        assert completion.outputs == [threading.get_ident()]

    def test_a_run_here_that_fails_comes_back_with_its_token_and_error(self, executor):
        error = RunError("no")

        def fail():
            raise error

        completion = executor.run_here(work(fail, token="mine"))
        assert (completion.token, completion.outputs, completion.error) == ("mine", None, error)
        assert executor.run_here(work(lambda: ["fine"])).outputs == ["fine"]

    def test_a_run_here_lets_its_inputs_go(self, executor):
        inputs = [Tensor(), Tensor()]
        watched = [weakref.ref(tensor) for tensor in inputs]
        completion = executor.run_here(work(lambda *_: [], *inputs))
        inputs.clear()
        assert completion.error is None
        assert [tensor() for tensor in watched] == [None, None]

    def test_closing_twice_does_nothing(self, executor):
        executor.close()
        executor.close()

    def test_closing_gives_the_descriptors_back(self):
        before = psutil.Process().num_fds()
        self.open(self.lanes).close()
        assert psutil.Process().num_fds() == before


class LanesContract(ExecutorContract):
    """An executor whose lanes are threads that run on while the loop does other things."""

    thread_calls: list

    def test_submitting_does_not_wait_for_what_runs(self, executor):
        go = threading.Event()
        executor.submit(0, work(lambda: must(go)))
        for _ in range(1000):
            executor.submit(0, work(lambda: None))
        go.set()
        assert len(collect(executor, 1001)) == 1001

    def test_lanes_run_beside_each_other(self, executor):
        meet = threading.Barrier(2)
        for lane in range(2):
            executor.submit(lane, work(lambda: meet.wait(FOREVER), token=lane))
        completions = collect(executor, 2)
        assert [completion.error for completion in completions] == [None, None]
        assert {completion.token for completion in completions} == {0, 1}

    def test_a_lane_that_is_busy_does_not_hold_the_others(self, executor):
        go = threading.Event()
        executor.submit(0, work(lambda: must(go), token="busy"))
        executor.submit(1, work(lambda: None, token="free"))
        assert [completion.token for completion in collect(executor, 1)] == ["free"]
        go.set()
        assert [completion.token for completion in collect(executor, 1)] == ["busy"]

    def test_stamps_are_of_the_monotonic_clock_and_in_order(self, executor):
        before = time.monotonic()
        completions = self.run(executor, *(work(lambda: None) for _ in range(5)))
        stamps = [stamp for one in completions for stamp in (one.started, one.finished)]
        assert stamps == sorted(stamps)
        assert before <= stamps[0]
        assert stamps[-1] <= time.monotonic()

    @pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
    def test_not_even_an_error_that_ends_programs_ends_a_lane(self, executor, error):
        def fail():
            raise error

        completions = self.run(executor, work(fail), work(lambda: ["fine"]))
        assert isinstance(completions[0].error, error)
        assert completions[1].outputs == ["fine"]

    def test_a_burst_is_collected_in_bounded_portions(self, executor):
        through = threading.Event()
        for n in range(600):
            executor.submit(0, work(lambda: None, token=n))
        executor.submit(0, work(through.set, token=600))
        must(through)  # the six hundred before it wait to be collected now
        portions = []
        while sum(map(len, portions)) < 601:
            assert select.select([executor], [], [], FOREVER)[0], (
                "completions wait, and nothing says so"
            )
            portions.append(executor.drain())
        assert len(portions) >= 3
        assert max(map(len, portions)) == 256
        assert [one.token for portion in portions for one in portion] == list(range(601))

    def test_lane_threads_are_named_after_device_and_lane(self, executor):
        names = [
            collect_one(executor, lane, lambda: [threading.current_thread().name])
            for lane in range(2)
        ]
        assert names == ["aoti:cpu:0", "aoti:cpu:1"]

    def test_the_thread_count_is_set_on_the_lane_and_only_when_it_changes(self, executor):
        self.run(executor, *(work(lambda: None, threads=n) for n in (2, 2, 1, 1, 2)))
        self.run(executor, work(lambda: None, threads=2), lane=1)
        assert self.thread_calls == [
            ("aoti:cpu:0", 2),
            ("aoti:cpu:0", 1),
            ("aoti:cpu:0", 2),
            ("aoti:cpu:1", 2),
        ]

    def test_a_run_here_waits_for_no_lane(self, executor):
        go = threading.Event()
        for lane in range(2):
            executor.submit(lane, work(lambda: must(go)))
        assert executor.run_here(work(lambda: ["here"])).outputs == ["here"]
        go.set()
        assert len(collect(executor, 2)) == 2

    def test_stamps_of_runs_here_are_of_the_same_clock(self, executor):
        before = time.monotonic()
        completions = [
            executor.run_here(work(lambda: None)),
            *self.run(executor, work(lambda: None)),
        ]
        stamps = [stamp for one in completions for stamp in (one.started, one.finished)]
        assert stamps == sorted(stamps)
        assert before <= stamps[0]

    @pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
    def test_not_even_an_error_that_ends_programs_comes_out_of_a_run_here(self, executor, error):
        def fail():
            raise error

        assert isinstance(executor.run_here(work(fail)).error, error)

    @pytest.mark.parametrize("error", [RunError, ValueError])
    def test_an_error_that_is_kept_keeps_no_tensors(self, executor, error):
        """Those of the run nor those that its callers have."""

        def fail(tensor):
            beside.append(weakref.ref(local := Tensor()))
            raise error(f"no, said {id(local)}")

        def fail_here(tensor):
            return executor.run_here(work(fail, tensor)).error

        def fail_on_a_lane(tensor):
            (completion,) = self.run(executor, work(fail, tensor))
            return completion.error

        for run in (fail_here, fail_on_a_lane):
            beside = []
            tensor = Tensor()
            beside.append(weakref.ref(tensor))
            kept = run(tensor)
            del tensor
            assert isinstance(kept, error)
            assert [one() for one in beside] == [None, None]

    def test_an_error_that_no_one_foresaw_says_where_it_was_raised(self, executor):
        def surprise():
            return 1 // 0

        on_lane = self.run(executor, work(surprise))[0].error
        here = executor.run_here(work(surprise)).error
        for error in (on_lane, here):
            text = "".join(traceback.format_exception(error))
            assert "in surprise" in text
            assert "return 1 // 0" in text

    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize("mkl", [0, 1, 3] if MKL else [0])
    @pytest.mark.parametrize("openmp", [1, 3])
    def test_a_run_here_has_the_threads_it_asks_for_and_its_thread_has_its_own_again_after(
        self, executor, openmp, mkl, fails
    ):
        inside = []

        def look():
            inside.append(thread_counts())
            if fails:
                raise RunError("no")

        def body():
            set_thread_counts(openmp, mkl)
            executor.run_here(work(look, threads=3))
            inside.append(thread_counts())

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        assert inside == [(3, 3 if MKL else 0), (openmp, mkl)]

    def test_closing_waits_for_what_was_submitted(self):
        executor = self.open(1)
        closing = threading.Event()
        ran = []

        def first():
            must(closing)
            ran.append("first")

        executor.submit(0, work(first))
        executor.submit(0, work(lambda: ran.append("second")))
        closer = threading.Thread(
            target=lambda: (closing.set(), executor.close(), ran.append("closed"))
        )
        closer.start()
        closer.join(FOREVER)
        assert ran == ["first", "second", "closed"]

    def test_closing_ends_the_lanes(self):
        executor = self.open(3)
        threads = [
            collect_one(executor, lane, lambda: [threading.current_thread()]) for lane in range(3)
        ]
        assert all(thread.is_alive() for thread in threads)
        executor.close()
        assert not any(thread.is_alive() for thread in threads)


def collect_one(executor, lane, function):
    executor.submit(lane, work(function))
    (completion,) = collect(executor, 1)
    return completion.outputs[0]
