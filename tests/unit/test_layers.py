"""The rooms: which room may import which.

Reads every import of the package, type-only imports included.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import aoti_sched
import aoti_sched.errors

ROOT = Path(aoti_sched.__file__).parent

# Rooms of several modules; every other module or folder below `aoti_sched/` is a room of its own
# name.
FACE = {
    *(
        "",
        "apply",
        "blocking",
        "blocking_calls",
        "blocking_handles",
        "blocking_lease",
        "handle",
        "lease",
        "load_settings",
        "mapping",
        "runnable",
    ),
    *("runner", "scheduler", "session", "split"),
}
WORDS = {
    *("arguments", "config", "config_file", "at_exit", "errors", "events", "foreign", "signature"),
    *("explanation", "histograms", "percentiles", "recording", "spans", "stats", "timeline"),
    *("waits", "whole_file"),
}
MAY_IMPORT = {
    "errors": set(),
    "signature": set(),
    "arguments": {"errors"},
    "child": {"errors"},
    "at_exit": set(),
    "foreign": {"errors"},
    "config": {"arguments", "errors"},
    "config_file": {"arguments", "config", "errors"},
    "events": {"errors", "foreign"},
    "histograms": {"errors"},
    "percentiles": set(),
    "spans": set(),
    "waits": {"events", "spans"},
    "explanation": {"errors", "events"},
    "recording": {"arguments", "events", "explanation", "timeline", "waits"},
    "timeline": {"events", "whole_file"},
    "flight": {"errors", "queue", "version", "whole_file"},
    "version": set(),
    "whole_file": set(),
    "stats": {"arguments", "errors", "histograms", "model"},
    "model": {"arguments", "child", "config", "errors"},
    "package": {"arguments", "errors"},
    "queue": {"errors"},
    "compile": {"compile_stages", "errors", "model"},
    "compile_stages": set(),
    "backends": {"at_exit", "errors", "events", "foreign", "model", "package"},
    "engine": {*WORDS, "backends", "child", "model", "package", "queue"},
    "face": {
        *(*WORDS, "backends", "compile", "engine", "expose", "flight", "model", "package", "queue"),
        "version",
    },
    "expose": {*WORDS, "exporters", "package"},
    "exporters": {"arguments", "errors", "events", "face", "histograms", "stats", "version"},
    "testing": {*WORDS, "backends", "engine", "face", "flight", "model", "package", "queue"},
    "simulation": {*WORDS, "backends", "engine", "face", "queue", "testing"},
    "cli": {
        *(*WORDS, "backends", "compile", "compile_stages", "expose", "face", "model", "package"),
        "simulation",
    },
    "__main__": {"cli"},
}
# Groups of modules that import each other, for their types alone. None may be added.
CIRCLES = {
    frozenset(
        "queue." + name
        for name in (
            "admission.load",
            "admission.shedding",
            "batching",
            "job",
            "runner_state",
            "selection.backlog",
            "selection.job_queue",
            "selection.sorted_jobs",
        )
    ),
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


def room_of(module):
    return "face" if module in FACE else module.partition(".")[0]


@functools.cache
def imports_in(source):
    """Full names of all that a source imports, wherever in it the import stands, types' imports
    included.

    `from a import b` gives "a.b", be that a module or a name in one.
    """
    return tuple(_imports_in(source))


def _imports_in(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the package imports by full names"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_module(name, modules):
    """Return which of the package's modules an imported name is, or is in; None for foreign
    names.
    """
    if name.partition(".")[0] != "aoti_sched":
        return None
    inner = name.partition(".")[2]
    while inner not in modules:
        inner = inner.rpartition(".")[0]
    return inner


def targets(module, sources):
    """The package's own modules that a module imports."""
    own = (own_module(name, sources) for name in imports_in(sources[module]))
    return {target for target in own if target is not None and target != module}


def arrows_up(sources):
    """A sentence for each import of a module in a room that the importing room may not know."""
    for module in sources:
        here = room_of(module)
        for target in sorted(targets(module, sources)):
            there = room_of(target)
            if there != here and there not in MAY_IMPORT[here]:
                yield f"{module} ({here}) imports {target} ({there})"


def circles(sources):
    """The groups of modules that reach each other by imports (Tarjan's strongly connected
    components).
    """
    edges = {module: sorted(targets(module, sources)) for module in sources}
    index, low, stack, found = {}, {}, [], []

    def visit(module):
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in edges[module]:
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            group = set()
            while module not in group:
                group.add(stack.pop())
            if len(group) > 1:
                found.append(frozenset(group))

    for module in edges:
        if module not in index:
            visit(module)
    return found


def sources():
    return {module: path.read_text() for module, path in MODULES.items()}


def tops(module):
    """First parts of the names of all that a module imports."""
    return {name.partition(".")[0] for name in imports_in(MODULES[module].read_text())}


def test_every_module_is_in_a_known_room():
    assert [module for module in MODULES if room_of(module) not in MAY_IMPORT] == []


def test_no_import_points_up():
    assert list(arrows_up(sources())) == []


def test_no_circle_of_imports_is_new():
    assert [
        sorted(circle) for circle in circles(sources()) if not any(circle <= old for old in CIRCLES)
    ] == []


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
    tree = {"": "", "scheduler": "", "backends.cpu": source, "runner": source}
    assert list(arrows_up(tree)) == ["backends.cpu (backends) imports scheduler (face)"]


def test_a_circle_is_found():
    tree = {"": "", "queue.a": "import aoti_sched.queue.b", "queue.b": "import aoti_sched.queue.a"}
    assert circles(tree) == [{"queue.a", "queue.b"}]


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) == "queue"])
def test_the_queue_imports_only_what_is_pure(module):
    allowed = (sys.stdlib_module_names - NOT_FOR_THE_QUEUE) | {"msgspec", "aoti_sched"}
    assert tops(module) - allowed == set()


def test_asyncio_lives_in_the_engine_and_the_face_alone():
    users = {room_of(module) for module in MODULES if "asyncio" in tops(module)}
    # Events ask whether a loop runs here. A command and a simulation have event loops of their own.
    # A scrape of another thread asks the loop. The server of an exposed scheduler runs on its loop.
    others = {"cli", "events", "exporters", "expose", "simulation"}
    assert users == {"engine", "face", "testing", *others}


@pytest.mark.parametrize("module", ["aoti_sched", "aoti_sched.testing"])
def test_importing_costs_no_torch(module):
    names = "[name for name in sys.modules if name.partition('.')[0] == 'torch']"
    code = f"import sys, {module}; print({names})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_imported_from_where_type_checkers_find_it():
    tree = ast.parse(Path(aoti_sched.__file__).read_text())
    (types,) = (node for node in tree.body if isinstance(node, ast.If))
    stated = {
        alias.name: node.module.removeprefix("aoti_sched.")
        for node in types.body
        for alias in node.names
    }
    assert stated == aoti_sched._HOME
    assert {*stated, "__version__"} == {*aoti_sched.__all__}


def test_the_public_names_are_sorted_and_exist():
    names = aoti_sched.__all__
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(aoti_sched, name)] == []


def test_every_error_is_public():
    errors = {name for name, thing in vars(aoti_sched.errors).items() if isinstance(thing, type)}
    assert errors - set(aoti_sched.__all__) == set()
