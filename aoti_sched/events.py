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
import sys
from asyncio import _get_running_loop  # the public one raises
from typing import Any

from aoti_sched.foreign import said

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class EventLog:
    """Passes events to structlog where the application has configured it, else to `logging`.

    No call raises. An event that neither would show is dropped before any text is made.

    Args:
        name: The logger's name, for both.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._logger = logging.getLogger(name)
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
        if not (self._logger.isEnabledFor(_LEVELS[level]) or _structlog() is not None):
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
            structlog = _structlog()
            if structlog is not None:
                getattr(structlog.get_logger(self._name), level)(event, **values)
            else:
                self._emit_record(_LEVELS[level], event, values)
        except BaseException as error:
            if on_loop and isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            self._complain(error)

    def _emit_record(self, level: int, event: str, values: dict[str, Any]) -> None:
        """Log a record with the event's values as attributes, and in its text."""
        exc_info = values.pop("exc_info", None)
        text = "".join(f" {name}={value!r}" for name, value in values.items())
        extra = {f"{name}_" if name in _OF_RECORDS else name: v for name, v in values.items()}
        # The text may have percent signs, so it is no format.
        self._logger.log(
            level, "%s", event + text, exc_info=exc_info, extra={**extra, "event": event}
        )

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


def _structlog() -> Any:
    """Return structlog where the application has configured it; else None.

    An application that has done so has imported it. Importing it here would take more time than all
    of this package.
    """
    structlog = sys.modules.get("structlog")
    return structlog if structlog is not None and structlog.is_configured() else None


_OF_RECORDS = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "event"})
"""Names that `logging` keeps for itself; a value of such a name gets an underscore."""


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
"""The log of this package, by the name `aoti_sched`.

Where neither structlog nor `logging` is configured, warnings go to stderr, and other events are
dropped. docs/logging.md lists the events.
"""
