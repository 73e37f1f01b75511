"""The example's digit classifier learns to read, and learns the same each time."""

import pytest
import torch

from examples.semantic_search import digits


@pytest.fixture(scope="module")
def data():
    return digits.load_digits()


@pytest.fixture(scope="module")
def classifier(data):
    train, _ = data
    return digits.train_classifier(train)


def test_the_classifier_reads_digits_it_was_not_trained_on(classifier, data):
    _, held_out = data
    assert digits.accuracy(classifier, held_out) >= 0.97


def test_no_held_out_digit_is_among_those_trained_on(data):
    train, held_out = ({tuple(image) for image in part.images.flatten(1).tolist()} for part in data)
    assert len(train) == 1347
    assert len(held_out) == 450
    assert not train & held_out


def test_images_are_counts_of_inked_dots(data):
    for part in data:
        assert part.images.dtype == torch.float32
        assert part.images.shape[1:] == (1, 8, 8)
        assert part.images.min() == 0
        assert part.images.max() == 16


def test_the_split_is_the_same_each_time(data):
    for before, again in zip(data, digits.load_digits(), strict=True):
        assert torch.equal(before.images, again.images)
        assert torch.equal(before.labels, again.labels)


def test_training_twice_gives_the_same_network(monkeypatch, data):
    monkeypatch.setattr(digits, "EPOCHS", 1)
    train, _ = data
    first, second = (digits.train_classifier(train).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_leaves_the_callers_random_numbers_alone(monkeypatch, data):
    monkeypatch.setattr(digits, "EPOCHS", 1)
    train, _ = data
    before = torch.random.get_rng_state()
    digits.train_classifier(train)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_accuracy_is_the_share_of_right_answers():
    images = torch.zeros(4, 1, 8, 8)
    always_three = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    torch.nn.init.zeros_(always_three[1].weight)
    always_three[1].bias.data = torch.nn.functional.one_hot(torch.tensor(3), 10).float()
    assert digits.accuracy(always_three, digits.Digits(images, torch.tensor([3, 1, 3, 3]))) == 0.75


def test_a_drawing_has_a_blank_for_no_ink_and_the_darkest_sign_for_all():
    image = torch.zeros(1, 8, 8)
    image[0, 2, 5] = 16
    lines = digits.draw(image).splitlines()
    assert lines[2] == " " * 10 + "@@" + " " * 4
    assert lines[:2] + lines[3:] == [" " * 16] * 7
