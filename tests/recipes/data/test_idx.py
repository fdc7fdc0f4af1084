from __future__ import annotations

import gzip
import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from recipes.data._idx import MNIST_FILES, read_idx, read_mnist_folder

CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}


def idx(array: NDArray[Any]) -> bytes:
    """The published format, written down a second time."""
    header = bytes([0, 0, CODES[array.dtype.name], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist(folder: Path, names: tuple[str, ...] = MNIST_FILES) -> list[NDArray[np.uint8]]:
    parts = [
        np.arange(n, dtype=np.uint8).reshape(shape) for n, shape in ((24, (4, 2, 3)), (4, 4), (12, (2, 2, 3)), (2, 2))
    ]
    for name, part in zip(names, parts, strict=True):
        content = idx(part)
        (folder / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return parts


@given(
    array=st.sampled_from(list(CODES)).flatmap(
        lambda name: arrays(name, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    ),
    compressed=st.booleans(),
)
def test_what_was_written_is_read(array: NDArray[Any], compressed: bool) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "array")
        path.write_bytes(gzip.compress(idx(array), mtime=0) if compressed else idx(array))
        read = read_idx(path)
    assert read.dtype == array.dtype
    assert read.dtype.isnative
    assert read.flags.writeable
    np.testing.assert_array_equal(read, array)


def test_the_bytes_of_the_published_format(tmp_path: Path) -> None:
    path = tmp_path / "array"
    path.write_bytes(bytes.fromhex("0000 0b02 00000002 00000003") + bytes.fromhex("0001 0002 0100 ffff 8000 7fff"))
    assert read_idx(path).tolist() == [[1, 2, 256], [-1, -32768, 32767]]


GOOD = idx(np.arange(6, dtype=np.int16).reshape(2, 3))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not in idx format: it starts with nothing"),
        (b"\0\0\x08", "is not in idx format: it starts with 00 00 08"),
        (b"\x89PNG\r\n", "is not in idx format: it starts with 89 50 4e 47"),
        (b"\0\0\x0a\x01" + GOOD[4:], "is not in idx format: it starts with 00 00 0a 01"),
        (GOOD[:8], "is truncated: 8 bytes, its header alone has 12"),
        (GOOD[:-1], r"is truncated: 23 bytes, where shape \(2, 3\) of int16 takes 24"),
        (GOOD + b"\0", r"is too long: 25 bytes, where shape \(2, 3\) of int16 takes 24"),
        (b"\0\0\x08\xff" + struct.pack(">I", 1) * 255 + b"x", "cannot be held in an array"),
        (gzip.compress(GOOD, mtime=0)[:-9], "is damaged"),
        (gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 20, "is damaged"),
        (gzip.compress(GOOD, mtime=0) + b"garbage", "is damaged"),
        (gzip.compress(GOOD[:-1], mtime=0), "is truncated: 23 bytes"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "some-idx2-short"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"some-idx2-short {words}"):
        read_idx(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("separator", ["-idx", ".idx"])
def test_folder_in_every_spelling(tmp_path: Path, separator: str, suffix: str) -> None:
    parts = write_mnist(tmp_path, tuple(name.replace("-idx", separator) + suffix for name in MNIST_FILES))
    read = read_mnist_folder(tmp_path)
    for array, part in zip(read, parts, strict=True):
        np.testing.assert_array_equal(array, part)
    assert [array.dtype.name for array in read] == ["uint8", "int64", "uint8", "int64"]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        read_mnist_folder(tmp_path / "nowhere")
    write_mnist(tmp_path)
    (tmp_path / MNIST_FILES[1]).unlink()
    (tmp_path / MNIST_FILES[2]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {MNIST_FILES[1]}, {MNIST_FILES[2]} "):
        read_mnist_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        (
            MNIST_FILES[1],
            np.zeros(3, np.uint8),
            r"The train files .* images of shape \(4, 2, 3\), labels of shape \(3,\)",
        ),
        (MNIST_FILES[2], np.zeros(2, np.uint8), r"The t10k files .* images of shape \(2,\)"),
        (MNIST_FILES[3], np.zeros((2, 1), np.uint8), r"The t10k files .* labels of shape \(2, 1\)"),
        (MNIST_FILES[0], np.zeros((4, 2, 3), np.float32), "The train files .* hold float32 and uint8; wanted uint8"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path: Path, name: str, array: NDArray[Any], words: str) -> None:
    write_mnist(tmp_path)
    (tmp_path / name).write_bytes(idx(array))
    with pytest.raises(ValueError, match=words):
        read_mnist_folder(tmp_path)
