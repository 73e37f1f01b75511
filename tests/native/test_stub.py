"""`_native.pyi` says what the compiled module is: the same names, parameters, defaults, types
and words.

mypy's stubtest can't tell: it finds no signatures in nanobind's functions, which keep them in an
attribute of their own.
"""

import ast
import re

import pytest

from aoti_sched.backends.native import _native
from tests.native.library import NATIVE

STUB = (NATIVE / "_native.pyi").read_text()
UNKNOWN = {"object", "list", "tuple"}
"""What nanobind calls a type that it knows no better."""


def in_module(module):
    """(signature, words) of each function of a module and its classes; None for a class that is
    an error.
    """
    found = {}
    for name, thing in vars(module).items():
        if name.startswith("__"):
            continue
        if hasattr(thing, "__nb_signature__"):
            found[name] = signature(thing)
        elif issubclass(thing, Exception):
            found[name] = f"class {name}({thing.__base__.__name__})"
        else:
            found |= {
                f"{name}.{method}": signature(function)
                for method, function in vars(thing).items()
                if hasattr(function, "__nb_signature__")
            }
    return found


def signature(function):
    ((text, words, defaults),) = function.__nb_signature__
    text = re.sub(r"\\(\d+)", lambda match: repr(defaults[int(match[1])]), text)
    text = text.replace(f"{_native.__name__}.", "").replace("collections.abc.", "")
    return described(ast.parse(f"{text}: ...").body[0], words)


def in_stub(text):
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = described(node, ast.get_docstring(node))
        elif isinstance(node, ast.ClassDef):
            if node.bases:
                found[node.name] = f"class {node.name}({ast.unparse(node.bases[0])})"
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    found[f"{node.name}.{part.name}"] = described(part, ast.get_docstring(part))
    return found


def described(function, words):
    """A function's parameters without their types, its types, and its words."""
    types = [each.annotation for each in ast.walk(function.args) if isinstance(each, ast.arg)]
    types = [ast.unparse(one) if one else "" for one in (*types, function.returns)]
    for each in ast.walk(function.args):
        if isinstance(each, ast.arg):
            each.annotation = None
    return ast.unparse(function.args), types, " ".join((words or "").split())


def differences(stub):
    real, said = in_module(_native), in_stub(stub)
    yield from sorted(real.keys() ^ said.keys())
    for name in real.keys() & said.keys():
        if isinstance(real[name], str):
            if real[name] != said[name]:
                yield name
            continue
        (parameters, types, words), (its_parameters, its_types, its_words) = real[name], said[name]
        known = [
            (one, its) for one, its in zip(types, its_types, strict=False) if one not in UNKNOWN
        ]
        if (
            parameters != its_parameters
            or words != its_words
            or any(one != its for one, its in known)
        ):
            yield name


def test_the_stub_says_what_the_module_is():
    assert list(differences(STUB)) == []


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("class Model:", "class Models:", "Model.__init__"),
        ("    def fileno(self) -> int: ...\n", "", "Lanes.fileno"),
        ("    def fileno(self)", "    def gone(self): ...\n    def fileno(self)", "Lanes.gone"),
        (
            (
                "inputs: Sequence[Any],\n        threads: int,\n        on: Stream | None = None,\n"
                "        graph: Graph | None = None,\n        after: Arrival | None = None,\n"
                "        consumers: Sequence[int | None] | None = None,\n    ) -> None:"
            ),
            (
                "inputs: Sequence[Any],\n        threads: int,\n        stream: Stream | None = "
                "None,\n"
                "        graph: Graph | None = None,\n        after: Arrival | None = None,\n"
                "        consumers: Sequence[int | None] | None = None,\n    ) -> None:"
            ),
            "Lanes.submit",
        ),
        (
            "delete_tensor: int,\n        root",
            "delete_tensor: int = 0,\n        root",
            "Lanes.__init__",
        ),
        (
            (
                "threads: int,\n        on: Stream | None = None,\n        graph: Graph | None = "
                "None,\n        consumers: Sequence[int | None] | None = None,\n"
                '    ) -> Taken:\n        """Run a batch'
            ),
            (
                "threads: int = 1,\n        on: Stream | None = None,\n        graph: Graph | "
                "None = None,\n        consumers: Sequence[int | None] | None = None,\n"
                '    ) -> Taken:\n        """Run a batch'
            ),
            "Lanes.run_batch_here",
        ),
        (
            "token: int,\n        model: Model,\n        inputs",
            "token: str,\n        model: Model,\n        inputs",
            "Lanes.submit",
        ),
        ("def count(self) -> int", "def count(self) -> str", "Lanes.count"),
        ("        *,\n        delete_tensor", "        delete_tensor", "Lanes.__init__"),
        ("Make the descriptor readable", "Make it loud", "Lanes.wake"),
        ("ForkedError(RuntimeError)", "ForkedError(ValueError)", "ForkedError"),
    ],
)
def test_a_stub_that_says_otherwise_is_seen(old, new, name):
    assert STUB.count(old) == 1
    assert name in differences(STUB.replace(old, new))
