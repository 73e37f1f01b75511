"""`python -m aoti_sched.backends.native`: prints which lanes and rules this installation has.

An installation succeeds even where no compiler was found or the compiler failed. A source tree that
was not installed in place has no native module either. The exit status is 1 where lanes are Python
threads, because the native module is missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

from aoti_sched.backends.native.missing import missing, tree_not_installed


def _main() -> int:
    if importlib.util.find_spec("aoti_sched.backends.native._native") is not None:
        print(f"aoti_sched: lanes are native threads, the rules {_rules()}")  # noqa: T201
        return 0
    if tree_not_installed() is not None:
        why, remedy = missing()
        print(  # noqa: T201
            f"aoti_sched: LANES ARE PYTHON THREADS: the native module is missing; {why}.\n"
            f"To build it, {remedy}.",
            file=sys.stderr,
        )
        return 1
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


sys.exit(_main())
