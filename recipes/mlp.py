"""A deep multilayer perceptron on handwritten digits: three ways in which it fails, each healed by the callbacks alone.

Scenario ``vanishing``: 30 linear layers with ReLU and PyTorch's own initialization, Adam at 0.001. That initialization
gives weights a sixth of the variance that ReLU needs: signals lose more than half their size in every layer, and so do
gradients on the way back. The last layers see the same for every image, the first ones get next to no gradient, and the
network stays at chance. Kaiming's initialization alone heals it.

Scenario ``exploding``: 20 layers, weights from a normal distribution with a standard deviation of 0.3, SGD with
momentum at 0.01. That is 1.7 times what ReLU needs for 64 units: signals and gradients grow in every layer, the first
step throws the weights far off, and soon after they are NaN. LSUV, which scales each layer on the first batch, heals it
at the same learning rate; clipping and a warm-up stand by, and without LSUV they keep the loss finite, no more.

Scenario ``poisoned``: a sound network of five layers, but one batch in a hundred holds a NaN. The first one makes every
weight of the plain network NaN; the guard skips these steps.

Run it with ``python -m recipes.mlp``; ``configs/mlp.yaml`` holds every default, ``configs/mlp/`` the scenarios.
"""

from __future__ import annotations

from collections.abc import Sequence

from recipes.models import DeepMLP
from recipes.runner import run_recipe

__all__ = ["DeepMLP", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe from the command line and return the exit code."""
    return run_recipe("mlp", argv)


if __name__ == "__main__":
    raise SystemExit(main())
