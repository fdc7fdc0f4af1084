from __future__ import annotations

import pytest
import torch
from torch import nn

from recipes.models._blocks import AdditiveCoupling, BlockKind, NormKind, PlainBlock, ResidualBlock, Reversible, block

KINDS: list[BlockKind] = ["basic", "plain", "depthwise", "dilated", "invertible"]
NORMS: list[NormKind] = ["none", "batch"]


def weights(module: nn.Module) -> int:
    return sum(each.weight.numel() for each in module.modules() if isinstance(each, nn.Conv2d))


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all its parameters at zero: what is left is the way around them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_keeps_its_shape_and_reaches_every_parameter(kind: BlockKind, norm: NormKind) -> None:
    torch.manual_seed(0)
    made = block(kind, 4, norm)
    x = torch.randn(8, 4, 7, 6)
    assert made(x).shape == x.shape
    made(x).square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert any(isinstance(each, nn.BatchNorm2d) for each in made.modules()) == (norm == "batch")


def test_only_the_plain_block_has_no_way_around() -> None:
    x = torch.rand(2, 4, 5, 5)
    for kind in KINDS:
        expected = torch.zeros_like(x) if kind == "plain" else x
        assert torch.equal(zeroed(block(kind, 4, "batch"))(x), expected), kind


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("basic", 2 * 9 * 16 * 16),
        ("plain", 2 * 9 * 16 * 16),
        ("depthwise", 2 * (9 * 16 + 16 * 16)),
        ("dilated", 2 * 9 * 16 * 16),
        ("invertible", 2 * 9 * 8 * 8),
    ],
)
def test_weights_of_the_convolutions(kind: BlockKind, count: int) -> None:
    assert weights(block(kind, 16, "batch")) == count


@pytest.mark.parametrize(("kind", "reach"), [("basic", 2), ("depthwise", 2), ("dilated", 4)])
def test_how_far_a_pixel_sees(kind: BlockKind, reach: int) -> None:
    made = block(kind, 1, "none")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(0.1)
    x = torch.zeros(1, 1, 21, 21, requires_grad=True)
    made(x)[0, 0, 10, 10].backward()
    assert x.grad is not None
    rows = x.grad[0, 0].abs().sum(dim=1).nonzero().flatten().tolist()
    assert (rows[0], rows[-1]) == (10 - reach, 10 + reach)


def test_a_bias_only_where_no_norm_takes_it_away() -> None:
    for norm in NORMS:
        biases = [each.bias is not None for each in block("basic", 4, norm).modules() if isinstance(each, nn.Conv2d)]
        assert biases == [norm == "none"] * 2


def test_a_block_that_changes_the_shape_projects_its_shortcut() -> None:
    x = torch.randn(2, 4, 6, 6)
    assert isinstance(ResidualBlock(4, 4).shortcut, nn.Identity)
    for made in (ResidualBlock(4, 8, stride=2), PlainBlock(4, 8, stride=2)):
        assert made(x).shape == (2, 8, 3, 3)
    assert weights(ResidualBlock(4, 8).shortcut) == 4 * 8


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_a_deep_stack_is_inverted(norm: NormKind, training: bool, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    stack = Reversible(*(AdditiveCoupling(8, norm) for _ in range(20))).to(dtype)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    stack.train(training)
    x = torch.randn(16, 8, 7, 7, dtype=dtype)
    y = stack(x)
    scale = y.abs().max().item()
    assert (y - x).abs().max() > 1, "a stack that does nothing would be easy to invert"
    assert (stack.inverse(y) - x).abs().max().item() <= tolerance * max(scale, 1.0)
    z = torch.randn_like(x)
    torch.testing.assert_close(stack(stack.inverse(z)), z, atol=100 * tolerance, rtol=0)


def test_invertible_blocks_need_an_even_number_of_channels() -> None:
    with pytest.raises(ValueError, match="`channels` must be even for invertible blocks, which halve them; got 5"):
        block("invertible", 5, "none")
