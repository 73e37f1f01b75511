"""Every error that a user can meet.

One hierarchy under `AotiSchedError`. A message names the thing (model, input, constant, file), says
what was expected, what came, and what to do. Where a caller may want to branch on the parts, they
are attributes too. This file imports nothing of ours, so every layer may use it.

No message is longer than a screen, and none carries what a terminal or a log would obey: `readable`
sees to both. Within a message, `brief` shortens a value's `repr`, `clipped` a text, `shortened` a
list, and `first_line` a foreign error.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

SCREEN = 1800
"""Characters of the longest message: 24 lines of 75."""

_LINES = 24
_HEAD = 2 / 3
"""How much of a long message is kept from its beginning; the rest is from its end, which says what
to do.
"""


def readable(text: str, *, lines: bool = False) -> str:
    """Return `text` with control characters escaped, cut in the middle to a screen's length.

    Args:
        text: The message.
        lines: Keep line breaks and tabs. A name or a path with a line break would forge a line of a
            log.
    """
    text = _cut(text)  # before all of it is looked at
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return _cut("".join(letter if letter in kept else _escaped(letter) for letter in text))


def _escaped(letter: str) -> str:
    if letter.isprintable():
        return letter
    return letter.encode("unicode_escape", "backslashreplace").decode("ascii")


def _cut(text: str) -> str:
    listed = text.split("\n", SCREEN)
    if len(listed) > _LINES:
        head = int(_LINES * _HEAD)
        tail = text.rsplit("\n", _LINES - head - 1)[1:]
        left_out = text.count("\n") + 1 - head - len(tail)
        text = "\n".join([*listed[:head], f"... [{left_out} lines left out] ...", *tail])
    if len(text) > SCREEN:
        head = int(SCREEN * _HEAD)
        tail_size = SCREEN - head - 50
        left_out = len(text) - head - tail_size
        text = f"{text[:head]} ... [{left_out} characters left out] ... {text[-tail_size:]}"
    return text


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 60


def brief(value: object) -> str:
    """Return the first 60 characters of a value's `repr`, without writing out large values."""
    try:
        return _brief.repr(value)[:60]
    # A user's `__repr__` may raise anything, and an error is being made here.
    except Exception:  # noqa: BLE001
        return f"<{type(value).__name__}>"


def first_line(error: BaseException) -> str:
    """Return an error's kind and the first line of its text, at most 200 characters."""
    try:
        text = str(error).strip().splitlines()
    except Exception:  # noqa: BLE001 -- a foreign `__str__` may raise anything
        text = []
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def clipped(thing: object, width: int = 160) -> str:
    """Return `str(thing)`, its middle left out where it has more than `width` characters."""
    text = str(thing)
    if len(text) <= width:
        return text
    half = (width - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def shortened(
    items: Iterable[object], limit: int = 8, width: int = 160, rest: str = " and {} more"
) -> str:
    """Return the first `limit` items in words, and how many more there are.

    Each item is clipped to `width` characters.

    `items` must end; each is read. Pass `map(repr, names)` for quoted names, `map(brief, values)`
    for values of any kind.
    """
    shown: list[str] = []
    more = 0
    for item in items:
        if len(shown) < limit:
            shown.append(clipped(item, width))
        else:
            more += 1
    return ", ".join(shown) + (rest.format(more) if more else "")


class AotiSchedError(Exception):
    """Base of every error raised by aoti_sched. Its message is at most a screen long.

    `tag` is what `options(tag=)` named the request that met the error; "" without one.
    """

    _lines = False
    """Whether the message may have several lines, as torch's own texts have."""
    tag: str = ""

    def __init__(self, message: str = "") -> None:
        super().__init__(readable(str(message), lines=self._lines))

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text} (request {self.tag!r})" if self.tag else text


# --- packages -------------------------------------------------------------------------------------


class PackageError(AotiSchedError):
    """A package could not be read. `path` is the file as the caller named it."""

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class PackageNotFoundError(PackageError, FileNotFoundError):
    """There is no file at the given path."""


class PackageFormatError(PackageError, ValueError):
    """The file is no valid package: no zip, truncated, with an unsafe member, or an absurd size."""


class PackageHashError(PackageError, ValueError):
    """The file's sha256 is not the one the caller asked for; nothing of it was mapped or run."""


class ModelNotFoundError(PackageError, LookupError):
    """The package holds no model of that name, or several and none was named."""


class PlatformMismatchError(PackageError):
    """The model was compiled for another operating system, machine or device than this one."""


class InstructionSetError(PlatformMismatchError):
    """The model was compiled for CPU instructions that this CPU lacks; a run would be SIGILL."""


# --- loading --------------------------------------------------------------------------------------


class LoadError(AotiSchedError):
    """The shared library or its container could not be created; the text is the runtime's own."""

    _lines = True


class MissingWeightsError(LoadError):
    """The model has constants, but the package brings no values for them."""


class MemoryLimitError(AotiSchedError):
    """A model's weights, or new weights beside the old, exceed their device's `memory_limit`.

    `device` is its name; `needed`, `limit` and `used` are in bytes.
    """

    def __init__(
        self, message: str, *, device: str = "", needed: int = 0, limit: int = 0, used: int = 0
    ) -> None:
        super().__init__(message)
        self.device = device
        self.needed = needed
        self.limit = limit
        self.used = used


