from __future__ import annotations

import copy
import random
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stability_callbacks.diagnosis import Cause, RandomState, find_cause, isolated

NAN, INF = float("nan"), float("inf")
FIRST_ROW = torch.tensor([[True], [False], [False]])
FIRST_COLUMN = torch.tensor([True, False, False, False])


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Tensor:
        return self.function(*args)


def net(function: Callable[..., Tensor]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), Apply(function), nn.Linear(4, 4))


def cause_of(model: nn.Module, x: Any = None, loss: Callable[[Tensor], Tensor] = torch.sum) -> Cause:
    """The cause for a batch of three rows; every hook is gone afterwards."""
    x = torch.randn(3, 4) if x is None else x
    cause = find_cause(model, lambda: loss(model(x)), x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return cause


def assert_cause(cause: Cause, phase: str, module: str, operation: str | None, *source: str) -> None:
    assert (cause.reproduced, cause.phase, cause.module, cause.operation) == (True, phase, module, operation), cause
    for text in source:
        assert text in (cause.source or ""), cause
    assert (cause.source is not None) == bool(source)


class Known(NamedTuple):
    """A function with a known cause: the operation, and a word of the explanation."""

    function: Callable[[Tensor], Tensor]
    operation: str
    why: str


def poisoned_memory(*shape: int, dtype: torch.dtype = torch.float) -> Tensor:
    memory = torch.empty(*shape, dtype=dtype)
    memory.numpy()[:] = NAN  # behind PyTorch's back, as if it had been there
    return memory


def replaced_in_rows(h: Tensor) -> Tensor:
    h[0].mul_(0).log_()
    h[1].sub_(1).sqrt_()
    return h


FORWARD = {
    "log of zero": Known(
        lambda h: (0 * h).log(),
        "log",
        "log made 12 -inf in 12 values (log of 12 values <= 0)",
    ),
    "square root of a negative": Known(
        lambda h: (0 * h - 1).sqrt(),
        "sqrt",
        "sqrt of 12 values < 0",
    ),
    "overflow of exp": Known(
        lambda h: (0 * h + 812).exp(),
        "exp",
        "the largest input is 812, float32 ends at 3.40282e+38",
    ),
    "0 / 0": Known(
        lambda h: (0 * h) / (0 * h),
        "div",
        "div made 12 NaN in 12 values (division by zero: 12 of 12 divisors)",
    ),
    "division by the number 0": Known(
        lambda h: h.abs() / 0,
        "div",
        "division by zero: 1 of 1 divisors",
    ),
    "infinity times 0": Known(
        lambda h: (0 * h) * (1 / (0 * h)),
        "reciprocal",
        "reciprocal of 12 values that are 0",
    ),
    "a cast to half precision": Known(
        lambda h: (0 * h + 1e5).half().float(),
        "to",
        "the largest input is 100000, float16 ends at 65504",
    ),
    "softmax of a row that is masked entirely": Known(
        lambda h: h.masked_fill(FIRST_ROW, -INF).softmax(-1),
        "softmax",
        "1 row is masked entirely: all values are -inf; masked_fill wrote 4 -inf in 12 values, as it was told to",
    ),
    "a log after a healthy mask": Known(
        lambda h: h.masked_fill(FIRST_COLUMN, -INF).softmax(-1).log(),
        "log",
        "log of 3 values <= 0",
    ),
    "a second mask after a healthy one": Known(
        lambda h: h.masked_fill(FIRST_COLUMN, -INF).masked_fill(FIRST_ROW, -INF).softmax(-1),
        "softmax",
        "1 row is masked entirely",
    ),
    "an overflow beside a healthy mask": Known(
        lambda h: (0 * h - 3e38).masked_fill(FIRST_COLUMN, -INF) * 2,
        "mul",
        "mul made 12 -inf in 12 values",
    ),
    "NaN written on purpose": Known(
        lambda h: h.masked_fill(FIRST_COLUMN, NAN),
        "masked_fill",
        "it was given the number nan",
    ),
    "mean over nothing": Known(
        lambda h: h + h[:0].mean(),
        "mean",
        "mean over no elements",
    ),
    "in place": Known(
        lambda h: (0 * h).add_(-1).log_(),
        "log_",
        "log of 12 values <= 0",
    ),
    "in place, on a view": Known(
        lambda h: torch.cat([h, h.clone()[0].mul_(0).log_()[None]]),
        "log_",
        "log_ made 4 -inf in 4 values (log of 4 values <= 0)",
    ),
    "in place, after another fault was mended": Known(
        lambda h: replaced_in_rows((0 * h).log().nan_to_num_(neginf=0)),
        "log_",
        "log_ made 4 -inf in 4 values",
    ),
    "written over something that is not read": Known(
        lambda h: poisoned_memory(3, 4, dtype=torch.half).copy_(0 * h + 1e5).float(),
        "copy_",
        "the largest input is 100000, float16 ends at 65504",
    ),
    "beside a healthy mask": Known(
        lambda h: h.masked_fill(FIRST_COLUMN, -INF) + (0 * h).log(),
        "log",
        "log of 12 values <= 0",
    ),
    "memory that was never filled": Known(
        lambda h: h + poisoned_memory(3, 4),
        "empty",
        "read before it was filled",
    ),
    "under vmap": Known(
        torch.vmap(lambda row: (0 * row).log()),
        "log",
        "log of 12 values <= 0",
    ),
    "complex": Known(
        lambda h: torch.fft.fft(h).conj().div(0).abs(),
        "div",
        "division by zero",
    ),
}


INTENDED: dict[str, Callable[[Tensor], Tensor]] = {
    "masked_fill": lambda h: h.masked_fill(FIRST_COLUMN, -INF),
    "scalar_tensor": lambda h: torch.where(FIRST_COLUMN, -INF, h),
}


@pytest.mark.parametrize("name", INTENDED)
def test_an_intended_infinity_that_gets_out(name: str) -> None:
    model = net(INTENDED[name])
    into_the_loss = cause_of(model[:2])
    assert_cause(into_the_loss, "forward", "1", name, "lambda h: ")
    assert f"{name} wrote " in into_the_loss.explanation
    nn.init.constant_(model[2].weight, -1)
    into_a_layer = cause_of(model)
    assert_cause(into_a_layer, "forward", "2", "addmm", "loss(model(x))")
    assert f"addmm made 12 inf in 12 values (arithmetic with infinity, such as inf - inf or 0 * inf; {name} wrote" in (
        into_a_layer.explanation
    )


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str) -> None:
    function, operation, why = FORWARD[name]
    cause = cause_of(net(function))
    inner = {"empty": "memory = torch.empty(*shape", "log_": "log_()"}.get(operation, "lambda ")
    assert_cause(cause, "forward", "1", operation, "test_cause.py:", inner)
    assert cause.module_type == "Apply"
    assert why in cause.explanation
    assert cause.source is not None
    assert cause.source in cause.explanation


