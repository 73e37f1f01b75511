"""Check this library on a real device: `python -m tests.device cuda:0 --out FOLDER [--steps
compile,tests,...]`.

Each step is a process of its own with a time limit, and its findings are in `FOLDER/device.json` as
soon as it ends. A step that dies stops no other. At the end `FOLDER/device.md` has them as a table
for docs/devices.md. Compiled packages are kept in `FOLDER/packages`,
for another run on the same kind of device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.device.report import MARK, table

MODELS = (
    "mlp",
    "wide",
    "gather",
    "item",
    "noisy",
    "attention",
    "conv",
    "folding",
    "aliasing",
    "deep",
    "large",
)
"""The most needed first. The last two are the benchmark's, and lie in its own cache."""
TESTED = ("mlp", "attention", "conv", "folding", "aliasing")
"""Those of `tests/compiled/test_devices.py`."""
BENCHMARK = ("deep", "large")


@dataclass(frozen=True)
class Step:
    """A step: a Python module and its arguments, or a command.

    `limit` is in seconds; `needs` are models. Steps of one `group` run at once; groups run one
    after the other.
    """

    name: str
    group: int
    limit: int
    arguments: str
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    program: str = ""


def steps(device: str) -> list[Step]:
    """All steps for a device. `{device}` and `{packages}` are replaced in their arguments."""
    stress = "-m tests.device.stress {device} {packages} 15"
    pytest = (
        "-m pytest -q --tb=short -o filterwarnings=default -p no:cacheprovider "
        "tests/compiled/test_devices.py"
    )
    tests = f"{pytest} -m cuda" if device.startswith("cuda") else f"{pytest} -k cpu"
    both = ("mlp", "wide")
    found = [
        Step("tests", 1, 150, tests, TESTED),
        Step(
            "tests, Python threads",
            1,
            150,
            tests,
            TESTED,
            {"AOTI_SCHED_EXECUTOR": "threads"},
        ),
        Step("stress", 2, 60, stress, both),
        Step("memory", 4, 90, "-m tests.device.memory {device} {packages}", both),
    ]
    if not device.startswith("cuda"):
        return found
    loss = "-m tests.device.loss {device} {packages} "
    return [
        *(
            Step(f"recording: {how}", 1, 60, f"-m tests.device.recording_probe {how}")
            for how in ("torch", "driver", "reset")
        ),
        *found,
        *(
            Step(f"loss: {how}", 2, 90, loss + how, ("mlp", "gather"))
            for how in ("runs", "graphs", "eager")
        ),
        Step(
            "unrecordable",
            2,
            60,
            "-m tests.device.unrecordable {device} {packages}",
            ("item", "noisy"),
        ),
        Step("stress, graphs", 2, 60, f"{stress} graphs", both),
        Step("stress, graphs, launchers", 3, 60, f"{stress} graphs launchers", both),
        Step("stress, a user records", 3, 60, f"{stress} global", both),
        Step("stress, graphs, a user records", 3, 60, f"{stress} graphs global", both),
        Step("driver", 5, 90, "-m tests.device.driver_probe"),
        Step(
            "benchmark",
            6,
            170,
            "-m benchmarks.devices {device} --seconds 0.5 --rounds 2 --updates 5",
            BENCHMARK,
        ),
        Step(
            "memcheck",
            7,
            120,
            "-m tests.device.requests {device} {packages}",
            ("mlp",),
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            "compute-sanitizer --tool memcheck --error-exitcode 9",
        ),
    ]


class Check:
    """One run of the steps, and what it has found so far."""

    def __init__(self, device: str, out: Path) -> None:
        self.device = device
        self.out = out
        self.packages = out / "packages"
        self.packages.mkdir(parents=True, exist_ok=True)
        self.file = out / "device.json"
        self.results: dict[str, Any] = (
            json.loads(self.file.read_text()) if self.file.exists() else {}
        )
        self.began = time.monotonic()

    def run(
        self, name: str, command: list[str], limit: int, environment: dict[str, str]
    ) -> dict[str, Any]:
        """Run a command under its limit; its output goes to a file and its findings to the
        results.
        """
        began = time.monotonic()
        log = self.out / f"{name.replace(': ', '-').replace(', ', '-').replace(' ', '_')}.log"
        with log.open("w") as file:
            try:
                code: int | str = subprocess.run(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    check=False,
                    env={
                        **os.environ,
                        "AOTI_SCHED_DEVICE_PACKAGES": str(self.packages),
                        **environment,
                    },
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"did not end within {limit} s"
        text = log.read_text(errors="replace")
        result: dict[str, Any] = {"exit": code, "seconds": round(time.monotonic() - began, 1)}
        marked = [line for line in text.splitlines() if line.startswith(MARK)]
        if marked:
            result.update(json.loads(marked[-1][len(MARK) :]))
        if not marked or code != 0:
            result["end of its output"] = text[-1500:]
        self.results[name] = result
        self.file.write_text(json.dumps(self.results, indent=1))
        print(
            f"[{time.monotonic() - self.began:5.0f} s] {name}: exit {code}, "
            f"{result.get('failed') or ''}",
            flush=True,
        )
        return result

    def compile(self, name: str) -> None:
        cache = {
            "TORCHINDUCTOR_CACHE_DIR": f"/tmp/inductor-{name}",
            "TORCHINDUCTOR_COMPILE_THREADS": "2",
        }
        if name in BENCHMARK:
            kind = "pt2" if self.device == "cpu" else f"{self.device.partition(':')[0]}.pt2"
            program = f"from benchmarks import models; models.ensure({name!r}, {kind!r})"
            self.run(f"compile {name}", [sys.executable, "-c", program], 200, cache)
            return
        for device, path in (
            (self.device, f"{name}.pt2"),
            *((("cpu", "mlp-cpu.pt2"),) if name == "mlp" else ()),
        ):
            if not (self.packages / path).exists():
                words = ("-m", "tests.device.models", name, device, str(self.packages / path))
                self.run(f"compile {path}", [sys.executable, *words], 200, cache)

    def step(self, step: Step) -> None:
        words = step.arguments.format(device=self.device, packages=self.packages).split()
        self.run(
            step.name, [*step.program.split(), sys.executable, *words], step.limit, step.environment
        )


def versions() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "capability": torch.cuda.get_device_capability() if cuda else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.device", description=__doc__)
    parser.add_argument("device", help="cuda:0; or cpu, to see that the steps themselves work")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--steps", help="names that begin with one of these, with commas between; all by default"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 2, help="models compiled at once"
    )
    given = parser.parse_args()
    chosen = [
        step
        for step in steps(given.device)
        if not given.steps or any(step.name.startswith(one) for one in given.steps.split(","))
    ]
    check = Check(given.device, given.out)
    check.results["versions"] = versions()
    needed = {name for step in chosen for name in step.needs}
    with ThreadPoolExecutor(given.workers) as pool:
        compiling = {name: pool.submit(check.compile, name) for name in MODELS if name in needed}
        for group in sorted({step.group for step in chosen}):
            now = [step for step in chosen if step.group == group]
            with ThreadPoolExecutor(len(now)) as beside:

                def ready(step: Step) -> None:
                    for name in step.needs:
                        compiling[name].result()
                    check.step(step)

                list(beside.map(ready, now))
    (given.out / "device.md").write_text(table(check.results))
    bad = [name for name, result in check.results.items() if result.get("exit", 0) != 0]
    print(
        f"{len(check.results) - 1} steps, {len(bad)} with findings to read: "
        f"{', '.join(bad) or 'none'}"
    )


if __name__ == "__main__":
    main()
