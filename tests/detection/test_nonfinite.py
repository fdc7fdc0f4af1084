"""NonFinite: every kind of evidence counts, alone and together."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from stability_callbacks.detection import NonFinite, StepEvidence
from stability_callbacks.gradient_pass import GradientNorms, measure_gradients

NAN, INF = math.nan, math.inf


def norms_of(*values: float, dtype: torch.dtype = torch.float32) -> GradientNorms:
    weight = nn.Parameter(torch.zeros(len(values), dtype=dtype))
    weight.grad = torch.tensor(values, dtype=dtype)
    return measure_gradients([weight])


def vote(evidence: StepEvidence) -> bool:
    verdict = NonFinite()(evidence)
    assert verdict.shape == ()
    assert verdict.dtype == torch.bool
    return bool(verdict)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(("loss", "gradients", "buffers"), list(itertools.product([False, True], repeat=3)))
def test_any_bad_evidence_is_enough(loss: bool, gradients: bool, buffers: bool, bad: float) -> None:
    evidence = StepEvidence(
        loss=torch.tensor(bad if loss else 0.5),
        gradients=norms_of(1.0, bad if gradients else 2.0),
        nonfinite_buffers=torch.tensor([False, buffers]),
    )
    assert vote(evidence) == (loss or gradients or buffers)


@pytest.mark.parametrize("loss", [None, torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.float16)])
@pytest.mark.parametrize("nonfinite", [None, torch.zeros(0, dtype=torch.bool)])
def test_evidence_may_be_missing_or_of_another_shape(loss: Tensor | None, nonfinite: Tensor | None) -> None:
    assert not vote(StepEvidence(loss, norms_of(1.0), nonfinite))
    assert vote(StepEvidence(loss, norms_of(NAN), nonfinite))


def test_a_bad_element_of_the_loss_is_enough() -> None:
    assert vote(StepEvidence(torch.tensor([0.5, NAN]), norms_of(1.0)))


def test_large_but_finite_gradients_pass() -> None:
    assert not vote(StepEvidence(None, norms_of(*[65504.0] * 100, dtype=torch.float16)))
    assert not vote(StepEvidence(None, norms_of(1e18, 1e18)))


def test_a_step_without_gradients_passes() -> None:
    assert not vote(StepEvidence(torch.tensor(0.5), measure_gradients([])))


def test_is_a_plain_value() -> None:
    detector = NonFinite()
    assert (repr(detector), detector.kind, detector.state_dict()) == ("NonFinite()", "nonfinite", {})
