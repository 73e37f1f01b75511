"""A model under clients: entrants that run one, and clients that ask again as soon as they are
answered.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from .contestants import Contestant, Run, Setting, beginning
from .plan import Entrant, Measured, Opened


def serving(
    measure: Callable[[Contestant, Setting, Run, float], Awaitable[Measured]],
    setting: Setting,
    entering: Sequence[Contestant],
) -> list[Entrant]:
    """Entrants that run a model; each is measured by `measure`."""

    def entrant(contestant: Contestant) -> Entrant:
        given = Setting(setting.model, setting.instances, setting.clients, contestant.kind)

        @asynccontextmanager
        async def opened() -> AsyncIterator[Opened]:
            async with contestant.open(given) as run:
                answer = run() if contestant.blocking else await run()
                yield Opened(functools.partial(measure, contestant, given, run), beginning(answer))

        return Entrant(
            contestant.name,
            contestant.note,
            opened,
            environment=contestant.environment,
            uvloop=contestant.uvloop,
            missing=contestant.missing,
            files=((given.model, given.kind),),
        )

    return [entrant(contestant) for contestant in entering]


async def many_clients(
    contestant: Contestant, setting: Setting, run: Run, seconds: float
) -> Measured:
    """Clients that ask again as soon as they are answered.

    One that blocks is called from a bare loop.
    """
    if not contestant.blocking:
        return Measured({"rate": await served(run, setting.clients, seconds)})
    started = time.perf_counter()
    until = started + seconds
    requests = 0
    while time.perf_counter() < until:
        run()
        requests += 1
    return Measured({"rate": requests / (time.perf_counter() - started)})


async def served(run: Run, clients: int, seconds: float) -> float:
    """Answers per second."""
    started = time.perf_counter()
    until = started + seconds
    requests = sum(await asyncio.gather(*(ask(run, until) for _ in range(clients))))
    return requests / (time.perf_counter() - started)


async def ask(run: Run, until: float) -> int:
    """One client; how many answers it had."""
    requests = 0
    while time.perf_counter() < until:
        await run()
        requests += 1
    return requests
