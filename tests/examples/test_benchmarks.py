"""The benchmarks run and report on every contestant. What they measure is nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.measure import percentile, ticker

REPOSITORY = Path(__file__).resolve().parents[2]
CONTESTANTS = ["(a) ticker alone", "(b) asyncio.to_thread", "(c) aoti_sched", "(d) on the loop"]


@pytest.fixture(scope="module")
def loop_lag(tmp_path_factory):
    """What a short run of it printed, and the JSON and PNG it wrote."""
    folder = tmp_path_factory.mktemp("loop_lag")
    figures, picture = folder / "made" / "figures.json", folder / "picture.png"
    command = [sys.executable, "-m", "benchmarks.loop_lag", "--seconds", "0.3", "--repetitions", "2"]
    command += ["--json", str(figures), "--png", str(picture)]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout, figures, picture


def test_loop_lag_prints_every_contestant_and_where_it_ran(loop_lag):
    printed, figures, picture = loop_lag
    for told in [*CONTESTANTS, "cores of", str(figures), str(picture)]:
        assert told in printed


def test_loop_lag_writes_every_repetition_and_its_ratios_as_json(loop_lag):
    document = json.loads(loop_lag[1].read_text())
    assert document["machine"].keys() >= {"date", "torch", "cores"}
    assert [result["name"] for result in document["results"]] == CONTESTANTS
    for result in document["results"]:
        assert len(result["repetitions"]) == 2
        assert result["median"].keys() == result["ratios"].keys()
        assert result["median"].keys() == {"runs_per_second", "lag_p50", "lag_p99", "lag_max"}
        if result["name"] == document["baseline"]:
            assert set(result["ratios"].values()) == {1.0}


def test_loop_lag_draws_a_picture(loop_lag):
    assert loop_lag[2].read_bytes().startswith(b"\x89PNG")


def test_a_percentile_is_one_of_the_values():
    values = [float(n) for n in range(100, 0, -1)]
    assert [percentile(values, percent) for percent in (0, 50, 99, 100)] == [1, 50, 99, 100]


async def test_the_ticker_counts_a_sleep_that_the_whole_block_held_up():
    async with ticker() as lags:
        until = time.perf_counter() + 0.02
        while time.perf_counter() < until:
            pass
    assert lags
