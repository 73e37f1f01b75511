"""How a call's arguments become the container's inputs, and its outputs become what the module
returned.

torch's own pytree is the oracle: our plan gives the same leaves in the same order, and the same
structures back.
"""

import collections
import inspect
import json
import math
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from aoti_sched.errors import ConfigError, InputMismatchError, LoadError
from aoti_sched.model.call_spec import ExportedCallSpec, must_fit
from aoti_sched.model.specs import BoolSpec, FloatSpec, IntegerSpec, LiteralSpec, TensorSpec


def text(tree):
    return pytree.treespec_dumps(pytree.tree_structure(tree))


def call_spec(args=(), kwargs=None, out=0, **options):
    """The call spec of a model that was exported with these arguments and this result."""
    return ExportedCallSpec("m", text((args, kwargs or {})), text(out), **options)


def tensors(count):
    return [torch.full((), float(index)) for index in range(count)]


def tensor_specs(*names):
    return tuple(TensorSpec(name, "float32", ()) for name in names)


def refused(spec, *args, **kwargs):
    with pytest.raises(InputMismatchError) as caught:
        spec.flatten(args, kwargs)
    return caught.value


@dataclass
class Point:
    x: torch.Tensor
    y: torch.Tensor


pytree.register_pytree_node(
    Point,
    lambda point: ([point.x, point.y], None),
    lambda children, _: Point(*children),
    serialized_type_name="tests.unit.model.test_call_spec.Point",
)


# --- against torch's pytree -----------------------------------------------------------------------

keys = st.one_of(st.text(max_size=3), st.integers(-9, 9))
trees = st.recursive(
    st.builds(lambda: torch.zeros(())),
    lambda children: st.one_of(
        st.lists(children, max_size=4),
        st.lists(children, max_size=4).map(tuple),
        st.dictionaries(keys, children, max_size=4),
    ),
    max_leaves=12,
)
calls = st.tuples(
    st.lists(trees, max_size=3).map(tuple),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), trees, max_size=3),
)


def same(one, other):
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


@given(calls)
def test_any_call_flattens_as_torch_flattens_it(call):
    args, kwargs = call
    assert same(call_spec(args, kwargs).flatten(args, kwargs), pytree.tree_leaves(call))


@given(trees)
def test_any_result_is_rebuilt_as_torch_rebuilds_it(tree):
    leaves, structure = pytree.tree_flatten(tree)
    rebuilt = call_spec(out=tree).unflatten(leaves)
    again, structure_again = pytree.tree_flatten(rebuilt)
    assert structure_again == structure
    assert same(again, leaves)


def in_lists(tree):
    """The same tree with lists for tuples, which pass for each other."""
    if isinstance(tree, dict):
        return {key: in_lists(child) for key, child in tree.items()}
    return list(map(in_lists, tree)) if isinstance(tree, (list, tuple)) else tree


@given(calls, calls)
def test_a_call_of_another_structure_is_refused_just_when_torch_tells_them_apart(exported, called):
    spec = call_spec(
        *exported, inputs=tensor_specs(*map(str, range(len(pytree.tree_leaves(exported)))))
    )
    structure = pytree.tree_structure(in_lists(exported))
    try:
        expected = structure.flatten_up_to(in_lists(called))
    except ValueError:
        refused(spec, *called[0], **called[1])
    else:  # a container where a tensor belongs is passed on; the input check tells of it
        assert [*map(in_lists, spec.flatten(*called))] == expected


# --- arguments ------------------------------------------------------------------------------------


def test_flat_arguments_are_taken_as_they_come():
    a, b = tensors(2)
    assert same(call_spec((a, b)).flatten((a, b), {}), [a, b])


def test_keyword_arguments_come_after_positional_ones_in_the_exported_order():
    a, b, c = tensors(3)
    spec = call_spec((a,), {"scale": b, "offset": c})
    assert same(spec.flatten((a,), {"offset": c, "scale": b}), [a, b, c])


def test_the_order_of_a_dictionary_does_not_matter():
    a, b = tensors(2)
    assert same(call_spec(({"a": a, "b": b},)).flatten(({"b": b, "a": a},), {}), [a, b])


def test_keys_may_be_numbers():
    a, b = tensors(2)
    assert same(call_spec(({0: a, 7: b},)).flatten(({7: b, 0: a},), {}), [a, b])


