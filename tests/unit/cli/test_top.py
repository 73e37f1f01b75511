"""`top`: what it draws of a real process, its keys, and its refusals."""

import asyncio
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress

import msgspec
import pytest
from msgspec.structs import replace

from aoti_sched.expose.reports import StatsReport
from aoti_sched.histograms import EndedRequests, Histogram
from aoti_sched.testing import FakeBackend, ManualClock, fake_scheduler
from tests.unit.cli.exposed import ROOT, exposed, folder_for_sockets, variables
from tests.unit.cli.support import json_of, refused, run

pytest.importorskip("textual", reason="top needs the extra top")
pytest.importorskip("uvicorn", reason="exposing needs the extra expose")

from textual.widgets import DataTable, Sparkline, Static

from aoti_sched.cli import rates
from aoti_sched.cli.processes import ask, choose
from aoti_sched.cli.top_screen import COLUMNS, Top, bar, sparks


@pytest.fixture
def folder(monkeypatch):
    with folder_for_sockets() as made:
        for name, value in variables(made).items():
            monkeypatch.setenv(name, value)
        yield made


def texts(app):
    table = app.query_one(DataTable)
    return [[str(cell) for cell in table.get_row_at(row)] for row in range(table.row_count)]


def shown(app, name):
    return str(app.query_one(name, Static).render())


async def until(pilot, true):
    for _ in range(400):
        await pilot.pause(0.02)
        if true():
            return
    pytest.fail(f"it did not come true: {texts(pilot.app)} {shown(pilot.app, '#title')}")


async def test_the_screen_shows_devices_and_moving_runners(folder):
    with exposed(folder, "--name", "app") as exposure:
        app = Top("app", ask(choose(None), "/stats", StatsReport), 0.1)
        async with app.run_test(size=(140, 30)) as pilot:
            assert texts(app)[0][COLUMNS.index("rate")] == "0.0/s"
            await until(pilot, lambda: not texts(app)[0][2].startswith("0.0"))
            assert {row[0] for row in texts(app)} == {"slow", "quick"}
            assert shown(app, "#title").startswith(f"app  process {exposure['pid']}  exposed for ")
            assert re.match(r"cpu +lanes [█░]{8} \d/2  cores [█░]{8} \d/\d", shown(app, "#devices"))
            await until(pilot, lambda: len(app.query_one("#total", Sparkline).data) > 2)
            slow = next(row for row in texts(app) if row[0] == "slow")
            assert slow[COLUMNS.index("p99")].endswith("ms")
            assert slow[COLUMNS.index("state")] == "ok"
            assert re.fullmatch("[▁▂▃▄▅▆▇█]+", slow[COLUMNS.index("history")])


async def test_a_runner_that_fails_is_shown(folder):
    with exposed(folder, "--broken"):
        app = Top(None, ask(choose(None), "/stats", StatsReport), 0.1)
        async with app.run_test(size=(140, 30)) as pilot:
            await until(
                pilot, lambda: "failing" in {row[COLUMNS.index("state")] for row in texts(app)}
            )
            row = next(row for row in texts(app) if row[0] == "broken")
            assert row[COLUMNS.index("rate")] == "0.0/s"
            assert row[COLUMNS.index("p99")] == "-"
            await until(pilot, lambda: texts(app)[-1][COLUMNS.index("errors")] != "0.0/s")
        assert re.search(r"^broken +cpu +failing ", run("stats").stdout, re.MULTILINE)


async def test_keys_and_headings_sort(folder):
    with exposed(folder, "--name", "app"):
        app = Top("app", ask(choose(None), "/stats", StatsReport), 60)
        async with app.run_test(size=(140, 30)) as pilot:
            app._sort_by("runner")
            assert [row[0] for row in texts(app)] == ["quick", "slow"]
            await pilot.press("r")
            assert [row[0] for row in texts(app)] == ["slow", "quick"]
            await pilot.press("s")
            assert app.sorted_by == "device"
            for _ in range(len(COLUMNS) - 2):
                await pilot.press("s")
            assert app.sorted_by == "runner"  # every column but the history was there
            await pilot.click(DataTable, offset=(3, 0))
            assert (app.sorted_by, app.descending) == ("runner", True)
            await pilot.press("q")
        assert app.return_code == 0


