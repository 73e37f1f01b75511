"""The live page in a real browser, beside a real process: numbers, charts, a restart, strangers."""

from __future__ import annotations

import copy
import json
import shutil
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.unit.cli.exposed import exposed, folder_for_sockets

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("uvicorn", reason="exposing needs the extra expose")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

RATE = "document.querySelector('tr[data-runner=slow] td[data-column=rate]')?.innerText"
COLOURED = """
() => [...document.querySelectorAll("canvas")].map((canvas) => {
    const context = canvas.getContext("2d");
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    let found = 0;
    for (let at = 0; at < pixels.length; at += 4) {
        const [red, green, blue, alpha] = pixels.slice(at, at + 4);
        if (alpha > 200 && Math.max(red, green, blue) - Math.min(red, green, blue) > 100) found++;
    }
    return found;
})
"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--host-resolver-rules=MAP evil.example 127.0.0.1"],
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def folder():
    with folder_for_sockets() as made:
        yield made


@pytest.fixture(scope="module")
def app(folder):
    with exposed(folder, "--name", "app", "--port", 0) as exposure:
        yield exposure


class Visit:
    """A page that is open, and what its console and its network have said."""

    def __init__(self, browser, url, **settings):
        self.page = browser.new_page(**settings)
        self.errors = []
        self.asked = []
        self.page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)

    def wait(self, condition):
        """Ask until it is true. The page's policy forbids to evaluate text inside it."""
        until = time.monotonic() + 30
        while not self.page.evaluate(condition):
            assert time.monotonic() < until, f"{condition} {self.errors}"
            self.page.wait_for_timeout(50)

    def live(self):
        self.wait("document.body.dataset.state === 'live'")
        self.wait("document.querySelectorAll('canvas').length === 4")

    def cell(self, runner, column):
        return self.page.inner_text(f"tr[data-runner={runner}] td[data-column={column}]")


@pytest.fixture
def visit(browser, app):
    made = Visit(browser, app["url"])
    made.live()
    yield made
    made.page.close()
    assert made.errors == []
    assert [url for url in made.asked if not url.startswith(app["url"])] == []


def test_numbers_move_and_charts_are_drawn(visit, app):
    assert visit.page.inner_text("#name") == "app"
    assert visit.page.inner_text("#about").startswith(f"process {app['pid']}, exposed for ")
    visit.wait(f"!['0/s', undefined].includes({RATE})")
    before = visit.page.evaluate(RATE)
    visit.wait(f"{RATE} !== '{before}'")
    assert visit.cell("slow", "p99").endswith(" ms")
    assert visit.cell("slow", "state") == "ok"
    assert visit.page.inner_text("#devices").startswith("cpu")
    visit.wait(f"({COLOURED})().every((pixels) => pixels > 20)")


def test_a_runner_that_has_just_been_loaded_has_its_rates(browser, app):
    """Also one whose name every object of JavaScript has."""
    with urllib.request.urlopen(f"{app['url']}stats") as answer:
        first = json.load(answer)
    second = copy.deepcopy(first)
    second["uptime"] += 1.0
    runners = second["stats"]["devices"]["cpu"]["runners"]
    runners["constructor"] = {**runners["slow"], "name": "constructor"}
    reports = "".join(f"event: stats\ndata: {json.dumps(each)}\n\n" for each in (first, second))
    visit = Visit(browser, "about:blank")
    visit.page.route(
        "**/stream*", lambda route: route.fulfill(body=reports, content_type="text/event-stream")
    )
    visit.page.goto(app["url"])
    visit.wait("document.querySelectorAll('#runners tbody tr').length === 3")
    assert visit.cell("constructor", "p99").endswith(" ms")
    assert visit.cell("constructor", "rate") != "0/s"
    assert visit.errors == []
    visit.page.close()


DOT = "getComputedStyle(document.querySelector('#state'), '::before').backgroundColor"


def colour(page, name):
    """A colour of the style sheet, as the browser computes it."""
    return page.evaluate(
        "(name) => { const one = document.createElement('i');"
        " one.style.color = `var(${name})`; document.body.append(one);"
        " const found = getComputedStyle(one).color; one.remove(); return found; }",
        name,
    )


