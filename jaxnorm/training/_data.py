"""Images from scikit-learn, from local files or made up, and batches of them, the last one padded and masked."""

import gzip
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxnorm.training._failure import Failure

if find_spec("sklearn") is None:  # said when this is imported, as of all else that the extra brings
    raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

DATA = ("digits", "mnist", "cifar10", "synthetic")
# How other formats, and IDX files of the other sort, give themselves away: where, by which bytes.
_SIGNATURES = {
    "a gzip file": (0, b"\x1f\x8b"),
    "a tar archive": (257, b"ustar"),
    "a Python pickle": (0, b"\x80\x02"),
    "an IDX file of labels": (0, b"\x00\x00\x08\x01"),
    "an IDX file of images": (0, b"\x00\x00\x08\x03"),
}
_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_RECORD = 1 + math.prod(_CIFAR_SHAPE)


class DataError(Failure, ValueError):
    """Data that are not what they should be."""


class MissingDataError(Failure, FileNotFoundError):
    """A file that is not where it should be."""


class Split(NamedTuple):
    """Images and their labels.

    Attributes:
      images: float32 in [0, 1], of shape ``(n, height, width, channels)``.
      labels: int32, of shape ``(n,)``.

    Example:
      >>> images, labels = Split(np.zeros((5, 8, 8, 1), np.float32), np.arange(5, dtype=np.int32))
      >>> labels.tolist()
      [0, 1, 2, 3, 4]
    """

    images: np.ndarray
    labels: np.ndarray


def load_digits(*, seed: int = 0) -> tuple[Split, Split]:
    """Load the handwritten digits of scikit-learn, 8x8 pixels. Nothing is downloaded.

    Args:
      seed: which images are for testing. Default: 0.

    Returns:
      1437 examples for training and 360 for testing.

    Example:
      >>> train, test = load_digits()
      >>> train.images.shape, test.images.shape
      ((1437, 8, 8, 1), (360, 8, 8, 1))
    """
    from sklearn import datasets, model_selection  # takes two seconds, for which other data need not wait

    pixels, targets = datasets.load_digits(return_X_y=True)
    images = (np.asarray(pixels, np.float32) / 16).reshape(-1, 8, 8, 1)
    labels = np.asarray(targets, np.int32)
    parts = model_selection.train_test_split(images, labels, test_size=0.2, random_state=seed, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(np.asarray, parts)
    return Split(train_images, train_labels), Split(test_images, test_labels)


def load_mnist(folder: str | os.PathLike[str]) -> tuple[Split, Split]:
    """Load MNIST, or a set in the same format such as Fashion-MNIST, from a local folder.

    Args:
      folder: has ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
        ``t10k-labels-idx1-ubyte``, each unpacked or, if that is missing, with ``.gz``.

    Returns:
      The examples for training and those for testing, images of shape ``(n, height, width, 1)``: for MNIST, 60000 and
      10000 of 28x28 pixels.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is truncated, too long, corrupt or of another kind, has labels other than 0 to 9, or does not
        go with the others.

    Example:
      >>> import struct, tempfile
      >>> with tempfile.TemporaryDirectory() as name:
      ...     folder = Path(name)
      ...     for part, n in (("train", 3), ("t10k", 2)):
      ...         images, labels = struct.pack(">4B3I", 0, 0, 8, 3, n, 4, 4), struct.pack(">4BI", 0, 0, 8, 1, n)
      ...         _ = (folder / f"{part}-images-idx3-ubyte").write_bytes(images + bytes(16 * n))
      ...         _ = (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels + bytes(range(n)))
      ...     train, test = load_mnist(folder)
      >>> train.images.shape, test.labels.tolist()
      ((3, 4, 4, 1), [0, 1])

    References:
      The IDX format: http://yann.lecun.com/exdb/mnist/
    """
    train, test = (_load_mnist_part(Path(folder), part) for part in ("train", "t10k"))
    _require(
        train.images.shape[1:3] == test.images.shape[1:3],
        f"load_mnist: {folder}",
        f"t10k-images of the size of train-images, {_times(train.images.shape[1:3])}",
        _times(test.images.shape[1:3]),
    )
    return train, test


def _load_mnist_part(folder: Path, part: str) -> Split:
    labels_path, sizes, read_labels = _open_idx(folder, f"{part}-labels-idx1-ubyte", ndim=1)
    images_path, shape, read_images = _open_idx(folder, f"{part}-images-idx3-ubyte", ndim=3)
    where = f"load_mnist: {labels_path}"
    _require(sizes[0] == shape[0], where, f"{shape[0]} labels, one for each image of {images_path}", sizes[0])
    return _split(where, read_images()[..., None], read_labels())


def _open_idx(folder: Path, name: str, ndim: int) -> tuple[Path, tuple[int, ...], Callable[[], np.ndarray]]:
    """The path of an IDX file, its sizes, and a function that reads its bytes, no more of them than the sizes say.

    The file begins with 0, 0, the type (8: bytes), ``ndim`` and the sizes (big endian).
    """
    path = _find("load_mnist", folder, [name, f"{name}.gz"])
    where = f"load_mnist: {path}"

    def read(size: int) -> bytes:
        parts = []
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                while part := file.read(min(size, 2**20)):  # a buffer is as large as what is asked for
                    parts.append(part)
                    size -= len(part)
                return b"".join(parts)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{where}: expected a whole gzip file; found it broken: {error}.") from error

    header = 4 + 4 * ndim
    content = read(512)
    magic = bytes([0, 0, 8, ndim])
    found = (content[:4].hex(" ") or "no bytes") + _kind(content)
    _require(content[:4] == magic, where, f"the bytes {magic.hex(' ')} at its beginning", found)
    _require(len(content) >= header, where, f"a header of {header} bytes", f"{len(content)} bytes in all")
    shape = tuple(np.frombuffer(content[4:header], ">u4").tolist())
    _require(min(shape) > 0, where, "sizes of at least 1 in its header", _times(shape))

    def pixels() -> np.ndarray:
        size = header + math.prod(shape)
        content = read(size + 1)
        found = "more" if len(content) > size else f"{len(content)} bytes"
        _require(len(content) == size, where, f"{size} bytes, {header} + {_times(shape)}", found)
        return np.frombuffer(content, np.uint8, offset=header).reshape(shape)

    return path, shape, pixels


def load_cifar10(folder: str | os.PathLike[str]) -> tuple[Split, Split]:
    """Load CIFAR-10 in its binary version from a local folder.

    Args:
      folder: has ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, itself or in its subfolder
        ``cifar-10-batches-bin``. Files may have any number of examples; those of CIFAR-10 have 10000.

    Returns:
      The examples for training and those for testing, images of shape ``(n, 32, 32, 3)``, red, green and blue.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is truncated, too long or of another kind, or has labels other than 0 to 9.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as name:
      ...     for part in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
      ...         _ = (Path(name) / f"{part}.bin").write_bytes(bytes([7, *bytes(3 * 32 * 32)]))
      ...     train, test = load_cifar10(name)
      >>> train.images.shape, test.labels.tolist()
      ((5, 32, 32, 3), [7])

    References:
      The binary version: https://www.cs.toronto.edu/~kriz/cifar.html
    """
    parts = [_read_cifar10(Path(folder), f"data_batch_{i}.bin") for i in range(1, 6)]
    train = Split(*map(np.concatenate, zip(*parts, strict=True)))
    return train, _read_cifar10(Path(folder), "test_batch.bin")


def _read_cifar10(folder: Path, name: str) -> Split:
    """A file of records: the label in one byte, then the 32x32 bytes of red, of green and of blue, row by row."""
    path = _find("load_cifar10", folder, [name, f"cifar-10-batches-bin/{name}"], " (the binary version, unpacked)")
    where = f"load_cifar10: {path}"
    content = path.read_bytes()
    _require(
        len(content) > 0 and len(content) % _CIFAR_RECORD == 0,
        where,
        f"a positive multiple of {_CIFAR_RECORD} bytes, the records of the binary version",
        f"{len(content)} bytes{_kind(content)}",
    )
    records = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR_RECORD)
    return _split(where, records[:, 1:].reshape(-1, *_CIFAR_SHAPE).transpose(0, 2, 3, 1), records[:, 0])


