"""DeviceState: tensors made once, kept where they are needed, and saved as copies."""

from __future__ import annotations

import pytest
import torch

from stability_callbacks._device_state import DeviceState

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


def test_tensors_are_made_once_with_their_first_values() -> None:
    state = DeviceState()
    mean, variance = state.on(CPU, mean=0.5, variance=2)
    assert [(t.item(), t.shape, t.dtype) for t in (mean, variance)] == [(v, (), torch.float64) for v in (0.5, 2.0)]
    mean.add_(1)
    again, other = state.on(CPU, mean=0.5, other=3)
    assert again is mean
    assert (again.item(), other.item()) == (1.5, 3.0)
    assert state["variance"] is variance
    assert "variance" in state
    assert "median" not in state


def test_shape_and_type_are_those_asked_for() -> None:
    [history] = DeviceState().on(CPU, shape=(2, 3), history=float("nan"))
    assert history.shape == (2, 3)
    assert history.isnan().all()
    [count] = DeviceState().on(CPU, shape=(2, 1), dtype=torch.int64, count=7)
    assert count.dtype == torch.int64
    assert count.tolist() == [[7], [7]]


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float64), (torch.int64, torch.int64)])
def test_tensors_move_to_where_they_are_needed(dtype: torch.dtype | None, expected: torch.dtype) -> None:
    state = DeviceState()
    state.on(CPU, dtype=dtype, count=1)
    [moved] = state.on(ELSEWHERE, dtype=dtype, count=1)
    assert (moved.device, moved.dtype) == (ELSEWHERE, expected)
    assert state["count"] is moved


def test_state_is_saved_and_loaded_as_copies() -> None:
    first, second = DeviceState(), DeviceState()
    [mean] = first.on(CPU, mean=1)
    saved = first.state_dict()
    second.on(CPU, forgotten=1)
    second.load_state_dict(saved)
    mean.add_(1)
    saved["mean"].add_(5)
    [loaded] = second.on(CPU, mean=0)
    assert (mean.item(), loaded.item()) == (2.0, 1.0)
    assert "forgotten" not in second