def filled_in_parts(h: Tensor) -> Tensor:
    memory = poisoned_memory(3, 4)
    for index, row in enumerate(h):
        memory[index] = row
    return memory


def mask() -> Tensor:
    return torch.ones(3, 4).masked_fill(FIRST_COLUMN, -INF)


HEALTHY: dict[str, Callable[[Tensor], Tensor]] = {
    "a mask": lambda h: h.masked_fill(FIRST_COLUMN, -INF).softmax(-1),
    "a mask as a constant": lambda h: (h + torch.tensor([0, -INF, 0, 0])).softmax(-1),
    "the log of a mask": lambda h: (h + (~FIRST_COLUMN).float().log()).softmax(-1),
    "a value thrown away": lambda h: torch.where(h > INF, h.detach().mul(0).log(), h),
    "memory that is filled in parts": filled_in_parts,
    "a minimum that starts with infinity": lambda h: torch.minimum(torch.full_like(h, INF), h),
    "a sparse mask": lambda h: (h.detach().masked_fill(FIRST_COLUMN, -INF).to_sparse() * 2).to_dense().softmax(-1),
    "a sparse mask times a dense tensor": lambda h: (mask().to_sparse() * h.detach().exp()).to_dense().softmax(-1),
    "nan_to_num": lambda h: (h.detach() / 0).nan_to_num() * 1e-38 + h,
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_healthy_is_not_blamed(name: str) -> None:
    healthy = HEALTHY[name]
    assert not cause_of(net(healthy)).reproduced
    cause = cause_of(net(lambda h: (0 * healthy(h)).log()))
    assert_cause(cause, "forward", "1", "log", "(0 * healthy(h)).log()")


def first_row_replaced(h: Tensor) -> Tensor:
    h = h * 1
    h[0].mul_(0).pow_(0.5)
    return h * 1


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient / 0


BACKWARD = {
    "square root at 0": Known(
        lambda h: (0 * h).sqrt(),
        "SqrtBackward0",
        "`result` held 12 zeros in 12",
    ),
    "norm by hand at 0": Known(
        lambda h: h * (0 * h).pow(2).sum(-1, keepdim=True).sqrt(),
        "SqrtBackward0",
        "`result` held 3 zeros in 3",
    ),
    "power at 0": Known(
        lambda h: (0 * h).pow(0.5),
        "PowBackward0",
        "`self` held 12 zeros in 12",
    ),
    "the trap of where": Known(
        lambda h: torch.where(h > INF, (0 * h).log(), h),
        "LogBackward0",
        "LogBackward0 made non-finite gradients from finite ones",
    ),
    "in place, on a view": Known(
        first_row_replaced,
        "CopySlices",
        "CopySlices made non-finite gradients from finite ones",
    ),
    "a function of one's own": Known(
        Broken.apply,
        "BrokenBackward",
        "BrokenBackward made non-finite gradients from finite ones",
    ),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name: str) -> None:
    function, operation, why = BACKWARD[name]
    cause = cause_of(net(function))
    line = {"CopySlices": "h[0].mul_(0).pow_(0.5)", "BrokenBackward": "return x * 1"}.get(operation, "lambda h: ")
    assert_cause(cause, "backward", "1", operation, "test_cause.py:", line)
    assert why in cause.explanation


def test_a_break_that_a_mask_hides_from_the_parameters_is_not_blamed() -> None:
    def hidden(h: Tensor) -> Tensor:
        h.register_hook(lambda gradient: gradient.nan_to_num(0, 0, 0))
        return (0 * h).sqrt()

    model = net(hidden)
    assert not cause_of(model).reproduced
    cause = cause_of(nn.Sequential(nn.Linear(4, 4), Apply(lambda h: (0 * h).pow(0.5)), model))
    assert_cause(cause, "backward", "1", "PowBackward0", "(0 * h).pow(0.5)")


class Branches(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches])


