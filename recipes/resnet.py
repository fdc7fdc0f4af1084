"""Deep convolutional networks on MNIST: five ways in which they fail, and the callbacks that heal each.

Scenario ``vanishing``: 20 convolutions in a row, without skip connections or norms, from PyTorch's initialization: no
gradient reaches the first ones. Orthogonal weights, a warm-up and clipping make the same network learn.

Scenario ``exploding``: 40 convolutions with skip connections but no norm, from He's initialization: each block adds to
the one before, and the weights are NaN at the second step. Residual branches that start at zero cure it.

Scenario ``stuck``: skip connections and batch normalization at a high learning rate. The loss stays finite, but the
network does not learn; with branches that start at zero and a warm-up it does.

Scenario ``poisoned``: one batch in a hundred holds a NaN. The guard skips the step and puts back the running statistics
of batch normalization, which the forward pass has already spoiled.

Scenario ``scaled``: one batch in a hundred is ten thousand times too large. Batch normalization hides it from the loss
and the gradient, while its running statistics are ruined; a guard that looks at the inputs sees it.

Run it with ``python -m recipes.resnet``; ``configs/resnet.yaml`` holds every default, ``configs/resnet/`` what differs
in each scenario.
"""

from __future__ import annotations

from collections.abc import Sequence

from recipes.models import ConvNet, ResNet18
from recipes.runner import run_recipe

__all__ = ["ConvNet", "ResNet18", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe from the command line and return the exit code."""
    return run_recipe("resnet", argv)


if __name__ == "__main__":
    raise SystemExit(main())
