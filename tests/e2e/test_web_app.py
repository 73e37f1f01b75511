"""The web application's answers, in process: its own code and the real scheduler over a fake
model.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest
import torch

from aoti_sched import RunError, Scheduler
from aoti_sched.testing import FakeBackend, ManualClock
from examples.colours import NAMES
from examples.web_app import make_app

QUESTION = {"rgb": [[230, 30, 40]]}


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def backend(clock):
    scores = torch.nn.functional.one_hot(torch.tensor([NAMES.index("red")]), len(NAMES))
    return FakeBackend({"namer": lambda rgb: scores.expand(len(rgb), -1)}, clock=clock)


@pytest.fixture
async def app(backend, clock):
    app = make_app(Scheduler(devices={"cpu": backend}, clock=clock), Path("namer.pt2"))
    async with app.router.lifespan_context(app):
        yield app
        backend.finish_all()


@pytest.fixture
async def client(app):
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://app"
    ) as client:
        yield client


async def test_a_question_gets_the_model_s_answer(client, backend):
    answer = asyncio.ensure_future(client.post("/name", json=QUESTION))
    await backend.running(1)
    await backend.step()
    assert (await answer).json() == {"names": ["red"]}


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ("no json", 400, "malformed"),
        ('{"rgb": "red"}', 422, "Expected `array`"),
        ('{"rgb": [[1, 2, 3], [4]]}', 422, "as many numbers"),
    ],
)
async def test_a_body_that_is_no_question_is_the_client_s_fault(client, body, status, told):
    answer = await client.post("/name", content=body)
    assert answer.status_code == status
    assert told in answer.json()["error"]


async def test_one_too_many_is_told_to_come_back_later(client, backend):
    accepted = [asyncio.ensure_future(client.post("/name", json=QUESTION)) for _ in range(1 + 64)]
    await backend.running(1)
    refused = await client.post("/name", json=QUESTION)
    assert refused.status_code == 429
    assert "64" in refused.json()["error"]
    backend.finish_all()
    assert {(await answer).status_code for answer in accepted} == {200}


async def test_an_answer_that_takes_too_long_is_a_gateway_timeout(client, backend, clock):
    answer = asyncio.ensure_future(client.post("/name", json=QUESTION))
    await backend.running(1)
    clock.advance(1.1)
    assert (await answer).status_code == 504


async def test_a_drained_model_is_unavailable(client, app):
    await app.state.namer.drain()
    assert (await client.post("/name", json=QUESTION)).status_code == 503


async def test_a_fault_of_the_model_is_not_blamed_on_the_client(client, backend):
    answer = asyncio.ensure_future(client.post("/name", json=QUESTION))
    await backend.running(1)
    await backend.step(error=RunError("the model is ill"))
    with pytest.raises(RunError):  # a server makes it a 500
        await answer


async def test_the_stats_are_json(client):
    answer = await client.get("/stats")
    assert json.loads(answer.content)["devices"]["cpu"]["runners"]["namer"]["free_slots"] == 1
