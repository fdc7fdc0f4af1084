"""Which exceptions bad numbers caused, told from torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stability_callbacks.diagnosis import numeric_fault, raising_line

NAN = torch.full((3, 3), float("nan"))
MATRIX = -torch.eye(3)


def anomaly() -> None:
    x = torch.zeros(1, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        (x.sqrt() * 0).backward()


BY_NUMBERS: dict[str, Callable[[], Any]] = {
    "normal, loc": lambda: torch.distributions.Normal(NAN, 1.0, validate_args=True),
    "normal, scale": lambda: torch.distributions.Normal(0.0, torch.tensor(-1.0), validate_args=True),
    "categorical": lambda: torch.distributions.Categorical(logits=NAN, validate_args=True),
    "support": lambda: torch.distributions.Beta(1.0, 1.0, validate_args=True).log_prob(torch.tensor(2.0)),
    "cholesky": lambda: torch.linalg.cholesky(MATRIX),
    "cholesky of NaN": lambda: torch.linalg.cholesky(NAN),
    "inverse": lambda: torch.linalg.inv(torch.zeros(2, 2)),
    "eigh of NaN": lambda: torch.linalg.eigh(NAN),
    "svd of NaN": lambda: torch.linalg.svd(NAN),
    "multinomial, NaN": lambda: torch.multinomial(NAN, 1),
    "multinomial, negative": lambda: torch.multinomial(-torch.ones(3), 1),
    "multinomial, zero": lambda: torch.multinomial(torch.zeros(3), 1),
    "binary cross entropy": lambda: F.binary_cross_entropy(torch.tensor([1.5]), torch.tensor([1.0])),
    "binary cross entropy of NaN": lambda: F.binary_cross_entropy(NAN, torch.ones(3, 3)),
    "bernoulli": lambda: torch.bernoulli(torch.tensor([2.0])),
    "normal of a negative deviation": lambda: torch.normal(0.0, torch.tensor([-1.0])),
    "anomaly": anomaly,
    "division": lambda: 1 / int(torch.zeros(1).sum()),
}


def told(call: Callable[[], Any]) -> str | None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return numeric_fault(caught.value)


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected")
@pytest.mark.parametrize("name", BY_NUMBERS)
def test_errors_that_numbers_caused_are_told(name: str) -> None:
    assert told(BY_NUMBERS[name])


def own_check(x: Tensor) -> None:
    y = x * 2
    if not bool(y.isfinite().all()):
        raise ValueError("the encoder collapsed")


def wrong_shape(x: Tensor) -> Tensor:
    return x @ torch.ones(7, 7)


def wrong_key(x: Tensor) -> Any:
    return {"x": x}["y"]


def test_a_check_of_the_users_own_counts_if_a_number_nearby_is_bad() -> None:
    assert told(lambda: own_check(NAN)) == "ValueError: the encoder collapsed (`x` held 9 NaN in 9 values)"


@pytest.mark.parametrize(
    "call",
    [
        lambda: wrong_shape(NAN),
        lambda: wrong_key(NAN),
        lambda: own_check(torch.full((3, 3), float("-inf"))),  # a mask
        lambda: torch.ones(2, device="meta").sum().item(),
        lambda: own_check(torch.ones(1)) or (_ for _ in ()).throw(ValueError("too many values to unpack")),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("contains NaN")),
        lambda: (_ for _ in ()).throw(NotImplementedError("nan or inf")),
        lambda: (_ for _ in ()).throw(KeyboardInterrupt()),
    ],
)
def test_errors_of_the_code_are_not(call: Callable[[], Any]) -> None:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        call()
    assert numeric_fault(caught.value) is None


def test_the_users_line_is_named() -> None:
    with pytest.raises(ValueError, match="collapsed") as caught:
        own_check(NAN)
    line = raising_line(caught.value)
    assert line is not None
    assert (line.function, str(line).endswith('`raise ValueError("the encoder collapsed")`')) == ("own_check", True)


def test_a_bare_exception_counts_where_a_number_nearby_is_bad() -> None:
    def stop(loss: Tensor) -> None:
        raise Exception("Loss is NaN, training stopped.")  # as neuralforecast does

    assert told(lambda: stop(NAN))
    assert told(lambda: stop(torch.ones(1))) is None
