"""Answers: JSON responses, errors among them, and the numbers in a request's query."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
from starlette.responses import Response

from aoti_sched.errors import AotiSchedError, ConfigError
from aoti_sched.expose.reports import FailureReport

if TYPE_CHECKING:
    from starlette.requests import Request

JSON = "application/json"


class RefusedError(AotiSchedError):
    """A request that is answered with a status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def answer(report: msgspec.Struct, status: int = 200) -> Response:
    """Return a report as a JSON response."""
    return Response(msgspec.json.encode(report), status, media_type=JSON)


def refusal(status: int, sentence: str, kind: str = "") -> Response:
    """Return an error as a JSON response."""
    return answer(FailureReport(error=sentence, kind=kind), status)


async def refused(_: Request, error: Exception) -> Response:
    """Return the response for an error of the library."""
    status = getattr(error, "status", 400 if isinstance(error, ConfigError) else 409)
    kind = "" if isinstance(error, RefusedError) else type(error).__name__
    return refusal(status, str(error), kind)


def number(request: Request, name: str, default: float, least: float, most: float) -> float:
    """Return a number of the query.

    Raises:
        RefusedError: The text is no number, or out of range.
    """
    given = request.query_params.get(name)
    try:
        value = default if given is None else float(given)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise RefusedError(400, f"{name}: expected {least:g} to {most:g} seconds, got {given!r}.")
    return value
