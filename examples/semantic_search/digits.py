"""A small convolutional network that reads handwritten digits, trained here in seconds.

The digits are scikit-learn's: 1,797 real ones, 8 by 8 pixels, each pixel the count 0..16 of inked
dots in it. A quarter is held out: the network never trains on it, its accuracy is measured on it,
and the demo serves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SEED = 0
EPOCHS = 15
BATCH = 32
SHADES = " .:-=+*#%@"  # from no ink to all of it


class Digits(NamedTuple):
    """Images, float32 [n, 1, 8, 8] with values 0..16, and the digits they show, int64 [n]."""

    images: Tensor
    labels: Tensor


class DigitClassifier(nn.Module):
    """Two convolutions, and a perceptron over what they found."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images as `Digits` has them, to one score per digit: float32 [batch, 10]; the highest
        is the answer.
        """
        return cast("Tensor", self.layers(images / 16))


def load_digits() -> tuple[Digits, Digits]:
    """The digits to train on, and those held out; always the same split, each digit in the same
    proportion.
    """
    from sklearn import datasets  # type: ignore[import-untyped]
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    images, labels = datasets.load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=SEED)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)

    def digits(pixels: Tensor, labels: Tensor) -> Digits:
        return Digits(pixels.float().reshape(-1, 1, 8, 8), labels.long())

    return digits(train_images, train_labels), digits(test_images, test_labels)


@contextmanager
def one_thread() -> Iterator[None]:
    """This network is too small to share among threads: they would spend their time waiting for
    each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_classifier(train: Digits) -> DigitClassifier:
    """A classifier trained on `train`, ready for inference.

    The seed is fixed; the caller's is left alone.
    """
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = DigitClassifier()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        for _ in range(EPOCHS):
            for chosen in torch.split(torch.randperm(len(train.images)), BATCH):
                optimizer.zero_grad()
                loss = cross_entropy(model(train.images[chosen]), train.labels[chosen])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of `digits` that `model` reads correctly, 0 to 1."""
    with torch.no_grad():
        right = model(digits.images).argmax(1) == digits.labels
    return float(right.double().mean())


def draw(image: Tensor) -> str:
    """The image as 8 lines of characters, each pixel two wide, because a character is twice as
    high as wide.
    """
    darkest = len(SHADES) - 1
    rows = (image.reshape(8, 8) / 16 * darkest).round().int().tolist()
    return "\n".join("".join(SHADES[shade] * 2 for shade in row) for row in rows)
