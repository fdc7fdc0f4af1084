"""The scalar differentiator against torch.autograd, its tree, its expressions in text, and the pitfalls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from recipes.autograd import (
    PITFALLS,
    SCALARS,
    TENSORS,
    Scalar,
    _scalar,
    backward,
    by_scalars,
    by_torch,
    evaluate,
    expression_tree,
    maximum,
    relu,
    sqrt,
    variable,
)
from recipes.autograd.__main__ import main

# Where functions break or choose a subgradient, over- or underflow, and where sums of them are exact and often tie.
NOTABLE = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    -0.5,
    2.0,
    -2.0,
    3.0,
    1e-310,
    1e-200,
    1e200,
    710.0,
    -746.0,
    math.inf,
    -math.inf,
    math.nan,
]
NUMBERS = st.sampled_from(NOTABLE) | st.floats(-4, 4) | st.floats()
VARIABLES = 3

Step = tuple[str, list[int]]  # a function and the positions of its operands among all numbers so far

FUNCTIONS: dict[str, tuple[int, str]] = {
    "add": (2, "a + b"),
    "sub": (2, "a - b"),
    "mul": (2, "a * b"),
    "div": (2, "a / b"),
    "pow": (2, "a ** b"),
    "neg": (1, "-a"),
    "max": (2, "max(a, b)"),
    "where": (3, "where(a > b, b, c)"),
    **{name: (1, f"{name}(a)") for name in ("exp", "log", "sqrt", "abs", "relu", "tanh", "acos")},
}
EXACT = ["add", "sub", "mul", "div", "neg", "max", "where", "abs", "relu"]  # rounded correctly everywhere

# Torch fuses tanh's 1 - value * value, which cancels: alone it agrees to 1e-15, but then others divide by it.
COMPOSED = [name for name in FUNCTIONS if name != "tanh"]


@st.composite
def programs(draw: st.DrawFn, names: list[str]) -> list[Step]:
    """Expressions with shared subexpressions: each step may use any number that came before, several times."""
    steps: list[Step] = []
    available = 2 * VARIABLES  # variables and constants
    for _ in range(draw(st.integers(1, 12))):
        name = draw(st.sampled_from(names))
        # Mostly of late numbers, so that expressions become deep.
        position = st.integers(0, available - 1) | st.integers(max(0, available - 3), available - 1)
        steps.append((name, [draw(position) for _ in range(FUNCTIONS[name][0])]))
        available += 1
    return steps


def compute(steps: list[Step], inputs: list[Any], algebra: Any) -> list[Any]:
    numbers = list(inputs)
    for name, positions in steps:
        operands = dict(zip("abc", (numbers[position] for position in positions), strict=False))
        numbers.append(evaluate(FUNCTIONS[name][1], operands, algebra))
    return numbers


def both(steps: list[Step], values: list[float]) -> tuple[list[float], list[float]]:
    """The last value and the gradient at every variable and result, by this differentiator and by torch."""
    scalars = compute(
        steps,
        [variable(f"x{i}", v) if i < VARIABLES else SCALARS.constant(v) for i, v in enumerate(values)],
        SCALARS,
    )
    gradients = backward(scalars[-1])
    ours = [float(scalars[-1].value), *(float(gradients.get(x, 0.0)) for x in scalars if x.requires_grad)]

    tensors = compute(
        steps,
        [torch.tensor(v, dtype=torch.float64, requires_grad=i < VARIABLES) for i, v in enumerate(values)],
        TENSORS,
    )
    output, needing = tensors[-1], [x for x in tensors if x.requires_grad]
    assert [x.requires_grad for x in scalars] == [x.requires_grad for x in tensors]
    if not output.requires_grad:
        return ours, [output.item(), *(0.0 for _ in needing)]
    torchs = torch.autograd.grad(output, needing, allow_unused=True, materialize_grads=True)
    return ours, [output.item(), *(gradient.item() for gradient in torchs)]


@contextmanager
def functions_of_torch() -> Iterator[None]:
    """Differentiate with torch's exp, log, ...: NumPy's differ in the last bit, which a subtraction makes the first."""

    def of_torch(function: Callable[..., Tensor]) -> Callable[..., np.float64]:
        return lambda *values: np.float64(function(*(torch.tensor(v, dtype=torch.float64) for v in values)).item())

    replaced = {
        "sqrt": torch.sqrt,
        "exp": torch.exp,
        "log": torch.log,
        "tanh": torch.tanh,
        "arccos": torch.acos,
        "float_power": torch.pow,
        "maximum": torch.maximum,
    }
    namespace = SimpleNamespace(**vars(np) | {name: of_torch(function) for name, function in replaced.items()})
    with patch.object(_scalar, "np", namespace):
        yield


@given(programs(EXACT), st.lists(NUMBERS, min_size=2 * VARIABLES, max_size=2 * VARIABLES))
def test_exact_arithmetic_differentiates_to_the_same_bits_as_torchs(steps: list[Step], values: list[float]) -> None:
    with functions_of_torch():  # for the sign of the larger of 0 and -0
        ours, torchs = both(steps, values)
    assert ours == pytest.approx(torchs, rel=0, abs=0, nan_ok=True)


@settings(deadline=None)
@example([("pow", [0, 1]), ("log", [6])], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # 0 * inf in the exponent's rule
@given(programs(COMPOSED), st.lists(NUMBERS, min_size=2 * VARIABLES, max_size=2 * VARIABLES))
def test_random_expressions_differentiate_as_torchs(steps: list[Step], values: list[float]) -> None:
    with functions_of_torch():
        ours, torchs = both(steps, values)
    assert ours == pytest.approx(torchs, rel=1e-12, abs=0, nan_ok=True)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(st.lists(NUMBERS, min_size=3, max_size=3))
def test_each_function_and_its_rule_are_torchs(name: str, values: list[float]) -> None:
    at = dict(zip("abc", values, strict=True))
    ours, torchs = by_scalars(FUNCTIONS[name][1], at), by_torch(FUNCTIONS[name][1], at)
    assert [ours.value, *ours.gradient.values()] == pytest.approx(
        [torchs.value, *torchs.gradient.values()], rel=1e-12, abs=1e-15, nan_ok=True
    )


SUBGRADIENTS = [
    ("relu(x)", {"x": 0.0}, {"x": 0.0}),
    ("abs(x)", {"x": 0.0}, {"x": 0.0}),
    ("abs(x)", {"x": math.nan}, {"x": 0.0}),
    ("relu(x)", {"x": math.nan}, {"x": 1.0}),
    ("max(x, y)", {"x": 2.0, "y": 2.0}, {"x": 0.5, "y": 0.5}),
    ("max(x, y)", {"x": math.nan, "y": 2.0}, {"x": 1.0, "y": 1.0}),
    ("max(x, x)", {"x": 2.0}, {"x": 1.0}),
    ("x ** y", {"x": 0.0, "y": 0.0}, {"x": 0.0, "y": 0.0}),
]


@pytest.mark.parametrize(("expression", "at", "gradient"), SUBGRADIENTS)
def test_where_there_is_no_derivative_the_choice_is_torchs(
    expression: str, at: dict[str, float], gradient: dict[str, float]
) -> None:
    assert by_scalars(expression, at).gradient == gradient
    assert by_torch(expression, at).gradient == gradient


def test_a_shared_number_gets_the_sum_over_its_uses() -> None:
    x, y = variable("x", 3.0), variable("y", 5.0)
    shared = x * y
    gradients = backward(shared * shared + shared)
    assert gradients[shared] == 2 * 15 + 1
    assert gradients[x] == 31 * 5
    assert gradients[y] == 31 * 3


def test_constants_take_part_without_a_gradient() -> None:
    x = variable("x", 2.0)
    output = (1 + x) * (6 / x) - 3 + (4 - x) ** 2 + 2**x + np.float64(2.0) * x
    gradients = backward(output)
    assert output.value == pytest.approx(3 * 3 - 3 + 4 + 4 + 4)
    assert gradients[x] == pytest.approx(3 - 3 * 6 / 4 - 4 + 4 * math.log(2) + 2)
    assert all(node.requires_grad for node in gradients)
    assert backward(sqrt(4.0) + 1) == {}


def test_depth_is_not_limited_by_recursion() -> None:
    x = variable("x", 1.0)
    output = x
    for _ in range(5_000):
        output = output * 1.0 + 0.0
    assert backward(output)[x] == 1
    assert str(expression_tree(output, {}).children[1].label) == "0"


def test_operands_are_numbers() -> None:
    with pytest.raises(TypeError, match="operand must be a Scalar or a real number, got 'a'"):
        maximum(variable("x", 1.0), "a")  # type: ignore[arg-type]


def drawn(output: Scalar) -> list[str]:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(expression_tree(output, backward(output)))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_the_tree_shows_values_and_gradients_and_a_shared_result_once() -> None:
    x = variable("x", 3.0)
    y = relu(x)
    assert drawn(y * y + 2) == [
        "add = 11   gradient 1",
        "├── mul = 9   gradient 1",
        "│   ├── relu = 3   gradient 6",
        "│   │   └── x = 3   gradient 6",
        "│   └── relu = 3   gradient 6   (see above)",
        "└── 2",
    ]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("x +", "not valid arithmetic"),
        ("__import__('os')", "function must be one of abs, acos"),
        ("x.real", "got 'x.real'"),
        ("x if x else 1", "expression allows numbers"),
        ("'a'", "expression allows numbers"),
        ("True", "expression allows numbers"),
        ("z", "'z', which has no value; known are x"),
        ("x > 0", "first argument of where"),
        ("where(x, x, 0)", "must be one comparison"),
        ("where(0 < x < 1, x, 0)", "must be one comparison"),
        ("exp(x, x)", "wrong arguments of exp"),
        ("exp(x=x)", "expression allows numbers"),
        ("-" * 50_000 + "x", "nested too deeply"),
    ],
)
def test_anything_but_arithmetic_is_refused(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(expression, {"x": variable("x", 1.0)}, SCALARS)


def test_a_huge_integer_is_infinite() -> None:
    assert by_scalars(f"x + 1{'0' * 400}", {"x": 1.0}).value == math.inf


@pytest.mark.parametrize("name", PITFALLS)
def test_each_pitfall_is_one_by_both_and_its_cure_is_none(name: str) -> None:
    pitfall = PITFALLS[name]
    ours, torchs = by_scalars(pitfall.expression, pitfall.at), by_torch(pitfall.expression, pitfall.at)
    cured = by_torch(pitfall.cure, pitfall.at)
    assert ours.value == pytest.approx(torchs.value)
    assert ours.gradient == pytest.approx(torchs.gradient, nan_ok=True)
    assert not any(map(math.isfinite, ours.gradient.values()))
    assert math.isfinite(ours.value) is (name != "log1mexp")
    assert all(map(math.isfinite, [cured.value, *cured.gradient.values()]))


@pytest.mark.parametrize("name", PITFALLS)
def test_each_cure_is_the_same_function_at_a_harmless_point(name: str) -> None:
    pitfall = PITFALLS[name]
    at = {"x": 0.3, "y": 0.7} if "y" in pitfall.at else {"x": 0.3}
    plain, cured = by_torch(pitfall.expression, at), by_torch(pitfall.cure, at)
    assert cured.value == pytest.approx(plain.value)
    assert cured.gradient == pytest.approx(plain.gradient)


def test_the_command_prints_every_pitfall(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    for pitfall in PITFALLS.values():
        assert pitfall.expression in printed
        assert pitfall.cure in printed


def test_the_command_draws_one_pitfall_or_an_expression(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--case", "where"]) == 0
    assert "log = -inf   gradient 0" in capsys.readouterr().out
    assert main(["--expression", "x*y + exp(x)", "--at", "x=1", "y=2"]) == 0
    printed = capsys.readouterr().out
    assert "├── mul = 2   gradient 1" in printed
    assert "gradient by torch:  x=4.71828, y=1" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--case", "none"], "invalid choice"),
        (["--at", "x=1"], "--at needs an --expression"),
        (["--expression", "x", "--at", "x"], "--at must be NAME=NUMBER"),
        (["--expression", "x", "--at", "1=1"], "--at must name a variable"),
        (["--expression", "x"], "'x', which has no value"),
    ],
)
def test_the_command_says_what_is_wrong(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert message in capsys.readouterr().err
