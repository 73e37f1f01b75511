"""The demo's tables and picture show the numbers that were observed."""

import io

import pytest
import torch
from rich.console import Console

from examples.semantic_search import report
from examples.semantic_search.digits import Digits
from examples.semantic_search.serving import Hit, Observed, Sample

EXPECTED = {"who barks?": "A dog barks.", "who sings?": "A bird sings."}


@pytest.fixture
def digits():
    return Digits(torch.zeros(2, 1, 8, 8), torch.tensor([4, 7]))


@pytest.fixture
def observed():
    return Observed(
        samples=[
            Sample("index", asked=10.0, waited=0.001, answered=10.020),
            Sample("search", asked=10.0, waited=0.002, answered=10.010),
            Sample("search", asked=10.5, waited=0.004, answered=11.0),
            Sample("digit", asked=10.0, waited=0.0, answered=10.00325),
        ],
        lags=[(10.0, 0.0005), (11.0, 0.0125)],
        answers={
            query: [Hit(0.75, "A dog barks."), Hit(0.5, "A bird sings.")] for query in EXPECTED
        },
        readings=[(0, 4), (1, 1)],
        held_out_accuracy=0.982,
    )


def printed(part):
    console = Console(file=io.StringIO(), width=120)
    console.print(part)
    return console.file.getvalue()


def test_each_kind_of_request_has_its_rate_latency_and_queue_time(observed):
    index, search, digit = printed(report.requests_table(observed.samples)).splitlines()[5:8]
    assert [cell.strip() for cell in digit.split("│")[2:6]] == ["1", "308", "3.25", "3.25"]
    assert [cell.strip() for cell in search.split("│")[2:8]] == [
        "2",
        "2",
        "255.0",
        "495.1",
        "3.00",
        "3.98",
    ]
    assert "sentences" in index


def test_the_lag_is_told_in_milliseconds_with_its_maximum(observed):
    row = printed(report.lag_table(observed.lags)).splitlines()[4]
    assert [cell.strip() for cell in row.split("│")[1:5]] == ["2", "6.50", "12.4", "12.5"]


def test_only_queries_whose_first_answer_is_the_expected_one_count_as_right(observed):
    table = printed(report.answers_table(observed, EXPECTED))
    assert "came first for 1 of 2 queries" in table
    assert "✓ │ 0.75 │ A dog barks." in table
    assert "✓ │ 0.50 │ A bird sings." in table


def test_a_misread_digit_is_shown_as_one(observed, digits):
    panel = printed(report.digits_panel(observed, digits))
    assert "1 of 2 served ones were read correctly" in panel
    assert "98.2%" in panel
    assert "says 4" in panel
    assert "says 1, is 7" in panel


def test_the_picture_is_a_png_at_the_path_asked_for(observed, tmp_path):
    path = tmp_path / "new folder" / "latency.png"
    report.draw_latencies(observed, path)
    assert path.read_bytes().startswith(b"\x89PNG")
