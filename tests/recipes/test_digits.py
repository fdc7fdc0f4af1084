from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn

from recipes._digits import Digits
from recipes._poison import Poison

QUIET = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}


class Spy(L.LightningModule):
    """Keeps the batches that training and test get to see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.train_batches: list[Tensor] = []
        self.test_batches: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.train_batches.append(batch[0])
        return self.layer(batch[0].nan_to_num()).square().mean()

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.test_batches.append(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loaded(**arguments: object) -> Digits:
    data = Digits(**arguments)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def test_split_is_fixed_stratified_and_standardised() -> None:
    data, other_seed = loaded(seed=0), loaded(seed=1)
    assert (len(data.train), len(data.test)) == (1347, 450)
    assert torch.equal(data.test.tensors[0], other_seed.test.tensors[0])
    assert torch.bincount(data.test.tensors[1]).tolist() == [45, 46, 44, 46, 45, 46, 45, 45, 43, 45]
    torch.testing.assert_close(data.train.tensors[0].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train.tensors[0].std(), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_order_of_batches_comes_from_the_seed_alone() -> None:
    def labels(seed: int) -> Tensor:
        return torch.cat([labels for _, labels in loaded(seed=seed).train_dataloader()])

    first = labels(0)
    torch.rand(5)
    assert torch.equal(labels(0), first)
    assert not torch.equal(labels(1), first)


def test_poison_hits_the_training_steps_it_should_across_epochs_and_no_test_batch() -> None:
    poison, seed, steps = Poison(one_in=40, first_step=3), 5, 100
    spy = Spy()
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", logger=False, **QUIET)
    data = Digits(batch_size=32, seed=seed, poison=poison)
    trainer.fit(spy, data)
    trainer.test(spy, data, verbose=False)
    assert trainer.current_epoch >= 2
    poisoned = [step for step, batch in enumerate(spy.train_batches) if batch.isnan().any()]
    assert poisoned == [step for step in range(steps) if poison.hits(step, seed)] != []
    assert data.poisoned_batches == len(poisoned)
    assert not any(batch.isnan().any() for batch in spy.test_batches)