def test_a_number_is_not_its_text_as_a_key():
    assert refused(call_spec(({0: torch.zeros(())},)), {"0": torch.zeros(())}).got == "['0']"


def test_positional_arguments_may_be_given_by_name():
    a, b, c = tensors(3)
    spec = call_spec((a, b), {"k": c}, parameters=("x", "y"))
    assert same(spec.flatten((a,), {"k": c, "y": b}), [a, b, c])
    assert same(spec.flatten((), {"y": b, "k": c, "x": a}), [a, b, c])


def test_the_callers_keywords_are_left_as_they_were():
    a, b = tensors(2)
    keywords = {"x": a, "k": b}
    call_spec((a,), {"k": b}, parameters=("x",)).flatten((), keywords)
    assert list(keywords) == ["x", "k"]


def test_without_names_positional_arguments_are_positional():
    a, b = tensors(2)
    assert refused(call_spec((a, b)), a, y=b).got == "1 positional, y="


def test_leaves_that_are_no_tensors_are_dropped_where_the_inputs_are_unknown():
    a, b = tensors(2)
    spec = call_spec((a, None, 3), {"b": b})
    assert same(spec.flatten((a, None, 3), {"b": b}), [a, b])


def test_leaves_that_are_no_tensors_are_kept_for_the_input_check_where_all_inputs_are_tensors():
    spec = call_spec(tuple(tensors(2)), inputs=tensor_specs("x", "y"))
    a = torch.zeros(())
    assert spec.flatten((a, 3), {}) == [a, 3]


# --- literals -------------------------------------------------------------------------------------


def literal_spec(value):
    return call_spec(
        (torch.zeros(()), value),
        inputs=(*tensor_specs("x"), LiteralSpec("mode", value)),
        parameters=("x",),
    )


@pytest.mark.parametrize("value", [None, True, 2, 2.5, "nearest", math.inf, math.nan])
def test_a_literal_that_is_what_was_compiled_is_accepted_and_left_out(value):
    a = torch.zeros(())
    assert same(literal_spec(value).flatten((a, value), {}), [a])


@pytest.mark.parametrize(
    ("compiled", "given"),
    [
        (2, 3),
        (1, True),
        (True, 1),
        (2, 2.0),
        (2.0, 2),
        (None, 0),
        ("a", "b"),
        (math.inf, -math.inf),
    ],
)
def test_another_literal_than_the_compiled_one_is_refused(compiled, given):
    error = refused(literal_spec(compiled), torch.zeros(()), given)
    assert error.input == "mode"
    assert error.expected == f"{compiled!r}, the value the model was compiled with"
    assert error.got == repr(given)


def test_a_tensor_in_a_literals_place_is_refused():
    assert refused(literal_spec(2), torch.zeros(()), torch.tensor(2)).got == "tensor(2)"


def test_a_long_value_is_cut_in_the_message():
    assert len(refused(literal_spec("a"), torch.zeros(()), "b" * 10_000).got) == 60


# --- misfits --------------------------------------------------------------------------------------


def nested():
    a, b, c, d = tensors(4)
    return call_spec((a, {"k": [b, (c,)]}), {"scale": d}, parameters=("x", "options"))


def test_a_missing_argument_is_told_with_the_whole_signature():
    error = refused(nested(), torch.zeros(()))
    assert error.expected == "the arguments (x, options={'k': [*, (*,)]}, scale=*)"
    assert error.got == "1 positional"


def test_an_unknown_keyword_is_told():
    a = torch.zeros(())
    assert refused(call_spec((a,)), a, extra=a).got == "1 positional, extra="


def test_one_argument_too_many_is_told():
    a = torch.zeros(())
    assert refused(call_spec((a,)), a, a).got == "2 positional"


