"""What happens under the scheduler: an index is built, searches and digits come in, and all of
it is timed.

This is the part that an application would resemble: a few coroutines that await two runners.
Nothing here prints. The only scheduling setting here is the priority of the digits.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from aoti_sched import Priority, Runner, RunnerView, Scheduler

from .digits import Digits
from .minilm import Tokenizer
from .packages import MAX_BATCH

INDEX_BATCH = 8  # sentences per request while the index is built
CLIENTS = 4  # that build the index and then search, each asking again as soon as it has its answer
WRITERS = 4  # clients that send digits, each resting between two of them
WRITER_REST = 0.010  # seconds, on average; drawn from an exponential distribution
TICK = 0.001  # seconds
SEED = 0


@dataclass(frozen=True)
class Sample:
    """One finished request, in seconds; `asked` and `answered` on the clock of `time.monotonic`."""

    work: str  # "index", "search" or "digit"
    asked: float
    waited: float  # in the queue, before the run began
    answered: float

    @property
    def latency(self) -> float:
        """What the client felt."""
        return self.answered - self.asked


@dataclass(frozen=True)
class Hit:
    """A sentence that a search found; the score is the cosine of the angle between the two
    vectors.
    """

    score: float
    sentence: str


@dataclass
class Observed:
    """All that was seen while serving."""

    samples: list[Sample] = field(default_factory=list)
    lags: list[tuple[float, float]] = field(
        default_factory=list
    )  # when, and how late the loop was, seconds
    answers: dict[str, list[Hit]] = field(default_factory=dict)  # to each query, the last one given
    readings: list[tuple[int, int]] = field(default_factory=list)  # number of the image, digit read
    held_out_accuracy: float = 0.0  # of the loaded classifier, over every held-out digit


class Service:
    """Search over `sentences` and reading of `digits`, on two loaded models."""

    def __init__(
        self, encoder: Runner, classifier: Runner, sentences: Sequence[str], digits: Digits
    ) -> None:
        self.observed = Observed()
        self._encoder = encoder
        self._classifier = classifier.options(priority=Priority.HIGH)
        self._tokenizer = Tokenizer()
        self._sentences = sentences
        self._digits = digits
        self._vectors = torch.empty(0)

    async def serve(self, queries: list[str], seconds: float) -> Observed:
        """Build the index, then answer `queries` over and over for `seconds`; digits all the
        while.
        """
        self.observed.held_out_accuracy = await self._read_all_digits()
        beside = [asyncio.create_task(self._watch_loop())]
        beside += [
            asyncio.create_task(self._write_digits(random.Random(SEED + n))) for n in range(WRITERS)
        ]
        try:
            await self._build_index()
            until = time.monotonic() + seconds
            await asyncio.gather(
                *(self._search_on(queries[n:] + queries[:n], until) for n in range(CLIENTS))
            )
        finally:
            for task in beside:
                task.cancel()
            ended = await asyncio.gather(*beside, return_exceptions=True)
        for outcome in ended:
            if isinstance(outcome, Exception):  # not of being cancelled: it had failed before
                raise outcome
        return self.observed

    async def search(self, query: str, best: int = 3) -> list[Hit]:
        """The `best` sentences for `query`, the nearest first."""
        vector = await self._encode("search", [query])
        scores, found = (self._vectors @ vector[0]).topk(best)
        return [
            Hit(score, self._sentences[n])
            for score, n in zip(scores.tolist(), found.tolist(), strict=True)
        ]

    async def read_digit(self, n: int) -> int:
        """Which digit the classifier sees in image number `n`."""
        scores = await self._timed("digit", self._classifier, self._digits.images[n : n + 1])
        return int(scores.argmax())

    async def _build_index(self) -> None:
        vectors: dict[int, Tensor] = {}
        starts = iter(range(0, len(self._sentences), INDEX_BATCH))

        async def take_batches() -> None:
            for start in starts:  # each client takes the next batch that nobody has taken
                vectors[start] = await self._encode(
                    "index", self._sentences[start : start + INDEX_BATCH]
                )

        await asyncio.gather(*(take_batches() for _ in range(CLIENTS)))
        self._vectors = torch.cat([vectors[start] for start in sorted(vectors)])

    async def _encode(self, work: str, sentences: Sequence[str]) -> Tensor:
        return await self._timed(work, self._encoder, *self._tokenizer(sentences))

    async def _search_on(self, queries: Sequence[str], until: float) -> None:
        """Ask one query after the other, each at least once, until the time is over."""
        for asked, query in enumerate(itertools.cycle(queries)):
            if asked >= len(queries) and time.monotonic() >= until:
                return
            self.observed.answers[query] = await self.search(query)

    async def _read_all_digits(self) -> float:
        scores = [
            await self._classifier.run(images)
            for images in torch.split(self._digits.images, MAX_BATCH)
        ]
        return float((torch.cat(scores).argmax(1) == self._digits.labels).double().mean())

    async def _write_digits(self, chance: random.Random) -> None:
        while True:
            await asyncio.sleep(chance.expovariate(1 / WRITER_REST))
            n = chance.randrange(len(self._digits.images))
            self.observed.readings.append((n, await self.read_digit(n)))

    async def _watch_loop(self) -> None:
        """Sleep a millisecond at a time and note how late the loop wakes us: what any other
        task would feel.
        """
        while True:
            due = time.monotonic() + TICK
            await asyncio.sleep(TICK)
            now = time.monotonic()
            self.observed.lags.append((now, now - due))

    async def _timed(self, work: str, runner: RunnerView, *inputs: Tensor) -> Tensor:
        asked = time.monotonic()
        future = runner.submit(*inputs)
        output: Tensor = await future
        self.observed.samples.append(
            Sample(work, asked, future.trace.queue_seconds, time.monotonic())
        )
        return output


async def serve(
    paths: Mapping[str, Path],
    sentences: Sequence[str],
    queries: list[str],
    digits: Digits,
    seconds: float,
) -> Observed:
    """Load both packages into one scheduler and run a `Service` on it."""
    async with Scheduler() as scheduler:
        encoder = await scheduler.load(paths["encoder"], instances=2, name="encoder")
        classifier = await scheduler.load(paths["classifier"], name="classifier")
        return await Service(encoder, classifier, sentences, digits).serve(queries, seconds)
