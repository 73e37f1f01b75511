"""Makes C of the rules, and of what every request goes through on its way to them and back, by
mypyc: `python compiled/generate.py FOLDER`, in the repository's root.

Prints a line for each extension module: its full name, the folder of mypyc's own C, and the sources
to compile. The modules stay Python as they are: what is compiled is the same text, and takes its
place where it could be.
"""

from __future__ import annotations

import contextlib
import gc
import shlex
import sys
from pathlib import Path

from mypyc.build import include_dir, mypycify

PACKAGE = Path("aoti_sched")
RULES = sorted(PACKAGE.glob("queue/**/[!_]*.py"))
WAY = [
    PACKAGE / name
    for name in (
        "engine/dispatcher.py",
        "engine/observers.py",
        "engine/traces.py",
        "model/call_spec.py",
        "model/input_check.py",
    )
]
SEEN = [PACKAGE / "errors.py", PACKAGE / "engine" / "compiling.py"]
"""Read for their types, but not compiled.

No other import is followed: behind `aoti_sched` itself lies torch.
"""


def main(folder: str) -> None:
    gc.disable()  # half of the time otherwise
    modules = [str(path) for path in (*RULES, *WAY)]
    options = [
        "--config-file=",
        "--follow-imports=skip",
        "--ignore-missing-imports",
        f"--cache-dir={folder}/mypy",
    ]
    with contextlib.redirect_stdout(sys.stderr):
        extensions = mypycify(
            [*options, *modules, *map(str, SEEN)],
            only_compile_paths=modules,
            target_dir=folder,
            group_name="aoti_sched._compiled",
        )
    for extension in extensions:
        print(shlex.join([extension.name, include_dir(), *extension.sources]))


main(sys.argv[1])
