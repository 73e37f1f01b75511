"""A process with an exposed scheduler, for commands to look into.

It prints its `Exposure`, keeps two fake models busy, and ends when its input ends.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[3]


async def main():
    from aoti_sched import Scheduler
    from aoti_sched.engine.dispatcher import LoopClock
    from aoti_sched.testing import FakeBackend

    parser = argparse.ArgumentParser()
    parser.add_argument("--name")
    parser.add_argument("--port", type=int)
    parser.add_argument("--weights", action="store_true")
    parser.add_argument("--broken", action="store_true", help="one more model, which fails")
    options = parser.parse_args()

    async def slow(value):
        await asyncio.sleep(0.01)
        return value

    async def quick(value):
        await asyncio.sleep(0)
        return value

    async def broken(_):
        raise ValueError("broken")

    clock = LoopClock(asyncio.get_running_loop())
    backend = FakeBackend({"slow": slow, "quick": quick, "broken": broken}, auto=True, clock=clock)
    async with Scheduler(devices={"cpu": backend}) as scheduler:
        names = ["slow", "quick", *(["broken"] if options.broken else [])]
        runners = [await scheduler.load(f"{name}.pt2") for name in names]
        exposure = await scheduler.expose(options.name, port=options.port, weights=options.weights)
        print(msgspec.json.encode(exposure).decode(), flush=True)
        ended = asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))
        while not ended.done():
            runs = [runner.run(1) for runner in runners]
            await asyncio.gather(*runs, return_exceptions=True)


@contextmanager
def exposed(runtime_dir, *arguments):
    """Start the process; gives the fields of its exposure."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.unit.cli.exposed", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **variables(runtime_dir)},
    ) as process:
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(60)


def variables(folder):
    """The environment in which sockets lie in a folder of the test."""
    return {"XDG_RUNTIME_DIR": str(folder), "TMPDIR": str(folder)}


@contextmanager
def folder_for_sockets():
    """A folder with a path that is short enough."""
    folder = tempfile.mkdtemp(prefix="xdg-", dir="/tmp")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    asyncio.run(main())