async def test_a_pause_stops_the_numbers(folder):
    with exposed(folder, "--name", "app"):
        app = Top("app", ask(choose(None), "/stats", StatsReport), 0.1)
        async with app.run_test(size=(140, 30)) as pilot:
            await pilot.press("p")
            assert shown(app, "#title").endswith("  paused")
            before = texts(app)
            kept = len(app._history._reports)
            await until(pilot, lambda: len(app._history._reports) > kept + 2)
            assert texts(app) == before
            await pilot.press("p")
            await until(pilot, lambda: texts(app) != before)


@pytest.mark.parametrize("by", ["name", "pid"])
async def test_a_process_that_ends_is_said_and_its_successor_found(folder, by):
    with exposed(folder, "--name", "app") as first:
        wanted = "app" if by == "name" else str(first["pid"])
        app = Top(wanted, ask(choose(None), "/stats", StatsReport), 0.1)
        pilots = app.run_test(size=(140, 30))
        pilot = await pilots.__aenter__()
    await until(pilot, lambda: "no scheduler of this user is exposed" in shown(app, "#title"))
    start = exposed(folder, "--name", "app")
    second = await asyncio.to_thread(start.__enter__)
    await until(pilot, lambda: f"process {second['pid']} " in shown(app, "#title"))
    assert "no scheduler" not in shown(app, "#title")
    await pilots.__aexit__(None, None, None)
    start.__exit__(None, None, None)


@pytest.mark.parametrize(("keys", "code"), [("q", 0), ("\x03", 130)])
def test_it_runs_in_a_terminal_until_a_key_is_pressed(folder, keys, code):
    with exposed(folder, "--name", "app"):
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 140, 0, 0))
        process = subprocess.Popen(
            [sys.executable, "-m", "aoti_sched", "top", "--interval", "100ms"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(slave)
        got = b""
        with suppress(OSError):  # how Linux says that the other end is closed
            while chunk := os.read(master, 4096):
                got += chunk
                if b"quick" in got and keys:
                    os.write(master, keys.encode())
                    keys = ""
        os.close(master)
        assert process.wait(60) == code, got
        assert "█".encode() in got or "░".encode() in got


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--interval", "0"), 2, "--interval: expected 100 ms to a minute, got '0'."),
        (("--interval", "soon"), 2, "--interval: 'soon' is no time."),
        (("nothing",), 1, "no scheduler of this user is exposed."),
    ],
)
def test_wrong_usage_is_a_sentence(folder, arguments, code, says):
    assert says in refused("top", *arguments, code=code)


def test_without_a_terminal_it_names_the_other_command(folder):
    with exposed(folder):
        assert "`aoti-sched stats` shows the numbers once." in refused("top")


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path):
    (tmp_path / "textual").mkdir()
    error = "raise ModuleNotFoundError('No module', name='textual')"
    (tmp_path / "textual" / "__init__.py").write_text(error)
    done = run("top", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == "aoti-sched: top: textual is missing. Run: pip install 'aoti_sched[top]'\n"
    )


# --- the numbers ----------------------------------------------------------------------------------


def test_rates_are_of_the_window_and_a_restart_begins_anew(folder):
    with exposed(folder, "--name", "app"):
        first, second = (msgspec.convert(json_of("stats"), StatsReport) for _ in range(2))
    history = rates.History()
    history.add(first)
    (alone,) = [row for row in history.rows() if row.runner == "slow"]
    assert (alone.rate, alone.p50, alone.history) == (0.0, None, ())
    history.add(second)
    history.add(second)  # the same moment again
    old, new = (report.stats.devices["cpu"].runners["slow"] for report in (first, second))
    (row,) = [row for row in history.rows() if row.runner == "slow"]
    expected = (new.completed - old.completed) / (second.uptime - first.uptime)
    assert row.rate == pytest.approx(expected)
    assert row.history == pytest.approx((expected,))
    assert row.errors == 0
    assert 0.01 <= row.p50 <= row.p99
    restarted = msgspec.structs.replace(first, pid=1)
    history.add(restarted)
    assert history.latest is restarted
    assert history.total() == []


