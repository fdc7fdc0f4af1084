"""Why operations give values that are not finite: each reason is checked against what float64 gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stability_callbacks.diagnosis import Cause, cure_of, find_cause
from stability_callbacks.diagnosis._reasons import REASONS

NAN, INF = float("nan"), float("inf")


class Broken(NamedTuple):
    """An operation on some numbers, and why it breaks."""

    values: Any
    function: Callable[[Tensor], Tensor]
    reason: str
    words: str = ""
    dtype: torch.dtype = torch.float32


def cause_of(values: Tensor, function: Callable[[Tensor], Tensor]) -> Cause:
    parameter = nn.Parameter(values)
    return find_cause(nn.ParameterList([parameter]), lambda: function(parameter).float().sum())


SPECIAL = torch.special
POLES = {
    "log": Broken([0.0, 3.0], torch.log, "pole", "log of 1 value <= 0"),
    "log2": Broken([0.0, 0.0], torch.log2, "pole"),
    "log1p": Broken([-1.0, 2.0], torch.log1p, "pole", "log1p of 1 value <= -1"),
    "rsqrt": Broken([4.0, 0.0], torch.rsqrt, "pole"),
    "reciprocal": Broken([0.0, 5.0], torch.reciprocal, "pole", "that are 0"),
    "1 / x": Broken([0.0, 5.0], lambda x: 1 / x, "pole", "0"),
    "a quotient": Broken([7.0, 5.0], lambda x: x / (x - 5), "pole", "division by zero: 1 of 2 divisors"),
    "a fourth power below the line": Broken([0.0, 2.0], lambda x: x**-4, "pole", "to a negative power"),
    "0 to a power that is a tensor": Broken([-2.5, 1.0], lambda x: torch.zeros(2).pow(x), "pole", "negative power"),
    "lgamma": Broken([-3.0, 1.5], torch.lgamma, "pole", "negative integers"),
    "digamma": Broken([0.0, 1.5], torch.digamma, "pole"),
    "digamma of a negative integer": Broken([-4.0, 1.5], torch.digamma, "pole"),
    "polygamma": Broken([0.0, 1.5], lambda x: torch.polygamma(1, x), "pole"),
    "erfinv": Broken([-1.0, 0.5], torch.erfinv, "pole", "outside (-1, 1)"),
    "atanh": Broken([1.0, 0.5], torch.atanh, "pole"),
    "logit": Broken([1.0, 0.5], torch.logit, "pole", "outside (0, 1)"),
    "ndtri": Broken([0.0, 0.5], SPECIAL.ndtri, "pole"),
    "xlogy": Broken([0.0, 2.0], lambda x: torch.xlogy(x + 1, x), "pole", "takes the log of 1 value <= 0"),
    "xlog1py": Broken([-1.0, 2.0], lambda x: SPECIAL.xlog1py(x, x), "pole", "<= -1"),
    "addcdiv": Broken([0.0, 2.0], lambda x: torch.addcdiv(x, x + 3, x), "pole", "division by zero: 1 of 2"),
    "a Bessel function": Broken([0.0, 2.0], lambda x: SPECIAL.bessel_y0(x.detach()) * x.exp(), "pole"),
    "a Bessel function that decays": Broken(
        [0.0, 2.0], lambda x: SPECIAL.modified_bessel_k1(x.detach()) * x.exp(), "pole"
    ),
    "zeta": Broken([1.0, 2.0], lambda x: SPECIAL.zeta(x.detach(), torch.tensor(2.0)) * x, "pole", "has a pole at 1"),
    "expint by hand": Broken([0.0, 2.0], lambda x: x.exp() / x, "pole", "division by zero"),
    "gaussian_nll": Broken([0.0, 2.0], lambda x: x.log() + (x - 3).square() / x, "pole", "log of 1 value <= 0"),
    "poisson_nll": Broken(
        [0.0, 2.0], lambda x: F.poisson_nll_loss(x, torch.ones(2), log_input=False, eps=0.0), "pole", "log of"
    ),
    "kl_div of probabilities": Broken([0.0, 1.0], lambda x: F.kl_div(x.log(), torch.tensor([0.5, 0.5])), "pole"),
}

DOMAINS = {
    "log of a negative": Broken([-2.0, 3.0], torch.log, "domain"),
    "sqrt": Broken([-0.1, 3.0], torch.sqrt, "domain"),
    "acos": Broken([1.0001, 0.0], torch.acos, "domain"),
    "asin": Broken([-1.5, 0.0], torch.asin, "domain"),
    "acosh": Broken([0.5, 2.0], torch.acosh, "domain"),
    "atanh beyond": Broken([1.5, 0.0], torch.atanh, "domain"),
    "erfinv beyond": Broken([1.25, 0.0], torch.erfinv, "domain"),
    "a root of a negative": Broken([-8.0, 1.0], lambda x: x ** (1 / 3), "domain", "pow of 1 negative value"),
    "a power that is a tensor": Broken([0.5, 2.0], lambda x: torch.full((2,), -3.0).pow(x), "domain", "no integer"),
    "entropy": Broken([-0.5, 0.2], lambda x: SPECIAL.entr(x.detach()) * x, "domain"),
    "0 / 0": Broken([0.0, 0.0], lambda x: x / x, "domain", "division by zero: 2 of 2 divisors"),
    "fmod": Broken([1.0, 2.0], lambda x: torch.fmod(x, x - 2), "domain"),
    "normalize with eps 0": Broken([[0.0, 0.0], [3.0, 4.0]], lambda x: F.normalize(x, eps=0), "domain"),
    "cosine_similarity with eps 0": Broken(
        [[0.0, 0.0], [3.0, 4.0]], lambda x: F.cosine_similarity(x, torch.ones(2, 2), eps=0), "domain"
    ),
    "layer_norm with eps 0": Broken(
        [[2.0, 2.0], [3.0, 4.0]], lambda x: F.layer_norm(x, (2,), eps=0), "domain", "since its eps is 0"
    ),
    "group_norm with eps 0": Broken([[2.0, 2.0], [3.0, 3.0]], lambda x: F.group_norm(x, 1, eps=0), "domain"),
    "igamma": Broken([1.0, 2.0], lambda x: torch.igamma(x.detach() - 3, x.detach()) * x, "domain", "not defined"),
    "nanmean of nothing but NaN": Broken(
        [1.0, 2.0], lambda x: torch.where(x > 0, NAN, x).nanmean(), "domain", "division by zero"
    ),
}

OTHERS = {
    "mse of nothing": Broken([1.0, 2.0], lambda x: F.mse_loss(x[:0], x[:0]), "empty", "over no elements"),
    "l1 of nothing": Broken([1.0, 2.0], lambda x: F.l1_loss(x[:0], x[:0]), "empty"),
    "huber of nothing": Broken([1.0, 2.0], lambda x: F.huber_loss(x[:0], x[:0]), "empty"),
    "binary cross entropy of nothing": Broken([1.0], lambda x: F.binary_cross_entropy(x[:0], x[:0]), "empty"),
    "a mean of nothing along rows": Broken([[1.0, 2.0]], lambda x: x[:, :0].mean(1), "empty"),
    "logsumexp of nothing": Broken([1.0, 2.0], lambda x: x[:0].logsumexp(0), "empty"),
    "a median of nothing": Broken([1.0, 2.0], lambda x: x[:0].median(), "empty"),
    "targets that are all ignored": Broken(
        [[1.0, 2.0]], lambda x: F.cross_entropy(x, torch.tensor([-100])), "empty", "over no targets"
    ),
    "std of one": Broken([4.0], torch.std, "one_element", "std over 1 element with correction 1"),
    "var of one along rows": Broken([[4.0], [5.0]], lambda x: x.var(1), "one_element", "var over 1 element"),
    "var of two with correction 2": Broken([4.0, 5.0], lambda x: x.var(correction=2), "one_element", "correction 2"),
    "logdet": Broken([[1.0, 2.0], [2.0, 4.0]], torch.logdet, "singular", "1 of 1 matrix is singular"),
    "slogdet": Broken([[0.0, 0.0], [0.0, 4.0]], lambda x: x.slogdet()[1], "singular"),
    "ctc_loss": Broken(
        [0.5, 1.0, 2.0],
        lambda x: F.ctc_loss(
            x.expand(3, 2, 3).log_softmax(-1), torch.tensor([[1, 2, 0], [1, 1, 2]]), (3, 3), (2, 3), reduction="none"
        ),
        "alignment",
        "1 of 2 targets is longer than the frames allow",
    ),
    "a row that is masked": Broken(
        [[1.0, 2.0]], lambda x: x.masked_fill(x > 0, -INF).log_softmax(-1), "masked_row", "masked entirely"
    ),
    "inf - inf": Broken([1.0, 2.0], lambda x: x.masked_fill(x > 1, INF).add(-INF), "nonfinite_input", "inf - inf"),
    "0 * inf": Broken([0.0, 2.0], lambda x: torch.full_like(x, INF) * x, "nonfinite_input", "0 * inf"),
    "NaN by hand": Broken([1.0, 2.0], lambda x: x.masked_fill(x > 1, NAN), "nonfinite_input", "the number nan"),
}

OVERFLOWS = {
    "exp": Broken([89.0, 1.0], torch.exp, "overflow"),
    "exp beyond float64": Broken([5000.0, 1.0], torch.exp, "overflow", "the largest input is 5000"),
    "sinh beyond float64": Broken([-900.0, 1.0], torch.sinh, "overflow"),
    "square": Broken([1e25, 1.0], torch.square, "overflow", "float32 ends at 3.40282e+38"),
    "a product": Broken([1e20, 1.0], lambda x: x * x, "overflow"),
    "a sum": Broken([3e38, 3e38], torch.sum, "overflow"),
    "a product of many": Broken([10.0] * 50, torch.prod, "overflow"),
    "a product of many beyond float64": Broken([10.0] * 400, lambda x: x.cumprod(0), "overflow"),
    "a power": Broken([12.0, 1.0], lambda x: x**40, "overflow"),
    "a power beyond float64": Broken([12.0, 1.0], lambda x: x**400, "overflow"),
    "a small divisor": Broken([1e-30, 1.0], lambda x: 1e15 / x, "overflow"),
    "a matrix product": Broken([[1e20, 1e20], [1.0, 1.0]], lambda x: x @ x, "overflow"),
    "variance": Broken([1e25, -1e25, 3.0], torch.var, "overflow"),
    "lgamma of a large number": Broken([1e37, 1.0], torch.lgamma, "overflow"),
    "a cast": Broken([7e4, 1.0], lambda x: x.half(), "overflow_float16", "float16 ends at 65504"),
    "exp in float16": Broken([12.0, 1.0], torch.exp, "overflow_float16", dtype=torch.float16),
    "a matrix product in float16": Broken(
        [[300.0, 300.0], [1.0, 1.0]], lambda x: x @ x, "overflow_float16", dtype=torch.float16
    ),
    "a sum in float16": Broken([5e4, 5e4], torch.sum, "overflow_float16", dtype=torch.float16),
    "exp in bfloat16": Broken([100.0, 1.0], torch.exp, "overflow", "bfloat16 ends at", dtype=torch.bfloat16),
    "exp in float64": Broken([800.0, 1.0], torch.exp, "overflow", "float64 ends at", dtype=torch.float64),
    "a product in float64": Broken([1e200, 1.0], lambda x: x * x, "overflow", dtype=torch.float64),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [*POLES, *DOMAINS, *OTHERS])
def test_what_is_not_finite_in_any_precision_is_no_overflow(name: str) -> None:
    broken = {**POLES, **DOMAINS, **OTHERS}[name]
    values = torch.tensor(broken.values, dtype=broken.dtype)
    assert not broken.function(values.double()).isfinite().all()
    cause = cause_of(values, broken.function)
    assert (cause.phase, cause.reason) == ("forward", broken.reason), cause.explanation
    assert broken.words in cause.explanation
    assert "overflow" not in cause.explanation
    assert "overflow" not in (cure_of(cause.operation, cause.reason) or "")


@pytest.mark.parametrize("name", OVERFLOWS)
def test_an_overflow_is_finite_where_there_is_more_room(name: str) -> None:
    broken = OVERFLOWS[name]
    values = torch.tensor(broken.values, dtype=broken.dtype)
    if "beyond float64" not in name and broken.dtype is not torch.float64 and name != "a cast":
        assert broken.function(values.double()).isfinite().all()
    cause = cause_of(values, broken.function)
    assert (cause.phase, cause.reason) == ("forward", broken.reason), cause.explanation
    assert "overflow" in cause.explanation
    assert broken.words in cause.explanation


@pytest.mark.parametrize("name", [name for name, each in OVERFLOWS.items() if each.reason == "overflow_float16"])
def test_the_cure_of_an_overflow_in_half_precision_is_more_range(name: str) -> None:
    broken = OVERFLOWS[name]
    cause = cause_of(torch.tensor(broken.values, dtype=broken.dtype), broken.function)
    cure = cure_of(cause.operation, cause.reason)
    assert cure is not None
    assert "bf16" in cure
    assert "enabled=False" in cure


def test_rounding_is_neither_a_pole_nor_an_overflow() -> None:
    rows = torch.tensor([[2.0, 2.0], [3.0, 4.0]])
    cause = cause_of(rows, lambda x: F.layer_norm(x, (2,), eps=1e-60))
    assert cause.reason == "precision", cause.explanation
    assert "in float64 the result is at most" in cause.explanation


def test_no_reason_is_invented() -> None:
    lengths = torch.tensor([0, 2])
    cause = cause_of(
        torch.tensor([1.0, 2.0]),
        lambda x: torch.segment_reduce(x.detach(), "max", lengths=lengths).clamp(max=INF) * x,
    )
    assert cause.phase == "forward"
    assert cause.reason is None
    assert "overflow" not in cause.explanation


def test_random_operations_are_not_run_again() -> None:
    torch.manual_seed(3)
    drawn: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        overflown = torch.normal(x * 3e38, 1.0) * 10
        drawn.append(torch.normal(torch.full((2,), NAN), 1.0))
        drawn.append(torch.rand(2))
        return overflown

    cause_of(torch.ones(3), run)
    torch.manual_seed(3)
    torch.normal(torch.ones(3), 1.0)
    torch.normal(torch.ones(2), 1.0)
    assert torch.equal(drawn[1], torch.rand(2))


def test_every_reason_has_a_meaning_and_a_cure() -> None:
    assert all(cure_of("my_kernel", reason) for reason in REASONS)
    assert cure_of(None) is None
    assert cure_of("my_kernel", "a reason of a newer version") is None
    assert cure_of("log", "a reason of a newer version") == cure_of("log")


class Gradient(NamedTuple):
    """A function with a finite value and a gradient that is not, and why."""

    values: Any
    function: Callable[[Tensor], Tensor]
    node: str
    reason: str
    cure: str


GRADIENTS = {
    "sqrt": Gradient([0.0, 4.0], torch.sqrt, "SqrtBackward0", "pole", "safe_sqrt"),
    "a cube root": Gradient([0.0, 4.0], lambda x: x ** (1 / 3), "PowBackward0", "pole", "safe_pow"),
    "acos": Gradient([1.0, 0.0], torch.acos, "AcosBackward0", "pole", "safe_acos"),
    "norm": Gradient([4.0, 0.0], lambda x: (x[1:] ** 2).sum().sqrt(), "SqrtBackward0", "pole", "safe_sqrt"),
    "svd": Gradient(
        [[2.0, 0.0], [0.0, 2.0]], lambda x: torch.linalg.svd(x)[0][0], "LinalgSvdBackward0", "equal_values", "detach"
    ),
    "eigh": Gradient(
        [[5.0, 0.0], [0.0, 5.0]], lambda x: torch.linalg.eigh(x)[1][0], "LinalgEighBackward0", "equal_values", "detach"
    ),
    "hypot": Gradient([0.0, 3.0], lambda x: torch.hypot(x, x), "HypotBackward0", "pole", "clamp"),
    "acosh": Gradient([1.0, 3.0], torch.acosh, "AcoshBackward0", "pole", "Clamp"),
    "qr": Gradient(
        [[1.0, 1.0], [1.0, 1.0]], lambda x: torch.linalg.qr(x)[0], "LinalgQrBackward0", "singular", "identity"
    ),
    "a large product": Gradient(
        [1e-30, 0.0], lambda x: x * torch.tensor([1e20, 1.0]) * 1e20, "MulBackward0", "overflow", "overflow"
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_reason_of_a_gradient(name: str) -> None:
    known = GRADIENTS[name]
    cause = cause_of(torch.tensor(known.values), known.function)
    assert (cause.phase, cause.operation, cause.reason) == ("backward", known.node, known.reason), cause.explanation
    cure = cure_of(cause.operation, cause.reason)
    assert cure is not None
    assert known.cure in cure


def test_an_overflow_of_a_gradient_in_half_precision_names_its_cure() -> None:
    layer = nn.Linear(2, 2).half()
    cause = find_cause(layer, lambda: layer(torch.full((1, 2), 90.0).half()).float().sum() * 1e3)
    assert (cause.phase, cause.operation, cause.reason) == ("backward", "AddmmBackward0", "overflow_float16")
    assert "bf16" in str(cure_of(cause.operation, cause.reason))
    assert "float16 ends at 65504" in cause.explanation


def test_a_slope_that_is_steep_but_no_pole_overflows() -> None:
    cause = cause_of(torch.tensor([1e-36, 1.0]), lambda x: 1e-6 / x)
    assert (cause.phase, cause.operation, cause.reason) == ("backward", "ReciprocalBackward0", "overflow"), (
        cause.explanation
    )


HIDING: dict[str, Callable[[Tensor], Tensor]] = {
    "nan_to_num": lambda y: y.nan_to_num(nan=0.0),
    "where": lambda y: torch.where(y.isnan(), 0.0, y),
    "masked_fill": lambda y: y.masked_fill(y.isnan(), 7.0),
    "masked_select": lambda y: y.masked_select(~y.isnan()),
    "boolean selection": lambda y: y[~y.isnan()],
    "indexing": lambda y: y[1:],
    "index_select": lambda y: y.index_select(0, torch.tensor([1, 2])),
    "nansum": lambda y: y.nansum(),
    "nanmean": lambda y: y.nanmean(),
    "gather": lambda y: y.gather(0, torch.ones(1, y.shape[1], dtype=torch.long)),
    "fmax": lambda y: torch.fmax(y, torch.zeros_like(y)),
}
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "square": torch.square,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "a product": lambda h: h * h.detach(),
    "softmax": lambda h: h.softmax(-1),
}


class Net(nn.Module):
    def __init__(self, early: Callable[[Tensor], Tensor], hide: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.early, self.hide = nn.Linear(3, 2), early, hide

    def forward(self, x: Tensor) -> Tensor:
        return self.hide(self.early(self.first(x))).sum()


def bad_batch() -> Tensor:
    return torch.tensor([[NAN, 1.0, 2.0], [0.5, 1.5, -1.0], [2.0, 0.0, 1.0]])


@pytest.mark.parametrize("mixing", MIXING)
@pytest.mark.parametrize("hiding", HIDING)
def test_a_nan_in_the_batch_that_the_loss_hides_is_found_there(hiding: str, mixing: str) -> None:
    torch.manual_seed(0)
    model, batch = Net(MIXING[mixing], HIDING[hiding]), {"x": bad_batch()}
    assert model(batch["x"]).isfinite()
    cause = find_cause(model, lambda: model(batch["x"]), batch)
    assert cause[:6] == (True, "input", None, None, None, None), cause.explanation
    assert cause.explanation.startswith("batch['x'] held 1 NaN in 9 values before the forward pass; the loss hid it")


@pytest.mark.parametrize("hiding", HIDING)
def test_a_nan_that_is_made_early_and_hidden_has_its_operation(hiding: str) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 3.0], [2.0, 2.0]])
    model = nn.Linear(2, 2)

    def run() -> Tensor:
        shares = x / x.sum(1, keepdim=True)
        return HIDING[hiding](model(shares).square()).sum()

    cause = find_cause(model, run, x)
    assert (cause.phase, cause.module, cause.operation, cause.reason) == ("forward", "", "div", "domain")
    assert "shares = x / x.sum(1" in str(cause.source)
    assert "the loss hid it" in cause.explanation


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_hidden_nan_of_the_model(kind: str) -> None:
    model = Net(torch.square, HIDING["nan_to_num"])
    if kind == "parameter":
        with torch.no_grad():
            model.first.bias[0] = NAN
    else:
        model.first.register_buffer("shift", torch.tensor([0.0, NAN]))
        model.early = lambda h: (h + model.first.shift).square()
    cause = find_cause(model, lambda: model(torch.ones(3, 3)))
    assert (cause.phase, cause.module, cause.operation) == (kind, "first", None), cause.explanation


def test_a_hidden_nan_inside_of_a_checkpoint_and_a_function_of_ones_own() -> None:
    from torch.utils.checkpoint import checkpoint

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return 3 * ctx.saved_tensors[0] ** 2 * gradient

    functions: list[Callable[[Tensor], Tensor]] = [
        Cube.apply,
        lambda h: checkpoint(torch.exp, h, use_reentrant=False),
        lambda h: checkpoint(torch.exp, h, use_reentrant=True),
    ]
    for function in functions:
        model, batch = Net(function, HIDING["nan_to_num"]), bad_batch()
        cause = find_cause(model, lambda model=model, batch=batch: model(batch), batch)  # type: ignore[misc]
        assert cause.phase == "input", cause.explanation


def test_an_innocent_nan_beside_a_broken_gradient_is_not_blamed() -> None:
    """The batch holds NaN that no gradient works with; the break has another reason."""
    model, batch = nn.Linear(2, 2), {"x": torch.ones(3, 2), "weights": torch.tensor([NAN, 1.0])}

    def run() -> Tensor:
        unread = batch["weights"].nan_to_num().sum().detach()
        return (0 * model(batch["x"])).sqrt().sum() + unread

    cause = find_cause(model, run, batch)
    assert (cause.phase, cause.operation, cause.reason) == ("backward", "SqrtBackward0", "pole"), cause.explanation


def test_a_mask_of_infinities_is_no_origin_but_what_multiplies_it_is() -> None:
    weight = nn.Parameter(torch.tensor([2.0, 3.0]))

    def run() -> Tensor:
        mask = torch.zeros(2).masked_fill(torch.tensor([True, False]), -INF)
        return torch.where(mask.isinf(), weight, weight * mask).sum()

    cause = find_cause(nn.ParameterList([weight]), run)
    assert (cause.phase, cause.operation, cause.reason) == ("backward", "MulBackward0", "nonfinite_input")
    assert "masked_fill wrote 1 -inf in 2 values, as it was told to" in cause.explanation
    assert "dtype's lowest number" in str(cure_of(cause.operation, cause.reason))
