"""Updates that ruin weights from finite gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stability_callbacks import FlightRecorder, Rollback, StepGuard, TrainingDivergedError
from stability_callbacks.diagnosis import read_incidents, vanishing_eps
from tests.models import NormNet, fit, make_batches

NAN = float("nan")


@pytest.mark.parametrize(
    ("dtype", "eps", "value", "told"),
    [
        (torch.float16, 1e-8, NAN, True),
        (torch.float16, 1e-8, 1.0, False),
        (torch.float16, 1e-4, NAN, False),
        (torch.bfloat16, 1e-8, NAN, False),  # which bfloat16 holds
        (torch.float32, 1e-8, NAN, False),
        (torch.float32, 1e-60, NAN, True),
    ],
)
def test_an_eps_that_is_zero_in_the_type_of_ruined_weights_is_told(
    dtype: torch.dtype, eps: float, value: float, told: bool
) -> None:
    good, bad = (torch.nn.Parameter(torch.full((2,), each, dtype=dtype)) for each in (0.0, value))
    optimizer = torch.optim.Adam([{"params": [good], "eps": 1e-3}, {"params": [bad]}], eps=eps)
    found = vanishing_eps(optimizer)
    assert (found is not None) is told
    assert found is None or "parameter group 1 of Adam" in found


class HalfNet(NormNet):
    """All in float16, with gradients whose squares are 0 there."""

    def loss(self, batch: Any) -> Any:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x.half()).float(), y) * 1e-4

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3, eps=self.eps)

    eps = 1e-8


def test_what_cannot_help_is_not_tried_again(tmp_path: Any) -> None:
    rollback = Rollback(every_n_steps=5, dirpath=tmp_path / "rollback")
    callbacks = [StepGuard(), rollback, FlightRecorder(tmp_path / "record", trace=False)]
    with pytest.raises(TrainingDivergedError, match=r"made so by the optimizer .*eps=1e-08 is 0 in float16"):
        fit(HalfNet().half(), make_batches(20), callbacks)
    assert rollback.rollbacks == 0
    kinds = [incident.kind for incident in read_incidents(tmp_path / "record" / "incidents.jsonl")]
    assert kinds.count("update_arithmetic") == 1
    assert "rollback" not in kinds
    model = HalfNet().half()
    model.eps = 1e-4
    assert fit(model, make_batches(20), [StepGuard(), Rollback(every_n_steps=5)]).global_step == 20


def test_a_run_that_ends_after_rollbacks_names_the_update(tmp_path: Any) -> None:
    model = NormNet(lambda p: torch.optim.SGD(p, lr=1e38))
    rollback = Rollback(every_n_steps=5, max_rollbacks=2, dirpath=tmp_path)
    with pytest.raises(TrainingDivergedError, match=r"Updates were made by SGD\(lr=1e\+38"):
        fit(model, make_batches(40), [StepGuard(), rollback])
    assert rollback.rollbacks == 2
