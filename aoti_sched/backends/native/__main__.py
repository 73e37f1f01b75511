"""`python -m aoti_sched.backends.native` tells which lanes this installation has, and whether
its rules are compiled; it fails where lanes are Python threads.

An installation succeeds without the native module, be it that no compiler was at hand or that the
compiler failed. So this is how one knows.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys


def main() -> int:
    if importlib.util.find_spec("aoti_sched.backends.native._native") is not None:
        print(f"aoti_sched: lanes are native threads, the rules {_rules()}")  # noqa: T201 -- this is what it is for
        return 0
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    why = "no C++ compiler was found" if compiler is None else f"{compiler} did not build it"
    print(  # noqa: T201
        f"aoti_sched: LANES ARE PYTHON THREADS: the native module is missing; {why}.\n"
        "`pip install --verbose .` shows what the build said.",
        file=sys.stderr,
    )
    return 1


def _rules() -> str:
    rules = importlib.util.find_spec("aoti_sched.queue.device_queue")
    return "are Python" if rules is None or str(rules.origin).endswith(".py") else "are compiled"


sys.exit(main())