def num_classes(train: Split, test: Split) -> int:
    """How many classes there are: those of the training labels, and the test has no others.

    Raises:
      ValueError: it has.
    """
    count, largest = int(train.labels.max()) + 1, int(test.labels.max())
    _require(largest < count, "test labels", f"0 to {count - 1}, as in training", largest)
    return count


def synthetic(count: int, shape: Sequence[int], num_classes: int = 10, seed: int = 0) -> Split:
    """Make random images of any size that can be learned: a plane wave for each class, plus noise for each image.

    With frequencies ``u, v`` of the class and a phase ``p`` of the class and channel, all drawn uniformly, an image is
    ``0.5 + 0.3 cos(2 pi (u row + v column + p)) + 0.1 noise``, the noise Gaussian, the sum clipped to [0, 1].

    Args:
      count: the number of images.
      shape: ``(height, width, channels)`` of an image.
      num_classes: the number of classes; their counts differ by one at most. Default: 10.
      seed: seed of everything. Another seed makes other classes: to get a test set, cut it off. Default: 0.

    Returns:
      The images, ``(count, height, width, channels)``, and their labels, ``(count,)``.

    Raises:
      ValueError: a number is not positive, or ``shape`` does not have three.

    Example:
      >>> images, labels = synthetic(2500, (8, 8, 3))
      >>> waves = np.stack([images[:2000][labels[:2000] == k].mean(0) for k in range(10)])
      >>> nearest = np.square(images[2000:, None] - waves).sum((2, 3, 4)).argmin(1)
      >>> bool((nearest == labels[2000:]).all())
      True
    """
    if len(shape) != 3 or min(count, *shape, num_classes) < 1:
        got = f"count={count}, shape={shape}, num_classes={num_classes}"
        raise ValueError(f"synthetic: count, the three sizes of shape, and num_classes must be positive; got {got}.")
    rng = np.random.default_rng(seed)
    height, width, channels = shape
    labels = rng.permutation(count).astype(np.int32) % num_classes
    u, v = rng.uniform(0, 0.5, (2, num_classes, 1, 1, 1)).astype(np.float32)
    phases = rng.uniform(0, 1, (num_classes, 1, 1, channels)).astype(np.float32)
    rows, columns = np.arange(height, dtype=np.float32)[:, None, None], np.arange(width, dtype=np.float32)[:, None]
    cycles = u[labels] * rows + v[labels] * columns + phases[labels]
    noise = rng.standard_normal((count, *shape), np.float32)
    return Split(np.clip(0.5 + 0.3 * np.cos(2 * np.pi * cycles) + 0.1 * noise, 0, 1), labels)


