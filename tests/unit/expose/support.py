"""Clients of an exposed scheduler, over its socket or its port."""

import asyncio
import json
from contextlib import asynccontextmanager

from aoti_sched import Scheduler
from aoti_sched.testing import FakeBackend


@asynccontextmanager
async def scheduler_of(**models):
    """A scheduler whose models run by themselves; `m` gives the length of its argument."""
    backend = FakeBackend({"m": len, **models}, auto=True)
    async with Scheduler(devices={"cpu": backend}) as scheduler:
        yield scheduler, await scheduler.load("m.pt2")


class Answer:
    """What came back."""

    def __init__(self, content):
        head, _, self.body = content.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {
            name.lower(): text for name, _, text in (line.partition(": ") for line in lines[1:])
        }

        if self.headers.get("transfer-encoding") == "chunked":
            self.body = b"".join(_chunks(self.body))

    @property
    def json(self):
        return json.loads(self.body)


def _chunks(rest):
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if int(size, 16) == 0:
            return
        yield rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]


async def connect(exposure):
    """Open a connection to the socket, or to the port where the argument is a URL."""
    if isinstance(exposure, str):
        port = int(exposure.rstrip("/").rpartition(":")[2])
        return await asyncio.open_connection("127.0.0.1", port)
    return await asyncio.open_unix_connection(exposure.path)


def request(path, *, method="GET", host="localhost", body=b"", **headers):
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    head = {"Host": host, "Connection": "close", "Content-Length": len(body), **named}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {text}" for name, text in head.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def get(exposure, path, **parts):
    """Ask and wait for the whole answer."""
    reader, writer = await connect(exposure)
    writer.write(request(path, **parts))
    content = await reader.read()
    writer.close()
    await writer.wait_closed()
    return Answer(content)


async def post(exposure, path, **body):
    return await get(exposure, path, method="POST", body=json.dumps(body).encode())
