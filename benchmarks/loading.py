"""What loading a model costs, beside what it can't cost less than: `python -m benchmarks.loading`.

Each way loads its own copies of one package, so that each load maps a library of its own:

- floor: dlopen, and creating the container, on files that are extracted already;
- torch: torch's own package loader, which extracts to a new folder each time;
- first: `scheduler.load` of a package that the cache does not have;
- known: `scheduler.load` of a package that an earlier process has loaded.

Then many runners are loaded in one process, for the time and the memory that each takes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from . import models

SETTLED = 2.5
"""Seconds until a written package is old enough to be described in the cache."""

LARGE = 20 << 20
"""Bytes of a package of which only five copies are made."""


def copies(package: Path, folder: Path, count: int) -> list[Path]:
    """Copies of a package with other bytes each: a comment at the zip's end."""
    made = []
    for index in range(count):
        path = Path(shutil.copyfile(package, folder / f"m{index}.pt2"))
        with zipfile.ZipFile(path, "a") as file:
            file.comment = str(index).encode()
        made.append(path)
    return made


# --- in a process of its own ----------------------------------------------------------------------


def floor(paths: list[Path]) -> list[float]:
    import torch  # noqa: F401 -- it is not what is measured

    from aoti_sched.backends.aoti.c_abi import Library
    from aoti_sched.backends.aoti.raw_handle import RawHandle
    from aoti_sched.package import find_package

    libraries = [find_package(path).extract().library for path in paths]
    return [timed(lambda library=library: RawHandle(Library(library))) for library in libraries]


def torchs(paths: list[Path]) -> list[float]:
    import torch

    loader = torch._C._aoti.AOTIModelPackageLoader
    return [timed(lambda path=path: loader(str(path), "model", False, 1, -1)) for path in paths]


def ours(paths: list[Path]) -> list[float]:
    import aoti_sched

    async def main() -> list[float]:
        async with aoti_sched.Scheduler() as scheduler:
            await scheduler.load(paths[0], name="the first one, which imports torch")
            times = []
            for path in paths[1:]:
                started = time.perf_counter()
                await scheduler.load(path)
                times.append(time.perf_counter() - started)
            return times

    return asyncio.run(main())


def many(paths: list[Path], count: int) -> dict[str, float]:
    """Load runners of these packages, one after another, and return what each took."""
    import psutil

    import aoti_sched

    async def main() -> dict[str, float]:
        process = psutil.Process()
        async with aoti_sched.Scheduler() as scheduler:
            await scheduler.load(paths[0], name="the first one, which imports torch")
            before, started = process.memory_info().rss, time.perf_counter()
            for index in range(count):
                await scheduler.load(paths[index % len(paths)], name=f"runner {index}")
            seconds = time.perf_counter() - started
            return {
                "seconds": seconds / count,
                "bytes": (process.memory_info().rss - before) / count,
            }

    return asyncio.run(main())


def imports() -> float:
    """Seconds that `import aoti_sched` takes."""
    return timed(lambda: __import__("aoti_sched"))


def beside_imports() -> float:
    """Seconds that importing what it can't do without takes."""
    return timed(lambda: [__import__(name) for name in ("asyncio", "msgspec", "anyio")])


def shown(seconds: list[float]) -> str:
    return f"{min(seconds) * 1e3:.1f} ({statistics.median(seconds) * 1e3:.1f})"


def timed(do: object) -> float:
    started = time.perf_counter()
    kept.append(do())
    return time.perf_counter() - started


kept: list[object] = []
"""What was loaded: freeing it is not measured."""


# --- the program ----------------------------------------------------------------------------------


def apart(what: str, *arguments: object, cache: Path) -> object:
    """Call a function of this module in a fresh process, and return its result."""
    text = (
        "import json, sys; from pathlib import Path; from benchmarks import loading; "
        f"print(json.dumps(loading.{what}(*{arguments!r})))"
    ).replace("PosixPath(", "Path(")
    if what in ("imports", "beside_imports"):  # this module imports no more than they do
        text = f"import time; kept = []\n{_source()}\nprint({what}())"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text],
        cwd=models.REPOSITORY,
        env={**os.environ, "AOTI_SCHED_CACHE": str(cache), "PYTHONDONTWRITEBYTECODE": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(ran.stdout.splitlines()[-1])


def _source() -> str:
    import inspect

    functions = (timed, imports, beside_imports)
    return "\n".join(inspect.getsource(function) for function in functions).replace(
        "do: object", "do"
    )


def measured(model: str, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each way of loading a model, for each copy."""
    package = models.ensure(model, "pt2")
    if package.stat().st_size > LARGE:
        repetitions = min(repetitions, 5)
    with tempfile.TemporaryDirectory(dir=models.CACHE) as folder:
        # One more for ours, whose first load imports torch.
        paths = copies(package, Path(folder), repetitions + 1)
        cache = Path(folder) / "cache"
        time.sleep(SETTLED)
        return {
            "first": apart("ours", paths, cache=cache),
            "known": apart("ours", paths, cache=cache),
            "floor": apart("floor", paths[1:], cache=cache),
            "torch": apart("torchs", paths[1:], cache=cache),
        }


def main(arguments: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument("--models", default=f"tiny,{models.ENCODER}")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--many", type=int, default=1000, help="runners that are loaded at once")
    parser.add_argument("--files", type=int, default=60, help="packages that they are loaded from")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    results: dict[str, object] = {}
    print("ms, best (median)        floor           torch           first           known")
    for model in given.models.split(","):
        found = measured(model, given.repetitions)
        results[model] = found
        times = "".join(f"{shown(found[way]):>16}" for way in ("floor", "torch", "first", "known"))
        beyond = min(found["known"]) - min(found["floor"])
        ratio = min(found["known"]) / min(found["floor"])
        print(
            f"{model:<14}{times}   known is {beyond * 1e3:.1f} ms over the floor, {ratio:.2f} of it"
        )
    with tempfile.TemporaryDirectory(dir=models.CACHE) as folder:
        paths = copies(models.ensure("tiny", "pt2"), Path(folder), min(given.files, given.many))
        cache = Path(folder) / "cache"
        time.sleep(SETTLED)
        apart("ours", paths, cache=cache)
        each = apart("many", paths, given.many, cache=cache)
    results["many"] = each
    print(
        f"{given.many} runners of {len(paths)} tiny packages: {each['seconds'] * 1e3:.1f} ms and "
        f"{each['bytes'] / 1e6:.2f} MB each"
    )
    for name in ("imports", "beside_imports"):
        results[name] = min(apart(name, cache=Path()) for _ in range(9))
    print(
        f"import aoti_sched: {results['imports'] * 1e3:.0f} ms; asyncio, msgspec and anyio alone: "
        f"{results['beside_imports'] * 1e3:.0f} ms"
    )
    if given.json:
        given.json.write_text(json.dumps(results, indent=2))
    return results


if __name__ == "__main__":
    main()
