"""Native lanes: what they run, whose every handle is, how the loop hears of it, and how they
end.
"""

import gc
import os
import select
import sys
import threading
import time

import pytest

from aoti_sched.backends.native import _native
from aoti_sched.queue.selection.placement import MOST_AHEAD
from tests.native.harness import (
    FOREVER,
    collect,
    drain,
    model,
    numbers,
    open_lanes,
    readable,
    run_here,
    stream,
    submit,
    submit_when_there_is_room,
    tensors,
    tries,
)
from tests.native.library import (
    THROWS_OTHER,
    THROWS_STANDARD,
    Container,
    Fence,
    library,
    new_prefix,
)
from tests.threads import cores_of, named


@pytest.fixture
def c():
    """The C library. Whatever a test does, no tensor of its may be left over or be freed twice."""
    before = library().live()
    yield library()
    gc.collect()
    assert library().live() == before


@pytest.fixture
def lanes(c):
    lanes = open_lanes()
    yield lanes
    lanes.close()


@pytest.fixture
def two_lanes(c):
    lanes = open_lanes(2)
    yield lanes
    lanes.close()


@pytest.fixture
def gated(c):
    """A container whose runs wait until the test, or its end, opens the gate."""
    container = Container(gated=1)
    yield container
    c.open_gate(container)


def run(lanes, one, inputs=None):
    submit(lanes, one, inputs)
    (completion,) = collect(lanes, 1)
    return completion


def thread_names(prefix):
    return sorted({name for name, _ in named(prefix)})


# --- a run that succeeds --------------------------------------------------------------------------


def test_a_run_gives_its_token_and_outputs(c, lanes):
    submit(lanes, model(Container(made=0b11), outputs=2), token=2**64 - 1)
    (completion,) = collect(lanes, 1)
    assert completion.token == 2**64 - 1
    assert completion.error is None
    assert len(set(completion.outputs)) == 2
    assert [c.deletes(output) for output in completion.outputs] == [0, 0]
    c.delete(*completion.outputs)


def test_an_output_that_the_model_leaves_out_is_none(c, lanes):
    completion = run(lanes, model(Container(made=0b101), outputs=3))
    first, second, third = completion.outputs
    assert second is None
    assert first != third
    c.delete(first, third)


def test_a_model_without_outputs_gives_none(lanes):
    assert run(lanes, model(Container())).outputs == []


def test_an_input_may_come_back_as_an_output(c, lanes):
    inputs = tensors(2)
    container = Container(stolen=0b11, passes_on=1)
    completion = run(lanes, model(container, 2, 2), inputs)
    assert completion.outputs == inputs
    c.delete(*inputs)


@pytest.mark.parametrize("here", [False, True], ids=["on a lane", "here"])
@pytest.mark.parametrize("count", [3, 40])
def test_one_tensor_at_several_outputs_is_freed_once_for_each(c, lanes, here, count):
    """Models write its one handle into each of those outputs."""
    last = count - 1
    one = model(Container(made=0b1, again=1 << last | 0b10), outputs=count)
    completion = run_here(lanes, one) if here else run(lanes, one)
    there = [index for index, output in enumerate(completion.outputs) if output is not None]
    assert there == [0, 1, last]
    outputs = [completion.outputs[index] for index in there]
    assert len(set(outputs)) == 3
    assert [c.deletes(output) for output in outputs] == [0, 0, 0]
    c.delete(*outputs)


def test_an_input_that_is_several_outputs_is_freed_once_for_each(c, lanes):
    inputs = tensors(1)
    completion = run(lanes, model(Container(stolen=0b1, passes_on=1, again=0b110), 1, 3), inputs)
    first, *others = completion.outputs
    assert [first] == inputs
    assert len({first, *others}) == 3
    assert c.deletes(first) == 0
    c.delete(*completion.outputs)