def test_rates_of_rare_looks_are_of_the_time_since_the_last(folder):
    with exposed(folder, "--name", "app"):
        early, first, second = (msgspec.convert(json_of("stats"), StatsReport) for _ in range(3))
    history = rates.History()
    for number, report in enumerate((early, first, second)):
        history.add(msgspec.structs.replace(report, uptime=30.0 * number))
    old, new = (report.stats.devices["cpu"].runners["slow"] for report in (first, second))
    (row,) = [row for row in history.rows() if row.runner == "slow"]
    assert row.rate == pytest.approx((new.completed - old.completed) / 30.0)
    assert row.rate > 0
    assert row.p50 is not None


async def test_the_rates_of_a_runner_that_was_loaded_anew_are_never_below_zero():
    clock, history = ManualClock(), rates.History()
    backend = FakeBackend({"m": len}, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        for number, (good, bad) in enumerate([(5, 0), (4, 2)]):
            runner = await scheduler.load("m.pt2")
            runs = [runner.submit("ab") for _ in range(good + bad)]
            for done in range(good + bad):
                await backend.step(ValueError() if done < bad else None)
            await asyncio.gather(*runs, return_exceptions=True)
            history.add(
                StatsReport(
                    name="app",
                    pid=1,
                    time=0.0,
                    uptime=float(number),
                    weights=False,
                    stats=scheduler.stats(),
                )
            )
            await runner.aclose()
    (row,) = history.rows()
    assert (row.rate, row.errors, row.history) == (4.0, 2.0, (0.0,))


def test_a_batch_counts_once_and_the_callers_own_cancellations_are_no_errors(folder):
    with exposed(folder, "--name", "app"):
        report = msgspec.convert(json_of("stats"), StatsReport)
    device = report.stats.devices["cpu"]
    known = device.runners["slow"]

    def ended(outcome, count):
        each = dict.fromkeys(("queue", "run", "total"), Histogram(8e-6, (count,), 0.0, 0.0))
        each["batch_size"] = Histogram(1.0, (count,), float(count), 1.0)
        return EndedRequests(outcome=outcome, priority="NORMAL", **each)

    def runner(requests, batches, batched):
        outcomes = [ended(o, 5) for o in ("cancelled", "expired")]
        return replace(
            known,
            ended=(ended("completed", requests - 10), *outcomes),
            batches=batches,
            batched=batched,
        )

    old, new = runner(16, 1, 8), runner(40, 3, 24)  # 9 runs, and 19
    assert rates.requests_of_a_run(None, old) == pytest.approx(16 / 9)
    assert rates.requests_of_a_run(old, new) == pytest.approx(24 / 10)
    assert rates.requests_of_a_run(new, old) == pytest.approx(16 / 9)  # loaded anew
    assert rates.requests_of_a_run(old, old) is None

    history = rates.History()
    for number, one in enumerate((replace(known, ended=(), batches=0, batched=0), new)):
        devices = {"cpu": replace(device, runners={"slow": one})}
        history.add(replace(report, uptime=number, stats=replace(report.stats, devices=devices)))
    (row,) = history.rows()
    assert (row.rate, row.errors, row.batch) == (30.0, 5.0, pytest.approx(40 / 19))


def test_a_histogram_of_a_window_is_the_difference():
    old = Histogram(1.0, (1, 2), 4.0, 1.5)
    new = Histogram(1.0, (1, 5, 0, 1), 12.0, 3.0)
    assert rates.between(old, new) == Histogram(1.0, (0, 3, 0, 1), 8.0, 3.0)
    assert rates.between(new, old) == old  # the runner was loaded anew


def test_bars_and_sparks():
    assert (bar(0, 4), bar(4, 4), bar(9, 4), bar(0, 0)) == ("░" * 8, "█" * 8, "█" * 8, "░" * 8)
    assert sparks((0.0, 1.0, 2.0)) == "▁▅█"
    assert sparks((0.0, 0.0)) == "▁▁"
    assert sparks(()) == ""
