"""An application function and its tests.

The scheduler is the real one; the model is a Python function.

    python -m pytest examples/testing_your_app.py

The fixtures `aoti_scheduler`, `aoti_backend` and `aoti_clock` come with the library; there is
nothing to import. Nothing runs until a test says `step()`, and no time passes until it says
`advance()`. That needs `asyncio_mode = "auto"` of pytest-asyncio, as in this repository's
pyproject.toml.
"""

from __future__ import annotations

import asyncio

import pytest
import torch

import aoti_sched
from aoti_sched import Runner
from aoti_sched.testing import FakeBackend, ManualClock

# --- the application ------------------------------------------------------------------------------


async def moderate(comment: str, judge: Runner) -> str:
    """Publish a comment or remove it.

    When the judge is too slow or too busy, leave the comment to a person.
    """
    characters = torch.tensor([list(comment.encode())])
    try:
        spam = await judge.options(timeout=0.2).run(characters)
    except (aoti_sched.DeadlineExceededError, aoti_sched.QueueFullError):
        return "held"
    return "removed" if spam > 0.9 else "published"


# --- its tests ------------------------------------------------------------------------------------


def shouting(characters: torch.Tensor) -> float:
    """The model for tests: how much of the comment is in capitals."""
    text = bytes(characters[0].tolist()).decode()
    return sum(letter.isupper() for letter in text) / len(text)


@pytest.fixture
async def judge(aoti_backend: FakeBackend, aoti_scheduler: aoti_sched.Scheduler) -> Runner:
    aoti_backend.models["judge"] = shouting
    return await aoti_scheduler.load("judge.pt2", limits=aoti_sched.Limits(jobs=1))


async def test_spam_is_removed(judge: Runner, aoti_backend: FakeBackend) -> None:
    verdict = asyncio.ensure_future(moderate("BUYNOW", judge))
    await aoti_backend.running(1)
    await aoti_backend.step()
    assert await verdict == "removed"


async def test_an_honest_comment_is_published(judge: Runner, aoti_backend: FakeBackend) -> None:
    verdict = asyncio.ensure_future(moderate("Thank you, that helped.", judge))
    await aoti_backend.running(1)
    await aoti_backend.step()
    assert await verdict == "published"


async def test_a_comment_is_held_when_the_judge_takes_too_long(
    judge: Runner, aoti_backend: FakeBackend, aoti_clock: ManualClock
) -> None:
    verdict = asyncio.ensure_future(moderate("Hello?", judge))
    await aoti_backend.running(1)
    aoti_clock.advance(0.3)
    assert await verdict == "held"


async def test_a_comment_is_held_when_too_many_wait(
    judge: Runner, aoti_backend: FakeBackend
) -> None:
    verdicts = [
        asyncio.ensure_future(moderate(text, judge)) for text in ("runs", "waits", "one too many")
    ]
    assert await verdicts[2] == "held"
    for verdict in verdicts[:2]:
        await aoti_backend.running(1)
        await aoti_backend.step()
        assert await verdict == "published"


async def test_a_failing_judge_is_not_hidden(judge: Runner, aoti_backend: FakeBackend) -> None:
    verdict = asyncio.ensure_future(moderate("Hello?", judge))
    await aoti_backend.running(1)
    await aoti_backend.step(error=aoti_sched.RunError("the judge is ill"))
    with pytest.raises(aoti_sched.RunError, match="ill"):
        await verdict


async def test_a_reader_who_leaves_frees_the_place_in_the_queue(
    judge: Runner, aoti_backend: FakeBackend
) -> None:
    running, waiting = (asyncio.ensure_future(moderate("Hello?", judge)) for _ in range(2))
    await aoti_backend.running(1)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert judge.stats().queued == 0
    assert judge.stats().cancelled == 1
    await aoti_backend.step()
    assert await running == "published"
