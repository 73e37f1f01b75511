"""A web application with a model inside: the scheduler lives in its lifespan, each error has
its HTTP status.

pip install -e '.[web]'
python -m examples.web_app
curl localhost:8000/name -d '{"rgb": [[230, 30, 40], [20, 60, 220]]}'
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import aoti_sched
from aoti_sched import Limits, Scheduler

from .colours import namer_package, names

STATUS = {
    msgspec.ValidationError: 422,  # the body is JSON, but no `Question`
    msgspec.DecodeError: 400,  # the body is not JSON
    # a `Question`, but not for this model; the message says what is wrong
    aoti_sched.InputMismatchError: 422,
    aoti_sched.QueueFullError: 429,  # too many wait already: come back later
    aoti_sched.RunnerClosedError: 503,  # the server is shutting down
    aoti_sched.DeadlineExceededError: 504,  # the load's timeout passed, in the queue or running
}


class Question(msgspec.Struct):
    """What a client sends: colours, 0 to 255."""

    rgb: list[list[float]]


async def name_colours(request: Request) -> Response:
    question = msgspec.json.decode(await request.body(), type=Question)
    if len({len(colour) for colour in question.rgb}) > 1:
        raise msgspec.ValidationError("Every colour in `rgb` has as many numbers as the others")
    scores = await request.app.state.namer.run(torch.tensor(question.rgb) / 255)
    return JSONResponse({"names": names(scores)})


async def stats(request: Request) -> Response:
    return Response(
        msgspec.json.encode(request.app.state.scheduler.stats()), media_type="application/json"
    )


async def explain(_: Request, error: Exception) -> Response:
    status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
    return JSONResponse({"error": str(error)}, status)


def make_app(scheduler: Scheduler, package: Path) -> Starlette:
    """The application over a scheduler that is not yet entered; a test brings one with a fake
    backend.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with scheduler:
            app.state.scheduler = scheduler
            app.state.namer = await scheduler.load(package, limits=Limits(jobs=64), timeout=1.0)
            yield
        # Left only when every accepted request has its answer.

    return Starlette(
        routes=[Route("/name", name_colours, methods=["POST"]), Route("/stats", stats)],
        exception_handlers=dict.fromkeys(STATUS, explain),
        lifespan=lifespan,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.web_app")
    parser.add_argument("--port", type=int, default=8000)
    uvicorn.run(make_app(Scheduler(), namer_package()), port=parser.parse_args().port)
