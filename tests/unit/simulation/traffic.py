"""Requests and runs that are drawn from a seed."""

import random

from aoti_sched import Batching, DeviceConfig, ModelConfig, SchedulerConfig
from aoti_sched.simulation.replay import Arrival


class DrawnTimes:
    """Run times that are drawn: a constant and a part for each request, log-normal around that."""

    def __init__(self, seed, first=0.002, each=0.0005, sigma=0.3):
        self.draw = random.Random(seed)
        self.first, self.each, self.sigma = first, each, sigma

    def seconds(self, requests):
        mean = self.first + self.each * len(requests)
        return mean * self.draw.lognormvariate(0, self.sigma)


def poisson(seed, count, rate, runners=("a",), *, varied=False):
    draw = random.Random(seed)
    at, found = 0.0, []
    for _ in range(count):
        more = (
            {
                "priority": draw.choice(["HIGH", "NORMAL", "LOW"]),
                "tenant": draw.choice(["", "x", "y"]),
                "timeout": draw.choice([None, 0.05, 0.1]),
                "leaves_after": draw.choice([*[None] * 9, 0.001]),
            }
            if varied
            else {}
        )
        found.append(Arrival(at, draw.choice(runners), **more))
        at += draw.expovariate(rate)
    return found


def settings(lanes=2, **models):
    return SchedulerConfig(
        devices={"cpu": DeviceConfig(lanes=lanes, cores=lanes)},
        models={name: ModelConfig(path=name, **given) for name, given in models.items()},
    )


TWO = settings(
    a={"instances": 2, "batching": Batching(max_size=8, max_delay=0.001)}, b={"instances": 1}
)
"""Two models on two lanes, one of them in batches."""
