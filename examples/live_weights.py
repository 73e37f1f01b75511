"""A model that learns while it serves: each new set of weights goes live between two requests.

python -m examples.live_weights

A classifier of handwritten digits starts out untrained, and clients ask it all the while. In the
same program it is trained; after every few steps its weights are published with `runner.update`,
and `trace.epoch` tells which set gave an answer. Then noise is published by mistake: the share of
right answers falls, a monitor notices it, and `runner.rollback` brings the last good set back. At
the end every answer is computed again, in plain PyTorch, with the set that its trace names. What
happened is printed, and drawn in .cache/examples/live_weights.png.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor
from torch.export import Dim
from torch.nn.functional import cross_entropy

import aoti_sched
from aoti_sched import Runner, UpdateReport

from .colours import CACHE, made_once
from .semantic_search.digits import BATCH, SEED, DigitClassifier, Digits, load_digits, one_thread

CLIENTS = 12
REST = 0.010  # a client rests as long between two questions, in seconds, on average
UPDATES = 50
STEPS = 4  # of training, between two updates
PACE = 0.15  # seconds from one update to the next, unless training takes longer
MISTAKE = 35  # after so many updates, noise is published
WATCHED = 400  # so many of the latest answers are watched
# When their share of right ones falls so far below the best there was, the weights are rolled back.
ALARM = 0.2

MISTAKEN = "#d1242f"

State = dict[str, Tensor]


class Answer(NamedTuple):
    """One digit read. Times in seconds on the monotonic clock."""

    client: int
    asked: float
    answered: float
    epoch: int  # which set of weights gave it
    image: int
    scores: Tensor  # one per digit
    right: bool


class Change(NamedTuple):
    """An update or a rollback."""

    at: float  # when the report came, just after the swap
    report: UpdateReport


@dataclass
class Observed:
    """What happened, and a watch over it."""

    answers: list[Answer] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    # Each epoch's weights, to compute its answers again.
    published: dict[int, State] = field(default_factory=dict)
    noise: int = 0  # the epoch that should not have been
    lost: int = 0  # requests that were not answered
    alarm: asyncio.Event = field(default_factory=asyncio.Event)
    _latest: deque[bool] = field(default_factory=lambda: deque(maxlen=WATCHED))
    _best: float = 0.0

    def add(self, answer: Answer) -> None:
        self.answers.append(answer)
        self._latest.append(answer.right)
        share = sum(self._latest) / WATCHED
        self._best = max(self._best, share)
        if share < self._best - ALARM:
            self.alarm.set()


def compile_untrained(path: Path) -> None:
    """A build step.

    Its weights stay apart from its code (`freeze` is off), so that they can be changed.
    """
    torch.manual_seed(SEED)
    batch = Dim("batch", min=1, max=64)
    aoti_sched.compile_package(
        DigitClassifier().eval(), (torch.rand(2, 1, 8, 8),), path, dynamic={"images": {0: batch}}
    )


def training(model: DigitClassifier, digits: Digits) -> Iterator[State]:
    """Train, and stop after every few steps to show the weights."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    chance = torch.Generator().manual_seed(SEED)
    while True:
        with one_thread():
            for _ in range(STEPS):
                chosen = torch.randint(len(digits.labels), (BATCH,), generator=chance)
                loss = cross_entropy(model(digits.images[chosen]), digits.labels[chosen])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        yield {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


async def ask(
    reader: Runner, client: int, digits: Digits, observed: Observed, done: asyncio.Event
) -> None:
    """A client: show the reader one digit after the other. It knows nothing of updates."""
    chance = random.Random(client)
    while not done.is_set():
        image = chance.randrange(len(digits.labels))
        asked = time.monotonic()
        future = reader.submit(digits.images[image : image + 1])
        scores = (await future)[0]
        right = int(scores.argmax()) == int(digits.labels[image])
        observed.add(
            Answer(client, asked, time.monotonic(), future.trace.epoch, image, scores, right)
        )
        await asyncio.sleep(chance.expovariate(1 / REST))


async def publish(reader: Runner, weights: State, observed: Observed) -> int:
    """New weights go live: from the next request on, every answer is theirs.

    Readers go on meanwhile.
    """
    report = await reader.update(weights)
    observed.changes.append(Change(time.monotonic(), report))
    observed.published[report.epoch] = weights
    return report.epoch


async def improve(reader: Runner, digits: Digits, observed: Observed) -> None:
    """Train beside the serving, publish as it goes, and undo the one mistake."""
    observed.published[reader.epoch] = await reader.extract()  # what the package brought
    model = DigitClassifier()
    model.load_state_dict(observed.published[reader.epoch])
    learning = training(model, digits)
    for number in range(1, UPDATES + 1):
        weights, _ = await asyncio.gather(asyncio.to_thread(next, learning), asyncio.sleep(PACE))
        await publish(reader, weights, observed)
        if number == MISTAKE:
            await asyncio.sleep(PACE)
            noise = {name: torch.randn_like(tensor) for name, tensor in weights.items()}
            observed.noise = await publish(reader, noise, observed)
            await observed.alarm.wait()
            report = await reader.rollback()
            observed.changes.append(Change(time.monotonic(), report))


async def serve(package: Path, train: Digits, held_out: Digits) -> Observed:
    observed, done = Observed(), asyncio.Event()
    # torch imports its compiler at the first step of training: seconds, the GIL held.
    next(training(DigitClassifier(), train))
    async with aoti_sched.Scheduler() as scheduler:
        reader = await scheduler.load(package, name="reader", instances=2)
        clients = asyncio.gather(
            *(ask(reader, n, held_out, observed, done) for n in range(CLIENTS))
        )
        await asyncio.sleep(0.3)  # untrained
        await improve(reader, train, observed)
        await asyncio.sleep(0.5)  # the last set, for a while
        done.set()
        await clients  # raises what any of their requests raised
        observed.lost = reader.stats().submitted - reader.stats().completed
    return observed


# --- what happened --------------------------------------------------------------------------------


def same_as_alone(observed: Observed, digits: Digits) -> int:
    """How many answers are those that plain PyTorch gives with the weights which their traces name.

    Compiled code rounds otherwise; a few steps of training change the scores a hundred times more
    than that.
    """
    model, count = DigitClassifier().eval(), 0
    with torch.no_grad():
        for epoch, weights in observed.published.items():
            model.load_state_dict(weights)
            alone = model(digits.images)
            for answer in observed.answers:
                if answer.epoch == epoch:
                    expected = alone[answer.image]
                    count += bool((answer.scores - expected).norm() < 1e-4 * expected.norm())
    return count


def share_right(answers: Sequence[Answer]) -> float:
    return sum(answer.right for answer in answers) / len(answers)


def steps_back(answers: Sequence[Answer]) -> int:
    """How often a client that awaits each answer before it asks again was given an older epoch
    than before.
    """
    last: dict[int, int] = {}
    count = 0
    for answer in answers:
        count += answer.epoch < last.get(answer.client, 0)
        last[answer.client] = answer.epoch
    return count


def summary(observed: Observed, digits: Digits) -> str:
    answers, changes = observed.answers, observed.changes
    first, last = (
        share_right([a for a in answers if a.epoch == end.epoch])
        for end in (answers[0], answers[-1])
    )
    pauses = sorted(change.report.pause_seconds * 1e3 for change in changes)
    staging = sorted(
        change.report.stage_seconds * 1e3 for change in changes if change.report.stage_seconds
    )
    size = changes[0].report.bytes / 1e6
    published, seen = len(observed.published), len({answer.epoch for answer in answers})
    back, exact = steps_back(answers), same_as_alone(observed, digits)
    clients = len({answer.client for answer in answers})
    span = answers[-1].answered - answers[0].asked
    return "\n".join(
        [
            (
                f"requests    {len(answers):,} answered in {span:.1f} s, {observed.lost} lost; "
                f"{clients} clients"
            ),
            (
                f"epochs      {published} published, {seen} seen in answers; 1 rolled back, which "
                f"{back} clients saw"
            ),
            f"accuracy    {first:.0%} of the answers right at first, {last:.0%} at last",
            (
                f"staging     {size:.2f} MB beside the requests: median {middle(staging):.2f} ms, "
                f"at "
                f"most {staging[-1]:.2f} ms"
            ),
            (
                f"pause       of all requests, per update: median {middle(pauses):.2f} ms, at most "
                f"{pauses[-1]:.2f} ms"
            ),
            (
                f"exactness   {exact:,} of {len(answers):,} answers are those of the very epoch "
                f"their "
                f"trace names"
            ),
        ]
    )


def middle(ordered: Sequence[float]) -> float:
    return ordered[len(ordered) // 2]


def draw(observed: Observed, path: Path) -> None:
    """Write a PNG: the share of right answers, the epoch of each answer, and how long each
    took; all over time.
    """
    start = observed.answers[0].asked
    shades = Normalize(1, max(observed.published))

    def colour(epoch: int) -> Any:
        return (
            MISTAKEN
            if epoch == observed.noise
            else colormaps["viridis_r"](shades(epoch) * 0.9 + 0.1)
        )

    figure = Figure(figsize=(11, 8.5), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(4, 3, 3))
    when = [answer.answered - start for answer in observed.answers]
    colours = [colour(answer.epoch) for answer in observed.answers]
    dots = {"s": 9, "linewidths": 0, "c": colours}

    draw_accuracy(top, observed, start, colour)
    middle.scatter(when, [answer.epoch for answer in observed.answers], **dots)
    middle.set_ylabel("epoch of each answer")
    latencies = [(answer.answered - answer.asked) * 1e3 for answer in observed.answers]
    bottom.scatter(when, latencies, alpha=0.6, **dots)
    bottom.scatter(
        [change.at - start for change in observed.changes],
        [change.report.pause_seconds * 1e3 for change in observed.changes],
        s=26,
        marker="_",
        color="black",
        label="pause of an update, in which nothing runs",
    )
    bottom.set_yscale("log")
    bottom.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    bottom.set_ylabel("request to answer (ms)")
    bottom.set_xlabel("time (s)")
    bottom.legend(
        loc="lower right", bbox_to_anchor=(1, 0.98), frameon=False, borderpad=0, handletextpad=0
    )
    for axes in (top, middle, bottom):
        axes.grid(visible=True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    figure.align_ylabels()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_accuracy(
    axes: Axes, observed: Observed, start: float, colour: Callable[[int], Any]
) -> None:
    """A bar for each epoch: as wide as the time it was live, as high as the share of right
    answers it gave.
    """
    changes = observed.changes
    starts = [observed.answers[0].asked, *(change.at for change in changes)]
    ends = [*starts[1:], observed.answers[-1].answered]
    epochs = [1, *(change.report.epoch for change in changes)]
    for began, ended, epoch in zip(starts, ends, epochs, strict=True):
        given = [a for a in observed.answers if a.epoch == epoch and began <= a.answered < ended]
        if given:
            share = share_right(given) * 100
            axes.bar(
                began - start, share, ended - began, align="edge", color=colour(epoch), alpha=0.35
            )
            axes.hlines(share, began - start, ended - start, color=colour(epoch), linewidth=2.5)
            if epoch == observed.noise:
                axes.annotate(
                    f"epoch {epoch}: noise, published by mistake;\n"
                    f"rolled back after {(ended - began) * 1e3:.0f} ms",
                    (began - start, share),
                    xytext=(-4, 4),
                    textcoords="offset points",
                    ha="right",
                    color=MISTAKEN,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2},
                )
    axes.set_ylim(0, 104)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.set_ylabel("right answers")
    axes.set_title(
        f"{len(observed.answers):,} requests while {len(observed.published)} sets of weights went "
        f"live; "
        "each colour is one set",
        loc="left",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=CACHE / "live_weights.png",
        help="where the picture goes",
    )
    output = parser.parse_args().output
    to_learn, to_read = load_digits()
    seen = asyncio.run(serve(made_once("live_weights", compile_untrained), to_learn, to_read))
    print(summary(seen, to_read))
    draw(seen, output)
    print(f"picture     {output}")