def test_the_first_in_the_order_of_the_backward_pass_is_named() -> None:
    roots = net(lambda h: (0 * h).pow(0.5)), net(lambda h: (0 * h).sqrt())
    assert_cause(cause_of(nn.Sequential(*roots)), "backward", "1.1", "SqrtBackward0", "(0 * h).sqrt()")
    assert_cause(cause_of(Branches(*roots)), "backward", "branches.1.1", "SqrtBackward0", "(0 * h).sqrt()")


def test_the_first_in_the_order_of_the_forward_pass_is_named() -> None:
    faults = net(lambda h: (0 * h).log()), net(lambda h: (0 * h - 1).sqrt())
    assert_cause(cause_of(nn.Sequential(*faults)), "forward", "0.1", "log", "(0 * h).log()")
    assert_cause(cause_of(Branches(*faults)), "forward", "branches.0.1", "log", "(0 * h).log()")


@dataclass
class Example:
    x: Tensor
    weights: tuple[float, ...]


class Pair(NamedTuple):
    x: Any
    y: Any


class Graph:
    """As PyTorch Geometric's: it can be read as a mapping."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to_dict(self) -> dict[str, Tensor]:
        return {"x": self.x}


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda x: x, "batch held"),
        (lambda x: [x, torch.tensor(3)], "batch[0] held"),
        (lambda x: {"a": {"x": (1, x)}}, "batch['a']['x'][1] held"),
        (lambda x: Pair(3, x), "batch.y held"),
        (lambda x: Example(x, (1.0,)), "batch.x held"),
        (lambda x: [{"x": x.numpy()}], "batch[0]['x'] held"),
        (lambda x: UserDict(x=x), "batch['x'] held"),
        (Graph, "batch['x'] held"),
    ],
)
def test_input(wrap: Callable[[Tensor], Any], place: str) -> None:
    x = torch.randn(3, 4)
    x[1, 2] = NAN
    x[0, 0] = INF
    model = nn.Linear(4, 4)
    cause = find_cause(model, lambda: model(x.clone()).sum(), wrap(x))
    assert cause[:6] == (True, "input", None, None, None, None)
    assert cause.explanation.startswith(f"{place} 1 NaN and 1 inf in 12 values")


def test_input_that_reaches_nothing_is_said() -> None:
    model = nn.Linear(4, 4)
    cause = find_cause(model, lambda: model(torch.ones(1, 4)).sum(), {"x": torch.tensor([NAN])})
    assert cause.phase == "input"
    assert cause.explanation.endswith("it reached neither the loss nor a gradient")


def test_a_mask_in_the_batch_is_no_fault() -> None:
    model = nn.Linear(4, 4)
    mask = torch.tensor([0.0, 0, -INF, -INF])

    def masked() -> Tensor:
        out: Tensor = model(torch.ones(3, 4)) + mask
        return out

    assert not find_cause(model, lambda: masked().softmax(-1).sum(), {"mask": mask}).reproduced
    cause = find_cause(model, lambda: masked().mean(), {"mask": mask})
    assert (cause.phase, cause.explanation) == (
        "input",
        "batch['mask'] held 2 -inf in 4 values before the forward pass",
    )


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_parameter(value: float) -> None:
    model = net(torch.relu)
    with torch.no_grad():
        model[2].weight[0, 0] = value
    cause = cause_of(model)
    assert_cause(cause, "parameter", "2", None)
    assert cause.module_type == "Linear"
    assert cause.explanation.startswith("2.weight held 1 ")


def test_tied_weights_are_named_once() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[0, 0] = NAN
    assert_cause(cause_of(model, torch.tensor([1, 2])), "parameter", "0", None)


def test_a_sum_of_finite_gradients_that_overflows() -> None:
    linear = nn.Linear(4, 4, bias=False).half()
    nn.init.zeros_(linear.weight)
    model = nn.Sequential(linear)
    x = torch.full((1, 4), 200.0, dtype=torch.half)
    cause = find_cause(model, lambda: (model(x) * 200 + model(x) * 200).float().sum(), x)
    assert_cause(cause, "backward", "0", "AccumulateGrad")
    assert "the gradient of 0.weight holds 16 inf in 16 values" in cause.explanation


@pytest.mark.parametrize("value", [NAN, INF])
def test_buffer(value: float) -> None:
    model = net(torch.relu)
    model[1].register_buffer("scale", torch.tensor([1.0, 1, 1, value]))
    model[1].function = lambda h: h * model[1].scale
    cause = cause_of(model)
    assert_cause(cause, "buffer", "1", None)
    assert cause.explanation.startswith("1.scale held 1 ")


def test_a_mask_in_a_buffer_is_blamed_only_if_no_operation_is() -> None:
    model = net(torch.relu)
    model[1].register_buffer("mask", torch.tensor([0.0, 0, 0, -INF]))
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "healthy": lambda h: (h + model[1].mask).softmax(-1),
        "masked entirely": lambda h: (h[:, 3:] + model[1].mask[3:]).softmax(-1).expand(3, 4),
        "in the loss": lambda h: h + model[1].mask,
    }
    model = model[:2]
    causes = {}
    for name, function in functions.items():
        model[1].function = function
        causes[name] = cause_of(model)
    assert not causes["healthy"].reproduced
    assert_cause(causes["masked entirely"], "forward", "1", "softmax", "masked entirely")
    assert "1.mask held 1 -inf in 4 values before the forward pass" in causes["masked entirely"].explanation
    assert_cause(causes["in the loss"], "buffer", "1", None)


def test_a_buffer_that_the_forward_pass_spoils() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    cause = cause_of(model, 1e30 * torch.randn(3, 4))
    assert_cause(cause, "buffer", "0", "batch_norm", "loss(model(x))")
    assert cause.explanation.startswith("the forward pass made 0.running_var non-finite: batch_norm made 4 inf")
    assert torch.equal(model[0].running_var, torch.ones(4))


def test_an_attribute_that_holds_nan() -> None:
    model = net(lambda h: h * model[1].hidden)
    model[1].hidden = torch.tensor([NAN, 1, 1, 1])
    cause = cause_of(model)
    assert_cause(cause, "forward", "1", "mul", "h * model[1].hidden")
    assert "mul read 1 NaN in 4 values from a tensor that no operation made" in cause.explanation


class Manual(nn.Module):
    """As a LightningModule: the loss is computed outside of ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def training_step(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        margin = (out - out).log()
        return margin.mean()


def test_an_operation_outside_of_all_submodules() -> None:
    model = Manual()
    cause = find_cause(model, lambda: model.training_step(torch.randn(3, 4)))
    assert_cause(cause, "forward", "", "log", "test_cause.py:", "in training_step: `margin = (out - out).log()`")
    assert cause.module_type == "Manual"
    assert "in Manual itself, outside of its submodules" in cause.explanation


def test_a_loss_from_outside_of_pytorch() -> None:
    model = nn.Linear(4, 4)
    cause = find_cause(model, lambda: torch.from_numpy(np.array(NAN)))
    assert cause[:6] == (True, "loss", None, None, None, None)
    assert cause.explanation.startswith("the loss holds 1 NaN in 1 value")


def test_all_targets_ignored() -> None:
    model = nn.Linear(4, 4)
    cause = cause_of(model, loss=lambda out: F.cross_entropy(out, torch.tensor([-100, -100, -100])))
    assert_cause(cause, "forward", "", "nll_loss", "F.cross_entropy")
    assert "the mean is over no targets" in cause.explanation


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, key_padding_mask=padding)
        return self.out(mixed)


