from __future__ import annotations

import torch
from torch import Tensor

from recipes.data._sine import SineWaves, sine_waves


def loaded(**options: int) -> SineWaves:
    data = SineWaves(**options)
    data.setup("fit")
    return data


def whole(data: SineWaves, part: str) -> Tensor:
    waves, values = getattr(data, part).tensors
    return torch.cat([waves[:, :, 0], values], dim=1)


def test_waves_obey_the_equation_of_a_sine() -> None:
    # sin(a + d) + sin(a - d) = 2 cos(d) sin(a): each wave has one d for all its steps.
    waves = sine_waves(200, 50, torch.Generator().manual_seed(1)).double()
    neighbors, middle = waves[:, 2:] + waves[:, :-2], waves[:, 1:-1]
    slope = (neighbors * middle).sum(dim=1, keepdim=True) / middle.square().sum(dim=1, keepdim=True)
    torch.testing.assert_close(neighbors, slope * middle, atol=1e-4, rtol=0)
    frequencies = (slope / 2).acos() / (2 * torch.pi)
    assert 0.0199 < frequencies.min() < 0.025
    assert 0.095 < frequencies.max() < 0.1001
    # A piece of 50 steps holds at least one period, so it comes close to its amplitude.
    tops = waves.abs().amax(dim=1)
    assert 0.45 < tops.min() < 0.6
    assert 1.4 < tops.max() <= 1.5


def test_targets_are_what_follows_the_inputs() -> None:
    data = loaded(length=30, horizon=5)
    waves, values = data.train.tensors
    assert (waves.shape, values.shape) == ((1024, 30, 1), (1024, 5))
    joined = whole(data, "train").double()
    neighbors, middle = joined[:, 2:] + joined[:, :-2], joined[:, 1:-1]
    slope = (neighbors[:, :20] * middle[:, :20]).sum(1, keepdim=True) / middle[:, :20].square().sum(1, keepdim=True)
    torch.testing.assert_close(neighbors, slope * middle, atol=1e-3, rtol=0)


def test_splits_are_fixed_and_share_no_wave() -> None:
    data, other_seed = loaded(seed=0), loaded(seed=1)
    assert [len(part) for part in (data.train, data.val, data.test)] == [1024, 256, 512]
    for part in ("train", "val", "test"):
        assert torch.equal(whole(data, part), whole(other_seed, part))
    rows = torch.cat([whole(data, part) for part in ("train", "val", "test")])
    assert len(rows.unique(dim=0)) == 1024 + 256 + 512


def test_evaluation_loaders_give_every_wave_in_order() -> None:
    data = loaded()
    for part, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        assert torch.equal(torch.cat([values for _, values in loader]), getattr(data, part).tensors[1])


def test_order_of_batches_comes_from_the_seed_alone() -> None:
    def values(seed: int) -> Tensor:
        return torch.cat([values for _, values in loaded(seed=seed).train_dataloader()])

    first = values(0)
    torch.rand(5)
    assert torch.equal(values(0), first)
    assert not torch.equal(values(1), first)
    assert first.shape == (1024, 8)
