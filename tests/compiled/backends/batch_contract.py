"""What every executor makes of batches, and what those make of them that put tensors together.

A test class derives from a contract and gives `open` and `finish`, as for `ExecutorContract`, and
where its containers are others than Python functions also `container`.
"""

import contextlib
import itertools
import random
import weakref

import pytest
import torch

from aoti_sched.backends.contracts import HostContainer, Work
from aoti_sched.backends.executors.batches import Batch, Staging
from aoti_sched.backends.executors.inline import refused
from aoti_sched.errors import RunError
from aoti_sched.model.batch_plan import BatchPlan, InputPlan, OutputPlan, RaggedOut
from tests.compiled.backends.executor_contract import collect

ROWS = InputPlan(0, (0, 1))
"""A matrix whose rows lie one after the other."""


class Rows(HostContainer):
    """A container that calls a function with tensors."""

    c_run = None

    def __init__(self, function, outputs, own):
        self.function = function
        self.outputs = outputs
        self.detach_outputs = own
        self.staging = Staging("model 'rows'")

    def run_raw(self, inputs):
        return self.detach_outputs(self.function(*inputs))


def plan(*inputs, outputs=1, detach=False):
    """A plan: rows in dimension 0 of matrices unless it is said otherwise."""
    if isinstance(outputs, int):
        outputs = (OutputPlan(0),) * outputs
    return BatchPlan(inputs or (ROWS,), tuple(outputs), detach)


def matrices(*rows, width=3, dtype=torch.float32):
    """Matrices of so many rows, each with numbers of its own."""
    count = itertools.count()
    return [
        torch.tensor([[next(count) for _ in range(width)] for _ in range(n)])
        .reshape(n, width)
        .to(dtype)
        for n in rows
    ]


def batch_of(how, members, *, padded_rows=None, slot=0):
    rows = [member[0].shape[how.inputs[0].dim] for member in members]
    return Batch(how, members, rows, sum(rows) if padded_rows is None else padded_rows, slot)


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


