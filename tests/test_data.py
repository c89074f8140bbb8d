"""Data: small files written here are read back value by value, broken ones are named, every example is seen once."""

import gzip
import pickle
import re
import runpy
import struct
import sys
import tarfile

import numpy as np
import pytest

from jaxnorm import training
from jaxnorm.training._data import batches, load_cifar10, load_mnist, synthetic

pytestmark = pytest.mark.any_version

MNIST_COUNTS = {"train": 7, "t10k": 4}
CIFAR_COUNTS = {f"data_batch_{i}.bin": i for i in range(1, 6)} | {"test_batch.bin": 3}
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(rng, tmp_path):
    """A folder of four valid files, of images of 5x6 pixels, and their arrays."""
    arrays = {}
    for part, count in MNIST_COUNTS.items():
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 5, 6), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, count, np.uint8)
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path, arrays


@pytest.fixture
def cifar(rng, tmp_path):
    """A folder of six valid files, and their labels and pixels."""
    arrays = {}
    for name, count in CIFAR_COUNTS.items():
        labels, planes = rng.integers(0, 10, count, np.uint8), rng.integers(0, 256, (count, 3, 32, 32), np.uint8)
        (tmp_path / name).write_bytes(b"".join(bytes([k]) + p.tobytes() for k, p in zip(labels, planes, strict=True)))
        arrays[name] = labels, planes
    return tmp_path, arrays


def fails(error, load, folder, name, expected, found):
    """Loading raises this error, which names the file, what was expected and what was found."""
    pattern = f"^{load.__name__}: {re.escape(str(folder / name))}: expected .*{expected}.*; found .*{found}"
    with pytest.raises(error, match=pattern):
        load(folder)


