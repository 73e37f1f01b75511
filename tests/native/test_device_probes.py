"""The probes for real devices call what there is, and a step that fails is in the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device.report import MARK, table

REPOSITORY = Path(__file__).resolve().parents[2]

# Without a device nothing is computed, so values are not as they should be.
VALUES = {"driver: two graphs of one pool give the right values"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("driver_probe",),
        *(("recording_probe", how) for how in ("torch", "driver", "reset")),
    ],
)
def test_a_probe_comes_to_its_end_on_a_driver_that_checks_each_call(arguments):
    ran = subprocess.run(
        [sys.executable, "-m", "tests.device.dry_run", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    marked = [line for line in ran.stdout.splitlines() if line.startswith(MARK)]
    assert marked, ran.stdout + ran.stderr
    findings = json.loads(marked[-1][len(MARK) :])
    assert set(findings["failed"]) <= VALUES, ran.stdout + ran.stderr
    assert findings["found"]


def test_the_table_has_a_row_for_each_step_with_its_numbers_and_faults():
    results = {
        "versions": {"torch": "2.13.0", "device": "cpu", "capability": None},
        "memory": {"exit": 0, "seconds": 1.5, "found": {"grown": 0, "text": "a|b"}, "failed": []},
        "driver": {"exit": "did not end within 90 s", "seconds": 90.0, "failed": ["waiting"]},
    }
    assert table(results).splitlines() == [
        "torch 2.13.0, device cpu",
        "",
        "| step | ended | found | not as it should be |",
        "|---|---|---|---|",
        "| memory | well, 1.5 s | grown: 0 | - |",
        "| driver | with did not end within 90 s, 90.0 s | - | waiting |",
    ]