class BatchContract:
    """What the front relies on."""

    lanes = 2
    """How many lanes it is opened with."""

    @pytest.fixture
    def executor(self):
        with contextlib.closing(self.open(self.lanes)) as executor:
            yield executor

    @pytest.fixture(params=["on a lane", "here"], autouse=True)
    def where(self, request):
        self.here = request.param == "here"

    def finish(self, executor):
        """Let what was submitted run, where it does not by itself."""

    def container(self, function, *, inputs=1, outputs=1, own=lambda outputs: outputs):
        """A container of a model that takes and gives so many tensors."""
        return Rows(function, outputs, own)

    def run(self, executor, container, batch, token=None):
        work = Work(container, (), 1, token, batch)
        del batch
        if self.here:
            return executor.run_here(work)
        try:
            executor.submit(0, work)
        except Exception as error:  # noqa: BLE001 -- the lane took nothing: the front ends the work so
            return refused(work, error)
        del work
        self.finish(executor)
        (completion,) = collect(executor, 1)
        return completion

    def outputs(self, executor, container, batch):
        completion = self.run(executor, container, batch)
        assert completion.error is None
        return completion.outputs

    def test_a_batch_comes_back_with_its_token_and_a_list_of_outputs_for_each_member(
        self, executor
    ):
        token = object()
        members = [[one] for one in matrices(1, 1, 1)]
        model = self.container(lambda x: [x * 2])
        completion = self.run(executor, model, batch_of(plan(), members), token)
        assert completion.token is token
        assert completion.error is None
        assert completion.started <= completion.finished
        assert [type(outputs) for outputs in completion.outputs] == [list] * 3
        for (output,), (x,) in zip(completion.outputs, members, strict=True):
            assert same(output, x * 2)

    @pytest.mark.parametrize("rows", [(1,), (3,), (1, 2, 3), (2, 0, 1), (1,) * 64])
    def test_each_member_gets_what_it_would_get_alone(self, executor, rows):
        def function(x, y):
            return [x * 2 + y, x.sum(1), -y]

        members = [[x, x.flip(1) + 1] for x in matrices(*rows)]
        model = self.container(function, inputs=2, outputs=3)
        batch = batch_of(plan(ROWS, ROWS, outputs=3), members)
        outputs = self.outputs(executor, model, batch)
        for got, member in zip(outputs, members, strict=True):
            assert all(map(same, got, function(*member)))

    def test_members_may_be_lists_or_tuples(self, executor):
        one, two = matrices(1, 1)
        outputs = self.outputs(
            executor, self.container(lambda x: [x + 1]), batch_of(plan(), ((one,), [two]))
        )
        assert [output.tolist() for (output,) in outputs] == [
            (one + 1).tolist(),
            (two + 1).tolist(),
        ]

    def test_an_output_that_is_left_out_is_none_for_each_member(self, executor):
        model = self.container(lambda x: [None, x + 1, None], outputs=3)
        batch = batch_of(plan(outputs=3), [[one] for one in matrices(1, 1)])
        outputs = self.outputs(executor, model, batch)
        assert [[output is None for output in each] for each in outputs] == [
            [True, False, True]
        ] * 2

    @pytest.mark.parametrize("detach", [False, True], ids=["views", "copies"])
    @pytest.mark.parametrize("function", [lambda x: x + 1, lambda x: x], ids=["made", "an input"])
    def test_one_tensor_at_several_outputs_is_each_members_at_all_of_them(
        self, executor, function, detach
    ):
        def both(x):
            y = function(x)
            return [y, x * 2, y, y]

        model = self.container(both, outputs=4)
        for _ in range(3):
            members = [[one] for one in matrices(1, 2)]
            outputs = self.outputs(
                executor, model, batch_of(plan(outputs=4, detach=detach), members)
            )
            for got, (x,) in zip(outputs, members, strict=True):
                assert all(map(same, got, both(x)))

    def test_one_tensor_as_two_inputs_is_two_inputs(self, executor):
        model = self.container(lambda x, y: [x + y], inputs=2)
        members = [[one, one] for one in matrices(1, 2)]
        outputs = self.outputs(executor, model, batch_of(plan(ROWS, ROWS), members))
        assert all(same(output, x + x) for (output,), (x, _) in zip(outputs, members, strict=True))
        assert [x._use_count() for x, _ in members] == [1, 1]

    def test_a_model_without_outputs_gives_each_member_an_empty_list(self, executor):
        model = self.container(lambda x: [], outputs=0)
        batch = batch_of(plan(outputs=0), [[one] for one in matrices(1, 1)])
        assert self.outputs(executor, model, batch) == [[], []]

    def test_an_error_fails_the_whole_batch_and_is_followed_by_the_next(self, executor):
        def function(x):
            if 4 in x:
                raise RunError("four is too much")
            return [x]

        model = self.container(function)
        members = [[one] for one in matrices(1, 1, 1)]  # the second has a four
        completion = self.run(executor, model, batch_of(plan(), members), token="mine")
        assert (completion.token, completion.outputs) == ("mine", None)
        assert isinstance(completion.error, RunError)
        assert "four is too much" in str(completion.error)
        assert len(self.outputs(executor, model, batch_of(plan(), members[2:]))) == 1

    def test_inputs_stay_as_they_were_and_are_let_go_before_the_completion_is_seen(self, executor):
        inputs = matrices(2, 1)
        before = [one.clone() for one in inputs]
        members = [[one] for one in inputs]
        completion = self.run(
            executor, self.container(lambda x: [x + 1]), batch_of(plan(), members)
        )
        assert completion.error is None
        assert all(map(same, inputs, before))
        assert [one._use_count() for one in inputs] == [1, 1]
        watched = [weakref.ref(one) for one in inputs]
        members.clear()
        inputs.clear()
        assert [one() for one in watched] == [None, None]

    def test_outputs_are_let_go_with_the_completion(self, executor):
        made = []

        def function(x):
            y = x + 1
            made.append(weakref.ref(y))
            return [y]

        members = [[one] for one in matrices(1, 1)]
        completion = self.run(executor, self.container(function), batch_of(plan(), members))
        assert completion.error is None
        kept = completion.outputs[0][0]
        assert same(kept, members[0][0] + 1)
        del completion, kept
        assert [one() for one in made] == [None] * len(made)