class ResourcesError(AotiSchedError):
    """The process or its machine has no threads, descriptors or memory left for an operation.

    Nothing has changed, and the same works again when the resource is back.
    """


class MissingCapabilityError(LoadError):
    """A compiled model lacks a function of the C ABI because an older torch compiled it."""


class ConfigError(AotiSchedError, ValueError):
    """A setting is unknown, of the wrong type or outside its range. The message gives its path."""


class ExposeError(AotiSchedError):
    """A scheduler can't be exposed, or one that is exposed can't be reached."""


class CompileError(AotiSchedError):
    """`compile_package` could not export or compile the module."""

    _lines = True


# --- weights --------------------------------------------------------------------------------------


class WeightsFileError(AotiSchedError):
    """A file of new weights is missing, damaged, of a foreign format, or changed during the read.

    `path` is the file: the one the caller named, or a shard that its index names.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class WeightsTypeError(AotiSchedError, TypeError):
    """The given weights are no mapping, pairs or path, or an entry is no name with a tensor."""


# --- requests -------------------------------------------------------------------------------------


class InputMismatchError(AotiSchedError, ValueError):
    """A request's arguments do not fit the model. Checked before native code sees them.

    `model` is the runner's name, `input` the input's name ("" when it is the arguments' structure),
    `expected` and `got` the two sides in words.
    """

    def __init__(self, model: str, input: str, expected: str, got: str, hint: str = "") -> None:
        what = f"model {model!r}, input {input!r}" if input else f"model {model!r}"
        super().__init__(f"{what}: expected {expected}, got {got}." + (f" {hint}" if hint else ""))
        self.model = model
        self.input = input
        self.expected = expected
        self.got = got
        self.hint = hint

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str, str], dict[str, object]]:
        parts = (self.model, self.input, self.expected, self.got, self.hint)
        return type(self), parts, dict(vars(self))


class RunError(AotiSchedError, RuntimeError):
    """The model itself failed while it ran; the text is torch's root cause."""

    _lines = True


class DeviceLostError(RunError):
    """A device failed in a way that only ends with the process; nothing runs on it any more.

    `device` is its name. The process must be started again; other devices go on.
    """

    def __init__(self, message: str, *, device: str = "") -> None:
        super().__init__(message)
        self.device = device


class QueueFullError(AotiSchedError):
    """Admission refused a request because a bound of its queue is reached."""


class ShedError(QueueFullError):
    """A queued request was dropped from a full queue for a better one (overflow="shed")."""


class DeadlineExceededError(AotiSchedError, TimeoutError):
    """The request's timeout passed, or can't be met any more."""


class DeadlineUnreachableError(DeadlineExceededError):
    """Admission refused a request because it would be finished too late (admission="predictive").

    `predicted` is in how many seconds it would be finished, `timeout` in how many it had to be.
    """

    def __init__(self, runner: str, predicted: float, timeout: float) -> None:
        self.runner = runner
        self.predicted = predicted
        self.timeout = timeout
        super().__init__(
            f"runner {runner!r}: the request would be finished in about {predicted:.3g} s, its "
            f"timeout is {timeout:.15g} s; send less, or give it more time"
        )

    def __reduce__(self) -> tuple[type, tuple[str, float, float], dict[str, object]]:
        return type(self), (self.runner, self.predicted, self.timeout), dict(vars(self))


class RunnerClosedError(AotiSchedError):
    """The runner (or its whole scheduler) is draining, closed or terminated."""


class EpochError(AotiSchedError):
    """A request's epoch (`min_epoch`) was rolled back, or its lease can't reach it."""


class ConstantMismatchError(AotiSchedError, ValueError):
    """New weights do not fit the model. Nothing has changed.

    `model` is the runner's name. `faults` holds all that is wrong, as (name, problem) pairs; the
    message lists the first eight.
    """

    def __init__(self, model: str, faults: tuple[tuple[str, str], ...]) -> None:
        self.model = model
        self.faults = faults
        listed = "; ".join(
            f"{clipped(repr(name), 80)} {clipped(wrong, 140)}" for name, wrong in faults[:8]
        )
        more = f"; and {len(faults) - 8} more, all in .faults" if len(faults) > 8 else ""
        super().__init__(f"model {clipped(model)!r}: the new weights do not fit: {listed}{more}")

    def __reduce__(self) -> tuple[type, tuple[str, tuple[tuple[str, str], ...]], dict[str, object]]:
        return type(self), (self.model, self.faults), dict(vars(self))


class UpdateError(AotiSchedError):
    """The change of weights is not possible: frozen weights, nothing staged, or nothing kept."""


class UpdateAbortedError(AotiSchedError):
    """The request was queued when an update with `barrier="abort"` closed its runner's barrier.

    Send it again.
    """


class LeaseError(AotiSchedError):
    """A lease was used after its release, or a call would wait for a lease of its own task."""


class ReplayError(AotiSchedError):
    """A flight record is damaged, lacks its beginning, or comes from another release's rules."""


class UnsupportedLoopError(AotiSchedError, RuntimeError):
    """A call came from outside asyncio (trio, no loop), or would block the loop's own thread."""
