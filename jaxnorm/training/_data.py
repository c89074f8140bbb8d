"""Images, and batches of them in which the last, partial one is padded and masked, not dropped."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits as sklearn_digits
from sklearn.model_selection import train_test_split


class Split(NamedTuple):
    """Images of shape ``(n, height, width, channels)`` in [0, 1], float32, and their labels, int32."""

    images: np.ndarray
    labels: np.ndarray


def load_digits(*, seed: int = 0) -> tuple[Split, Split]:
    """The handwritten digits that come with scikit-learn: 1437 images for training and 360 for testing, 8x8 pixels."""
    pixels, targets = sklearn_digits(return_X_y=True)
    images = (np.asarray(pixels, np.float32) / 16).reshape(-1, 8, 8, 1)
    labels = np.asarray(targets, np.int32)
    parts = train_test_split(images, labels, test_size=0.2, random_state=seed, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(np.asarray, parts)
    return Split(train_images, train_labels), Split(test_images, test_labels)


def batches(data: Split, batch_size: int, *, seed: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """One pass over ``data``, every example once.

    Args:
      data: the examples.
      batch_size: how many examples a batch has room for.
      seed: of the order; None to keep it.

    Yields:
      ``{"image", "label", "mask"}``, all of length ``batch_size``; the mask is False where the last batch is padded.
    """
    count = len(data.labels)
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    for start in range(0, count, batch_size):
        index = order[start : start + batch_size]
        mask = np.arange(batch_size) < len(index)
        index = np.pad(index, (0, batch_size - len(index)))
        yield {"image": data.images[index], "label": data.labels[index], "mask": mask}
