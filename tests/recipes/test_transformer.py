from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from recipes.data._text import Text
from recipes.transformer import TextSample, main
from tests.recipes.tiny import LENGTH, QUIET, fitted

# ---- the sample


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
