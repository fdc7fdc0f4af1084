from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from recipes._blocks import BlockKind, NormKind, Reversible
from recipes._poison import Poison
from recipes._run import Run
from recipes.resnet import ConvNet, ResNet18, main
from stability_callbacks.initialization import LSUV, ZeroResidual

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
KINDS: list[BlockKind] = ["basic", "plain", "depthwise", "dilated", "invertible"]


def parameters(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "size",
    [
        pytest.param((1, 14, 14), id="pooled"),
        pytest.param((1, 28, 28), id="mnist"),
        pytest.param((3, 9, 11), id="odd"),
        pytest.param((2, 3, 3), id="smallest"),
    ],
)
def test_images_of_any_size_give_logits(kind: BlockKind, size: tuple[int, int, int]) -> None:
    model = ConvNet(torch.Size(size), 7, SGD, blocks=2, channels=4, block=kind)
    assert model(torch.randn(5, *size)).shape == (5, 7)


def test_depth_is_two_convolutions_a_block_and_a_stem() -> None:
    for blocks in (0, 3, 10):
        model = ConvNet(torch.Size([1, 14, 14]), 10, SGD, blocks=blocks)
        assert sum(isinstance(each, nn.Conv2d) for each in model.modules()) == 1 + 2 * blocks


def test_he_weights() -> None:
    torch.manual_seed(0)
    size = torch.Size([1, 14, 14])
    he, default = (ConvNet(size, 10, SGD, blocks=1, channels=64, weights=kind) for kind in ("he", "torch"))
    expected = {"he": (2 / (9 * 64)) ** 0.5, "torch": (1 / (3 * 9 * 64)) ** 0.5}
    for model, std in ((he, expected["he"]), (default, expected["torch"])):
        convolutions = [each for each in model.blocks.modules() if isinstance(each, nn.Conv2d)]
        assert len(convolutions) == 2
        for each in convolutions:
            assert each.weight.std().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("size", [(14, 14), (1, 14), (1, 2, 14), (1, 1, 14, 14)])