@pytest.mark.parametrize("here", [False, True], ids=["on a lane", "here"])
@pytest.mark.parametrize(
    "fault",
    [{"status": 1}, {"throws": THROWS_STANDARD, "error": b"no"}, {"throws": THROWS_OTHER}],
    ids=str,
)
def test_a_failed_run_that_gave_one_tensor_at_several_outputs_has_it_freed_once(
    c, lanes, here, fault
):
    inputs = tensors(1)
    one = model(Container(stolen=0b1, passes_on=1, again=0b110, **fault), 1, 3)
    completion = run_here(lanes, one, inputs) if here else run(lanes, one, inputs)
    assert completion.error is not None
    assert c.deletes(inputs[0]) == 1


def test_a_run_fails_where_torch_makes_no_second_handle_of_a_tensor(c, lanes):
    inputs = tensors(1)
    c.break_tensor(inputs[0])
    one = model(Container(stolen=0b1, passes_on=1, again=0b10), 1, 2)
    _, error, *_ = lanes.run_here(one, inputs, 1)
    assert error == ("aoti_torch_new_tensor_handle() API call failed", "")
    assert c.deletes(inputs[0]) == 1


def test_nothing_is_submitted_where_torch_makes_no_second_handle_of_an_input(c, lanes):
    inputs = tensors(2)
    c.break_tensor(inputs[1])
    before = c.live()
    with pytest.raises(RuntimeError, match="torch made no handle for an input"):
        submit(lanes, model(Container(), 2, 1), inputs)
    assert [c.deletes(handle) for handle in inputs] == [1, 1]
    assert c.live() == before - 2
    assert lanes.drain(1) == []


def test_closing_frees_one_tensor_at_several_outputs_that_nobody_drained(c):
    lanes = open_lanes()
    before = c.live()
    submit(lanes, model(Container(made=0b1, again=0b110), outputs=3))
    lanes.close()
    assert c.live() == before + 3  # a handle for each output
    del lanes
    gc.collect()


def test_the_model_is_given_the_counts_the_stream_and_the_proxy_executor(lanes, c):
    container = Container()
    on = stream(Fence(), handle=0x4560)
    lanes.submit(0, 1, model(container, 3, 2, proxy_executor=0x1230), tensors(3), 1, on=on)
    collect(lanes, 1)
    assert (container.num_inputs, container.num_outputs) == (3, 2)
    assert (container.stream, container.proxy_executor) == (0x4560, 0x1230)


def test_inputs_that_the_model_did_not_steal_are_freed_once(c, lanes):
    inputs = tensors(3)
    run(lanes, model(Container(stolen=0b010), 3), inputs)
    assert [c.deletes(handle) for handle in inputs] == [1, 1, 1]


def test_stamps_are_seconds_of_the_monotonic_clock_and_in_order(lanes):
    before = time.monotonic()
    one = model(Container())
    completions = [run(lanes, one) for _ in range(5)]
    stamps = [
        stamp for completion in completions for stamp in (completion.started, completion.finished)
    ]
    assert stamps == sorted(stamps)
    assert before <= stamps[0]
    assert stamps[-1] <= time.monotonic()


# --- a run that fails -----------------------------------------------------------------------------


def test_a_failed_run_gives_the_words_of_the_runtime_and_of_torch_from_its_own_thread(lanes):
    container = Container(status=1, error=b"the run failed", cause=b"out of memory")
    completion = run(lanes, model(container, outputs=1))
    assert completion.outputs is None
    assert completion.error == ("the run failed", "out of memory")


def test_a_model_that_has_no_words_for_its_failure_gives_torchs_alone(c, lanes):
    container = Container(status=1, error=b"not asked for", cause=b"out of memory")
    silent = _native.Model(
        run=c.address("model_run"), container=container.address, num_inputs=0, num_outputs=0
    )
    assert run(lanes, silent).error == ("", "out of memory")


def test_words_that_are_not_utf8_are_given_all_the_same(lanes):
    container = Container(status=1, error=b"caf\xe9")
    assert run(lanes, model(container)).error == ("caf\ufffd", "")


