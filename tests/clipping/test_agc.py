"""AGC against a float64 reference, unit by unit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stability_callbacks.clipping import AGC
from stability_callbacks.gradient_pass import measure_gradients
from tests.clipping import references

SHAPES = st.one_of(
    st.just(()),
    st.tuples(st.integers(1, 6)),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
)


@given(st.lists(SHAPES, min_size=1, max_size=4), st.floats(1e-3, 1.0), st.integers(0, 2**31))
@settings(max_examples=80)
def test_equals_the_reference(shapes: list[tuple[int, ...]], clip: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pairs, expected = [], []
    for index, shape in enumerate(shapes):
        weight = nn.Parameter(torch.randn(shape, generator=generator) * (index % 2))  # zero weights among them
        weight.grad = torch.randn(shape, generator=generator) * 10 ** float(torch.randn((), generator=generator))
        expected.append(references.agc(weight.detach(), weight.grad, clip, 1e-3))
        pairs.append((f"w{index}", weight))
    result = AGC(clip).clip_(pairs)
    for (_, weight), reference in zip(pairs, expected, strict=True):
        torch.testing.assert_close(weight.grad.double(), reference, rtol=1e-6, atol=1e-12)  # type: ignore[union-attr]
    torch.testing.assert_close(result.clipped_norm, measure_gradients(pairs).total, rtol=1e-5, atol=1e-10)


def test_gives_the_published_example() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    AGC(clip=0.01, eps=1e-3).clip_([weight])
    assert weight.grad.tolist() == pytest.approx([7.0711e-6, 7.0711e-6], rel=1e-4)


def test_excluded_parameters_are_left_alone() -> None:
    pairs = [(name, nn.Parameter(torch.ones(2, 2))) for name in ("body.weight", "head.weight")]
    for _, weight in pairs:
        weight.grad = torch.full((2, 2), 100.0)
    AGC(exclude=["^head"]).clip_(pairs)
    assert float(pairs[0][1].grad.max()) < 1  # type: ignore[union-attr]
    assert torch.equal(pairs[1][1].grad, torch.full((2, 2), 100.0))  # type: ignore[arg-type]


class Classifier(nn.Module):
    """The classifier is defined last, after a normalization, whichever layers it has."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = head


HEADS = {
    "linear": nn.Linear(4, 2),
    "convolution": nn.Conv2d(4, 2, 1),
    "without a bias": nn.Linear(4, 2, bias=False),
    "parametrised": nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)),
    "after others": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.LayerNorm(2)),
}


def clipped(pairs: list[tuple[str, nn.Parameter]], rule: AGC) -> set[str]:
    """The names of the parameters whose huge gradients a rule clips."""
    for _, weight in pairs:
        weight.grad = torch.full_like(weight, 1000.0)
    rule.clip_(pairs)
    return {name for name, weight in pairs if weight.grad.max() < 1000}  # type: ignore[union-attr]


@pytest.mark.parametrize("head", HEADS)
def test_the_last_layer_may_be_excluded(head: str) -> None:
    model = Classifier(HEADS[head])
    pairs = list(model.named_parameters())
    last = "head.2." if head == "after others" else "head."
    assert clipped(pairs, AGC(exclude_last_layer=True)) == {name for name, _ in pairs if not name.startswith(last)}
    assert clipped(pairs, AGC()) == {name for name, _ in pairs}


def test_the_last_layer_is_found_among_all_parameters() -> None:
    """Those that have no gradient in the first step, and those that the rule was told of before, too."""
    pairs = list(Classifier(nn.Linear(4, 2)).named_parameters())
    rule = AGC(exclude_last_layer=True)
    rule.clip_(pairs)  # no gradients at all
    assert clipped(pairs[:2], rule) == {"stem.weight", "stem.bias"}
    told = AGC(exclude_last_layer=True)
    told.assign(pairs)
    assert clipped(pairs[:2], told) == {"stem.weight", "stem.bias"}
    assert clipped(pairs[:2], AGC(exclude_last_layer=True)) == set()
    assert clipped(pairs, AGC(exclude=["stem"], exclude_last_layer=True)) == {"norm.weight", "norm.bias"}


def test_the_last_layer_of_parameters_without_names_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"AGC\(exclude_last_layer=True\) needs named parameters"):
        AGC(exclude_last_layer=True).clip_(nn.Linear(2, 2).parameters())
    with pytest.raises(TypeError, match="`exclude_last_layer` must be True or False, got 'head'"):
        AGC(exclude_last_layer="head")  # type: ignore[arg-type]


def test_sparse_embeddings_are_clipped_row_by_row() -> None:
    dense, sparse = nn.Embedding(5, 3), nn.Embedding(5, 3, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    tokens = torch.tensor([1, 1, 4])
    for embedding in (dense, sparse):
        (embedding(tokens) * torch.tensor([3.0, 5.0, 7.0])).sum().backward()
        AGC().clip_(embedding.named_parameters())
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)  # type: ignore[union-attr]


def test_half_precision_does_not_overflow() -> None:
    weight = nn.Parameter(torch.ones(2, 4, dtype=torch.float16))
    weight.grad = torch.full((2, 4), 60_000.0, dtype=torch.float16)
    AGC(clip=0.5).clip_([weight])
    assert torch.allclose(weight.grad.float(), torch.tensor(0.5), rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "name"), [({"clip": 0}, "clip"), ({"eps": -1}, "eps"), ({"exclude": ["("]}, "exclude")]
)
def test_bad_arguments_are_named(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}"):
        AGC(**arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`exclude`"):
        AGC(exclude="head")
