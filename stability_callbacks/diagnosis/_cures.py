"""What to write instead of an operation that made a value or gradient that is not finite."""

from __future__ import annotations

import re

__all__ = ["NO_CURE", "cure_of", "is_backward"]

_BACKWARD = re.compile(r"Backward\d*$")


def cure_of(operation: str) -> str | None:
    """What to write instead of an operation that made a value or gradient that is not finite.

    Args:
        operation: The operation, as ``"log"``, or the node of its backward pass, as ``"LogBackward0"``.

    Returns:
        The cure; None where no general one is known.

    Example:
        >>> cure_of("SqrtBackward0")
        'Use `stability_callbacks.numerics.safe_sqrt`: the slope of a square root is infinite at 0.'
    """
    plain = _BACKWARD.sub("", operation).replace("_", "").lower()
    return next((cure for names, cure in _CURES.items() if plain in names.split()), None)


def is_backward(operation: str) -> bool:
    """Whether an operation is a node of the backward pass.

    Example:
        >>> is_backward("SqrtBackward0"), is_backward("sqrt")
        (True, False)
    """
    return _BACKWARD.search(operation) is not None


# By the names of operations, without underscores, since the backward pass writes them in another way.
_CURES = {
    "log log2 log10": (
        "Use `stability_callbacks.numerics.safe_log`. For probabilities use `log_softmax` or `logsigmoid`."
    ),
    "log1p": "Keep its input above -1. For `log(1 - exp(x))` use `stability_callbacks.numerics.log1mexp`.",
    "sqrt rsqrt": "Use `stability_callbacks.numerics.safe_sqrt`: the slope of a square root is infinite at 0.",
    "div divide truedivide reciprocal": (
        "Use `stability_callbacks.numerics.safe_div`, or make sure that no divisor is 0: an empty mask or a count of 0 "
        "is the usual one."
    ),
    "pow": "Use `stability_callbacks.numerics.safe_pow`: the slope of a power below 1 is infinite at 0.",
    "norm linalgvectornorm cdist euclideandist": (
        "Use `stability_callbacks.numerics.safe_norm`: the slope of a norm is undefined at a vector of zeros."
    ),
    "acos": (
        "Use `stability_callbacks.numerics.safe_acos`: rounding takes a cosine beyond 1, where the slope is infinite."
    ),
    "asin": "Subtract from `pi / 2` what `stability_callbacks.numerics.safe_acos` gives: the slope is infinite at 1.",
    "acosh atanh logit": "Clamp its input to the inside of its domain, as `torch.logit(x, eps=1e-6)` does.",
    "std var stdmean varmean": (
        "Add a small number to the variance before the root. Of a single element use `correction=0`."
    ),
    "exp exp2 expm1 sinh cosh": (
        "It overflows: subtract the maximum first (`logsumexp`, `log_softmax`), use `softplus`, or clamp its input."
    ),
    "softmax logsoftmax safesoftmax logsumexp scaleddotproductattention": (
        "If a row is masked entirely, give every query one position that it may attend to, or mask with the dtype's "
        "lowest number in place of `-inf`. If not, the logits overflow: normalize queries and keys, or scale them down."
    ),
    "nllloss nllloss2d crossentropyloss": (
        "If all targets of a batch are ignored, the mean is over nothing: use `reduction='sum'` and divide by the "
        "count, at least 1."
    ),
    "binarycrossentropy": "Use `binary_cross_entropy_with_logits` on the logits.",
    "mean nanmean": "It is taken over no elements: leave out empty batches, or divide a sum by the count, at least 1.",
    "mm addmm bmm baddbmm matmul linear convolution": (
        "Activations overflow: look at the layers before it in the heat map; add a norm layer, or initialize smaller. "
        "In fp16, whose largest number is 65,504, train in `bf16-mixed`."
    ),
}

NO_CURE = (
    "Replay the bundle (the command stands with it) and look at what the operation is given: it needs a check of its "
    "domain, a small `eps`, or smaller inputs."
)