@pytest.mark.parametrize(
    ("options", "path", "expected", "got"),
    [
        ([1], "options", "a dict of 1: {'k': [*, (*,)]}", "list of 1"),
        ({"j": 1}, "options", "the keys ['k']", "['j']"),
        ({"k": {1: 1, 2: (2,)}}, "options['k']", "a list of 2: [*, (*,)]", "dict of 2"),
        ({"k": [1]}, "options['k']", "2 elements: [*, (*,)]", "1"),
        ({"k": [1, 2]}, "options['k'][1]", "a tuple of 1: (*,)", "int"),
        ({"k": [1, (2, 3)]}, "options['k'][1]", "1 elements: (*,)", "2"),
        (collections.Counter(k=1), "options", "a dict of 1: {'k': [*, (*,)]}", "Counter of 1"),
        ({"k": {3}}, "options['k']", "a list of 2: [*, (*,)]", "set"),
    ],
)
def test_a_misfit_deep_inside_names_its_path(options, path, expected, got):
    error = refused(nested(), torch.zeros(()), options, scale=torch.zeros(()))
    assert (error.model, error.input, error.expected, error.got) == ("m", path, expected, got)


def test_a_type_that_is_only_called_like_a_builtin_one_is_refused():
    impostor = type("dict", (dict,), {})
    assert (
        refused(nested(), torch.zeros(()), impostor(k=1), scale=torch.zeros(())).input == "options"
    )


def test_a_misfit_of_an_argument_without_a_name_gives_its_place():
    a = torch.zeros(())
    assert refused(call_spec((a, [a])), a, a).input == "args[1]"


def test_a_misfit_of_a_keyword_argument_names_it():
    a = torch.zeros(())
    assert refused(call_spec((), {"pair": (a, a)}), pair=(a,)).input == "pair"


def test_a_misfit_of_a_large_structure_is_told_in_a_few_words():
    keys = [f"key{number}" for number in range(100_000)]
    error = refused(call_spec((dict.fromkeys(keys, 0),)), dict.fromkeys(keys[1:], 0))
    assert (
        error.expected
        == f"the keys ['key0', {', '.join(map(repr, keys[1:8]))}, ... and 99992 more]"
    )
    assert error.got == f"[{', '.join(map(repr, keys[1:9]))}, ... and 99991 more]"
    error = refused(call_spec((1,)), **dict.fromkeys(keys, 0))
    assert error.got.endswith("key19=, and 99980 more")


# --- what torch's own loader takes ----------------------------------------------------------------

Named = collections.namedtuple("Named", "x y")  # noqa: PYI024
Other = collections.namedtuple("Other", "y x")  # noqa: PYI024
pytree._register_namedtuple(Named, serialized_type_name="tests.unit.model.test_call_spec.Named")
OrderedDict, defaultdict, deque = (
    collections.OrderedDict,
    collections.defaultdict,
    collections.deque,
)
A, B, C = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)


def stock(exported, args, kwargs):
    """The inputs that a model gets from torch's own loader, None when the loader refuses the
    call.
    """
    # Imported here: it brings torch's compiler, which takes a second and a half.
    from torch.export.pt2_archive._package import AOTICompiledModel

    seen = []

    # stands for the C++ class, which takes a list of tensors and looks at nothing else
    class Loader:
        def get_call_spec(self):
            return [text(exported), text(0)]

        def boxed_run(self, inputs):
            seen.extend(inputs)
            return [0]

    try:
        AOTICompiledModel(Loader())(*args, **kwargs)
    except ValueError:
        return None
    return seen


