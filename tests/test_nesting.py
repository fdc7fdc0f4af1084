"""Names of tensors in batches of any nesting."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from stability_callbacks._nesting import named_tensors

X, Y, Z = (torch.full((2,), float(value)) for value in range(3))


@dataclass
class Sample:
    image: Any
    more: Any = field(init=False)  # never set


Pair = namedtuple("Pair", ["one", "two"])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, {"b": X}),
        ([X, (Y, 3, "text", None)], {"b.0": X, "b.1.0": Y}),
        ({"x": X, 5: [Y]}, {"b.x": X, "b.5.0": Y}),
        (OrderedDict(x=X), {"b.x": X}),
        (UserDict(x=X), {"b.x": X}),
        (Pair(X, [Y]), {"b.one": X, "b.two.0": Y}),
        (Sample({"x": X}), {"b.image.x": X}),
        ([Sample, 1.5, {}], {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_finds_tensors_in_any_nesting(batch: Any, expected: dict[str, torch.Tensor]) -> None:
    found = dict(named_tensors(batch, "b"))
    assert list(found) == list(expected)
    assert all(found[name] is tensor for name, tensor in expected.items())


def test_finds_the_data_of_a_packed_sequence() -> None:
    packed = pack_sequence([X, Y])
    assert dict(named_tensors(packed, "b"))["b.data"] is packed.data
