from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from recipes._text import Text
from recipes.transformer import CausalSelfAttention, CharTransformer, TextSample, main
from stability_callbacks.initialization import DepthScaled

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
LENGTH, VOCABULARY = 12, 11
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
    centred = stream - stream.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


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


@pytest.fixture
def text(tmp_path: Path) -> Text:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question.\n" * 30)
    return Text(batch_size=8, length=LENGTH, path=tmp_path / "text.txt")


def fitted(data: Text, steps: int = 3, callbacks: list[L.Callback] | None = None, **options: Any) -> L.Trainer:
    data.setup("fit")
    model = CharTransformer(SHAPE, data.classes, partial(torch.optim.AdamW, lr=1e-2), layers=1, width=16, heads=2)
    options = {"logger": False, **options}
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=callbacks, log_every_n_steps=1, **QUIET, **options
    )
    trainer.fit(model, data)
    return trainer


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_loss_is_the_mean_over_all_characters(text: Text, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes._text.EVALUATION_BATCH_SIZE", 4)
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


def test_a_sample_goes_to_the_logs(text: Text, tmp_path: Path) -> None:
    sample = TextSample(prompt="to be", characters=30)
    loggers = [TensorBoardLogger(tmp_path, name="", version="board"), CSVLogger(tmp_path, name="", version="table")]
    trainer = fitted(text, callbacks=[sample], logger=loggers)
    assert sample.text is None
    trainer.test(trainer.lightning_module, text, verbose=False)
    assert sample.text is not None
    assert sample.text.startswith("to be")
    assert len(sample.text) == 35
    for folder in ("board", "table"):
        assert (tmp_path / folder / "sample.txt").read_text(encoding="utf-8") == f"{sample.text}\n"
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    (event,) = events.Tensors("sample/text_summary")
    written = event.tensor_proto.string_val[0].decode()
    assert written == "".join(f"    {line}\n" for line in sample.text.splitlines())


def test_sampling_draws_from_its_own_stream(text: Text) -> None:
    trainer = fitted(text)
    model = trainer.lightning_module.eval()
    before = torch.get_rng_state()
    first = TextSample(seed=1).write(model, text)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert TextSample(seed=1).write(model, text) == first
    assert TextSample(seed=2).write(model, text) != first


class Alternating(L.LightningModule):
    """After each token, the next one has logit 2, all others 0."""

    def forward(self, tokens: Tensor) -> Tensor:
        assert tokens.shape[1] <= LENGTH
        return 2.0 * nn.functional.one_hot((tokens + 1) % 4, 4)


class Letters:
    length = LENGTH

    def encode(self, text: str) -> Tensor:
        return torch.tensor(["abcd".index(letter) for letter in text])

    def decode(self, tokens: Tensor) -> str:
        return "".join("abcd"[token] for token in tokens)


def test_temperature_sharpens_and_flattens() -> None:
    def share(temperature: float) -> float:
        text = TextSample("a", characters=800, temperature=temperature).write(Alternating(), Letters())
        return sum(text[i : i + 2] in "abcda" for i in range(800)) / 800

    assert share(0.0) == 1.0
    for temperature in (0.5, 1.0, 2.0):
        expected = math.exp(2 / temperature) / (math.exp(2 / temperature) + 3)
        assert abs(share(temperature) - expected) < 0.05


def test_a_ruined_model_writes_that_it_is_ruined(text: Text) -> None:
    trainer = fitted(text)
    model = trainer.lightning_module
    model.head.bias.data[0] = torch.nan
    assert TextSample("to").write(model, text) == "to [the model's predictions are not finite]"


def test_sampling_needs_a_prompt_and_an_alphabet(text: Text) -> None:
    with pytest.raises(ValueError, match="`prompt` must hold at least one character"):
        TextSample(prompt="")
    model = fitted(text).lightning_module
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[TextSample()], **QUIET)
    with pytest.warns(UserWarning, match="TextSample writes nothing: NoneType lacks encode, decode or length"):
        trainer.test(model, text.test_dataloader(), verbose=False)
    assert trainer.callbacks[0].text is None  # type: ignore[attr-defined]


