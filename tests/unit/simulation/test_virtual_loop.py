"""The loop whose time jumps."""

import asyncio
import time

import pytest

from aoti_sched.simulation.virtual_loop import VirtualLoop


def test_time_jumps_from_timer_to_timer_in_their_order():
    loop = VirtualLoop()
    seen = []

    async def main():
        loop.waits = False
        begin = loop.time()

        async def sleeper(seconds):
            await asyncio.sleep(seconds)
            seen.append((seconds, round(loop.time() - begin, 6)))

        await asyncio.gather(*(sleeper(seconds) for seconds in (7200.0, 60.0, 3600.0)))
        return "done"

    before = time.monotonic()
    assert loop.run(main) == "done"
    assert seen == [(60.0, 60.0), (3600.0, 3600.0), (7200.0, 7200.0)]
    assert time.monotonic() - before < 3600


def test_a_thread_is_waited_for():
    loop = VirtualLoop()

    async def main():
        first = await asyncio.to_thread(lambda: 1)
        loop.waits = False
        return first + await asyncio.to_thread(lambda: 2)  # no timer could come first

    assert loop.run(main) == 3


def test_time_may_pass_in_a_callback():
    loop = VirtualLoop()

    async def main():
        loop.waits = False
        begin = loop.time()
        late = loop.create_future()
        loop.call_later(1.0, lambda: late.set_result(loop.time() - begin))
        loop.pass_time(5.0)
        return await late

    assert loop.run(main) == 5.0


def test_what_is_interrupted_ends_before_the_loop_closes():
    loop = VirtualLoop()
    left = []

    async def main():
        loop.call_soon(_interrupt)
        try:
            await asyncio.sleep(3600)
        finally:
            left.append("block")

    with pytest.raises(KeyboardInterrupt):
        loop.run(main)
    assert left == ["block"]
    assert loop.is_closed()


def _interrupt():
    raise KeyboardInterrupt
