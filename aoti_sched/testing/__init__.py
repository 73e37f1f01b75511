"""For testing your own application: a fake backend, a clock set by hand, pytest fixtures.

Nothing is compiled.

    async def test_search_survives_a_slow_encoder(aoti_backend, aoti_clock, aoti_scheduler):
        aoti_backend.models["encoder"] = lambda text: [len(text)]
        encoder = await aoti_scheduler.load("encoder.pt2", timeout=0.5)
        answer = asyncio.ensure_future(my_search(encoder, "query"))
        await aoti_backend.running(1)      # your code has called the model, nothing has run yet
        aoti_clock.advance(0.6)           # time passes only when you say so
        with pytest.raises(aoti_sched.DeadlineExceededError):
            await answer

A model is any function of the arguments your code passes to `run`. With `FakeBackend(auto=True)` it
runs by itself, otherwise each `step()` finishes one run. The fixtures are found by pytest without
an import; the scheduler and everything behind it but the backend are the real ones.
"""

from aoti_sched.testing.backend import FakeBackend, settle
from aoti_sched.testing.clock import ManualClock, ManualTimer
from aoti_sched.testing.container import FakeCall, FakeContainer
from aoti_sched.testing.executor import FakeExecutor
from aoti_sched.testing.replay import Replayed, replay, replay_device

try:
    from aoti_sched.testing.plugin import aoti_backend, aoti_clock, aoti_scheduler, fake_scheduler
except ModuleNotFoundError as error:  # the fake backend itself needs no pytest
    if error.name != "pytest":
        raise

__all__ = [
    "FakeBackend",
    "FakeCall",
    "FakeContainer",
    "FakeExecutor",
    "ManualClock",
    "ManualTimer",
    "Replayed",
    "aoti_backend",
    "aoti_clock",
    "aoti_scheduler",
    "fake_scheduler",
    "replay",
    "replay_device",
    "settle",
]
