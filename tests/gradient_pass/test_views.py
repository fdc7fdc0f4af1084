"""Views to read from and to write to."""

from __future__ import annotations

import torch

from stability_callbacks.gradient_pass import local_values, writable_values
from tests.gradients import conjugated_parameter, gradient, sparse_embedding


def test_views_read_and_write_what_they_should() -> None:
    sparse = gradient(sparse_embedding().weight)
    assert local_values(sparse).shape == (2, 2)
    assert writable_values(sparse).shape == (3, 2)
    lazy = gradient(conjugated_parameter())
    assert torch.equal(local_values(lazy), lazy.resolve_conj())
    assert writable_values(lazy).shape == (2, 2)
    dense = torch.ones(2)
    assert local_values(dense) is dense
    assert writable_values(dense) is dense