# What was exported, what is given, and what the model should get; None: nothing, the call is
# refused.
TAKEN_AS_STOCK = {
    "a list for a tuple": (((A, B),), ([A, B],), {}, [A, B]),
    "a tuple for a list": (([A, B],), ((A, B),), {}, [A, B]),
    "a list for a tuple, deep inside": (({"k": [(A, B)]},), ({"k": ([A, B],)},), {}, [A, B]),
    "a deque for a list": (([A, B],), (deque([A, B]),), {}, [A, B]),
    "a named tuple for a tuple": (((A, B),), (Named(A, B),), {}, [A, B]),
    "a tuple for a named tuple": ((Named(A, B),), ((A, B),), {}, [A, B]),
    "a list for a deque": ((deque([A, B]),), ([A, B],), {}, [A, B]),
    "a deque of another maxlen": ((deque([A, B], 2),), (deque([A, B], 9),), {}, [A, B]),
    "an OrderedDict for a dict": (({"a": A, "b": B},), (OrderedDict(a=A, b=B),), {}, [A, B]),
    "a dict for an OrderedDict": ((OrderedDict(a=A, b=B),), ({"a": A, "b": B},), {}, [A, B]),
    "a defaultdict for a dict": (({"a": A, "b": B},), (defaultdict(int, a=A, b=B),), {}, [A, B]),
    "a dict for a defaultdict": ((defaultdict(int, a=A, b=B),), ({"a": A, "b": B},), {}, [A, B]),
    "a list beside a registered type": ((Point(A, B), (C,)), (Point(A, B), [C]), {}, [A, B, C]),
    "an OrderedDict beside one": (
        (Point(A, B), {"c": C}),
        (Point(A, B), OrderedDict(c=C)),
        {},
        [A, B, C],
    ),
    "keyword arguments in another order": ((), (), {"b": B, "a": A}, [A, B]),
}
WRONG_IN_STOCK = {
    "keys in another order": (({"a": A, "b": B},), ({"b": B, "a": A},), {}, [A, B]),
    "keys of an OrderedDict for a dict": (
        ({"a": A, "b": B},),
        (OrderedDict(b=B, a=A),),
        {},
        [A, B],
    ),
    "keys of a dict for an OrderedDict": (
        (OrderedDict(a=A, b=B),),
        ({"b": B, "a": A},),
        {},
        [A, B],
    ),
    "another named tuple": ((Named(A, B),), (Other(B, A),), {}, None),
    "other keys": (({"a": A, "b": B},), ({"a": A, "c": B},), {}, None),
    "one tuple for two arguments": ((A, B), ((A, B),), {}, None),
    "two arguments for one tuple": (((A, B),), (A, B), {}, None),
    "a list for a dict": (({"a": A, "b": B},), ([A, B],), {}, None),
    "another nesting": (((A, (B, C)),), (((A, B), C),), {}, None),
    "one tensor too many": (((A, B),), ([A, B, C],), {}, None),
    "a tuple for a registered type": ((Point(A, B), C), ((A, B), C), {}, None),
    "a nesting beside a registered type": ((Point(A, B), (C,)), (Point(A, B), C), {}, None),
}
KEYWORDS = {"a": A, "b": B}


def given_to(exported, args, kwargs):
    """The inputs that a model gets from us, None when the call is refused."""
    spec = call_spec(exported, KEYWORDS if kwargs else {})
    try:
        return spec.flatten(args, kwargs)
    except InputMismatchError:
        return None


@pytest.mark.parametrize(
    ("exported", "args", "kwargs", "wanted"), TAKEN_AS_STOCK.values(), ids=TAKEN_AS_STOCK
)
def test_what_torchs_own_loader_takes_rightly_is_taken(exported, args, kwargs, wanted):
    assert same(stock((exported, KEYWORDS if kwargs else {}), args, kwargs), wanted)
    assert same(given_to(exported, args, kwargs), wanted)


@pytest.mark.parametrize(
    ("exported", "args", "kwargs", "wanted"), WRONG_IN_STOCK.values(), ids=WRONG_IN_STOCK
)
def test_what_torchs_own_loader_takes_wrongly_is_put_right_or_refused(
    exported, args, kwargs, wanted
):
    taken = stock((exported, {}), args, kwargs)
    assert taken is not None
    given = given_to(exported, args, kwargs)
    assert given is None if wanted is None else same(given, wanted) and not same(taken, wanted)


def test_both_refuse_other_keywords():
    assert stock(((), KEYWORDS), (), {"a": A, "c": B}) is None
    assert given_to((), (), {"a": A, "c": B}) is None


def test_keys_may_be_tuples():
    spec = call_spec(({("a", 1): A, ("b", (2,)): B},))
    assert same(spec.flatten(({("b", (2,)): B, ("a", 1): A},), {}), [A, B])


def test_a_flat_signature_reads_as_its_names():
    assert str(call_spec(tuple(tensors(3)), parameters=("x", "y"))) == "(x, y, args[2])"


# --- registered types -----------------------------------------------------------------------------


def test_a_registered_type_is_flattened_by_torch():
    a, b, c = tensors(3)
    assert same(call_spec((Point(a, b), [c])).flatten((Point(a, b), [c]), {}), [a, b, c])