@pytest.mark.parametrize(
    ("throws", "words"),
    [
        (THROWS_STANDARD, "thrown across"),
        (THROWS_OTHER, "the model threw something that is no std::exception"),
    ],
)
def test_an_exception_of_the_model_is_a_failed_run(lanes, throws, words):
    completion = run(lanes, model(Container(throws=throws, error=b"thrown across"), outputs=1))
    assert (completion.outputs, completion.error) == (None, (words, ""))


@pytest.mark.parametrize(
    "fault", [{"status": 1}, {"throws": THROWS_STANDARD}, {"throws": THROWS_OTHER}], ids=str
)
def test_a_failed_run_loses_no_handle_and_frees_none_twice(c, lanes, fault):
    inputs = tensors(3)
    run(lanes, model(Container(stolen=0b001, made=0b101, **fault), 3, 3), inputs)
    assert [c.deletes(handle) for handle in inputs] == [
        1,
        1,
        1,
    ]  # the outputs are counted by the fixture


@pytest.mark.parametrize(
    "fault", [{"status": 1}, {"throws": THROWS_STANDARD}, {"throws": THROWS_OTHER}], ids=str
)
def test_a_failed_run_is_followed_by_the_next(lanes, fault):
    submit(lanes, model(Container(**fault)), token=1)
    submit(lanes, model(Container()), token=2)
    first, second = collect(lanes, 2)
    assert (first.token, first.outputs) == (1, None)
    assert (second.token, second.outputs) == (2, [])


# --- fences ---------------------------------------------------------------------------------------


def run_fenced(lanes, container, fence):
    on = stream(fence)
    lanes.submit(0, 0, model(container, 0, 1), [], 1, on=on)
    (completion,) = collect(lanes, 1)
    return completion


def test_a_fence_is_waited_for_after_the_run(c, lanes):
    fence = Fence()
    completion = run_fenced(lanes, Container(made=1), fence)
    assert fence.calls == 1
    c.delete(*completion.outputs)


def test_a_fence_that_fails_fails_the_run_and_frees_its_outputs(lanes):
    completion = run_fenced(lanes, Container(made=1), Fence(status=719))
    assert completion.outputs is None
    assert completion.error == ("waiting for the device failed with status 719", "")


def test_a_fence_that_throws_fails_the_run_and_frees_its_outputs(lanes):
    completion = run_fenced(lanes, Container(made=1), Fence(throws=1))
    assert (completion.outputs, completion.error) == (None, ("the device is lost", ""))


@pytest.mark.parametrize("fault", [{"status": 1}, {"throws": THROWS_STANDARD}], ids=str)
def test_the_device_is_waited_for_after_a_failed_run_too_and_the_runs_own_words_stay(lanes, fault):
    """What the run launched before it failed may still read the inputs, which are freed next."""
    fence = Fence(status=719)
    completion = run_fenced(lanes, Container(error=b"the run failed", **fault), fence)
    assert fence.calls == 1
    assert completion.error == ("the run failed", "")


# --- what is refused, and that nothing is taken then ----------------------------------------------


def refuse(lanes, error, match, one, inputs, *, lane=0):
    with pytest.raises(error, match=match):
        submit(lanes, one, inputs, lane=lane)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_inputs_is_refused_before_a_handle_is_made(c, lanes, count):
    container, inputs = Container(), tensors(count)
    refuse(lanes, ValueError, "wrong number of inputs", model(container, 2), inputs)
    assert container.runs == 0
    assert [c.deletes(handle) for handle in inputs] == [0] * count
    c.delete(*inputs)