@pytest.mark.parametrize("model", [ConvNet, ResNet18])
def test_what_is_no_image_is_refused(model: type[ConvNet] | type[ResNet18], size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`inputs` must be images"):
        model(torch.Size(size), 10, SGD)


def test_resnet18_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        imagenet = ResNet18(torch.Size([3, 224, 224]), 1000, SGD, small_stem=False)
        cifar = ResNet18(torch.Size([3, 32, 32]), 10, SGD)
        assert parameters(imagenet) == 11_689_512
        assert parameters(cifar) == 11_173_962
        assert imagenet.stages(imagenet.stem(torch.zeros(1, 3, 224, 224))).shape == (1, 512, 7, 7)
        assert cifar.stages(cifar.stem(torch.zeros(1, 3, 32, 32))).shape == (1, 512, 4, 4)
        assert cifar(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("kind", ["basic", "depthwise", "dilated", "invertible"])
def test_the_callbacks_find_every_residual_branch(kind: BlockKind, norm: NormKind) -> None:
    model = ConvNet(torch.Size([1, 14, 14]), 10, SGD, blocks=2, channels=4, block=kind, norm=norm).eval()
    ZeroResidual().apply(model)
    x = torch.randn(3, 1, 14, 14)
    stem = model.stem(x)
    torch.testing.assert_close(model.blocks(stem), stem)


def test_the_plain_network_can_be_initialised_by_data() -> None:
    model = ConvNet(torch.Size([1, 14, 14]), 10, SGD, blocks=2, channels=4, block="plain", norm="none")
    LSUV().apply(model, torch.randn(32, 1, 14, 14))
    assert model(torch.randn(32, 1, 14, 14)).std().item() == pytest.approx(1, abs=0.5)


def test_the_invertible_network_runs_backwards() -> None:
    model = ConvNet(torch.Size([1, 14, 14]), 10, SGD, blocks=10, block="invertible").double().eval()
    features = model.stem(torch.randn(4, 1, 14, 14, dtype=torch.float64))
    assert isinstance(model.blocks, Reversible)
    assert (model.blocks.inverse(model.blocks(features)) - features).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_logs(kind: BlockKind) -> None:
    L.seed_everything(0, verbose=False)
    labels = torch.arange(64) % 4
    images = torch.randn(64, 1, 8, 8) * 0.1
    images[torch.arange(64), 0, labels, labels] += 3.0
    loader = DataLoader(TensorDataset(images, labels), batch_size=32)
    model = ConvNet(torch.Size([1, 8, 8]), 4, SGD, blocks=1, channels=8, block=kind)
    trainer = L.Trainer(
        max_steps=60,
        check_val_every_n_epoch=30,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, loader, loader)
    assert trainer.callback_metrics["train/loss"] < 0.5
    assert trainer.validate(model, loader, verbose=False)[0]["val/accuracy"] > 0.9
    assert trainer.test(model, loader, verbose=False)[0]["test/accuracy"] > 0.9


SCENARIOS = ["exploding", "poisoned", "scaled", "stuck", "vanishing"]
STEPS = 10
TINY = [
    f"--trainer.max_steps={STEPS}",
    "--trainer.enable_progress_bar=false",
    "--model.channels=4",
    "--goal.threshold=0.0",
    "--plain.monitor.histograms=false",
    "--healed.monitor.histograms=false",
]


def recipe(output: Path, *options: str) -> int:
    return main([*TINY, f"--output={output}", *options])


def run(output: Path, name: str) -> Run:
    return Run.load(output / name / "seed-0" / "run.json")


@pytest.mark.slow
def test_every_scenario_is_trained_plain_and_healed(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    # No --healed.schedule here: it would bring a schedule into scenarios that have none.
    with pytest.warns(UserWarning, match="The warm-up of .* steps is longer than training"):
        assert recipe(tmp_path) == 0
    records: list[dict[str, Any]] = json.loads((tmp_path / "results.json").read_text())
    assert [(each["scenario"], each["variant"]) for each in records] == [
        (scenario, variant) for scenario in SCENARIOS for variant in ("plain", "healed")
    ]
    assert all(each["metric"] == "accuracy" and each["success"] for each in records)


def test_the_exploding_network_is_dead_at_once_and_the_healed_one_is_not(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    with pytest.warns(UserWarning, match="The warm-up of .* steps is longer than training"):
        recipe(tmp_path, "--scenario=exploding", "--model.channels=16", "--trainer.max_steps=4")
    assert run(tmp_path, "exploding-plain").died_at in (1, 2)
    assert run(tmp_path, "exploding-healed").died_at is None


@pytest.mark.parametrize("scenario", ["poisoned", "scaled"])
def test_the_guard_skips_the_bad_batches_and_no_others(tmp_path: Path, scenario: str) -> None:
    pytest.importorskip("mlxtend")
    hits = [step for step in range(STEPS) if Poison(one_in=4, first_step=2).hits(step, seed=0)]
    recipe(tmp_path, f"--scenario={scenario}", "--poison.one_in=4", "--poison.first_step=2")
    assert run(tmp_path, f"{scenario}-healed").skipped_at == hits != []
    assert run(tmp_path, f"{scenario}-plain").died_at == (hits[0] if scenario == "poisoned" else None)


def test_resnet18_by_class_path(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    options = ["--scenario=stuck", "--variant=plain", "--data.side=4", "--data.batch_size=4", "--trainer.max_steps=2"]
    model = ["--model=recipes.resnet.ResNet18", "--model.small_stem=true"]
    small = [option for option in TINY if "channels" not in option]
    assert main([*small, f"--output={tmp_path}", *model, *options]) == 0
    assert len(run(tmp_path, "stuck-plain").history["train/loss"]) == 2