def test_a_model_validated_alone_writes_too_but_not_within_training(text: Text) -> None:
    trained = fitted(text)
    sample = TextSample(characters=8)
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[sample], **QUIET)
    sample.on_validation_end(trained, trained.lightning_module)
    assert sample.text is None
    trainer.validate(trained.lightning_module, text, verbose=False)
    assert sample.text is not None


# ---- from the command line

SHORT = [
    "--trainer.max_steps=8",
    "--model.layers=1",
    "--model.width=16",
    "--data.length=16",
    "--data.max_windows=20",
    "--plain.monitor.histogram_every_n_steps=4",
    "--healed.monitor.histogram_every_n_steps=4",
    "--healed.schedule.schedule.warmup=2",
    "--goal.threshold=9.0",
]


def demonstrate(output: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    with contextlib.redirect_stdout(io.StringIO()):
        code = main([*SHORT, f"--output={output}", *options])
    return code, json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformer")


@pytest.fixture(scope="module")
def poisoned(folder: Path) -> list[dict[str, Any]]:
    config = folder / "early.yaml"
    fault = {"target": "activation", "value": "nan", "steps": [3, 6], "where": "^characters$"}
    injector = {
        "class_path": "stability_callbacks.FaultInjector",
        "init_args": {"faults": {"class_path": "stability_callbacks.faults.Fault", "init_args": fault}},
    }
    config.write_text(json.dumps({"faults": [injector]}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FaultInjector puts faults into this training on purpose")
        code, records = demonstrate(folder / "runs", "--scenario=poisoned", f"--config={config}")
    assert code == 0
    return records


def test_a_nan_kills_the_plain_model_and_is_skipped_by_the_guarded_one(
    folder: Path, poisoned: list[dict[str, Any]]
) -> None:
    assert [(record["variant"], record["metric"], record["success"]) for record in poisoned] == [
        ("plain", "loss", False),
        ("healed", "loss", True),
    ]
    assert poisoned[0]["value"] is None
    assert poisoned[1]["value"] < 5
    skips = EventAccumulator(str(folder / "runs" / "poisoned-healed" / "seed-0")).Reload()
    steps = skips.Scalars("stability/skipped_steps")
    assert [event.step for event, before in zip(steps[1:], steps, strict=False) if event.value > before.value] == [3, 6]


def test_both_variants_write_a_sample(folder: Path, poisoned: list[dict[str, Any]]) -> None:
    texts = {
        variant: (folder / "runs" / f"poisoned-{variant}" / "seed-0" / "sample.txt").read_text(encoding="utf-8")
        for variant in ("plain", "healed")
    }
    assert texts["plain"] == "The  [the model's predictions are not finite]\n"
    assert len(texts["healed"]) == len("The ") + TextSample().characters + 1


def test_variants_of_the_stuck_scenario_differ_in_callbacks_only(tmp_path: Path) -> None:
    _, records = demonstrate(tmp_path, "--scenario=stuck")
    assert [(record["scenario"], record["variant"]) for record in records] == [("stuck", "plain"), ("stuck", "healed")]
    first = [
        EventAccumulator(str(tmp_path / f"stuck-{variant}" / "seed-0")).Reload().Scalars("train/loss")[0].value
        for variant in ("plain", "healed")
    ]
    assert first[0] == first[1]


def test_text_of_ones_own_and_bf16_and_depth_scaled(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("a rose is a rose is a rose. " * 40)
    initialization = [
        "--healed.initialization=stability_callbacks.Initialization",
        "--healed.initialization.policy=stability_callbacks.initialization.DepthScaled",
        "--healed.initialization.verbose=false",
    ]
    code, records = demonstrate(
        tmp_path / "runs",
        "--scenario=stuck",
        "--variant=healed",
        f"--data.path={tmp_path / 'own.txt'}",
        "--trainer.precision=bf16-mixed",
        "--model.norm=pre",
        *initialization,
    )
    assert code == 0
    assert records[0]["value"] < 3