def test_a_work_more_than_the_rules_hand_ahead_is_refused_and_its_handles_are_freed(
    c, lanes, gated
):
    one, inputs = model(gated, 1), tensors(1)
    tokens = [*range(1 + MOST_AHEAD)]
    submit(lanes, one, tensors(1), token=tokens[0])
    c.wait_until_inside(gated)
    for token in tokens[1:]:
        submit(lanes, one, tensors(1), token=token)
    refuse(lanes, RuntimeError, "lane 0 is full or closed; nothing was submitted", one, inputs)
    assert c.deletes(inputs[0]) == 1
    c.open_gate(gated)
    assert [completion.token for completion in collect(lanes, len(tokens))] == tokens


def test_a_lane_takes_work_again_as_soon_as_a_completion_is_seen(lanes):
    one = model(Container())
    submit(lanes, one)
    submit(lanes, one)
    for _ in range(200):
        taken = collect(lanes, 1)
        for _ in taken:
            submit(lanes, one)


def test_a_lane_that_is_not_there_is_refused(c, lanes):
    inputs = tensors(1)
    refuse(lanes, IndexError, "no such lane", model(Container(), 1), inputs, lane=1)
    c.delete(*inputs)


def test_a_closed_lane_refuses_and_the_handles_are_freed(c, lanes):
    inputs = tensors(1)
    lanes.close()
    refuse(
        lanes, RuntimeError, "full or closed; nothing was submitted", model(Container(), 1), inputs
    )
    assert c.deletes(inputs[0]) == 1


def test_lanes_without_a_way_to_free_tensors_are_refused():
    with pytest.raises(ValueError, match="delete_tensor must be given"):
        _native.Lanes(["lane"], [], 2, numbers(), delete_tensor=0)


def test_a_model_without_a_run_function_is_refused():
    with pytest.raises(ValueError, match="run must be given"):
        _native.Model(run=0, container=1, num_inputs=0, num_outputs=0)


# --- lanes ----------------------------------------------------------------------------------------


def test_there_are_as_many_lanes_as_names(two_lanes):
    assert two_lanes.count() == 2


def test_a_lane_runs_one_work_at_a_time_in_the_order_they_came(c, lanes, gated):
    second = Container()
    submit(lanes, model(gated), token=1)
    c.wait_until_inside(gated)
    submit(lanes, model(second), token=2)
    assert second.runs == 0
    c.open_gate(gated)
    first_done, second_done = collect(lanes, 2)
    assert (first_done.token, second_done.token) == (1, 2)
    assert first_done.finished <= second_done.started
    assert gated.began < second.began


def test_two_works_of_one_container_never_overlap_on_one_lane(lanes):
    container = Container()
    one = model(container)
    for _ in range(50):
        submit(lanes, one)
        submit(lanes, one)
        collect(lanes, 2)
    assert (container.runs, container.most_inside) == (100, 1)


def test_lanes_run_beside_each_other(c, two_lanes, gated):
    one = model(gated)
    submit(two_lanes, one, lane=0)
    submit(two_lanes, one, lane=1)
    c.wait_until_inside(gated, runs=2)
    c.open_gate(gated)
    collect(two_lanes, 2)
    assert gated.most_inside == 2


def test_a_lane_that_is_busy_does_not_hold_the_others(c, two_lanes, gated):
    submit(two_lanes, model(gated), lane=0, token=1)
    c.wait_until_inside(gated)
    submit(two_lanes, model(Container()), lane=1, token=2)
    assert [completion.token for completion in collect(two_lanes, 1)] == [2]
    c.open_gate(gated)
    assert [completion.token for completion in collect(two_lanes, 1)] == [1]


@pytest.mark.parametrize("cores", [0, 1, 64], ids=lambda cores: f"{cores} cores")
def test_lanes_work_whether_they_spin_or_sleep(c, cores):
    """With no core to spare a lane never spins; with many it always does at first."""
    lanes = open_lanes(2, cores=cores)
    one = model(Container())
    for _ in range(100):
        submit(lanes, one, lane=0)
        submit(lanes, one, lane=1)
        collect(lanes, 2)
    lanes.close()


