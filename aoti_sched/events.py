"""Events for the log.

What an application's log processors and handlers do ends here: nothing of the package fails or
waits in its midst.

A call on an event loop's thread is carried out by the loop, after all steps of what goes on. A call
of another thread is carried out at once. What processors and handlers raise is dropped; the first
time, `sys.unraisablehook` is told. An interrupt or exit on a loop's thread leaves the loop as from
any callback of the application's.
"""

from __future__ import annotations

import contextlib
import logging
from asyncio import _get_running_loop  # the public one raises
from typing import Any

import structlog

from aoti_sched.foreign import said

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class EventLog:
    """Gives events to the application's structlog processors, and so to a standard logger.

    No call raises.

    Where structlog is not configured and the logger's level is off, an event is dropped before
    anything is made of it.

    Args:
        name: The standard logger's.
    """

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)
        self._log: Any = structlog.wrap_logger(self._logger)
        self._complained = False

    def debug(self, event: str, **values: Any) -> None:
        self._give("debug", event, values)

    def info(self, event: str, **values: Any) -> None:
        self._give("info", event, values)

    def warning(self, event: str, **values: Any) -> None:
        self._give("warning", event, values)

    def error(self, event: str, **values: Any) -> None:
        """An `error` among the values may be the exception itself: its text is made later."""
        self._give("error", event, values)

    def _give(self, level: str, event: str, values: dict[str, Any]) -> None:
        if not (structlog.is_configured() or self._logger.isEnabledFor(_LEVELS[level])):
            return
        loop = _get_running_loop()
        if loop is not None:
            loop.call_soon(self._emit, level, event, values, True)
        else:
            self._emit(level, event, values, False)

    def _emit(self, level: str, event: str, values: dict[str, Any], on_loop: bool) -> None:
        try:
            if isinstance(values.get("error"), BaseException):
                values["error"] = said(values["error"])
            getattr(self._log, level)(event, **values)
        except BaseException as error:
            if on_loop and isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            self._complain(error)

    def _complain(self, error: BaseException) -> None:
        """Tell of the first error, once."""
        if self._complained:
            return
        self._complained = True
        with contextlib.suppress(BaseException):  # a text or a traceback may be foreign, too
            lost = LostEventError(
                "an event of aoti_sched was lost in a log processor or handler, and more may be; "
                f"no more is said of it. It raised {type(error).__name__}: {said(error)}"
            ).with_traceback(error.__traceback__)
            _Teller(lost)


class LostEventError(RuntimeError):
    """What `sys.unraisablehook` is told of."""


class _Teller:
    """Tells `sys.unraisablehook` of an error.

    The interpreter's own hook takes no other arguments than the interpreter's.
    """

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __del__(self) -> None:
        raise self._error


log = EventLog("aoti_sched")
"""Events go through the application's structlog processors to the standard logger `aoti_sched`:
unless either is configured, warnings are seen on stderr and the rest is silent, as is decent for a
library.
"""