def test_the_page_is_neutral_until_a_connection_fails(browser, app):
    visit = Visit(browser, "about:blank")
    held = []

    def hold(route):
        held.append(route)

    visit.page.route("**/stream*", hold)
    visit.page.goto(app["url"])
    visit.wait("document.body.dataset.state === 'connecting'")
    while not held:
        visit.page.wait_for_timeout(50)
    assert visit.page.evaluate(DOT) == colour(visit.page, "--faint")
    held.pop().abort()
    visit.wait("document.body.dataset.state === 'reconnecting'")
    assert visit.page.evaluate(DOT) == colour(visit.page, "--bad")
    while not held:
        visit.page.wait_for_timeout(50)
    held.pop().continue_()
    visit.live()
    assert visit.page.evaluate(DOT) == colour(visit.page, "--good")
    visit.page.close()


def test_headings_sort_the_table(visit):
    first = "document.querySelector('#runners tbody tr').dataset.runner"
    visit.wait("document.querySelectorAll('#runners tbody tr').length === 2")
    visit.page.click("th button:text-is('runner')")
    assert visit.page.evaluate(first) == "quick"
    assert visit.page.get_attribute("th.text", "aria-sort") == "ascending"
    visit.page.click("th button:text-is('runner')")
    assert visit.page.evaluate(first) == "slow"


def test_the_link_records_a_timeline(visit):
    with visit.page.expect_download(timeout=30_000) as download:
        visit.page.click("nav a:text-is('Record 5 s')")
    assert download.value.suggested_filename == "timeline.json"
    with open(download.value.path()) as file:  # noqa: PTH123
        assert '"cat":"run"' in file.read()


def test_light_and_dark_follow_the_reader(visit):
    colour = "getComputedStyle(document.body).backgroundColor"
    light = visit.page.evaluate(colour)
    visit.page.emulate_media(color_scheme="dark")
    assert visit.page.evaluate(colour) != light
    visit.live()
    visit.wait(f"({COLOURED})().every((pixels) => pixels > 20)")


def test_a_phone_shows_all_without_scrolling_sideways(browser, app):
    phone = Visit(
        browser, app["url"], viewport={"width": 360, "height": 740}, device_scale_factor=2
    )
    phone.live()
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert phone.page.evaluate(wide) is False
    widths = "[...document.querySelectorAll('canvas')].map((one) => one.clientWidth)"
    assert all(200 < width <= 360 for width in phone.page.evaluate(widths))
    assert phone.errors == []
    phone.page.close()


def test_it_goes_on_after_a_restart(browser, folder):
    with exposed(folder, "--name", "first", "--port", 0) as exposure:
        visit = Visit(browser, exposure["url"])
        visit.live()
    visit.wait("document.body.dataset.state === 'reconnecting'")
    port = exposure["url"].rstrip("/").rpartition(":")[2]
    with exposed(folder, "--name", "second", "--port", port) as again:
        visit.wait("document.querySelector('#name').innerText === 'second'")
        assert visit.page.inner_text("#about").startswith(f"process {again['pid']},")
        visit.live()
        visit.wait(f"{RATE} !== '0/s'")
    visit.page.close()


def test_a_runner_that_fails_is_shown(browser, folder):
    with exposed(folder, "--port", 0, "--broken") as exposure:
        visit = Visit(browser, exposure["url"])
        visit.live()
        state = "document.querySelector('tr[data-runner=broken] td[data-column=state]')"
        visit.wait(f"{state}?.innerText === 'failing'")
        assert visit.page.evaluate(f"{state}.className") == "text bad"
        visit.wait(
            "document.querySelector('tr[data-runner=broken] td[data-column=errors]').innerText"
            " !== '0/s'"
        )
        assert visit.cell("broken", "p99") == "-"
        assert visit.errors == []
        visit.page.close()


# --- strangers ------------------------------------------------------------------------------------


def test_a_name_that_leads_to_the_port_reads_nothing(browser, app):
    page = browser.new_page()
    port = app["url"].rstrip("/").rpartition(":")[2]
    answer = page.goto(f"http://evil.example:{port}/stats")
    assert answer.status == 403
    assert "127.0.0.1" in answer.json()["error"]
    assert "devices" not in answer.text()
    page.close()


def test_a_page_of_another_origin_reads_nothing(browser, app):
    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<title>a stranger</title>")

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        page = browser.new_page()
        page.goto(f"http://evil.example:{server.server_port}/")
        for path, mode in (("stats", "cors"), ("timeline?seconds=1", "no-cors")):
            ask = (
                f"fetch('{app['url']}{path}', {{mode: '{mode}'}}).then(() => 'read', () => 'kept')"
            )
            assert page.evaluate(ask) == "kept"
        page.close()
        server.shutdown()
        thread.join()