def check_split(split, images, labels):
    assert split.images.dtype == np.float32
    assert split.images.flags.c_contiguous
    assert split.labels.dtype == np.int32
    np.testing.assert_array_equal(split.images, images.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(split.labels, labels)


def compress(folder, names):
    for name in names:
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()


@pytest.mark.parametrize("compressed", ["none", "all", "some"])
def test_mnist_values(mnist, compressed):
    folder, arrays = mnist
    compress(folder, {"none": [], "all": list(arrays), "some": [IMAGES]}[compressed])
    for split, part in zip(load_mnist(str(folder)), MNIST_COUNTS, strict=True):
        check_split(split, arrays[f"{part}-images-idx3-ubyte"][..., None], arrays[f"{part}-labels-idx1-ubyte"])


def test_mnist_value_by_hand(mnist):
    folder, _ = mnist
    (folder / IMAGES).write_bytes(bytes.fromhex("00000803 00000001 00000005 00000006") + bytes(range(0, 60, 2)))
    (folder / LABELS).write_bytes(bytes.fromhex("00000801 00000001 09"))
    train, _ = load_mnist(folder)
    assert train.labels.tolist() == [9]
    assert train.images[0, 1, 2, 0] == np.float32(16) / np.float32(255)


IDX_BREAKS = {
    "empty": (IMAGES, lambda b: b"", "00 00 08 03", "no bytes"),
    "short magic": (IMAGES, lambda b: b[:3], "00 00 08 03", "00 00 08"),
    "short header": (IMAGES, lambda b: b[:11], "header of 16 bytes", "11 bytes"),
    "short labels header": (LABELS, lambda b: b[:7], "header of 8 bytes", "7 bytes"),
    "header alone": (IMAGES, lambda b: b[:16], r"226 bytes, 16 \+ 7 x 5 x 6", "16 bytes"),
    "truncated": (IMAGES, lambda b: b[:-1], "226 bytes", "225 bytes"),
    "trailing": (IMAGES, lambda b: b + b"\0", "226 bytes", "more"),
    "truncated labels": (LABELS, lambda b: b[:-2], r"15 bytes, 8 \+ 7", "13 bytes"),
    "trailing labels": (LABELS, lambda b: b + b"\1\2", "15 bytes", "more"),
    "byte order": (IMAGES, lambda b: b[3::-1] + b[4:], "00 00 08 03", "03 08 00 00"),
    "floats": (IMAGES, lambda b: b[:2] + b"\x0d" + b[3:], "00 00 08 03", "00 00 0d 03"),
    "dimensions": (LABELS, lambda b: b[:3] + b"\2" + b[4:], "00 00 08 01", "00 00 08 02"),
    "no examples": (IMAGES, lambda b: b[:4] + bytes(4) + b[8:16], "at least 1", "0 x 5 x 6"),
    "no labels": (LABELS, lambda b: b[:4] + bytes(4), "at least 1", "0"),
    "huge": (IMAGES, lambda b: b[:8] + b"\xff" * 8 + b[16:], "7 x 4294967295 x 4294967295", "226 bytes"),
    "gzip in a plain name": (IMAGES, gzip.compress, "00 00 08 03", r"1f 8b 08 00 \(a gzip file\)"),
    "other label": (LABELS, lambda b: b[:10] + b"\x0a" + b[11:], "labels 0 to 9", "label 10 at example 2"),
}


@pytest.mark.parametrize("case", IDX_BREAKS)
@pytest.mark.parametrize("part", MNIST_COUNTS)
@pytest.mark.parametrize("compressed", [False, True])
def test_mnist_broken(mnist, case, part, compressed):
    folder, arrays = mnist
    name, damage, expected, found = IDX_BREAKS[case]
    if part == "t10k":  # the same seven examples, in the other pair of files
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            (folder / f"t10k-{kind}").write_bytes((folder / f"train-{kind}").read_bytes())
        name = name.replace("train", "t10k")
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    if compressed:
        compress(folder, arrays)
        name += ".gz"
    fails(ValueError, load_mnist, folder, name, expected, found)


def test_mnist_swapped(mnist):
    folder, _ = mnist
    images, labels = folder / IMAGES, folder / LABELS
    content = images.read_bytes(), labels.read_bytes()
    images.write_bytes(content[1])
    fails(ValueError, load_mnist, folder, IMAGES, "00 00 08 03", r"00 00 08 01 \(an IDX file of labels\)")
    images.write_bytes(content[0])
    labels.write_bytes(content[0])
    fails(ValueError, load_mnist, folder, LABELS, "00 00 08 01", r"00 00 08 03 \(an IDX file of images\)")


def test_mnist_parts_mixed_up(mnist):
    folder, arrays = mnist
    (folder / LABELS).write_bytes((folder / "t10k-labels-idx1-ubyte").read_bytes())
    fails(ValueError, load_mnist, folder, LABELS, f"7 labels, .*{IMAGES}", "4")
    (folder / LABELS).write_bytes(idx(arrays[LABELS]))
    (folder / IMAGES).write_bytes(idx(arrays[IMAGES].reshape(7, 3, 10)))
    fails(ValueError, load_mnist, folder, "", "t10k-images of the size of train-images, 3 x 10", "5 x 6")


def test_mnist_missing(mnist):
    folder, arrays = mnist
    for name in arrays:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        fails(FileNotFoundError, load_mnist, folder, "", f"{name} or {name}.gz", "only .*-ubyte")
        (folder / name).mkdir()
        fails(FileNotFoundError, load_mnist, folder, "", f"{name} or {name}.gz", f"only .*{name}/")
        (folder / name).rmdir()
        (folder / name).write_bytes(content)
    load_mnist(folder)


GZIP_BREAKS = {
    "not gzip": (lambda z: b"PK" + z[2:], "Not a gzipped file"),
    "short header": (lambda z: z[:5], ""),
    "truncated": (lambda z: z[:-20], "end-of-stream"),
    "no trailer": (lambda z: z[:-8], "end-of-stream"),
    "checksum": (lambda z: z[:-8] + bytes(4) + z[-4:], "CRC"),
    "stream": (lambda z: z[:10] + b"\xff" * 40 + z[50:], "decompressing"),
    "trailing": (lambda z: z + b"trailing", "Not a gzipped file"),
}


@pytest.mark.parametrize("case", GZIP_BREAKS)
def test_mnist_broken_gzip(mnist, case):
    folder, _ = mnist
    damage, found = GZIP_BREAKS[case]
    compress(folder, [IMAGES])
    path = folder / f"{IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    fails(ValueError, load_mnist, folder, path.name, "a whole gzip file", f"it broken: .*{found}")


@pytest.mark.parametrize("load", [load_mnist, load_cifar10])
def test_missing_folder(tmp_path, load):
    fails(FileNotFoundError, load, tmp_path / "nowhere", "", "folder", "no such folder")
    fails(FileNotFoundError, load, tmp_path, "", "folder", "it empty")
    for i in range(12):
        (tmp_path / f"{i:02}").touch()
    fails(FileNotFoundError, load, tmp_path, "", "folder", r"only 00, .*, 09, \.\.\.\.$")
    fails(FileNotFoundError, load, tmp_path / "00", "", "folder", "a file instead of a folder")


@pytest.mark.parametrize("subfolder", [False, True])
def test_cifar10_values(cifar, subfolder):
    folder, arrays = cifar
    if subfolder:
        (folder / "cifar-10-batches-bin").mkdir()
        for name in arrays:
            (folder / name).rename(folder / "cifar-10-batches-bin" / name)
    train, test = load_cifar10(str(folder))
    labels, planes = (np.concatenate([arrays[f"data_batch_{i}.bin"][j] for i in range(1, 6)]) for j in range(2))
    check_split(train, np.stack([planes[:, 0], planes[:, 1], planes[:, 2]], -1), labels)
    labels, planes = arrays["test_batch.bin"]
    check_split(test, np.stack([planes[:, 0], planes[:, 1], planes[:, 2]], -1), labels)


def test_cifar10_value_by_hand(cifar):
    folder, _ = cifar
    pixels = bytearray(3072)
    pixels[0], pixels[1], pixels[1024 + 32], pixels[3071] = 51, 102, 153, 255
    (folder / "test_batch.bin").write_bytes(b"\x09" + pixels)
    _, test = load_cifar10(folder)
    expected = np.zeros((1, 32, 32, 3), np.uint8)
    expected[0, 0, 0, 0], expected[0, 0, 1, 0], expected[0, 1, 0, 1], expected[0, 31, 31, 2] = 51, 102, 153, 255
    check_split(test, expected, [9])


CIFAR_BREAKS = {
    "empty": (lambda b: b"", "positive multiple of 3073", "0 bytes"),
    "truncated": (lambda b: b[:-1], "multiple of 3073", "bytes"),
    "trailing": (lambda b: b + b"\0", "multiple of 3073", "bytes"),
    "CIFAR-100": (lambda b: b"\1" + b[:3073], "multiple of 3073", "3074 bytes"),
    "label": (lambda b: b[:3073] + b"\xff" + b[3074:], "labels 0 to 9", "label 255 at example 1"),
    "gzip": (gzip.compress, "the binary version", r"\(a gzip file\)"),
    "pickle": (lambda b: pickle.dumps({b"data": b}, protocol=2), "the binary version", r"\(a Python pickle\)"),
}


@pytest.mark.parametrize("case", CIFAR_BREAKS)
@pytest.mark.parametrize("name", ["data_batch_2.bin", "data_batch_5.bin", "test_batch.bin"])
def test_cifar10_broken(cifar, case, name):
    folder, _ = cifar
    damage, expected, found = CIFAR_BREAKS[case]
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    fails(ValueError, load_cifar10, folder, name, expected, found)


def test_cifar10_missing(cifar):
    folder, arrays = cifar
    for name in arrays:
        (folder / name).rename(folder / "elsewhere")
        expected = rf"{name} or cifar-10-batches-bin/{name} in this folder \(the binary version, unpacked\)"
        fails(FileNotFoundError, load_cifar10, folder, "", expected, "only .*elsewhere")
        (folder / "elsewhere").rename(folder / name)


def test_cifar10_other_versions(cifar, tmp_path_factory):
    folder, _ = cifar
    other = tmp_path_factory.mktemp("other")
    for name, mode, kind in [("a.tar", "w", r"\(a tar archive\)"), ("a.tar.gz", "w:gz", r"\(a gzip file\)")]:
        with tarfile.open(other / name, mode) as archive:
            archive.add(folder / "test_batch.bin", "cifar-10-batches-bin/test_batch.bin")
        fails(FileNotFoundError, load_cifar10, other / name, "", "the binary version, unpacked", "a file")
        (folder / "data_batch_1.bin").write_bytes((other / name).read_bytes())
        fails(ValueError, load_cifar10, folder, "data_batch_1.bin", "the binary version", kind)
    fails(FileNotFoundError, load_cifar10, other, "", "the binary version, unpacked", r"only a\.tar, a\.tar\.gz")
    (other / "cifar-10-batches-py").mkdir()
    fails(FileNotFoundError, load_cifar10, other, "", "the binary version, unpacked", "cifar-10-batches-py/")


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 8, 1), (5, 9, 3), (64, 48, 4)])
def test_synthetic(shape):
    images, labels = synthetic(23, shape, num_classes=4, seed=5)
    assert images.shape == (23, *shape)
    assert images.dtype == np.float32
    assert labels.dtype == np.int32
    assert images.min() >= 0
    assert images.max() <= 1
    assert sorted(np.bincount(labels).tolist()) == [5, 6, 6, 6]
    again, other = synthetic(23, shape, num_classes=4, seed=5), synthetic(23, shape, num_classes=4, seed=6)
    np.testing.assert_array_equal(again.images, images)
    np.testing.assert_array_equal(again.labels, labels)
    assert np.any(other.images != images)
    assert np.any(other.labels != labels)