def test_threads_are_named_and_gone_after_the_close(c):
    prefix = new_prefix()
    lanes = open_lanes(3, prefix=prefix)
    for lane in range(3):
        submit(lanes, model(Container()), lane=lane)
    collect(lanes, 3)
    assert thread_names(prefix) == [f"{prefix}{lane}" for lane in range(3)]
    lanes.close()
    for _ in tries():  # the system counts a thread for a moment after it was joined
        if thread_names(prefix) == []:
            break


def test_a_name_longer_than_the_system_takes_is_cut(c):
    lanes = open_lanes(prefix="aoti:a-rather-long-device:")
    submit(lanes, model(Container()))
    collect(lanes, 1)
    assert thread_names("aoti:a-rather") == ["aoti:a-rather-l"]
    lanes.close()


def test_a_lane_stays_on_the_core_it_is_given(c):
    core = max(os.sched_getaffinity(0))
    prefix = new_prefix()
    lanes = _native.Lanes(
        [f"{prefix}0"], [core], 2, numbers(), delete_tensor=c.address("torch_delete_tensor")
    )
    submit(lanes, model(Container()))
    collect(lanes, 1)
    assert cores_of(f"{prefix}0", {core}) == {core}
    lanes.close()


def test_the_thread_count_is_set_on_the_lane_by_both_functions_and_only_when_it_changes(c):
    prefix = new_prefix()
    lanes = open_lanes(2, prefix=prefix)
    container = Container()
    for count in (2, 2, 1, 1, 2):
        submit(lanes, model(container), threads=count)
        collect(lanes, 1)
    submit(lanes, model(container), lane=1, threads=2)
    collect(lanes, 1)
    lanes.close()
    first, second = f"{prefix}0", f"{prefix}1"
    counts = [
        (thread, count) for thread, function, count in c.thread_calls(prefix) if function == "o"
    ]
    assert counts == [(first, 2), (first, 1), (first, 2), (second, 2)]
    assert counts == [
        (thread, count) for thread, function, count in c.thread_calls(prefix) if function == "m"
    ]


def test_torch_sets_a_lanes_thread_count_before_the_lane_does(c):
    prefix = new_prefix()
    lanes = open_lanes(prefix=prefix)
    submit(lanes, model(Container()), threads=3)
    collect(lanes, 1)
    lanes.close()
    assert [function for _, function, _ in c.thread_calls(prefix)] == ["g", "o", "m"]


# --- how the loop hears of it ---------------------------------------------------------------------


def test_the_descriptor_is_readable_while_completions_wait_and_only_then(lanes):
    assert not readable(lanes)
    submit(lanes, model(Container()))
    assert select.select([lanes], [], [], FOREVER)[0]
    assert len(drain(lanes)) == 1
    assert not readable(lanes)


def test_draining_when_nothing_is_there_gives_nothing(lanes):
    assert drain(lanes) == []


def finish_without_draining(c, lanes, count):
    """So many completions that wait to be drained; tokens from 0."""
    one, last = model(Container()), Container(gated=1)
    for token in range(count - 1):
        submit_when_there_is_room(lanes, one, token=token)
    submit_when_there_is_room(lanes, model(last), token=count - 1)
    c.wait_until_inside(last)  # all before it are done
    c.open_gate(last)


