"""Size conditions: what an exported program requires of its dynamic sizes besides their ranges.

Export follows one branch of what a module decides by its sizes, and notes the condition: `b <= a`
for `x[: y.shape[0]]`, where the sizes are a and b. The compiled code does not check it, and reads
past its buffers for other sizes. Inductor adds such choices of its own. Conditions are kept as
text, such as "b <= a", in the symbols of the inputs' sizes. Reading a text runs no code of the
package.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from types import CodeType
from typing import TYPE_CHECKING, Any

from aoti_sched.errors import LoadError, brief, shortened

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_ASSUMED = 2
"""Export assumes that a size is at least this; what holds from there on is no condition."""

_PARTS = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.BinOp, ast.Add, ast.Sub, ast.Mult),
    *(ast.FloorDiv, ast.Mod, ast.Pow, ast.Div, ast.Name, ast.Load, ast.Constant, ast.Call),
)
_POWERS = range(9)
"""Exponents. A larger one could take all memory."""
_FUNCTIONS: dict[str, Any] = {
    one.__name__: one
    for one in (min, max, abs, round, int, float, math.floor, math.ceil, math.trunc)
}
_MODULES = re.compile(r"\b(?:math\.|torch\.sym_)(?=\w+\()")
"""What torch's printer writes before the names of functions."""


class SizeCondition:
    """One condition on sizes.

    Args:
        text: The condition, an expression of Python's.

    Raises:
        ValueError: The text is no such condition.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._code, self.symbols = _compiled(text)

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Return whether the condition holds for these values of its symbols, all of them given."""
        known = {"__builtins__": {}, **_FUNCTIONS}
        try:
            return bool(eval(self._code, known, dict(sizes)))  # noqa: S307 -- it has _PARTS alone
        except (ArithmeticError, NameError):  # a division by zero, or a symbol that is not given
            return False


def _compiled(text: str) -> tuple[CodeType, frozenset[str]]:
    try:
        tree = ast.parse(text, mode="eval")
        code = compile(tree, "<condition>", "eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the condition {brief(text)} can't be read ({error})") from None
    names = set()
    for node in ast.walk(tree):
        if not (isinstance(node, _PARTS) and _is_known(node)):
            raise ValueError(f"the condition {brief(text)} has a {type(node).__name__}")
        if isinstance(node, ast.Name) and node.id not in _FUNCTIONS:
            names.add(node.id)
    return code, frozenset(names)


def _is_known(node: ast.AST) -> bool:
    """Return whether a part of a condition, of a known kind, is one that takes no time."""
    match node:
        case ast.Constant(value=value):
            return isinstance(value, (int, float))
        case ast.Call(func=ast.Name(id=name)):
            return name in _FUNCTIONS
        case ast.Call():
            return False
        case ast.BinOp(op=ast.Pow(), right=ast.Constant(value=value)):
            return value in _POWERS
        case ast.BinOp(op=ast.Pow(), right=ast.UnaryOp(operand=ast.Constant(value=value))):
            return value in _POWERS
        case ast.BinOp(op=ast.Pow()):
            return False
    return True


class SizeGuards:
    """Reads the conditions on an exported program's sizes, as tracing and lowering add them.

    Lowering narrows the ranges of symbols, so those that export stated are kept.

    Args:
        program: The exported program.
        named: Returns the name of a symbol in the specs.
    """

    def __init__(self, program: ExportedProgram, named: Callable[[Any], str]) -> None:
        sizes = [
            size
            for node in program.graph.nodes
            if node.op == "placeholder"
            for size in getattr(node.meta.get("val"), "shape", ())
            if not isinstance(size, int)
        ]
        self._named = named
        self._environment = sizes[0].node.shape_env if sizes else None
        self._symbols = {symbol for size in sizes for symbol in size.node.expr.free_symbols}
        self._ranges: dict[Any, Any] = {}
        self._replaced: dict[Any, Any] = {}
        if self._environment is not None:
            self._ranges = dict(self._environment.var_to_range)
            self._replaced = {symbol: self._environment.replace(symbol) for symbol in self._ranges}
        self._seen = 0

    def new(self) -> tuple[str, ...]:
        """Return the conditions added since the last call that the ranges do not imply.

        Raises:
            ValueError: A condition can't be expressed as text.
        """
        if self._environment is None:
            return ()
        guards = self._environment.guards[self._seen :]
        self._seen += len(guards)
        return tuple(dict.fromkeys(filter(None, map(self._text, guards))))

    def _text(self, guard: Any) -> str:
        """Return the condition of a guard; "" where the ranges imply it."""
        import sympy  # type: ignore[import-untyped]
        from torch.utils._sympy.printers import PythonPrinter
        from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

        condition = guard.expr.xreplace(self._replaced)
        symbols = condition.free_symbols
        if not symbols or not symbols <= self._symbols:
            return ""
        ranges = {}
        for symbol in symbols:
            bounds = self._ranges[symbol]
            low = max(bounds.lower, sympy.Integer(_ASSUMED))
            ranges[symbol] = ValueRanges(min(low, bounds.upper), bounds.upper)
        implied = bound_sympy(condition, ranges)
        if implied.is_singleton() and bool(implied.lower):
            return ""
        names = {symbol: sympy.Symbol(self._named(symbol), integer=True) for symbol in symbols}
        text = _MODULES.sub("", str(PythonPrinter().doprint(condition.xreplace(names))))
        if len(symbols) == 1:  # running it shows whether smaller sizes are right
            text = f"{self._named(*symbols)} < {_ASSUMED} or {text}"
        _compiled(text)
        return text


def read_conditions(
    model: str, texts: Iterable[str], symbols: Collection[str]
) -> tuple[SizeCondition, ...]:
    """Return the conditions of a package, each once.

    Args:
        model: The model's name in errors.
        texts: The conditions.
        symbols: The symbols of the sizes of the model's inputs.

    Raises:
        LoadError: A condition can't be read, or is on a size that no input has.
    """
    advice = "The package is damaged, or made by a later release. Compile the model again"
    try:
        found = tuple(map(SizeCondition, dict.fromkeys(texts)))
    except ValueError as error:
        raise LoadError(f"model {model!r}: {error}. {advice}") from None
    for condition in found:
        if unknown := condition.symbols - set(symbols):
            raise LoadError(
                f"model {model!r}: the condition {brief(condition.text)} is on "
                f"{shortened(sorted(unknown))}, which no input has as a size. {advice}"
            )
    return found


def with_symbol(conditions: Iterable[str], old: str, new: str) -> tuple[str, ...]:
    """Return the conditions with the symbol `new` in place of `old`."""
    return tuple(re.sub(rf"\b{re.escape(old)}\b", new, text) for text in conditions)


def mentioning(conditions: Iterable[str], symbol: str) -> str:
    """Return the first condition on a symbol; "" where there is none."""
    word = re.compile(rf"\b{re.escape(symbol)}\b")
    return next((text for text in conditions if symbol and word.search(text)), "")
