"""The native module does not know torch: one build serves every torch, and lanes run where none
is installed.
"""

import subprocess
import sys

from tests.native.library import ROOT, library

PROGRAM = """
import sys
from pathlib import Path

from aoti_sched.backends.native import _native
from tests.native.harness import model, open_lanes, run_here
from tests.native.library import Container

lanes = open_lanes(2)
container = Container(num_inputs=0, num_outputs=1, made=1)
done = run_here(lanes, model(container, outputs=1))
lanes.close()
loaded = {name.partition(".")[0] for name in sys.modules}
lines = Path("/proc/self/maps").read_text().splitlines()
mapped = {Path(line.split()[-1]).name for line in lines if ".so" in line}
print(done.error, container.runs)
print(sorted(loaded & {"torch", "numpy"}))
torch_like = ("libtorch", "libc10", "libgomp", "libiomp", "libshm")
print(sorted(name for name in mapped if name.startswith(torch_like)))
print(any(name.startswith("_native.") for name in mapped))
"""


def test_lanes_are_made_and_run_models_without_torch():
    library()  # compiled once, here
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.stdout.splitlines() == ["None 1", "[]", "[]", "True"], result.stderr
