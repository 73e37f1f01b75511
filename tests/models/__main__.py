"""`python -m tests.models [names]`: build these models, or all and the demo's, two at a time; what
is built already costs nothing.

The two processes stay for many models, since half of a small model's time is importing the
compiler. What takes longest goes first, so that neither process waits for the other at the end: the
demo's models, and those that have a process of their own.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.models import DEFINITIONS, build_demo, build_here, compile_apart

DEMO = "the demo's"


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - set(DEFINITIONS))
    if unknown:
        sys.exit(f"no such model: {', '.join(unknown)}; there are {', '.join(DEFINITIONS)}")
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(
            2, mp_context=context, initializer=compile_apart, initargs=(scratch,)
        ) as pool,
    ):
        futures = {pool.submit(build_demo): DEMO} if names == list(DEFINITIONS) else {}
        longest_first = sorted(names, key=lambda name: not DEFINITIONS[name]().alone)
        futures |= {pool.submit(build_here, name): name for name in longest_first}
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            sys.stdout.write(
                f"{time.monotonic() - start:6.1f} s  {done:2d}/{len(futures)}  {futures[future]}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:] or list(DEFINITIONS))
