"""Probing: runs a model at load to find its least sizes, independent rows and written inputs.

All of it blocks. On a CPU the runs happen in a child process (`child.py`). A run that fails
there ends no other process, prints nothing and changes no buffer. On other devices, and where there
are no child processes, only sizes that the compiler knew of are run, and size 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.child import FAULT, NOT_STARTED, Tell, can_fork, in_child
from aoti_sched.engine.probe_runs import ProbeRuns
from aoti_sched.engine.probe_values import Findings, Rows, Symbol, symbols_in
from aoti_sched.model.evidence import (
    symbols_of,
    tolerance_of,
)
from aoti_sched.model.specs import ExampleSpec, RowEvidence, TensorSpec

if TYPE_CHECKING:
    from aoti_sched.backends.contracts import Container

LIMIT = 10.0
"""Seconds that the runs in one child may take.

A child that dies is followed by another, at most 2 x symbols + 2.
"""


def examine(
    container: Container,
    specs: Sequence[TensorSpec],
    *,
    examples: Sequence[ExampleSpec] = (),
    symbols: Mapping[str, Symbol] | None = None,
    rows: Rows | None = None,
    dtypes: Sequence[str] = (),
    apart: bool = True,
    set_threads: Callable[[int], None] | None = None,
) -> Findings:
    """Run a model that was just loaded on values made up for it, and say what that shows.

    About 8 runs for each symbol.

    Args:
        container: The model; nothing else may run on it.
        specs: Its inputs.
        examples: Values are made up like these, one for each input.
        symbols: Those whose least values are to be found.
        rows: Whether these rows are independent is to be found.
        dtypes: In which it computes, besides those of its inputs.
        apart: Whether to run it in a child process, where there can be one.
        set_threads: Sets the intra-op threads of the child's only thread.
    """
    findings = Findings()
    todo = dict(symbols or {})
    odd = [name for name in todo if not name.isidentifier()]
    odd = odd or [name for name in symbols_of(specs) if not name.isidentifier()]
    if odd:
        findings.failure = f"the size {odd[0]} is none that inputs could be made for"
        findings.least = {s.name: (s.trusted, findings.failure) for s in todo.values()}
        return findings
    everything = symbols_in(specs, stated_by_user=True) | todo
    tolerance = tolerance_of([*(spec.dtype for spec in specs), *dtypes])
    apart = apart and can_fork()
    if not apart:
        todo = {name: msgspec.structs.replace(s, floor=max(s.floor, 1)) for name, s in todo.items()}

    def work(tell: Tell) -> None:
        if apart and set_threads is not None:
            set_threads(1)
        ProbeRuns(container, specs, examples, everything, tolerance, findings, tell).all(todo, rows)

    if not apart:
        told: list[Any] = []
        work(told.append)
        _take(findings, todo, told)
        return findings
    for _ in range(2 * len(todo) + 2):  # each child that dies leaves one thing fewer to do
        told, end = in_child(work, LIMIT)
        trying = _take(findings, todo, told)
        if not end:
            break
        if not end.startswith((NOT_STARTED, FAULT)):
            end = f"a process that ran it so did not survive: {end}"
        if trying is None:
            findings.failure = findings.failure or end
            if rows is not None and findings.rows is None:
                findings.rows = RowEvidence(None, end)
            break
        name, value = trying
        if not name:  # all at their least values together
            findings.least = {
                s.name: (max(findings.least[s.name][0], 1) if value == 0 else s.trusted, f"{end}.")
                for s in todo.values()
            }
        else:
            what = "could not be tried" if end.startswith(FAULT) else "is not taken"
            findings.least[name] = (value + 1, f"{value} {what}: {end}.")
    for symbol in todo.values():
        findings.least.setdefault(symbol.name, (symbol.trusted, findings.failure))
    return findings


def _take(
    findings: Findings, todo: Mapping[str, Symbol], told: Sequence[Any]
) -> tuple[str, int] | None:
    """Note what a child told.

    Returns:
        The symbol and the value of the trial that did not end; None where every trial ended.
    """
    trying = None
    for kind, *values in told:
        trying = None
        if kind == "trying":
            trying = (values[0], values[1])
        elif kind == "least":
            findings.least[values[0]] = (values[1], values[2])
        elif kind == "rows":
            findings.rows = RowEvidence(values[0], values[1])
        elif kind == "mutated":
            findings.mutated = tuple(values[0])
        elif kind == "zeros":
            findings.zeros = values[0]
        elif kind == "failed":
            findings.failure = values[0]
            for symbol in todo.values():
                findings.least.setdefault(symbol.name, (symbol.trusted, values[0]))
    return trying