def test_synthetic_can_be_learned():
    """Least squares on one half knows the other half, and knows nothing once the labels are shuffled."""
    images, labels = synthetic(2000, (6, 6, 2), num_classes=10)
    pixels = images.reshape(2000, -1)

    def accuracy(labels):
        weights = np.linalg.lstsq(pixels[:1000], np.eye(10)[labels[:1000]], rcond=None)[0]
        return np.mean((pixels[1000:] @ weights).argmax(1) == labels[1000:])

    assert accuracy(labels) > 0.95
    assert accuracy(np.random.default_rng(1).permutation(labels)) < 0.2


@pytest.mark.parametrize(
    "change", [{"count": 0}, {"shape": (8, 8)}, {"shape": (8, 0, 3)}, {"shape": (8, 8, 3, 1)}, {"num_classes": 0}]
)
def test_synthetic_errors(change):
    with pytest.raises(ValueError, match="synthetic: count, the three sizes of shape, and num_classes must be pos"):
        synthetic(**{"count": 4, "shape": (8, 8, 3), "num_classes": 10} | change)


def numbered(count):
    """Examples that say which they are, in the image and in the label."""
    number = np.arange(count)
    return training.Split(
        np.tile(number.astype(np.float32)[:, None, None, None], (1, 2, 3, 1)), number.astype(np.int32)
    )


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 21])
@pytest.mark.parametrize("seed", [None, 3])
def test_batches_have_every_example_once(count, seed):
    data = numbered(count)
    seen, sizes = [], []
    for batch in batches(data, 8, seed=seed):
        assert {name: (len(x), x.dtype) for name, x in batch.items()} == {
            "image": (8, np.float32),
            "label": (8, np.int32),
            "mask": (8, bool),
        }
        np.testing.assert_array_equal(batch["image"], np.ones((2, 3, 1)) * batch["label"][:, None, None, None])
        seen += [label for label, valid in zip(batch["label"].tolist(), batch["mask"], strict=True) if valid]
        sizes.append(int(batch["mask"].sum()))
        assert batch["mask"].tolist() == [True] * sizes[-1] + [False] * (8 - sizes[-1])
    assert sorted(seen) == list(range(count))
    assert sizes == [8] * (count // 8) + [count % 8] * (count % 8 > 0)
    if seed is None:
        assert seen == list(range(count))


def test_batches_order_is_of_the_seed():
    def order(seed):
        return [
            label for batch in batches(numbered(50), 8, seed=seed) for label in batch["label"][batch["mask"]].tolist()
        ]

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in (None, 0, 1, 2)}) == 4


