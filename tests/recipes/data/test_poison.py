from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from recipes.data import Digits
from recipes.data._poison import SCALE, Poison, poison_batches

QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}


class Spy(L.LightningModule):
    """Keeps the batches that training and test get to see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.train_batches: list[Tensor] = []
        self.test_batches: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.train_batches.append(batch[0])
        return self.layer(batch[0].flatten(1).nan_to_num()).square().mean()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        assert not batch[0].isnan().any()

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.test_batches.append(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@given(one_in=st.integers(1, 150), first_step=st.integers(0, 50), seed=st.integers(0, 2**32))
def test_each_stretch_holds_exactly_one_poisoned_step(one_in: int, first_step: int, seed: int) -> None:
    poison = Poison(one_in, first_step)
    assert not any(poison.hits(step, seed) for step in range(first_step))
    for stretch in range(3):
        start = first_step + stretch * one_in
        assert sum(poison.hits(step, seed) for step in range(start, start + one_in)) == 1


def test_places_depend_on_the_seed_and_on_nothing_else() -> None:
    poison = Poison(one_in=100, first_step=10)

    def places(seed: int) -> list[int]:
        return [step for step in range(500) if poison.hits(step, seed)]

    first = places(0)
    torch.rand(3)
    assert places(0) == first
    assert places(1) != first
    assert len({place % 100 for place in first}) > 1  # not the same place in each stretch


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_spoils_one_number_of_a_copy(kind: Any) -> None:
    inputs = torch.zeros(4, 64)
    spoiled = Poison(kind=kind).spoil(inputs)
    assert str(spoiled[0, 0].item()) == kind
    assert (~spoiled.isfinite()).sum() == 1
    assert not inputs.any()


def test_scales_the_whole_of_a_copy() -> None:
    inputs = torch.ones(4, 64)
    assert torch.equal(Poison(kind="scale").spoil(inputs), torch.full((4, 64), SCALE))
    assert inputs.max() == 1


def test_integers_cannot_be_spoiled() -> None:
    with pytest.raises(TypeError, match=r"floating-point inputs, got torch\.int64"):
        Poison().spoil(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("arguments", [{"one_in": 0}, {"first_step": -1}])
def test_wrong_arguments_are_named(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}` must be an integer >= ., got {arguments[name]}"):
        Poison(**arguments)


def test_poison_hits_the_training_steps_it_should_across_epochs_and_no_test_batch() -> None:
    poison, seed, steps = Poison(one_in=40, first_step=3), 5, 100
    spy, clean = Spy(), Spy()
    data = Digits(batch_size=32, seed=seed)
    poison_batches(data, poison, seed)
    for model, source in ((spy, data), (clean, Digits(batch_size=32, seed=seed))):
        trainer = L.Trainer(max_steps=steps, accelerator="cpu", logger=False, **QUIET)
        trainer.fit(model, source)
        trainer.test(model, source, verbose=False)
    assert trainer.current_epoch >= 2
    poisoned = [step for step, batch in enumerate(spy.train_batches) if batch.isnan().any()]
    assert poisoned == [step for step in range(steps) if poison.hits(step, seed)] != []
    assert not any(batch.isnan().any() for batch in spy.test_batches)
    # Apart from the poison, the data are what they were.
    for batch, original in zip(spy.train_batches, clean.train_batches, strict=True):
        assert torch.equal(batch.where(batch.isfinite(), original), original)


def test_one_batch_of_an_accumulated_step_is_poisoned() -> None:
    poison, spy = Poison(one_in=2, first_step=0), Spy()
    data = Digits(batch_size=32)
    poison_batches(data, poison, seed=0)
    trainer = L.Trainer(max_steps=6, accumulate_grad_batches=3, accelerator="cpu", logger=False, **QUIET)
    trainer.fit(spy, data)
    poisoned = [index for index, batch in enumerate(spy.train_batches) if batch.isnan().any()]
    assert poisoned == [3 * step for step in range(6) if poison.hits(step, seed=0)]
    assert len(poisoned) == 3


class Halved(Digits):
    """Has the hook itself."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] / 2, *batch[1:]]


class HalvingSpy(Spy):
    """A model with the hook."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] / 2, *batch[1:]]


@pytest.mark.filterwarnings("ignore:You have overridden `on_before_batch_transfer` in")
@pytest.mark.parametrize(("model", "kind"), [(Spy, Halved), (HalvingSpy, Digits)])
def test_the_hook_of_the_data_module_or_of_the_model_still_does_its_work(model: Any, kind: Any) -> None:
    spies = []
    for poisoned in (False, True):
        spy, data = model(), kind(batch_size=32)
        if poisoned:
            poison_batches(data, Poison(one_in=3, first_step=0), seed=0)
        trainer = L.Trainer(max_steps=6, accelerator="cpu", logger=False, **QUIET)
        trainer.fit(spy, data)
        spies.append(spy)
    clean, spoiled = spies
    assert clean.train_batches[0].abs().max() < 2.5  # halved
    bad = [batch.isnan().any() for batch in spoiled.train_batches]
    assert sum(bad) == 2
    for batch, original in zip(spoiled.train_batches, clean.train_batches, strict=True):
        assert torch.equal(batch.where(batch.isfinite(), original), original)


def test_a_batch_may_lie_in_memory_as_it_likes() -> None:
    images = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert Poison().spoil(images).isnan().sum() == 1
