"""The demo as a person starts it: a program, from the repository root.

It compiles its models if they are not cached.
"""

import re
import subprocess
import sys

from examples.semantic_search.packages import REPOSITORY


def test_the_demo_runs_answers_every_query_and_draws_its_picture(tmp_path):
    picture = tmp_path / "latency.png"
    command = [
        sys.executable,
        "-m",
        "examples.semantic_search",
        "--quick",
        "--output",
        str(picture),
    ]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "came first for 12 of 12 queries" in run.stdout
    accuracy = re.search(r"the classifier's accuracy is ([\d.]+)%", run.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) >= 97
    assert picture.read_bytes().startswith(b"\x89PNG")