def batches(
    data: Split, batch_size: int, *, seed: int | None = None, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Iterate over ``data`` once, in batches of one size; the last batch is padded and masked.

    Args:
      data: all examples, in every process.
      batch_size: how many examples a batch has room for, over all processes.
      seed: seed of the order, the same in every process; None keeps the order.
      process_index: which part of each batch to take: ``jax.process_index()``. Default: 0.
      process_count: into how many parts each batch is cut: ``jax.process_count()``. Default: 1. The parts of all
        processes together are the batch of a single process.

    Returns:
      An iterator over ``{"image", "label", "mask"}``, all of length ``batch_size / process_count``; the mask is False
      where the last batch is padded. Every process gets as many, and in the last a part may be all padding.

    Raises:
      ValueError: ``data`` is empty or has more images than labels or fewer, ``process_index`` is not below
        ``process_count``, or ``batch_size`` is not a positive multiple of ``process_count``.

    Example:
      >>> data = Split(np.zeros((5, 8, 8, 1), np.float32), np.arange(5, dtype=np.int32))
      >>> for batch in batches(data, 4):
      ...     print(batch["label"], batch["mask"])
      [0 1 2 3] [ True  True  True  True]
      [4 0 0 0] [ True False False False]
      >>> for batch in batches(data, 4, process_index=1, process_count=2):
      ...     print(batch["label"], batch["mask"])
      [2 3] [ True  True]
      [0 0] [False False]
    """
    count = len(data.labels)
    if count == 0 or len(data.images) != count:
        found = f"{len(data.images)} images and {count} labels"
        raise ValueError(f"batches: data must have as many images as labels, and at least one; got {found}.")
    if not 0 <= process_index < process_count:
        got = f"process_index={process_index}, process_count={process_count}"
        raise ValueError(f"batches: process_index must be at least 0 and below process_count; got {got}.")
    if batch_size < 1 or batch_size % process_count:
        got = f"batch_size={batch_size}, process_count={process_count}"
        raise ValueError(f"batches: batch_size must be a positive multiple of process_count; got {got}.")
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    padding = (0, -count % batch_size)
    parts = (-1, process_count, batch_size // process_count)
    indices = np.pad(order, padding).reshape(parts)[:, process_index]
    masks = np.pad(np.ones(count, bool), padding).reshape(parts)[:, process_index]
    return (
        {"image": data.images[index], "label": data.labels[index], "mask": mask}
        for index, mask in zip(indices, masks, strict=True)
    )


def _find(loader: str, folder: Path, names: list[str], hint: str = "") -> Path:
    """The first of the names that is a file in the folder."""
    for path in (folder / name for name in names):
        if path.is_file():
            return path
    if folder.is_dir():
        entries = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
        found = f"only {', '.join(entries[:10])}{', ...' * (len(entries) > 10)}" if entries else "it empty"
    else:
        found = "a file instead of a folder" if folder.is_file() else "no such folder"
    raise MissingDataError(f"{loader}: {folder}: expected {' or '.join(names)} in this folder{hint}; found {found}.")


def _split(where: str, pixels: np.ndarray, labels: np.ndarray) -> Split:
    """The split with these bytes as its images and labels, the labels checked."""
    worst = int(labels.argmax())
    _require(labels[worst] <= 9, where, "labels 0 to 9", f"label {labels[worst]} at example {worst}")
    return Split(np.divide(pixels, np.float32(255), order="C"), labels.astype(np.int32))


def _require(holds: object, where: str, expected: str, found: object) -> None:
    if not holds:
        raise DataError(f"{where}: expected {expected}; found {found}.")


def _kind(content: bytes) -> str:
    """What the content looks like, for a message about it."""
    return "".join(f" ({kind})" for kind, (at, mark) in _SIGNATURES.items() if content[at : at + len(mark)] == mark)


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