def test_attention_over_padding_only() -> None:
    model, x = Attention(), torch.randn(2, 3, 4)
    padding = torch.tensor([[False, False, True], [True, True, True]])
    cause = find_cause(model, lambda: model(x, padding).sum(), (x, padding))
    assert_cause(cause, "forward", "attention", "softmax", "in forward: `mixed, _ = self.attention(x, x, x")
    assert "masked entirely" in cause.explanation
    padding[1, 0] = False
    assert not find_cause(model, lambda: model(x, padding).sum(), (x, padding)).reproduced


def test_a_recurrent_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.RNN(4, 4, nonlinearity="relu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(30)
    cause = cause_of(model, torch.ones(40, 1, 4), loss=lambda out: out[0].sum())
    assert (cause.phase, cause.module, cause.module_type) == ("forward", "1", "RNN")
    assert "overflow" in cause.explanation


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_an_lstm() -> None:
    model = nn.Sequential(nn.LSTM(4, 4, proj_size=2), Apply(lambda out: out[0]))
    with torch.no_grad():
        model[0].weight_hr_l0.fill_(3e38)
        model[0].bias_ih_l0.fill_(10)
    assert_cause(cause_of(model, torch.ones(5, 1, 4)), "forward", "0", "mm", "loss(model(x))")


def test_a_sparse_embedding() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), Apply(lambda h: (0 * h).sqrt()))
    assert_cause(cause_of(model, torch.tensor([1, 2])), "backward", "1", "SqrtBackward0", "(0 * h).sqrt()")


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    ("function", "phase", "operation"),
    [
        (lambda h: (0 * h).log(), "forward", "log"),
        (lambda h: (0 * h).sqrt(), "backward", "SqrtBackward0"),
    ],
)
def test_checkpoints(use_reentrant: bool, function: Callable[[Tensor], Tensor], phase: str, operation: str) -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), Apply(lambda h: checkpoint(model[2], h, use_reentrant=use_reentrant)), net(function)
    )
    block = nn.Sequential(model[0], model[1])  # the third runs inside of the second
    x = torch.randn(3, 4)
    cause = find_cause(model, lambda: block(x).sum(), x)
    assert_cause(cause, phase, "2.1", operation, "lambda h: (0 * h)")
    loss = block(x).sum()
    assert "CheckpointFunction" in type(loss.grad_fn.next_functions[0][0]).__name__ or not use_reentrant


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_overflow_under_autocast(dtype: torch.dtype) -> None:
    model = net(lambda h: h * torch.finfo(dtype).max)

    def run() -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(100 * torch.ones(3, 4)).float().sum()

    cause = find_cause(model, run)
    assert_cause(cause, "forward", "1", "mul", "h * torch.finfo(dtype).max")
    assert f"{str(dtype).removeprefix('torch.')} ends at" in cause.explanation


