"""The idx format, in which MNIST and the data sets after its fashion are published."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_idx", "read_mnist_folder"]

GZIP_MAGIC = b"\x1f\x8b"
ELEMENT_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def read_idx(path: Path) -> NDArray[Any]:
    """Read one array from an idx file, plain or compressed with gzip.

    Args:
        path: The file; whether it is compressed is told from its first bytes, not from its name.

    Returns:
        The array, writable and in the byte order of this machine.

    Raises:
        ValueError: If the file is not in idx format, shorter or longer than its header says, or damaged.
        OSError: If it cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "labels-idx1-ubyte")
        ...     _ = path.write_bytes(bytes([0, 0, 0x08, 1, 0, 0, 0, 3]) + bytes([7, 2, 1]))
        ...     read_idx(path)
        array([7, 2, 1], dtype=uint8)
    """
    content = _content(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in ELEMENT_TYPES:
        raise ValueError(
            f"{path} is not in idx format: it starts with {content[:4].hex(' ') or 'nothing'}, "
            f"an idx file with 00 00, one of {', '.join(f'{code:02x}' for code in ELEMENT_TYPES)}, and the rank."
        )
    dtype, rank = np.dtype(ELEMENT_TYPES[content[2]]), content[3]
    header = 4 + 4 * rank
    if len(content) < header:
        raise ValueError(f"{path} is truncated: {len(content)} bytes, its header alone has {header}.")
    shape = struct.unpack(f">{rank}I", content[4:header])
    expected = header + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        fault = "is truncated" if len(content) < expected else "is too long"
        raise ValueError(f"{path} {fault}: {len(content)} bytes, where shape {shape} of {dtype.name} takes {expected}.")
    try:
        array = np.frombuffer(content, dtype, offset=header).reshape(shape)
    except ValueError as error:  # a rank that numpy does not know
        raise ValueError(f"{path} cannot be held in an array: {error}") from error
    return array.astype(dtype.newbyteorder("="))


def read_mnist_folder(
    folder: Path,
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]:
    """Read the four files of MNIST, or of a data set published like it (Fashion-MNIST, KMNIST).

    Args:
        folder: Holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
            ``t10k-labels-idx1-ubyte``, each with or without ``.gz``; ``train-images.idx3-ubyte`` does as well.

    Returns:
        Training images, training labels, test images, test labels.

    Raises:
        FileNotFoundError: If the folder or one of the files is missing.
        ValueError: If a file is damaged, or images and labels do not belong together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    found = {name: _find(folder, name) for name in MNIST_FILES}
    if missing := [name for name, path in found.items() if path is None]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)} (.gz will do).")
    train_images, train_labels, test_images, test_labels = (read_idx(path) for path in found.values() if path)
    for part, images, labels in (("train", train_images, train_labels), ("t10k", test_images, test_labels)):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"The {part} files in {folder} do not belong together: images of shape {images.shape}, "
                f"labels of shape {labels.shape}; wanted (count, height, width) and (count,)."
            )
        if images.dtype != np.uint8 or labels.dtype != np.uint8:
            raise ValueError(f"The {part} files in {folder} hold {images.dtype} and {labels.dtype}; wanted uint8.")
    return train_images, train_labels.astype(np.int64), test_images, test_labels.astype(np.int64)


def _content(path: Path) -> bytes:
    content = Path(path).read_bytes()
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _find(folder: Path, name: str) -> Path | None:
    spellings = (name, name.replace("-idx", ".idx"))
    paths = (folder / f"{spelling}{suffix}" for suffix in ("", ".gz") for spelling in spellings)
    return next((path for path in paths if path.is_file()), None)
