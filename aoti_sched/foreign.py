"""Errors that foreign code raises: a weights source, a user's pytree type, a device of a test.

Foreign code may raise anything, a `BaseException` and one whose text can't be made included.
Whatever it is ends the operation that the code was called for, and nothing else. This file imports
`errors` alone, so every layer may use it.
"""

from __future__ import annotations

import errno
from typing import TypeVar

from aoti_sched.errors import AotiSchedError, ResourcesError

_E = TypeVar("_E", bound=AotiSchedError)

LONGEST = 2000
"""Characters of a foreign text that are repeated in an error or an event."""


def own(error: BaseException, kind: type[_E], what: str) -> Exception:
    """Return the error that ends an operation: the one raised, or a `kind` that stands for it.

    A future can't carry every error.

    A `CancelledError` or `SystemExit` would cancel or end more than the operation. A future refuses
    a `StopIteration`.

    Args:
        error: What foreign code has raised.
        kind: The error of ours, made from one message.
        what: The subject of the message: "runner 'a': the weights source".
    """
    if isinstance(error, Exception) and not isinstance(error, (StopIteration, StopAsyncIteration)):
        return error
    text = said(error)
    ours = kind(
        f"{what} raised {type(error).__name__}{': ' if text else ''}{text}. Raise an Exception "
        "there."
    )
    ours.__cause__ = error
    return ours


def ended_by(error: BaseException, kind: type[_E], what: str) -> Exception:
    """Return the error that ends an operation: `own`, or a `ResourcesError` with a cause.

    A function of its own, since a frame in the traceback of an error must not hold its consequence.
    """
    ours = out_of_resources(error, what)
    if ours is None:
        return own(error, kind, what)
    ours.__cause__ = error
    return ours


_LIMITS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def out_of_resources(error: BaseException, what: str) -> ResourcesError | None:
    """Return a `ResourcesError` for an error that reports exhausted threads, descriptors or memory.

    For other errors, return None.

    Args:
        error: What was raised.
        what: The subject of the message.
    """
    if isinstance(error, AotiSchedError):
        return None
    text = said(error)
    if isinstance(error, MemoryError):
        text = f"no memory is left{': ' if text else ''}{text}"
    elif not (
        (isinstance(error, OSError) and error.errno in _LIMITS)
        or (isinstance(error, RuntimeError) and "can't start new thread" in text)
    ):
        return None
    return ResourcesError(f"{what}: {text}. Free some, or raise the limit, and try again")


def said(error: BaseException) -> str:
    """Return an error's text, at most `LONGEST` characters; its type's name if that fails."""
    try:
        text = str(error)
    except BaseException as fault:  # noqa: BLE001 -- a foreign `__str__` may raise anything
        return f"{type(error).__name__} (its text can't be made: {type(fault).__name__})"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text)} characters)"


def raise_again(error: BaseException) -> None:
    """Raise an interrupt or an exit that came during an operation, after the operation.

    The event loop calls this.
    """
    raise error