def test_autocast_casts_weights_again() -> None:
    model = net(torch.relu)
    nn.init.constant_(model[2].weight, 1e5)
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.float16):
        model(x)  # autocast keeps the casts
        assert_cause(cause_of(model, x), "forward", "2", "to", "loss(model(x))")
        assert torch.is_autocast_enabled("cpu")


def test_gradient_overflow_under_autocast() -> None:
    model = net(torch.relu)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.float16):
            out = model(torch.ones(3, 4))
        return out.float().sum() * 60_000

    cause = find_cause(model, run)
    assert_cause(cause, "backward", "2", "AddmmBackward0", "out = model(torch.ones(3, 4))")
    assert "the largest gradient given to it is 60000" in cause.explanation


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_submodule_that_ran_before(in_place: bool) -> None:
    from torch._dynamo import eval_frame

    inner = net(lambda h: h.log())
    if in_place:
        inner.compile(backend="eager")
    model = nn.Sequential(nn.Linear(4, 4), inner if in_place else torch.compile(inner, backend="eager"))
    x = torch.randn(3, 4)
    model(x)
    stances = []

    def run() -> Tensor:
        stances.append(eval_frame._stance.stance)
        return model(x).sum()

    assert_cause(find_cause(model, run, x), "forward", "1.1", "log", "net(lambda h: h.log())")
    assert [*stances, eval_frame._stance.stance] == ["force_eager", "default"]


