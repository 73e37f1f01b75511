"""The layers: who may import whom. Reads every import of the package and fails on an arrow that points up."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import aoti_sched

ROOT = Path(aoti_sched.__file__).parent

# From the ground up; a name stands for the module and, if it is a folder, for all that is in it.
LAYERS = {
    "errors": ["errors"],
    "words": [
        "call_spec",
        "child",
        "compile",
        "config",
        "arguments",
        "event_log",
        "evidence",
        "findings",
        "foreign",
        "package",
        "specs",
        "telemetry",
        "validation",
        "weight_names",
        "wrapper_source",
    ],
    "queue": ["queue"],
    "backends": ["backends"],
    "front": [
        "",
        "batching",
        "blocking",
        "dispatch",
        "future",
        "housekeeping",
        "loading",
        "parking",
        "probing",
        "replicas",
        "runner",
        "scheduler",
        "tenants",
        "testing",
        "update",
        "worker",
    ],
}
MAY_IMPORT = {
    "errors": set(),
    "words": {"errors", "words"},
    "queue": {"errors", "queue"},
    "backends": {"errors", "words", "backends"},
    "front": set(LAYERS),
}
ASYNCIO_LIVES_IN = {
    "blocking",
    "dispatch",
    "event_log",
    "future",
    "housekeeping",
    "parking",
    "replicas",
    "runner",
    "scheduler",
    "testing",
    "update",
}
NOT_FOR_THE_QUEUE = {
    "asyncio",
    "concurrent",
    "multiprocessing",
    "random",
    "selectors",
    "socket",
    "threading",
    "time",
}


def module_name(path):
    """ "queue.job" for aoti_sched/queue/job.py; "" for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def layer_of(module):
    """The one layer the module is in; None when it is in none."""
    top = module.partition(".")[0]
    return next((layer for layer, names in LAYERS.items() if top in names), None)


def imports_in(source):
    """Full names of all that a source imports, wherever in it the import stands, types' imports included.

    `from a import b` gives "a.b", be that a module or a name in one.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the package imports by full names"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_module(name, modules):
    """Which of the package's modules an imported name is, or is in; None for what is not of the package."""
    if name.partition(".")[0] != "aoti_sched":
        return None
    inner = name.partition(".")[2]
    while inner not in modules:
        inner = inner.rpartition(".")[0]
    return inner


def arrows_up(sources):
    """A sentence for each import of a module in a layer that the importing one may not know."""
    for module, source in sources.items():
        here = layer_of(module)
        for name in imports_in(source):
            target = own_module(name, sources)
            if target is not None and layer_of(target) not in MAY_IMPORT[here]:
                yield f"{module} ({here}) imports {target} ({layer_of(target)})"


def tops(module):
    """First parts of the names of all that a module imports."""
    return {name.partition(".")[0] for name in imports_in(MODULES[module].read_text())}


def test_every_module_is_in_a_known_layer():
    assert [module for module in MODULES if layer_of(module) is None] == []


def test_every_name_in_a_layer_is_a_module():
    assert [name for names in LAYERS.values() for name in names if name not in MODULES] == []


def test_no_import_points_up():
    assert list(arrows_up({module: path.read_text() for module, path in MODULES.items()})) == []


@pytest.mark.parametrize(
    "source",
    [
        "from aoti_sched.scheduler import Scheduler",
        "import aoti_sched.scheduler",
        "from aoti_sched import scheduler",
        "def late():\n    from aoti_sched.scheduler import Scheduler",
        "if TYPE_CHECKING:\n    from aoti_sched.scheduler import Scheduler",
    ],
)
def test_an_import_that_points_up_is_found_in_every_spelling(source):
    sources = {"": "", "scheduler": "", "backends.cpu": source, "runner": source}
    assert list(arrows_up(sources)) == ["backends.cpu (backends) imports scheduler (front)"]


@pytest.mark.parametrize("module", [module for module in MODULES if layer_of(module) == "queue"])
def test_the_queue_imports_only_what_is_pure(module):
    allowed = (sys.stdlib_module_names - NOT_FOR_THE_QUEUE) | {"msgspec", "aoti_sched"}
    assert tops(module) - allowed == set()


def test_asyncio_lives_in_the_front_alone():
    assert {module for module in MODULES if "asyncio" in tops(module)} == ASYNCIO_LIVES_IN


def test_importing_loads_nothing_that_only_some_calls_need():
    late = ["aoti_sched.model.findings", "ctypes", "hypothesis", "multiprocessing", "numpy", "torch"]
    code = f"import sys, aoti_sched; print([name for name in {late} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["aoti_sched", "aoti_sched.testing"])
def test_importing_costs_no_torch(module):
    code = f"import sys, {module}; print([name for name in sys.modules if name.partition('.')[0] == 'torch'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_sorted_and_exist():
    names = aoti_sched.__all__
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(aoti_sched, name)] == []


def test_every_error_is_public():
    errors = {name for name, thing in vars(aoti_sched.errors).items() if isinstance(thing, type)}
    assert errors - set(aoti_sched.__all__) == set()
