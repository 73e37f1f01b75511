"""The example that trains beside its serving: what it tells and draws is what happened, and a
run of it loses nothing.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aoti_sched import UpdateReport
from examples import live_weights
from examples.live_weights import Answer, Change, Observed
from examples.semantic_search.digits import DigitClassifier, Digits

REPOSITORY = Path(__file__).resolve().parents[2]


def weights(seed):
    torch.manual_seed(seed)
    return DigitClassifier().state_dict()


def report(epoch, pause):
    return UpdateReport(
        runner="reader",
        epoch=epoch,
        bytes=600_000,
        stage_seconds=0.002,
        fold_seconds=0.0,
        drain_seconds=pause / 2,
        swap_seconds=pause / 2,
        pause_seconds=pause,
        waited=3,
    )


@pytest.fixture
def digits():
    torch.manual_seed(7)
    return Digits(torch.randint(17, (4, 1, 8, 8)).float(), torch.tensor([4, 7, 1, 1]))


@pytest.fixture
def observed(digits):
    """Two clients, four answers each: epochs 1, 2, 3 (noise) and, rolled back, 2 again."""
    seen = Observed(published={epoch: weights(epoch) for epoch in (1, 2, 3)}, noise=3)
    for n, epoch in enumerate([1, 1, 2, 2, 3, 3, 2, 2]):
        model = DigitClassifier()
        model.load_state_dict(seen.published[epoch])
        with torch.no_grad():
            scores = model(digits.images)[n % 4]
        seen.add(Answer(n % 2, 10.0 + n, 10.004 + n, epoch, n % 4, scores, right=epoch == 2))
    seen.changes += [
        Change(11.5, report(2, 0.0004)),
        Change(13.5, report(3, 0.0002)),
        Change(15.5, report(2, 0.0010)),
    ]
    return seen


def test_the_summary_tells_what_was_observed(observed, digits):
    assert live_weights.summary(observed, digits).splitlines() == [
        "requests    8 answered in 7.0 s, 0 lost; 2 clients",
        "epochs      3 published, 3 seen in answers; 1 rolled back, which 2 clients saw",
        "accuracy    0% of the answers right at first, 100% at last",
        "staging     0.60 MB beside the requests: median 2.00 ms, at most 2.00 ms",
        "pause       of all requests, per update: median 0.40 ms, at most 1.00 ms",
        "exactness   8 of 8 answers are those of the very epoch their trace names",
    ]


def test_an_answer_of_another_epoch_than_its_trace_names_is_found(observed, digits):
    observed.answers[3] = observed.answers[3]._replace(epoch=1)
    assert live_weights.same_as_alone(observed, digits) == 7


def test_the_picture_is_a_png_at_the_path_asked_for(observed, tmp_path):
    path = tmp_path / "new folder" / "live.png"
    live_weights.draw(observed, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_alarm_is_raised_when_the_answers_turn_bad_and_not_before():
    observed = Observed()
    answers = [True] * live_weights.WATCHED + [False] * live_weights.WATCHED
    raised = []
    for right in answers:
        observed.add(Answer(0, 0.0, 0.0, 1, 0, torch.zeros(10), right))
        raised.append(observed.alarm.is_set())
    bad = live_weights.WATCHED * live_weights.ALARM
    assert live_weights.WATCHED + bad == pytest.approx(raised.index(True), abs=1)


def test_a_model_that_has_yet_to_learn_raises_no_alarm():
    observed = Observed()
    for _ in range(2 * live_weights.WATCHED):
        observed.add(Answer(0, 0.0, 0.0, 1, 0, torch.zeros(10), right=False))
    assert not observed.alarm.is_set()


def test_training_goes_on_from_the_weights_it_is_given(digits):
    model = DigitClassifier()
    learning = live_weights.training(model, digits)
    first, second = next(learning), next(learning)
    assert all(torch.equal(tensor, second[name]) for name, tensor in model.state_dict().items())
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_the_example_serves_while_it_learns_and_loses_no_request(tmp_path):
    picture = tmp_path / "live.png"
    command = [sys.executable, "-m", "examples.live_weights", "--output", str(picture)]
    run = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=540
    )
    assert run.returncode == 0, run.stdout + run.stderr
    answered, lost = re.search(r"requests +([\d,]+) answered .* s, (\d+) lost", run.stdout).groups()
    exact, of = re.search(r"exactness +([\d,]+) of ([\d,]+) answers", run.stdout).groups()
    assert lost == "0"
    assert exact == of == answered
    assert "52 published" in run.stdout
    accuracy = re.search(r"(\d+)% of the answers right at first, (\d+)% at last", run.stdout)
    assert int(accuracy[1]) < 40
    assert int(accuracy[2]) > 80
    assert picture.read_bytes().startswith(b"\x89PNG")