def test_a_gradient_penalty() -> None:
    model = net(lambda h: (0 * h).relu())

    def run() -> Tensor:
        x = torch.randn(3, 4, requires_grad=True)
        out = model(x).sum() + (0 * x).pow(0.5).sum()
        (gradient,) = torch.autograd.grad(out, x, create_graph=True)
        return gradient.pow(2).sum()

    cause = find_cause(model, run)
    assert_cause(cause, "forward", "", "PowBackward0", "(0 * x).pow(0.5)")


def test_dropout_with_the_random_state_of_the_step() -> None:
    model = net(lambda h: F.dropout(torch.ones_like(h[0, 0]), 0.5).log() + h)
    x = torch.randn(3, 4)
    finite, broken = None, None
    while finite is None or broken is None:
        state = RandomState.capture()
        if torch.isfinite(model(x)).all():
            finite = state
        else:
            broken = state
    for _ in range(3):
        with isolated(model, finite):
            assert not cause_of(model, x).reproduced
        with isolated(model, broken):
            assert_cause(cause_of(model, x), "forward", "1", "log", "F.dropout(")


def test_not_reproduced() -> None:
    cause = cause_of(net(torch.relu))
    assert cause[:6] == (False, None, None, None, None, None)
    assert "finite loss and finite gradients" in cause.explanation
    assert "another process" in cause.explanation
    assert "gave no loss" in find_cause(nn.Linear(1, 1), lambda: None).explanation


