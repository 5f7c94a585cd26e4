"""The 1,797 handwritten digits that scikit-learn ships, 8x8 pixels each: 1,437 to train on, 360 to test."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TRAINED = 1437
TESTED = 360


class Digits(NamedTuple):
    """Images of shape (n, 8, 8, 1), and labels of shape (n, 10), rows of one 1 among zeros; float32."""

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.float32]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.float32]


def load() -> Digits:
    """The digits, shuffled once and always alike; the training images have mean 0 and variance 1."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(TRAINED + TESTED)
    images = found.images[order][..., np.newaxis]
    labels = np.eye(10)[found.target[order]]
    train = images[:TRAINED]
    images = (images - train.mean()) / train.std()
    images, labels = images.astype(np.float32), labels.astype(np.float32)
    return Digits(images[:TRAINED], labels[:TRAINED], images[TRAINED:], labels[TRAINED:])