@pytest.mark.parametrize(
    "kind",
    [dict, collections.OrderedDict, lambda pairs: collections.defaultdict(list, pairs)],
    ids=["dict", "ordered", "default"],
)
def test_beside_a_registered_type_keys_may_be_tuples(kind):
    a, b, c, d = tensors(4)
    tree = (Point(a, b), kind({("a", 1): c, ("b", (2,)): d}))
    spec = call_spec((tree,), out=tree)
    assert same(spec.flatten((tree,), {}), [a, b, c, d])
    _, rest = spec.unflatten([a, b, c, d])
    assert rest == tree[1]
    assert "keys" not in refused(spec, (tree[0], {"a": c, "b": d})).hint


def test_an_ordered_dictionary_is_flattened_in_the_exported_order():
    a, b = tensors(2)
    spec = call_spec((collections.OrderedDict(a=a, b=b),))
    assert same(spec.flatten((collections.OrderedDict(b=b, a=a),), {}), [a, b])


def test_beside_a_registered_type_arguments_may_be_given_by_name_and_in_any_order():
    a, b, c, d = tensors(4)
    spec = call_spec((Point(a, b), c), {"k": d, "j": a}, parameters=("point", "x"))
    assert same(spec.flatten((), {"j": a, "x": c, "k": d, "point": Point(a, b)}), [a, b, c, d, a])


def test_another_type_in_a_registered_types_place_is_refused():
    a, b = tensors(2)
    error = refused(call_spec((Point(a, b),)), (a, b))
    assert "Point" in error.expected
    assert "tuple" in error.got


def test_missing_arguments_beside_a_registered_type_are_told_with_the_signature():
    a, b = tensors(2)
    spec = call_spec((Point(a, b), a), {"k": b}, parameters=("point",))
    assert refused(spec).expected == "the arguments (point, args[1], k=)"


def test_a_registered_type_is_rebuilt_by_torch():
    a, b, c = tensors(3)
    point, rest = call_spec(out=(Point(a, b), {"c": c})).unflatten([a, b, c])
    assert isinstance(point, Point)
    assert same([point.x, point.y, rest["c"]], [a, b, c])


@contextmanager
def unregistered(*kinds):
    """As in a process that never imported the module which registers these."""
    tables = (
        pytree.SUPPORTED_NODES,
        pytree.SUPPORTED_SERIALIZED_TYPES,
        pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE,
    )
    pytree.treespec_loads.cache_clear()
    before = [dict(table) for table in tables]
    for kind in kinds:
        name = f"tests.unit.model.test_call_spec.{kind.__name__}"
        for table in tables:
            table.pop(kind, None)
            table.pop(name, None)
    try:
        yield
    finally:
        for table, was in zip(tables, before, strict=True):
            table.clear()
            table.update(was)


@pytest.mark.parametrize("value", [Point(A, B), Named(A, B), [{"deep": Point(A, (B,))}]])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_class_that_is_not_registered_in_this_process_is_refused_at_load(value, side):
    name = "Named" if isinstance(value, Named) else "Point"
    texts = [text(((value, A), {})), text(value)]
    if side == "outputs":
        texts[0] = text(((A,), {}))
    else:
        texts[1] = text(A)
    sentence = (
        rf"model 'm': its {side} contain tests.unit.model.test_call_spec.{name}, which is not "
        rf".*import the module"
    )
    with unregistered(Point, Named), pytest.raises(LoadError, match=sentence):
        ExportedCallSpec("m", *texts)
    ExportedCallSpec("m", *texts)


def test_all_classes_that_are_not_registered_are_named():
    texts = text(((Point(A, B), [Named(A, Point(A, B))]), {})), text(A)
    with (
        unregistered(Point, Named),
        pytest.raises(LoadError, match=r"Point, tests.*Named, which are not "),
    ):
        ExportedCallSpec("m", *texts)


# --- results --------------------------------------------------------------------------------------


def test_one_tensor_comes_back_as_itself():
    (a,) = tensors(1)
    assert call_spec(out=a).unflatten([a]) is a


@pytest.mark.parametrize("out", [(0, 0), [0, 0], {"a": 0, "b": (0,)}, (), (0,), {"a": []}])
def test_a_result_comes_back_in_its_own_types(out):
    values = tensors(len(pytree.tree_leaves(out)))
    assert repr(call_spec(out=out).unflatten(values)) == repr(
        pytree.tree_unflatten(values, pytree.tree_structure(out))
    )