class GatheringContract(BatchContract):
    """Where the model sees one tensor for each input."""

    def whole(self, executor, batch, **others):
        """The first input of the one run, as the model saw it: its values and strides."""
        seen = []

        def function(*inputs):
            seen.append((inputs[0].clone(), inputs[0].stride()))
            return []

        completion = self.run(
            executor,
            self.container(function, inputs=len(batch.plan.inputs), outputs=0, **others),
            batch,
        )
        if completion.error is not None:
            raise completion.error
        ((whole, strides),) = seen
        return whole, strides

    def test_rows_lie_one_after_the_other(self, executor):
        members = matrices(2, 0, 1, 3)
        whole, _ = self.whole(executor, batch_of(plan(outputs=0), [[one] for one in members]))
        assert same(whole, torch.cat(members))

    def test_rows_beyond_the_members_are_zeros_and_never_given_back(self, executor):
        members = [[one + 1] for one in matrices(2, 1)]
        model = self.container(lambda x: [x * 2])
        for _ in range(2):  # the second time where other rows were
            whole, _ = self.whole(executor, batch_of(plan(outputs=0), members, padded_rows=8))
            assert same(whole, torch.cat([*(one for (one,) in members), torch.zeros(5, 3)]))
            outputs = self.outputs(executor, model, batch_of(plan(), members, padded_rows=8))
            assert [output.shape[0] for (output,) in outputs] == [2, 1]
            assert all(
                same(output, x * 2) for (output,), (x,) in zip(outputs, members, strict=True)
            )
            self.outputs(executor, model, batch_of(plan(), [[torch.full((8, 3), 7.0)]]))

    @pytest.mark.parametrize("pad", [0, -1, 7.5, True])
    def test_ragged_dimensions_are_padded_to_the_longest_and_cut_back(self, executor, pad):
        how = plan(
            InputPlan(0, (0, 1), (1,), pad),
            outputs=[OutputPlan(0, (RaggedOut(1, 0, 1),)), OutputPlan(0)],
        )
        inputs = [torch.rand(1, 3), torch.rand(2, 5), torch.rand(1, 0), torch.rand(1, 5)]
        expected = torch.nn.utils.rnn.pad_sequence(
            [row for one in inputs for row in one], batch_first=True, padding_value=pad
        )
        members = [[one] for one in inputs]
        seen = []

        def function(x):
            seen.append(x.clone())
            return [x * 2, x.sum(1)]

        model = self.container(function, outputs=2)
        outputs = self.outputs(executor, model, batch_of(how, members, padded_rows=7))
        assert same(seen[0], torch.cat([expected, torch.zeros(2, 5)]))
        for (doubled, total), x in zip(outputs, inputs, strict=True):
            assert same(doubled, x * 2)
            assert total.shape == x.shape[:1]

    @pytest.mark.parametrize(
        "dtype",
        [
            torch.float32,
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.int64,
            torch.int8,
            torch.uint8,
            torch.bool,
            torch.complex64,
            torch.complex128,
        ],
        ids=str,
    )
    @pytest.mark.parametrize("pad", [0, 1])
    def test_every_dtype_is_gathered_padded_and_given_back(self, executor, dtype, pad):
        how = plan(InputPlan(0, (0, 1), (1,), pad), outputs=[OutputPlan(0, (RaggedOut(1, 0, 1),))])
        inputs = [
            (torch.rand(rows, width) * 9).to(dtype) for rows, width in ((1, 3), (2, 1), (1, 4))
        ]
        model = self.container(lambda x: [x.clone()])
        outputs = self.outputs(
            executor, model, batch_of(how, [[one] for one in inputs], padded_rows=6)
        )
        whole, _ = self.whole(executor, batch_of(how_only(how), [[one] for one in inputs]))
        for (output,), one in zip(outputs, inputs, strict=True):
            assert output.dtype == dtype
            assert same(bytes_of(output), bytes_of(one))
        assert same(bytes_of(whole), bytes_of(by_hand(how_only(how).inputs[0], inputs, 4)))

    def test_a_pad_that_the_dtype_does_not_have_fails_the_batch(self, executor):
        how = plan(InputPlan(0, (0, 1), (1,), 1000), outputs=0)
        members = [[torch.ones(1, n, dtype=torch.uint8)] for n in (1, 2)]
        completion = self.run(
            executor, self.container(lambda x: [], outputs=0), batch_of(how, members)
        )
        assert completion.error is not None
        assert completion.outputs is None

    def test_rows_may_lie_in_another_dimension(self, executor):
        how = plan(InputPlan(1, (0, 1)), outputs=[OutputPlan(1), OutputPlan(0)])
        inputs = [torch.rand(3, n) for n in (2, 1, 4)]

        def function(x):
            return [x + 1, x.t() * 2]

        model = self.container(function, outputs=2)
        outputs = self.outputs(
            executor, model, batch_of(how, [[one] for one in inputs], padded_rows=9)
        )
        for got, x in zip(outputs, inputs, strict=True):
            assert all(map(same, got, function(x)))

    def test_channels_last_stays_channels_last(self, executor):
        how = plan(InputPlan(0, (0, 2, 3, 1)))
        inputs = [torch.rand(n, 3, 4, 5).to(memory_format=torch.channels_last) for n in (1, 2)]
        members = [[one] for one in inputs]
        whole, strides = self.whole(executor, batch_of(how_only(how), members))
        assert same(whole, torch.cat(inputs))
        assert strides == (60, 1, 15, 3)
        outputs = self.outputs(executor, self.container(lambda x: [x * 2]), batch_of(how, members))
        assert all(same(output, x * 2) for (output,), x in zip(outputs, inputs, strict=True))
        assert all(
            output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous()
            for (output,) in outputs
        )

    @pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (3, 0, 2)], ids=str)
    def test_dimensions_of_no_size_are_none_of_a_problem(self, executor, shape):
        how = plan(InputPlan(0, tuple(range(len(shape)))))
        inputs = [torch.rand(shape), torch.rand(shape)]
        for surplus in (0, 2):
            batch = batch_of(how, [[one] for one in inputs], padded_rows=2 * shape[0] + surplus)
            outputs = self.outputs(executor, self.container(lambda x: [x * 2]), batch)
            assert [output.shape for (output,) in outputs] == [shape, shape]

    @pytest.mark.parametrize("seed", range(40))
    def test_boxes_of_any_kind_are_gathered_as_by_hand(self, executor, seed):
        random.seed(seed)
        torch.manual_seed(seed)
        dims = random.randint(1, 4)
        dim = random.randrange(dims)
        others = [d for d in range(dims) if d != dim]
        ragged = tuple(random.sample(others, random.randint(0, len(others))))
        order = tuple(random.sample(range(dims), dims))
        how = InputPlan(dim, order, ragged, random.choice([0, 3, -2.5]))
        sizes = [random.choice([1, 2, 3]) for _ in range(dims)]
        inputs = []
        for _ in range(random.randint(1, 5)):
            shape = [
                random.randint(0, 3) if d == dim or d in ragged else sizes[d] for d in range(dims)
            ]
            inputs.append(laid_out(torch.rand(shape), order))
        rows = sum(one.shape[dim] for one in inputs) + random.choice([0, 0, 2])
        whole, strides = self.whole(
            executor, batch_of(plan(how, outputs=0), [[one] for one in inputs], padded_rows=rows)
        )
        expected = by_hand(how, inputs, rows)
        assert same(whole, expected)
        if whole.numel():
            assert [
                d for _, d in sorted(zip(strides, range(dims), strict=True), reverse=True)
            ] == list(order) or 1 in whole.shape

    def test_strides_of_dimensions_of_size_one_do_not_matter(self, executor):
        odd = torch.rand(1, 3).as_strided((1, 1, 3), (77, 99, 1))
        how = plan(InputPlan(0, (0, 1, 2)), outputs=0)
        whole, _ = self.whole(executor, batch_of(how, [[odd], [odd]]))
        assert same(whole, torch.cat([odd, odd]))

    # --- the memory -------------------------------------------------------------------------------

    def addresses(self, executor, model, *batches):
        model.seen.clear()
        for batch in batches:
            assert self.run(executor, model, batch).error is None
        return list(model.seen)

    def watching(self, function=lambda x: x * 2):
        """A container that keeps the address of its input."""
        seen = []

        def watch(x):
            seen.append(x.data_ptr())
            return [function(x)]

        container = self.container(watch)
        container.seen = seen
        return container

    def test_each_input_has_memory_of_its_own(self, executor):
        members = [[one, one + 1] for one in matrices(1, 2)]
        model = self.container(lambda x, y: [x - y], inputs=2)
        outputs = self.outputs(executor, model, batch_of(plan(ROWS, ROWS), members))
        assert all((output == -1).all() for (output,) in outputs)

    @pytest.mark.parametrize(
        "part", [lambda x: x, lambda x: x[:, 1:], lambda x: x.view(torch.int32)]
    )
    def test_memory_that_an_output_shares_is_given_up_and_never_written_again(self, executor, part):
        model = self.watching(part)
        first = [[one] for one in matrices(1, 2)]
        kept = self.outputs(executor, model, batch_of(plan(), first))
        for value in range(5):
            self.outputs(executor, model, batch_of(plan(), [[torch.full((3, 3), float(value))]]))
        assert all(same(output, part(x)) for (output,), (x,) in zip(kept, first, strict=True))
        assert model.seen[1] != model.seen[0]

    def test_views_of_different_members_share_one_output(self, executor):
        outputs = self.outputs(
            executor,
            self.container(lambda x: [x * 2]),
            batch_of(plan(), [[one] for one in matrices(1, 2)]),
        )
        assert len({output.untyped_storage().data_ptr() for (output,) in outputs}) == 1

    def test_detached_rows_are_copies_and_free_the_whole(self, executor):
        wholes = []

        def function(x):
            whole = x * 2
            wholes.append(weakref.ref(whole))
            return [whole]

        members = [[one] for one in matrices(1, 2)]
        outputs = self.outputs(
            executor, self.container(function), batch_of(plan(detach=True), members)
        )
        assert [output.untyped_storage().nbytes() for (output,) in outputs] == [12, 24]
        assert all(same(output, x * 2) for (output,), (x,) in zip(outputs, members, strict=True))
        assert wholes[0]() is None

    def test_outputs_are_what_the_container_makes_its_own(self, executor):
        weights = torch.arange(9.0).reshape(3, 3)

        def own(outputs):
            return [
                output.clone() if output.data_ptr() == weights.data_ptr() else output
                for output in outputs
            ]

        model = self.container(lambda x: [weights, x + 1], outputs=2, own=own)
        members = [[one] for one in matrices(1, 2)]
        outputs = self.outputs(executor, model, batch_of(plan(outputs=2), members))
        start, end = weights.data_ptr(), weights.data_ptr() + 36
        assert [output.tolist() for output, _ in outputs] == [
            weights[:1].tolist(),
            weights[1:].tolist(),
        ]
        assert not any(start <= output.data_ptr() < end for output, _ in outputs)

    # --- what fails ------------------------------------------------------------------------------

    def error(self, executor, function, batch, inputs=1, outputs=1):
        model = self.container(function, inputs=inputs, outputs=outputs)
        completion = self.run(executor, model, batch)
        assert completion.outputs is None
        tensors = [tensor for member in batch.members for tensor in member]
        assert [tensor._use_count() for tensor in tensors] == [1] * len(tensors)
        return completion.error

    def test_an_error_that_is_kept_keeps_no_tensors(self, executor):
        def fail(x):
            raise RunError("no")

        inputs = matrices(2, 1)
        members = [[one] for one in inputs]
        kept = self.run(executor, self.container(fail), batch_of(plan(), members)).error
        assert isinstance(kept, RunError)
        watched = [weakref.ref(one) for one in inputs]
        members.clear()
        inputs.clear()
        assert [one() for one in watched] == [None, None]

    @pytest.mark.parametrize(
        ("function", "words"),
        [
            (lambda x: x[:2], "output 1 of a batch has 2 rows in dimension 0, expected 4"),
            (
                lambda x: torch.cat([x, x]),
                "output 1 of a batch has 8 rows in dimension 0, expected 4",
            ),
            (
                lambda x: x.sum(),
                "output 1 of a batch has 0 dimensions, and its rows should be in dimension 0",
            ),
        ],
    )
    def test_an_output_of_other_rows_fails_the_batch(self, executor, function, words):
        batch = batch_of(plan(outputs=2), [[one] for one in matrices(1, 2)], padded_rows=4)
        error = self.error(executor, lambda x: [x + 1, function(x)], batch, outputs=2)
        assert isinstance(error, RunError)
        assert str(error) == f"model 'rows': the run failed: {words}"

    def test_an_output_that_is_too_short_to_be_cut_fails_the_batch(self, executor):
        how = plan(InputPlan(0, (0, 1), (1,)), outputs=[OutputPlan(0, (RaggedOut(1, 0, 1),))])
        batch = batch_of(how, [[torch.rand(1, n)] for n in (2, 5)])
        error = self.error(executor, lambda x: [x[:, :4]], batch)
        assert str(error) == (
            "model 'rows': the run failed: output 0 of a batch is shorter in dimension 1 than "
            "input 0 of request 1 in "
            "dimension 1"
        )

    @pytest.mark.parametrize(
        ("second", "words"),
        [
            (torch.rand(1, 4), "has size 4 in dimension 1, not 3"),
            (torch.rand(2, 3), "has size 2 in dimension 0, not 1"),
            (torch.rand(1, 3, 1), "has 3 dimensions, not 2"),
            (torch.ones(1, 3, dtype=torch.int32), "is of another dtype than that of the first"),
        ],
    )
    def test_members_that_do_not_fit_together_fail_the_batch(self, executor, second, words):
        batch = Batch(plan(), [[torch.rand(1, 3)], [second]], [1, 1], 2, 0)
        error = self.error(executor, lambda x: [x], batch)
        assert isinstance(error, RunError)
        assert (
            str(error) == f"model 'rows': the run failed: input 0 of request 1 of the batch {words}"
        )

    @pytest.mark.parametrize(("rows", "padded"), [([1, 1], 1), ([1], 2), ([], 0)])
    def test_rows_that_can_not_be_are_refused(self, executor, rows, padded):
        members = [[one] for one in matrices(1, 1)] if rows else []
        batch = Batch(plan(), members, rows, padded, 0)
        assert isinstance(self.error(executor, lambda x: [x], batch), ValueError)


