"""Events: where they go, as what, and the page that lists them."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import structlog

from aoti_sched.errors import RunError
from aoti_sched.events import EventLog

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def defaults():
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


@pytest.fixture
def records():
    """The records of the logger "a log", which is otherwise silent."""

    class Keep(logging.Handler):
        def emit(self, record):
            kept.append(record)

    kept, logger, handler = [], logging.getLogger("a log"), Keep()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield kept
    logger.removeHandler(handler)
    logger.propagate = True


# --- logging alone --------------------------------------------------------------------------------


def test_a_record_has_the_values_as_attributes_and_in_its_text(records):
    EventLog("a log").info("model loaded", runner="m", instances=2)
    (record,) = records
    assert (record.event, record.runner, record.instances) == ("model loaded", "m", 2)
    assert record.getMessage() == "model loaded runner='m' instances=2"
    assert (record.name, record.levelname) == ("a log", "INFO")


def test_a_formatter_adds_the_time_and_the_level_and_nothing_else_does(records):
    EventLog("a log").warning("run failed", error=RunError("100 % of it"))
    line = logging.Formatter("%(levelname)s %(message)s").format(records[0])
    assert line == "WARNING run failed error='100 % of it'"


def test_names_that_logging_keeps_for_itself_get_an_underscore(records):
    EventLog("a log").info("it", name="n", args=(1,), message="m", msg="x")
    (record,) = records
    assert (record.name_, record.args_, record.message_, record.msg_) == ("n", (1,), "m", "x")
    assert record.name == "a log"


def test_a_traceback_goes_the_way_of_logging(records):
    error = RunError("no")
    EventLog("a log").error("it", error=error, exc_info=error)
    assert records[0].exc_info[1] is error
    assert "exc_info" not in records[0].getMessage()


def test_a_level_that_is_off_makes_no_record(records):
    EventLog("a log").debug("it")
    assert not records


def test_structlog_is_not_imported_for_an_application_without_it():
    program = """
        import logging, sys
        logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
        import aoti_sched
        from aoti_sched.events import log
        log.warning("run failed", runner="m")
        log.info("model loaded")
        print("structlog" in sys.modules, "torch" in sys.modules)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines() == ["WARNING run failed runner='m'", "False False"]


# --- structlog ------------------------------------------------------------------------------------


def configured(**more):
    out = io.StringIO()
    structlog.configure(
        processors=[structlog.processors.add_log_level, structlog.processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(out),
        **more,
    )
    return out


def test_an_event_takes_the_applications_own_way(records):
    log = EventLog("a log")
    out = configured()
    log.info("model loaded", runner="m", instances=2)
    assert json.loads(out.getvalue()) == {
        "event": "model loaded",
        "level": "info",
        "runner": "m",
        "instances": 2,
    }
    assert not records


def test_structlogs_own_level_counts():
    log = EventLog("a log")
    out = configured(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    log.info("no")
    log.warning("yes")
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["yes"]


def test_structlog_over_logging_adds_time_and_level_once(records):
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ]
    )
    EventLog("a log").info("model loaded", runner="m")
    assert json.loads(formatter.format(records[0])) == {
        "event": "model loaded",
        "level": "info",
        "runner": "m",
    }


# --- the page -------------------------------------------------------------------------------------

DYNAMIC = {"request", "slow request", "container can't go back to its weights"}
"""Events whose names are no literal at the call that logs them."""


def events():
    """Return the names of the events in the source."""
    found = set(DYNAMIC)
    for path in (ROOT / "aoti_sched").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "log"
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                found.add(node.args[0].value)
    return found


def test_the_page_lists_every_event_and_no_other():
    page = (ROOT / "docs" / "logging.md").read_text()
    rows = [row for row in page[page.index("| event |") :].splitlines() if row.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(.+?)`", row.split("|")[1])}
    assert listed == events()
