from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from recipes.data._text import Text
from recipes.models._transformer import CausalSelfAttention, CharTransformer
from stability_callbacks.initialization import DepthScaled
from tests.recipes.tiny import LENGTH, fitted

VOCABULARY = 11
SHAPE = torch.Size([LENGTH])


def small(**options: Any) -> CharTransformer:
    settings = {"layers": 2, "width": 16, "heads": 2, **options}
    return CharTransformer(SHAPE, VOCABULARY, partial(torch.optim.AdamW, lr=1e-3), **settings).eval()


def tokens(batch: int = 3) -> Tensor:
    return torch.randint(VOCABULARY, (batch, LENGTH))


def reference_attention(layer: CausalSelfAttention, stream: Tensor) -> Tensor:
    """Attention written out: one head, one position at a time."""
    batch, time, width = stream.shape
    size = width // layer.heads
    query, key, value = layer.query_key_value(stream).split(width, dim=-1)
    mixed = torch.zeros_like(stream)
    for sample in range(batch):
        for head in range(layer.heads):
            part = slice(head * size, (head + 1) * size)
            for now in range(time):
                scores = key[sample, : now + 1, part] @ query[sample, now, part] / math.sqrt(size)
                mixed[sample, now, part] = scores.softmax(0) @ value[sample, : now + 1, part]
    return layer.output(mixed)


def reference_norm(layer: nn.LayerNorm, stream: Tensor) -> Tensor:
    centered = stream - stream.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def shake(model: nn.Module) -> None:
    """Give norms weights that matter: fresh ones are all alike."""
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)


def test_attention_is_that_of_the_formula() -> None:
    layer = CausalSelfAttention(width=12, heads=3, dropout=0.0).double()
    stream = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(stream), reference_attention(layer, stream), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_norms_stand_where_they_should(norm: Literal["post", "pre"]) -> None:
    model = small(norm=norm).double()
    shake(model)
    batch = tokens()
    stream = model.characters(batch) + model.positions(torch.arange(LENGTH))
    for block in model.blocks:
        for branch, layer in ((block.attention, block.attention_norm), (block.mlp, block.mlp_norm)):
            if norm == "post":
                stream = reference_norm(layer, stream + branch(stream))
            else:
                stream = stream + branch(reference_norm(layer, stream))
    if norm == "pre":
        stream = reference_norm(model.norm, stream)
    torch.testing.assert_close(model(batch), model.head(stream), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_no_character_looks_ahead(norm: Literal["post", "pre"]) -> None:
    model = small(norm=norm)
    batch = tokens()
    for place in range(LENGTH):
        changed = batch.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCABULARY
        difference = (model(changed) - model(batch)).abs().amax(dim=(0, 2))
        assert (difference[:place] == 0).all()
        assert (difference[place:] > 0).all()


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_an_untrained_model_knows_next_to_nothing(norm: Literal["post", "pre"]) -> None:
    torch.manual_seed(1)
    model = CharTransformer(torch.Size([64]), 100, torch.optim.AdamW, norm=norm)
    batch = torch.randint(100, (8, 65))
    loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    assert abs(loss.item() - math.log(100)) < 0.4


def test_shorter_texts_than_it_was_made_for_are_read() -> None:
    model = small()
    batch = tokens()
    torch.testing.assert_close(model(batch[:, :5]), model(batch)[:, :5])


def test_dropout_acts_in_training_only() -> None:
    model, batch = small(dropout=0.5), tokens()
    assert torch.equal(model(batch), model(batch))
    model.train()
    assert not torch.equal(model(batch), model(batch))


def test_heads_must_share_the_width() -> None:
    with pytest.raises(ValueError, match=r"`width` must be a multiple of `heads`, got width=16 and heads=3"):
        small(heads=3)


def test_depth_scaled_finds_both_branches_of_each_block() -> None:
    for norm in ("post", "pre"):
        report = DepthScaled(std=0.02).apply(small(layers=3, norm=norm))
        ends = [row.name for row in report if "ends 1 of 6 residual branches" in row.what]
        assert ends == [f"blocks.{block}.{end}.weight" for block in range(3) for end in ("attention.output", "mlp.2")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_gives_nearly_the_same(dtype: torch.dtype) -> None:
    model, batch = small(), tokens()
    expected = model(batch)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(model(batch).float(), expected, rtol=0, atol=0.05)
    torch.testing.assert_close(model.to(dtype)(batch).float(), expected, rtol=0, atol=0.05)


def test_it_compiles() -> None:
    model, batch = small(), tokens()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch), model(batch))


# ---- with a Trainer


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_loss_is_the_mean_over_all_characters(text: Text, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.data._text.EVALUATION_BATCH_SIZE", 4)
    trainer = fitted(text)
    loader = text.val_dataloader() if split == "val" else text.test_dataloader()
    batches = list(loader)
    assert len(batches[-1][0]) < len(batches[0][0])  # a mean of means would be wrong
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    model = trainer.lightning_module.eval()
    expected = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    evaluate = trainer.validate if split == "val" else trainer.test
    (scores,) = evaluate(model, text, verbose=False)
    assert scores[f"{split}/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_ruined_in_part_has_no_finite_loss(text: Text) -> None:
    trainer = fitted(text)
    model = trainer.lightning_module
    model.characters.weight.data[text.encode("q")] = torch.nan  # most windows do without it
    (scores,) = trainer.test(model, text, verbose=False)
    assert math.isnan(scores["test/loss"])


def test_it_learns(text: Text) -> None:
    trainer = fitted(text, steps=60)
    (scores,) = trainer.test(trainer.lightning_module, text, verbose=False)
    assert scores["test/loss"] < text.unigram_entropy() - 0.5
