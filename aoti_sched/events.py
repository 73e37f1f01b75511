"""Events for the log.

An application's log processors and handlers can neither fail nor block a step of this package.

- An event of an event loop's thread is logged by a later callback of the loop.
- An event of another thread is logged at once.
- An error of a processor or a handler is dropped. The first one goes to `sys.unraisablehook`.
- KeyboardInterrupt and SystemExit on a loop's thread leave the loop, as from any callback.
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
    """Passes events to the application's structlog processors, and so to a standard logger.

    No call raises. Where structlog is not configured and the logger's level is off, an event is
    dropped before any text is made.

    Args:
        name: The standard logger's name.
    """

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)
        self._log: Any = structlog.wrap_logger(self._logger)
        self._complained = False

    def debug(self, event: str, **values: Any) -> None:
        """Log an event that only a search for a fault needs."""
        self._log_soon("debug", event, values)

    def info(self, event: str, **values: Any) -> None:
        """Log an event of normal operation."""
        self._log_soon("info", event, values)

    def warning(self, event: str, **values: Any) -> None:
        """Log an event that someone should look at, after which all goes on."""
        self._log_soon("warning", event, values)

    def error(self, event: str, **values: Any) -> None:
        """Log an error. A value `error` may be an exception, whose text is made later."""
        self._log_soon("error", event, values)

    def _log_soon(self, level: str, event: str, values: dict[str, Any]) -> None:
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
        """Report the first error to `sys.unraisablehook`."""
        if self._complained:
            return
        self._complained = True
        with contextlib.suppress(BaseException):  # a text or a traceback may be foreign, too
            lost = LostEventError(
                "an event of aoti_sched was lost, and later losses are not reported: a log "
                f"processor or handler raised {type(error).__name__}: {said(error)}"
            ).with_traceback(error.__traceback__)
            _Unraisable(lost)


class LostEventError(RuntimeError):
    """The error that `sys.unraisablehook` gets when an event is lost."""


class _Unraisable:
    """Raises an error in `__del__`, so that the interpreter passes it to `sys.unraisablehook`.

    The default hook accepts only arguments that the interpreter made.
    """

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __del__(self) -> None:
        raise self._error


log = EventLog("aoti_sched")
"""The log of this package, which uses the standard logger `aoti_sched`.

Where neither structlog nor the logger is configured, warnings go to stderr, and other events are
dropped.
"""
