"""Writing: routes that stage, publish, restore and extract weights. The Unix socket alone has them.

The port has none, because every user of the machine can reach a port.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.to_thread
import msgspec
from starlette.routing import Route

from aoti_sched.errors import shortened
from aoti_sched.expose.answers import RefusedError, answer
from aoti_sched.expose.reports import (
    ExtractRequest,
    PublishRequest,
    StageRequest,
    WeightsReport,
)
from aoti_sched.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request
    from starlette.responses import Response

    from aoti_sched.expose.routes import Exposed

_LARGEST = 1 << 16
_T = TypeVar("_T")


class Writing:
    """Answers what changes weights.

    Args:
        scheduler: The scheduler.
        allowed: Whether that is allowed. Otherwise every request is refused with a sentence.
    """

    def __init__(self, scheduler: Exposed, *, allowed: bool) -> None:
        self._scheduler = scheduler
        self._allowed = allowed

    def routes(self) -> list[Route]:
        """Return the routes."""
        verbs = {
            "stage": self._stage,
            "commit": self._commit,
            "rollback": self._rollback,
            "extract": self._extract,
        }
        return [
            Route(f"/weights/{verb}", endpoint, methods=["POST"])
            for verb, endpoint in verbs.items()
        ]

    def forget(self) -> None:
        """Drop the scheduler, as `Reading.forget` does."""
        del self._scheduler

    async def _stage(self, request: Request) -> Response:
        asked = await self._asked(request, StageRequest)
        runner = self._runner(asked.runner)
        settings = msgspec.structs.asdict(asked)
        del settings["runner"], settings["file"]
        await runner.stage(_absolute(asked.file), **settings)
        return self._done([asked.runner], file=asked.file)

    async def _commit(self, request: Request) -> Response:
        asked = await self._asked(request, PublishRequest)
        runners = self._runners(asked)
        reports = await self._scheduler.commit(
            *runners,
            barrier=asked.barrier,
            keep_previous=asked.keep_previous,
            timeout=asked.timeout,
        )
        return self._done(asked.runners, reports=reports)

    async def _rollback(self, request: Request) -> Response:
        asked = await self._asked(request, PublishRequest)
        runners = self._runners(asked)
        reports = await self._scheduler.rollback(
            *runners, barrier=asked.barrier, timeout=asked.timeout
        )
        return self._done(asked.runners, reports=reports)

    async def _extract(self, request: Request) -> Response:
        asked = await self._asked(request, ExtractRequest)
        runner = self._runner(asked.runner)
        path = Path(_absolute(asked.file))
        if path.suffix != ".safetensors":
            raise RefusedError(400, f"{path}: expected a file named *.safetensors.")
        tensors = await runner.extract(inactive=asked.inactive)
        await anyio.to_thread.run_sync(_save, tensors, path)
        return self._done([asked.runner], file=asked.file)

    # --- parts -----------------------------------------------------------------------------------

    async def _asked(self, request: Request, kind: type[_T]) -> _T:
        if not self._allowed:
            raise RefusedError(
                403,
                "this scheduler is exposed for reading alone. Its program has to call "
                "expose(weights=True).",
            )
        content = bytearray()
        async for piece in request.stream():
            content += piece
            if len(content) > _LARGEST:
                raise RefusedError(413, f"the request has more than {_LARGEST} bytes.")
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            what = str(error) if _is_object(content) else f"expected {_described(kind)}"
            raise RefusedError(400, f"{request.url.path}: {what}.") from None

    def _runner(self, name: str) -> Any:
        runners = self._scheduler.runners
        if name not in runners:
            known = shortened(map(repr, runners))
            have = f"The runners are {known}." if known else "There is none."
            raise RefusedError(404, f"no runner is named {name!r}. {have}")
        return runners[name]

    def _runners(self, asked: PublishRequest) -> list[Any]:
        if not asked.runners:
            raise RefusedError(400, "runners: expected at least one name.")
        return [self._runner(name) for name in dict.fromkeys(asked.runners)]

    def _done(
        self,
        names: tuple[str, ...] | list[str],
        *,
        file: str | None = None,
        reports: Mapping[Any, Any] | None = None,
    ) -> Response:
        runners = self._scheduler.runners
        return answer(
            WeightsReport(
                runners=tuple(dict.fromkeys(names)),
                file=file,
                epochs={name: runners[name].epoch for name in names if name in runners},
                updates=tuple(map(msgspec.structs.asdict, (reports or {}).values())),
            )
        )


def _is_object(content: bytes | bytearray) -> bool:
    try:
        return isinstance(msgspec.json.decode(content), dict)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def _described(kind: type[Any]) -> str:
    """Return what a body has to be: a JSON object with its fields."""
    fields = msgspec.structs.fields(kind)
    needed = " and ".join(repr(field.name) for field in fields if field.required)
    others = ", ".join(repr(field.name) for field in fields if not field.required)
    return f"a JSON object with {needed}, and where wanted {others}"


def _absolute(file: str) -> str:
    if not os.path.isabs(file) or "\0" in file:  # noqa: PTH117 -- text is checked, not a path
        raise RefusedError(400, f"file: expected an absolute path, got {file!r}.")
    return file


def _save(tensors: Mapping[str, Any], path: Path) -> None:
    """Write a file of weights: whole, or not at all."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ModuleNotFoundError:
        raise RefusedError(
            501, "safetensors is missing. Run: pip install 'aoti_sched[expose]'"
        ) from None
    try:
        with whole_file(path) as beside:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, beside)
    except (OSError, SafetensorError) as error:
        raise RefusedError(409, f"{path}: the file can't be written: {error}.") from None