def test_literals_and_sizes_are_put_back_into_a_result():
    (a,) = tensors(1)
    outputs = (
        *tensor_specs("a"),
        LiteralSpec("none", None),
        LiteralSpec("mode", "nearest"),
        IntegerSpec("size"),
    )
    spec = call_spec(out={"a": 0, "none": None, "mode": "", "size": 0}, outputs=outputs)
    result = spec.unflatten([a, None, None, torch.tensor(7)])
    assert result == {"a": a, "none": None, "mode": "nearest", "size": 7}
    assert type(result["size"]) is int


def test_computed_numbers_and_conditions_come_back_in_their_types():
    outputs = FloatSpec("half"), BoolSpec("long"), FloatSpec("item")
    spec = call_spec(out=(0, 0, 0), outputs=outputs)
    result = spec.unflatten(
        [torch.tensor(3.5, dtype=torch.float64), torch.tensor(True), torch.tensor(2.25)]
    )
    assert result == (3.5, True, 2.25)
    assert list(map(type, result)) == [float, bool, float]


def test_literals_and_numbers_are_put_back_beside_a_registered_type():
    a, b = tensors(2)
    outputs = (
        *tensor_specs("x", "y"),
        LiteralSpec("n", 3),
        IntegerSpec("i"),
        LiteralSpec("o", None),
    )
    spec = call_spec(out=collections.OrderedDict(p=Point(a, b), n=0, i=0, o=0), outputs=outputs)
    result = spec.unflatten([a, b, torch.tensor(3), torch.tensor(7), None])
    assert same([result["p"].x, result["p"].y], [a, b])
    assert [(type(result[key]), result[key]) for key in "nio"] == [
        (int, 3),
        (int, 7),
        (type(None), None),
    ]


def test_the_runtimes_list_of_outputs_is_not_changed():
    values = [None]
    call_spec(out=3, outputs=(LiteralSpec("three", 3),)).unflatten(values)
    assert values == [None]


# --- specs that are none --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "{}",
        "[1]",
        "null",
        "[1, {}]",
        json.dumps([1, {"type": None, "context": None, "children_spec": []}]),
    ],
)
def test_a_call_spec_that_is_not_torchs_is_refused_at_load(broken):
    with pytest.raises(LoadError, match="model 'm': its call spec is not torch's pytree JSON"):
        ExportedCallSpec("m", broken, text(0))


def test_a_call_spec_nested_beyond_all_bounds_is_refused_at_load():
    deep = '{"type": "builtins.tuple", "context": "null", "children_spec": [' * 5000
    with pytest.raises(LoadError, match="model 'm': its call spec"):
        ExportedCallSpec("m", f"[1, {deep}", text(0))


# --- the signature that a user states -------------------------------------------------------------


class Module:
    def forward(self, x, y, *, scale=1.0): ...

    def any_forward(self, *args, **kwargs): ...


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (Module.forward, (0, 0), {}),
        (Module.forward, ((0, 0), [0]), {"scale": 0}),
        (Module.forward, (0,), {"y": 0}),
        (Module.any_forward, (0, 0, 0), {"more": 0}),
        (lambda _, x: x, (0,), {}),
    ],
)
def test_a_signature_fits_that_takes_the_exported_call(function, args, kwargs):
    must_fit("load('m.pt2')", function, call_spec(args, kwargs))


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "reason"),
    [
        (Module.forward, (0,), {}, "missing a required argument: 'y'"),
        (Module.forward, (0, 0, 0), {}, "too many positional arguments"),
        (Module.forward, (0, 0), {"size": 0}, "got an unexpected keyword argument 'size'"),
        (lambda: None, (), {}, "too many positional arguments"),
    ],
)
def test_a_signature_that_does_not_take_the_exported_call_is_refused(
    function, args, kwargs, reason
):
    spec = call_spec(args, kwargs)
    with pytest.raises(ConfigError) as caught:
        must_fit("load('m.pt2')", function, spec)
    assert str(caught.value) == (
        f"load('m.pt2'): signature: the model is called with {spec}, and "
        f"{function.__qualname__}{inspect.signature(function)} does not take that: {reason}. Give "
        "the forward of the module that was compiled."
    )