def test_a_burst_is_drained_in_bounded_portions_oldest_first(c, lanes):
    finish_without_draining(c, lanes, 11)
    portions = []
    while sum(map(len, portions)) < 11:
        assert select.select([lanes], [], [], FOREVER)[0], "completions wait, and nothing says so"
        portions.append([completion.token for completion in drain(lanes, 4)])
    assert portions[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [token for portion in portions for token in portion] == list(range(11))
    assert not readable(lanes)


def test_completions_that_come_between_two_portions_come_after_them(c, lanes):
    finish_without_draining(c, lanes, 6)
    tokens = [completion.token for completion in drain(lanes, 2)]
    submit(lanes, model(Container()), token=100)
    tokens += [completion.token for completion in collect(lanes, 5)]
    assert tokens == [0, 1, 2, 3, 4, 5, 100]


def test_a_burst_rings_once(c, lanes):
    finish_without_draining(c, lanes, 20)
    rung = os.read(lanes.fileno(), 4096)  # an eventfd's sum, or all that is in a pipe
    assert int.from_bytes(rung, sys.byteorder) == 1
    lanes.close()
    assert not readable(lanes)  # the last of them did not ring either
    assert len(drain(lanes)) == 20


def test_what_is_found_by_looking_rings_no_bell(lanes):
    submit(lanes, model(Container()), token=7)
    assert lanes.poll(FOREVER)
    assert [completion.token for completion in drain(lanes)] == [7]
    assert not readable(lanes)


def test_who_looks_in_vain_is_rung_for_later(c, lanes, gated):
    submit(lanes, model(gated), token=7)
    c.wait_until_inside(gated)
    assert not lanes.poll(1e-4)
    assert not readable(lanes)
    c.open_gate(gated)
    assert select.select([lanes], [], [], FOREVER)[0]
    assert [completion.token for completion in drain(lanes)] == [7]
    assert not readable(lanes)


def test_who_looks_when_the_bell_has_rung_finds_it_and_it_is_hushed(c, lanes):
    finish_without_draining(c, lanes, 2)
    assert select.select([lanes], [], [], FOREVER)[0]
    assert lanes.poll(0.0)
    lanes.close()
    assert len(drain(lanes)) == 2
    assert not readable(lanes)


def test_another_may_ring(lanes):
    lanes.wake()
    assert readable(lanes)
    assert drain(lanes) == []
    assert not readable(lanes)


# --- on the calling thread ------------------------------------------------------------------------


def test_a_run_here_gives_the_same_as_a_lanes(c, lanes):
    inputs = tensors(2)
    completion = run_here(lanes, model(Container(made=0b1, stolen=0b1), 2, 2), inputs)
    output, left_out = completion.outputs
    assert (left_out, completion.error) == (None, None)
    assert completion.started <= completion.finished
    assert [c.deletes(handle) for handle in inputs] == [1, 1]
    assert not readable(lanes)
    c.delete(output)


@pytest.mark.parametrize("fault", [{"status": 1}, {"throws": THROWS_STANDARD}], ids=str)
def test_a_run_here_that_fails_gives_words_and_frees_everything(c, lanes, fault):
    inputs = tensors(1)
    container = Container(made=0b1, error=b"no", **fault)
    completion = run_here(lanes, model(container, 1, 1), inputs)
    assert (completion.outputs, completion.error) == (None, ("no", ""))
    assert c.deletes(inputs[0]) == 1


def test_a_run_here_with_a_wrong_number_of_inputs_is_refused_before_a_handle_is_made(c, lanes):
    inputs = tensors(2)
    with pytest.raises(ValueError, match="wrong number of inputs"):
        run_here(lanes, model(Container(), 1), inputs)
    assert [c.deletes(handle) for handle in inputs] == [0, 0]
    c.delete(*inputs)


def with_counts(omp, mkl, function):
    """Call a function on a new thread that has these thread counts; what it returns, and the
    counts afterwards.
    """
    outcome = []

    def body():
        library().set_omp_threads(omp)
        library().set_mkl_threads(mkl)
        outcome.extend((function(), library().counts()))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return outcome


@pytest.mark.parametrize("fault", [{}, {"status": 1}, {"throws": THROWS_STANDARD}], ids=str)
@pytest.mark.parametrize("mkl", [0, 2, 3, 5], ids=lambda count: f"mkl {count}")
@pytest.mark.parametrize("omp", [2, 3], ids=lambda count: f"omp {count}")
def test_a_run_here_has_the_threads_it_asks_for_and_its_thread_has_its_own_again_after(
    lanes, omp, mkl, fault
):
    container = Container(**fault)
    completion, counts = with_counts(omp, mkl, lambda: run_here(lanes, model(container), threads=3))
    assert (container.omp_threads, container.mkl_threads) == (3, 3)
    assert counts == (omp, mkl)
    assert (completion.error is None) == (not fault)


def test_torch_is_asked_for_the_threads_count_before_a_run_here_sets_it(c, lanes):
    prefix = new_prefix()

    def body():
        library().name_thread(prefix)
        run_here(lanes, model(Container()), threads=3)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert c.thread_calls(prefix) == [
        (prefix, "g", 4),
        (prefix, "o", 3),
        (prefix, "m", 3),
        (prefix, "o", 4),
        (prefix, "m", 0),
    ]


def test_where_the_count_can_not_be_asked_for_a_run_here_changes_none(c):
    lanes = _native.Lanes(
        [],
        [],
        2,
        numbers(),
        delete_tensor=c.address("torch_delete_tensor"),
        set_omp_threads=c.address("torch_set_omp_threads"),
        set_mkl_threads=c.address("torch_set_mkl_threads"),
    )
    container = Container()
    with_counts(2, 0, lambda: run_here(lanes, model(container), threads=3))
    assert (container.omp_threads, container.mkl_threads) == (2, 0)


# --- the end --------------------------------------------------------------------------------------


def test_closing_waits_for_what_runs_and_for_what_is_next(c, gated):
    prefix = new_prefix()
    lanes = open_lanes(2, prefix=prefix)
    for _ in tries():
        if len(thread_names(prefix)) == 2:
            break  # a thread has its name once it has begun
    submit(lanes, model(gated), token=1)
    c.wait_until_inside(gated)
    submit(lanes, model(Container()), token=2)
    closer = threading.Thread(target=lanes.close)
    closer.start()
    for _ in tries():
        if f"{prefix}1" not in thread_names(prefix):
            break  # the idle lane has ended: closing has begun
    assert closer.is_alive()
    assert thread_names(prefix) == [f"{prefix}0"]
    c.open_gate(gated)
    closer.join(FOREVER)
    assert not closer.is_alive()
    assert [completion.token for completion in drain(lanes)] == [1, 2]


def test_closing_twice_does_nothing(lanes):
    lanes.close()
    lanes.close()


def test_who_closes_second_waits_too(c, gated):
    lanes = open_lanes()
    submit(lanes, model(gated))
    c.wait_until_inside(gated)
    closers = [threading.Thread(target=lanes.close) for _ in range(3)]
    for closer in closers:
        closer.start()
    assert all(closer.is_alive() for closer in closers)
    c.open_gate(gated)
    for closer in closers:
        closer.join(FOREVER)
    assert len(drain(lanes)) == 1


def test_what_was_done_before_the_close_can_be_drained_after_it(c, lanes):
    submit(lanes, model(Container(made=1), outputs=1), token=7)
    lanes.close()
    assert readable(lanes)
    (completion,) = drain(lanes)
    assert completion.token == 7
    c.delete(*completion.outputs)


@pytest.mark.parametrize("drained", [0, 1, 2])
def test_completions_that_nobody_drained_are_freed_with_the_lanes(c, drained):
    before = c.live()
    lanes = open_lanes()
    one = model(Container(made=0b11), outputs=2)
    submit(lanes, one)
    submit(lanes, one)
    lanes.close()
    for completion in drain(lanes, drained):
        c.delete(*completion.outputs)
    assert c.live() == before + 2 * (2 - drained)
    del lanes
    assert c.live() == before


def test_lanes_that_are_let_go_finish_their_works_first(c):
    container = Container(made=1)
    lanes = open_lanes()
    submit(lanes, model(container, outputs=1))
    submit(lanes, model(container, outputs=1))
    del lanes
    assert container.runs == 2


def test_lanes_that_are_let_go_give_their_descriptor_back(c):
    lanes = open_lanes()
    descriptor = lanes.fileno()
    os.fstat(descriptor)
    del lanes
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