@pytest.mark.parametrize("count", [1, 11, 13, 24])
@pytest.mark.parametrize("process_count", [1, 2, 3, 12])
@pytest.mark.parametrize("seed", [None, 7])
def test_batches_of_the_processes_are_the_batches_of_one(count, process_count, seed):
    data = numbered(count)
    whole = list(batches(data, 12, seed=seed))
    parts = [
        list(batches(data, 12, seed=seed, process_index=i, process_count=process_count)) for i in range(process_count)
    ]
    assert {len(part) for part in parts} == {-(-count // 12)}
    for batch, *pieces in zip(whole, *parts, strict=True):
        for name in ("image", "label", "mask"):
            assert {len(piece[name]) for piece in pieces} == {12 // process_count}
            np.testing.assert_array_equal(np.concatenate([piece[name] for piece in pieces]), batch[name])


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (numbered(0), {}, "data must have as many images as labels, and at least one; got 0 images and 0 labels"),
        (training.Split(numbered(3).images, numbered(4).labels), {}, "data must have .*; got 3 images and 4 labels"),
        (
            numbered(9),
            {"batch_size": 0},
            "batch_size must be a positive multiple .*; got batch_size=0, process_count=1",
        ),
        (
            numbered(9),
            {"batch_size": -4, "process_count": 2},
            "batch_size must be .*; got batch_size=-4, process_count=2",
        ),
        (
            numbered(9),
            {"process_count": 3},
            "batch_size must be a positive multiple .*; got batch_size=8, process_count=3",
        ),
        (
            numbered(9),
            {"process_index": 2, "process_count": 2},
            "process_index must be .*; got process_index=2, process_c",
        ),
        (numbered(9), {"process_index": -1}, "process_index must be at least 0 and below .*; got process_index=-1"),
        (numbered(9), {"process_count": 0}, "process_index must be at least 0 and below .*; got .*process_count=0"),
    ],
)
def test_batches_errors_come_with_the_call(data, arguments, message):
    with pytest.raises(ValueError, match=f"batches: {message}"):
        batches(data, **{"batch_size": 8} | arguments)


def test_without_scikit_learn_the_package_says_what_to_install(monkeypatch):
    """At its import, though the digits alone want it."""
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "jaxnorm.training._data")
    with pytest.raises(ModuleNotFoundError, match=r'needs sklearn, .*: pip install "jaxnorm\[training\]"'):
        runpy.run_path(training.__file__)