def test_an_exception_in_the_run_is_told() -> None:
    model = nn.Linear(4, 4)
    cause = cause_of(model, loss=lambda out: F.cross_entropy(out, torch.tensor([0, 1, 9])))
    assert not cause.reproduced
    assert "failed with IndexError: Target 9 is out of bounds" in cause.explanation
    cause = cause_of(net(lambda h: F.nll_loss((0 * h).log(), torch.tensor([0, 1, 9]))))
    assert_cause(cause, "forward", "1", "log", "(0 * h).log()")
    assert cause.explanation.startswith("log made 12 -inf")
    assert cause.explanation.endswith("failed with IndexError: Target 9 is out of bounds.")


def test_an_exception_of_finite_numbers_out_of_the_domain_is_the_cause() -> None:
    cause = cause_of(net(lambda h: torch.linalg.cholesky(-torch.eye(4)) + 0 * h.sum()))
    assert (cause.reproduced, cause.phase, cause.module, cause.operation) == (True, "forward", "1", "linalg.cholesky")
    assert "torch.linalg.cholesky(-torch.eye(4))" in str(cause.source)
    assert "not positive-definite" in cause.explanation


def test_a_module_that_an_exception_left_is_not_blamed() -> None:
    def fallback(h: Tensor) -> Tensor:
        try:
            return model[2](h.T[:3])
        except RuntimeError:
            return (0 * h).log()

    model = net(fallback)
    assert_cause(cause_of(model), "forward", "1", "log", "return (0 * h).log()")


def test_an_interrupt_passes() -> None:
    model = net(torch.relu)

    def interrupted() -> Tensor:
        model(torch.ones(3, 4))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_cause(model, interrupted)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_it_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        assert_cause(cause_of(net(lambda h: (0 * h).sqrt())), "backward", "1", "SqrtBackward0", "(0 * h).sqrt()")
        assert not torch.is_grad_enabled()


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module"):
        find_cause(torch.zeros(1), lambda: None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`run` must be a function that computes the loss"):
        find_cause(nn.Linear(1, 1), torch.zeros(1))  # type: ignore[arg-type]


class Trained(nn.Module):
    """Draws random numbers of all kinds, and keeps statistics, counters and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3))
        self.head = nn.Linear(8, 4)
        self.steps = 0
        self.losses: list[float] = []

    def loss(self, x: Tensor) -> Tensor:
        self.steps += 1
        noise = np.random.randn() + random.random()  # noqa: NPY002
        loss = (self.head(self.body(x)) - noise).square().mean() + 0 * self.steps
        self.losses.append(loss.item())
        return loss


@pytest.mark.parametrize("fails", ["nowhere", "forward", "backward", "exception"])
def test_training_goes_on_as_if_it_had_not_been_called(fails: str) -> None:
    def train(diagnosed: bool) -> dict[str, Any]:
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        model = Trained()
        optimizer = torch.optim.AdamW(model.parameters())
        for step in range(6):
            x = torch.randn(5, 4)
            optimizer.zero_grad()
            model.loss(x).backward()
            if diagnosed and step % 2:
                cause = find_cause(model, lambda x=x: failing(model, x), x)
                assert cause.reproduced == (fails in ("forward", "backward"))
            optimizer.step()
        return copy.deepcopy({**model.state_dict(), "losses": torch.tensor(model.losses), "steps": model.steps})

    def failing(model: Trained, x: Tensor) -> Tensor:
        loss = model.loss(x)
        model.zero_grad()
        if fails == "forward":
            return (loss - loss).log()
        if fails == "backward":
            return (loss - loss).sqrt() * loss
        if fails == "exception":
            raise ValueError("the user's own")
        loss.backward(retain_graph=True)
        return loss

    plain, diagnosed = train(False), train(True)
    assert all(torch.equal(torch.as_tensor(plain[name]), torch.as_tensor(diagnosed[name])) for name in plain)