class StagingContract(GatheringContract):
    """Where the memory in which inputs are put together is kept for the next batch."""

    def test_one_tensor_at_several_outputs_that_has_not_the_rows_fails_the_batch_and_no_other(
        self, executor
    ):
        def short(x):
            y = x[1:] + 1
            return [y, y]

        def both(x):
            y = x + 1
            return [y, y]

        members = [[one] for one in matrices(1, 2)]
        completion = self.run(
            executor, self.container(short, outputs=2), batch_of(plan(outputs=2), members)
        )
        assert "has 2 rows in dimension 0, expected 3" in str(completion.error)
        outputs = self.outputs(
            executor, self.container(both, outputs=2), batch_of(plan(outputs=2), members)
        )
        assert all(
            same(output, x + 1)
            for got, (x,) in zip(outputs, members, strict=True)
            for output in got
        )

    def test_memory_is_kept_for_a_slot_while_it_is_large_enough(self, executor):
        model = self.watching()
        big, small = (
            batch_of(plan(), [[one] for one in matrices(*rows)]) for rows in ((4, 4), (1, 2))
        )
        first, *others = self.addresses(executor, model, big, small, big, small)
        assert others == [first] * 3

    @pytest.mark.parametrize("first", [True, False])
    def test_batches_inside_inference_mode_and_outside_share_memory(self, executor, first):
        model = self.watching()
        members = [[one.requires_grad_()] for one in matrices(1, 2)]
        for mode in (first, not first, first):
            with torch.inference_mode(mode):
                outputs = self.outputs(executor, model, batch_of(plan(), members))
            assert all(
                same(output, x * 2) for (output,), (x,) in zip(outputs, members, strict=True)
            )
            assert not any(output.requires_grad for (output,) in outputs)
        assert len(set(model.seen)) == 1

    def test_memory_grows_by_more_than_is_asked_for(self, executor):
        model = self.watching()
        batches = [batch_of(plan(), [[one] for one in matrices(n)]) for n in range(1, 65)]
        held = [torch.empty(64)]  # or what is freed would be given again
        seen = []
        for batch in batches:
            seen += self.addresses(executor, model, batch)
            held.append(torch.empty(len(batch.rows) * 12))
        assert len(list(itertools.groupby(seen))) <= 8

    def test_each_slot_has_memory_of_its_own(self, executor):
        model = self.watching()
        members = [[one] for one in matrices(1, 2)]
        batches = [batch_of(plan(), members, slot=slot) for slot in (0, 1, 5, 0, 1, 5)]
        seen = self.addresses(executor, model, *batches)
        assert seen[:3] == seen[3:]
        assert len(set(seen)) == 3

    def test_detached_rows_of_an_input_leave_the_memory_to_the_next_batch(self, executor):
        model = self.watching(lambda x: x)
        members = [[one] for one in matrices(1, 2)]
        kept = self.outputs(executor, model, batch_of(plan(detach=True), members))
        self.outputs(executor, model, batch_of(plan(detach=True), [[torch.zeros(3, 3)]]))
        assert all(same(output, x) for (output,), (x,) in zip(kept, members, strict=True))
        assert model.seen[0] == model.seen[1]


def how_only(how):
    """The same plan of inputs for a model that gives nothing."""
    return BatchPlan(how.inputs, ())


def laid_out(tensor, order):
    """The same values, dense with the dimensions in this order in memory."""
    back = [order.index(dim) for dim in range(tensor.dim())]
    return tensor.permute(order).contiguous().permute(back)


def by_hand(how, inputs, rows):
    """What the model should see."""
    shape = [max(one.shape[dim] for one in inputs) for dim in range(inputs[0].dim())]
    shape[how.dim] = rows
    whole = torch.zeros(shape, dtype=inputs[0].dtype)
    first = 0
    for one in inputs:
        place = whole.narrow(how.dim, first, one.shape[how.dim])
        place.fill_(how.pad)
        place[tuple(slice(size) for size in one.shape)] = one
        first += one.shape[how.dim]
    return whole


def bytes_of(tensor):
    """Its values as bytes: not every dtype can be compared."""
    return tensor.contiguous().view(torch.uint8)
