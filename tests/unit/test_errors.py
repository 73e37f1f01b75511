"""What every error has in common: a message that fits on a screen and can be shown anywhere."""

import inspect
import pickle

import pytest

from aoti_sched import errors
from aoti_sched.errors import (
    SCREEN,
    AotiSchedError,
    CompileError,
    ConfigError,
    ConstantMismatchError,
    DeadlineUnreachableError,
    InputMismatchError,
    LoadError,
    PackageNotFoundError,
    RunError,
)

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, AotiSchedError)
]
HARM = "a\x1b[2J\x00\x7f\x9b\u202e\u2028\ud800b"


def of(kind, text):
    """An error of this kind, made as the library makes it, with `text` in all its parts."""
    if kind is InputMismatchError:
        return kind(text, text, text, text, text)
    if kind is DeadlineUnreachableError:
        return kind(text, 1.0, 2.0)
    if kind is ConstantMismatchError:
        return kind(text, ((text, text),) * 3)
    return kind(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_is_never_longer_than_a_screen_and_keeps_its_beginning_and_its_end(kind):
    text = str(of(kind, f"first {'x' * 1_000_000} last"))
    assert len(text) <= SCREEN
    assert "first x" in text[:200]
    assert "..." in text
    if kind is not DeadlineUnreachableError:
        assert "x last" in text[-50:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_has_no_character_that_a_terminal_obeys_and_can_be_written_in_utf_8(kind):
    text = str(of(kind, HARM))
    text.encode()
    assert text.isprintable()


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_comes_through_a_pickle_as_it_was(kind):
    error = of(kind, HARM + "\n" + "x" * 5000)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))


@pytest.mark.parametrize("kind", [RunError, LoadError, CompileError])
def test_what_torch_says_keeps_its_lines_but_no_more_than_a_screen_has(kind):
    assert str(kind("one\n\ttwo\n  three")) == "one\n\ttwo\n  three"
    lines = str(kind("\n".join(map(str, range(1000))))).split("\n")
    assert len(lines) == 24
    assert (lines[0], lines[-1]) == ("0", "999")
    assert lines[16] == "... [977 lines left out] ..."


@pytest.mark.parametrize("kind", [ConfigError, PackageNotFoundError])
def test_a_line_break_in_a_path_forges_no_line_of_a_log(kind):
    assert (
        str(kind("There is no package at a\nERROR root."))
        == "There is no package at a\\nERROR root."
    )


def test_an_ordinary_message_is_left_as_it_is():
    text = "modèle 'm': größer als 3 µs — 猫"
    assert str(RunError(text)) == text


def test_the_parts_of_an_error_are_whole_and_as_they_were():
    error = of(InputMismatchError, HARM * 1000)
    assert error.got == HARM * 1000
