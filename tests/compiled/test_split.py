"""A canary of a compiled model: a part of the traffic meets the new weights."""

from __future__ import annotations

import asyncio
from collections import Counter

import torch
from torch.testing import assert_close

from aoti_sched import RunFuture, Scheduler
from tests.models import build


async def test_each_request_is_answered_by_the_weights_of_its_own_runner():
    built = build("mlp")
    old, new = built.module(), built.module()
    with torch.no_grad():
        for tensor in new.state_dict().values():
            tensor.mul_(1.5)
        wanted = {"old": old(*built.args), "new": new(*built.args)}
    async with Scheduler() as scheduler:
        runners = [await scheduler.load(built.path, name=name) for name in ("old", "new")]
        await runners[1].update(new.state_dict())
        split = scheduler.split("ranker", dict(zip(runners, (3, 1), strict=True)))
        copies: asyncio.Queue[tuple[RunFuture, RunFuture]] = asyncio.Queue()
        split.shadow(runners[0], lambda *both: copies.put_nowait(both))
        futures = [split.submit(*built.args) for _ in range(40)]
        for future, answer in zip(futures, await asyncio.gather(*futures), strict=True):
            assert_close(answer, wanted[future.trace.runner], rtol=1e-4, atol=1e-4)
        assert Counter(future.trace.runner for future in futures) == {"old": 30, "new": 10}
        for _ in range(40):
            _, copy = await copies.get()
            assert_close(copy.result(), wanted["old"], rtol=1e-4, atol=1e-4)
