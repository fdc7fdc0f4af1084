"""What to write instead of an operation that made a value or gradient that is not finite."""

from __future__ import annotations

import re

from stability_callbacks.diagnosis._reasons import REASONS

__all__ = ["NO_CURE", "cure_of", "is_backward", "meaning_of", "plain_operation"]

_BACKWARD = re.compile(r"Backward\d*$")


def cure_of(operation: str | None, reason: str | None = None) -> str | None:
    """What to write instead of an operation that made a value or gradient that is not finite.

    The reason comes first, where it is known: a mean over nothing and a mean that overflows have different cures.

    Args:
        operation: The operation, as ``"log"``, or the node of its backward pass, as ``"LogBackward0"``; None: not
            known.
        reason: Why, as in ``Cause.reason``. Default None: not known.

    Returns:
        The cure; None where no general one is known.

    Example:
        >>> cure_of("SqrtBackward0")
        'Use `stability_callbacks.numerics.safe_sqrt`: the slope of a square root is infinite at 0.'
        >>> cure_of("mean", "overflow_float16").partition(":")[0]
        'The numbers are too large for float16, which ends at 65,504'
    """
    plain = plain_operation(operation or "")
    for known in (_BY_BOTH.get(reason or "", {}), _BY_REASON if reason else {}):
        key = plain if known is not _BY_REASON else reason
        if cure := next((cure for names, cure in known.items() if key in names.split()), None):
            return cure
    return next((cure for names, cure in _CURES.items() if plain in names.split()), None)


def meaning_of(reason: str | None) -> str:
    """What a reason means, as a sentence that follows another; empty where it is not known."""
    return f" The reason: {REASONS[reason]}." if reason in REASONS else ""


def plain_operation(operation: str) -> str:
    """An operation's name as both passes write it.

    Example:
        >>> plain_operation("LinalgVectorNormBackward0"), plain_operation("linalg_vector_norm")
        ('linalgvectornorm', 'linalgvectornorm')
    """
    return _BACKWARD.sub("", operation).replace("_", "").lower()


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
    "pow": (
        "Use `stability_callbacks.numerics.safe_pow`: at 0 a negative power is infinite, and so is the slope of one "
        "below 1."
    ),
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

_LARGE_LAYERS = (
    "Activations or gradients overflow: look at the layers before it in the heat map; add a norm layer, initialize "
    "smaller, or clip and warm up if they grow over the steps."
)

# By reason and operation, before what is said of the reason alone.
_BY_BOTH = {
    "overflow": {
        "exp exp2 expm1 sinh cosh": _CURES["exp exp2 expm1 sinh cosh"],
        "div divide truedivide reciprocal rsqrt pow": (
            "The divisor is too close to 0, or the power too high: keep it away from 0, as "
            "`stability_callbacks.numerics.safe_div` and `safe_pow` do, or clamp the input."
        ),
    },
    "overflow_float16": {
        "exp exp2 expm1 sinh cosh": (
            "It overflows float16, which ends at 65,504: subtract the maximum first (`logsumexp`, `log_softmax`), "
            "train in `bf16-mixed`, or compute this part in float32 "
            "(`with torch.autocast(device_type, enabled=False):`, on `x.float()`)."
        ),
    },
    "pole": {names: cure for names, cure in _CURES.items() if "safe_" in cure or "Clamp" in cure},
    "domain": {
        "pow": (
            "A negative number has no power that is no integer: clamp the base at 0, take its magnitude "
            "(`x.abs().pow(p)`), or use an integer exponent."
        ),
        "sqrt": "Keep its input at 0 or above: `stability_callbacks.numerics.safe_sqrt` does so.",
        **{
            names: cure
            for names, cure in _CURES.items()
            if not {"pow", "sqrt"} & set(names.split()) and ("safe_" in cure or "Clamp" in cure or "Keep" in cure)
        },
    },
    "empty": {"nllloss nllloss2d crossentropyloss": _CURES["nllloss nllloss2d crossentropyloss"]},
}
_BY_BOTH["pole"]["std var stdmean varmean"] = "Add a small number to the variance before the root: it is 0."
_BY_BOTH["pole"]["log1p"] = _CURES["log1p"]

_BY_REASON = {
    "overflow": _LARGE_LAYERS + " Or scale what is given to it, or clamp it.",
    "overflow_float16": (
        "The numbers are too large for float16, which ends at 65,504: train in `bf16-mixed`, whose range is that of "
        "float32, or compute this part in float32 (`with torch.autocast(device_type, enabled=False):`, on `x.float()`)."
    ),
    "precision": (
        "Rounding makes it so: compute this part in float64 (`x.double()`), or raise the small `eps` in it to one that "
        "the type can hold."
    ),
    "pole": "Keep what it is given away from the values that the cause names, by `clamp` or a small `eps`.",
    "domain": "Keep what it is given inside of its domain, by `clamp` or a check of the data.",
    "empty": "It is taken over no elements: leave out empty batches, or divide a sum by the count, at least 1.",
    "one_element": "Of a single element use `correction=0`, or leave out batches and groups that are that small.",
    "masked_row": (
        "Give every query one position that it may attend to, or mask with the dtype's lowest number in place of "
        "`-inf`."
    ),
    "nonfinite_input": (
        "It works with infinity or NaN, and `0 * inf` is NaN: mask with the dtype's lowest number in place of `-inf`, "
        "and choose arguments before the operation in place of masking its result."
    ),
    "equal_values": (
        "The gradient of singular vectors or eigenvectors is undefined where two values are equal: add a small random "
        "diagonal matrix first, use only the values (`svdvals`, `eigvalsh`), or detach the vectors."
    ),
    "singular": "The matrix has no inverse: add a small multiple of the identity (`A + 1e-6 * torch.eye(n)`) first.",
    "alignment": (
        "Leave out targets that are longer than their frames, or pass `zero_infinity=True`; if there are many, the "
        "network shortens its input too much."
    ),
    "unset_memory": "Fill it first: use `torch.zeros` in place of `torch.empty`.",
}

NO_CURE = (
    "Replay the bundle (the command stands with it) and look at what the operation is given: it needs a check of its "
    "domain, a small `eps`, or smaller inputs."
)
