"""A study: settings, each measured with several seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch

from recipes.gradient_flow._digits import CLASSES, PIXELS, digits_batches
from recipes.gradient_flow._measurement import Measurement, measure
from recipes.gradient_flow._network import ActivationName, network
from recipes.gradient_flow._verdict import Verdict, verdict
from stability_callbacks.initialization import Policy

__all__ = ["Observation", "Setting", "StudyName", "observe", "settings"]

StudyName = Literal["initializations", "depths"]


class Setting(NamedTuple):
    """One network of a study.

    Attributes:
        study: Which study it belongs to.
        activation: Between its layers.
        initialization: What the study calls its initialization.
        depth: Linear layers.
    """

    study: StudyName
    activation: ActivationName
    initialization: str
    depth: int


class Observation(NamedTuple):
    """A setting with one seed, and what was measured of it."""

    setting: Setting
    seed: int
    measurement: Measurement

    @property
    def verdict(self) -> Verdict:
        """What the rule says about it."""
        return verdict(self.measurement)


def settings(
    study: StudyName, activations: Sequence[ActivationName], initializations: Iterable[str], depths: Sequence[int]
) -> list[Setting]:
    """Every combination, in the order of the tables: activation, initialization, depth."""
    names = list(initializations)
    return [Setting(study, activation, name, depth) for activation in activations for name in names for depth in depths]


def observe(
    setting: Setting, policy: Policy | None, seed: int, *, width: int, batch_size: int, dtype: torch.dtype
) -> Observation:
    """Make the network of a setting and measure it.

    Which batch and which weights it gets depends on the seed alone, not on what was observed before, and the global
    random state is as it was when this returns.

    Args:
        setting: Which.
        policy: Its initialization; None for PyTorch's own.
        seed: Seeds weights and batches.
        width: Units of each hidden layer.
        batch_size: Images of a batch.
        dtype: Of the network.

    Returns:
        The observation.
    """
    fit, held_out = digits_batches(batch_size, seed, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(PIXELS, CLASSES, setting.activation, setting.depth, width).to(dtype)
        if policy is not None:
            policy.apply(model, fit)
        return Observation(setting, seed, measure(model, held_out))
