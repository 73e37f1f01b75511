"""The README's first five minutes, run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
FIRST_MINUTES = README[README.index("## The first five minutes") :]
COMPILE, SERVE = re.findall(r"```python\n(.*?)```", FIRST_MINUTES, re.DOTALL)
PRINTED = re.search(r"The last lines print:\s+```\n(.*?)\n```", FIRST_MINUTES, re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    directory = tmp_path_factory.mktemp("readme")
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILE], cwd=directory, check=True)
    return directory


def test_the_first_five_minutes_do_what_the_readme_says(workplace):
    ran = subprocess.run(
        [sys.executable, "-c", SERVE], cwd=workplace, check=True, capture_output=True, text=True
    )
    assert PRINTED[1] in ran.stdout


def test_every_page_the_readme_names_exists():
    for target in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (Path(__file__).parents[2] / target).exists(), target
