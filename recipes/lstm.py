"""Recurrent networks that fail, and heal with the callbacks.

Scenario ``exploding``: an LSTM reads handwritten digits pixel by pixel, 64 time steps, with SGD and momentum 0.9 at a
learning rate of 0.5. Now and then the gradient is ten or a hundred times its usual size and throws the plain LSTM back;
the same LSTM with an orthogonal initialization, clipping, a warm-up and a cosine decay learns the task.

Scenario ``poisoned``: one batch in a hundred holds a NaN. The first one kills the plain LSTM, at a rate at which it
would learn; the guarded one skips it and ends where the plain one ends on clean data.

Scenario ``relu_rnn``: a recurrence with ReLU and careless weights is NaN after one step; the cure of ``exploding``
heals it.

Scenario ``sine``: a tanh recurrence continues sine waves. Clipping makes the difference; a decay quiets the end.

Before any training, the recipe also follows the gradient back through time for ten networks and draws what is left of
it, ``gradient_through_time.png``.

Run it with ``python -m recipes.lstm``; ``configs/lstm.yaml`` and ``configs/lstm/`` hold every default.
"""

from __future__ import annotations

from collections.abc import Sequence

from recipes.gradient_flow import gradient_through_time
from recipes.models import PixelRNN, SineRNN
from recipes.runner import run_recipe

__all__ = ["PixelRNN", "SineRNN", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe from the command line and return the exit code."""
    return run_recipe("lstm", argv, picture=gradient_through_time)


if __name__ == "__main__":
    raise SystemExit(main())
