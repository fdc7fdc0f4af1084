"""Which layers end the residual branches of a network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stability_callbacks.initialization import CallGraph
from stability_callbacks.initialization._branches import residual_layers

KERNELS = (nn.Linear, nn.Conv2d)
NORMS = (nn.BatchNorm2d, nn.LayerNorm)


def ends(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    return residual_layers(CallGraph(model), kinds or KERNELS)


class Block(nn.Module):
    """A residual block with an optional projection on the shortcut."""

    def __init__(self, project: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.drop = nn.Linear(4, 12), nn.Linear(4, 4), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.drop(self.out(F.scaled_dot_product_attention(q, k, v)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(4), Attention()
        self.norm2, self.mlp = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4), nn.Dropout())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return torch.add(self.mlp(self.norm2(x)), x)


class GPT(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(8, 4), nn.Embedding(8, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(4, 8, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.ones_like(tokens).cumsum(1))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_resnet_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), Block(project=False), Block(project=True))
    assert ends(model) == ["1.conv2", "2.conv2"]
    assert ends(model, *KERNELS, *NORMS) == ["1.bn2", "2.bn2"]


def test_transformer_layers_have_two_branches_each() -> None:
    expected = [f"layers.{index}.{end}" for index in range(3) for end in ("attention.out", "mlp.2")]
    assert ends(GPT(layers=3)) == expected


def test_torch_transformer_layers() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2), 1, enable_nested_tensor=False)
    assert ends(encoder) == ["layers.0.self_attn.out_proj", "layers.0.linear2"]
    assert ends(nn.TransformerDecoderLayer(4, 2)) == ["self_attn.out_proj", "multihead_attn.out_proj", "linear2"]


def test_attention_module_inside_a_branch() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.attention(x, x, x)
            return x + y

    assert ends(Attend()) == ["attention.out_proj"]


def test_a_branch_that_cannot_be_read_ends_with_its_last_layer() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.drop = nn.Linear(4, 8), nn.Linear(8, 4), nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.down(self.up(row)) for row in x])

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Opaque()

        def forward(self, x: Tensor) -> Tensor:
            x += self.body(x)
            return x

    assert ends(Around()) == ["body.down"]


def test_other_additions_are_not_residual() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            towers = self.one(x) + self.two(x)  # neither is a shortcut
            others = self.one(x) + y  # nothing in common
            unequal = self.two(self.one(x)) + self.one(self.two(self.one(x)))  # a shortcut has one layer at most
            return torch.cat([towers, others + 1, x.relu() + x, unequal])

    assert ends(Sums()) == []
