"""What incidents mean, and what to change: rules that need nothing but the record."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from inspect import cleandoc
from typing import NamedTuple

from stability_callbacks.diagnosis import Cause, Incident

__all__ = ["Advice", "Observation", "advise", "cure_of"]


class Observation(NamedTuple):
    """An incident, and its cause where it is known."""

    incident: Incident
    cause: Cause | None = None

    @property
    def phase(self) -> str:
        """Where the fault began, as in ``Cause.phase``; "unknown" where that is not known."""
        if self.cause is not None:
            return (self.cause.reproduced and self.cause.phase) or "unknown"
        if (phase := self.incident.evidence.get("phase")) in _PHASES:
            return str(phase)
        operation = self.incident.operation
        if operation is None:
            return "unknown"
        return "backward" if _BACKWARD.search(operation) else "forward"


class Advice(NamedTuple):
    """Advice on incidents that have one thing in common. Backticks mark code in its texts.

    Attributes:
        kind: Their kind.
        times: How many there are.
        title: What they are.
        meaning: What they mean.
        changes: What to change, the most promising first.
    """

    kind: str
    times: int
    title: str
    meaning: str
    changes: tuple[str, ...]


def advise(observations: Sequence[Observation]) -> list[Advice]:
    """Say what the incidents of a run mean and what to change: the gravest first, then the most frequent.

    Args:
        observations: The incidents and their causes, in order of steps.

    Returns:
        One piece of advice for each kind, and for non-finite steps one for each place where they begin.

    Example:
        >>> incident = Incident(7, 0, 7, 0, "nonfinite", {}, "skipped", module="head", operation="log")
        >>> [advice] = advise([Observation(incident)])
        >>> print(advice.title)
        `log` in module `head` made a value that is not finite
        >>> print(advice.changes[0])
        Use `stability_callbacks.numerics.safe_log`. For probabilities use `log_softmax` or `logsigmoid`.
    """
    groups: defaultdict[tuple[str, ...], list[Observation]] = defaultdict(list)
    for each in observations:
        groups[_group(each)].append(each)
    ordered = sorted(groups.items(), key=lambda group: (_GRAVITY.get(group[0][0], 0), -len(group[1])))
    return [_advice_on(members) for _, members in ordered]


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


# What ruins a run comes first, what is everyday business last.
_GRAVITY = {"checkpoint_refused": -3, "rollback": -2, "nonfinite": -4, "loss_scale": 1}
_PHASES = ("input", "parameter", "buffer", "forward", "loss", "backward")
_BACKWARD = re.compile(r"Backward\d*$")

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
        "lowest number in place of `-inf`. If not, the logits overflow: normalise queries and keys, or scale them down."
    ),
    "nllloss nllloss2d crossentropyloss": (
        "If all targets of a batch are ignored, the mean is over nothing: use `reduction='sum'` and divide by the "
        "count, at least 1."
    ),
    "binarycrossentropy": "Use `binary_cross_entropy_with_logits` on the logits.",
    "mean nanmean": "It is taken over no elements: leave out empty batches, or divide a sum by the count, at least 1.",
    "mm addmm bmm baddbmm matmul linear convolution": (
        "Activations overflow: look at the layers before it in the heat map; add a norm layer, or initialise smaller. "
        "In fp16, whose largest number is 65,504, train in `bf16-mixed`."
    ),
}

_NO_CURE = (
    "Replay the bundle (the command stands with it) and look at what the operation is given: it needs a check of its "
    "domain, a small `eps`, or smaller inputs."
)

# A title, what it means, what to change. By kind, those of non-finite steps by phase.
_TEXTS = {
    "nonfinite forward": """
        `{operation}` {where} made a value that is not finite

        What it was given was finite, what it gave was not{at}. Each such step is skipped and costs a batch, and they
        come back until the operation is safe for every input.

        - {cure}
        - Masking the result with `torch.where` does not help: the masked branch still sends `0 * inf = NaN` backward.
          Choose the argument first, as the functions in `stability_callbacks.numerics` do.
        """,
    "nonfinite backward": """
        The gradient breaks in `{operation}` {where}

        The loss is finite, its gradient is not{at}: the slope there is infinite or undefined, or the gradient
        overflows.

        - {cure}
        - If the norms of layers grow over the steps before, in the heat map, gradients explode: clip them
          (`GradientClipping(NormClip(1.0))`) and warm the learning rate up (`LRSchedule(WarmupCosine())`).
        """,
    "nonfinite input": """
        Batches held values that are not finite

        The model is not to blame: the numbers were broken before they reached it.

        - Clean the data, or skip its bad samples in the data set; a bundle holds such a batch to look at (`batch.pt`).
        - Look for a division by a standard deviation of 0, and for missing values that are read as NaN.
        - Put `InputRange()` into `StepGuard`, which finds them before they do harm and says so.
        """,
    "nonfinite parameter": """
        A parameter {where} was not finite before the step

        An earlier update spoiled it, or it was loaded so. Skipping steps can't help any more.

        - Go on from the last good checkpoint. `Rollback` does so by itself.
        - Let `StepGuard` watch from the first step on, so that no such update is applied.
        """,
    "nonfinite buffer": """
        A buffer {where} became non-finite

        Running statistics, as of batch normalisation, take in whatever passes, also where the loss stays finite.
        Evaluation is broken then, although all weights are fine.

        - Keep `StepGuard(protect_buffers=True)`, the default: it puts buffers back when it skips a step.
        - Put `InputRange()` into `StepGuard`, since most often it is a batch that does it.
        """,
    "nonfinite loss": """
        The loss was not finite, and no operation of PyTorch made it so

        It came from elsewhere: NumPy, a kernel of your own, or a number computed in Python.

        - Check what `training_step` adds to the loss from outside of PyTorch.
        """,
    "nonfinite unknown": """
        Loss or gradients were not finite, and it is not known where that began

        The cause was not looked for, or the fault did not come up again when the batch was run once more. In the latter
        case suspect another process, a kernel that is not deterministic, or the hardware.

        - Let `FlightRecorder(trace=True)` look for the cause, or replay a bundle.
        - If it never comes up again, see whether it is always the same machine or device.
        """,
    "input": """
        Inputs were out of range

        A batch held NaN, infinities, or values above the bound of `InputRange`. The model is not to blame.

        - Clean the data, or skip its bad samples in the data set; a bundle holds such a batch to look at (`batch.pt`).
        - Look for a division by a standard deviation of 0, missing values that are read as NaN, other units, and
          channels in another order.
        - Keep `InputRange(max_abs=...)` a few times above what clean data reaches. Batch normalisation hides large
          inputs from loss and gradient, and is ruined by them.
        """,
    "spike": """
        Loss or gradient norm leapt far above its recent values

        A few in a long run are normal: an odd batch, or a learning rate at the edge of what is stable. If they become
        more frequent, or the loss does not come back after them, training is about to diverge.

        - Clip harder: a threshold near the median of the raw norm in the chart (`NormClip(max_norm=...)`), or one that
          follows the norm by itself (`ZClip`, `AutoClip`).
        - Lower the peak of the learning rate, or warm up longer if the spikes fall into its rise
          (`LRSchedule(WarmupCosine(warmup=0.1))`).
        - With Adam try a `beta2` of 0.95: at 0.999 its second moment is still that of small gradients when large ones
          come.
        - Look at the batches in the bundles. If they are clean and the steps did no harm, raise `Spike(threshold=...)`.
        """,
    "rollback": """
        Training went back to an earlier state

        Steps went wrong in a row, the loss stayed high, or the state itself was not finite. The last good state was
        restored and the learning rate lowered; the work since then is lost.

        - Look at the first incident before each rollback: it began there.
        - If rollbacks follow each other, the learning rate is too high for good: lower it, or warm up longer.
        - If much work is lost each time, take snapshots more often (`Rollback(every_n_steps=...)`).
        """,
    "checkpoint_refused": """
        Checkpoints were not written, because the state was not finite

        They would have taken the place of good ones. The last one that was written is good.

        - Go on from that one, or let `Rollback` put the state right while training runs.
        - Look for the update that spoiled the state: the first incident before, or a step that no guard saw.
        """,
    "loss_scale": """
        The loss scale of fp16 was too large

        Gradients overflowed under it while the loss was finite, from step {first} to {last}. The scaler then skips the
        step and halves the scale. At the start, and about once in 2,000 steps, this is how it works.

        - If it goes on and the scale keeps falling, train with `precision='bf16-mixed'`, which needs no scale.
        - If the device has no bf16, start lower:
          `MixedPrecision('16-mixed', device, scaler=GradScaler(init_scale=2**10))`.
        """,
    "": """
        A detector of your own spoke up

        Its evidence is in the table of incidents.

        - Look at these steps in the curves, and at their bundles.
        """,
}


def _group(observation: Observation) -> tuple[str, ...]:
    """What incidents have in common that one piece of advice is for."""
    kind, phase = observation.incident.kind, observation.phase
    if kind != "nonfinite":
        return (kind,)
    if phase in ("input", "loss", "unknown"):
        return kind, phase
    return kind, phase, observation.incident.module or "", observation.incident.operation or ""


def _advice_on(members: Sequence[Observation]) -> Advice:
    first = members[0]
    incident = first.incident
    key = " ".join(_group(first)[:2])
    title, meaning, changes = cleandoc(_TEXTS.get(key, _TEXTS[""])).split("\n\n")
    facts = {
        "operation": incident.operation or "an operation",
        "where": _where(incident.module),
        "at": f", at `{incident.source.replace('`', '')}`" if incident.source else "",
        "cure": cure_of(incident.operation or "") or _NO_CURE,
        "first": f"{incident.step:,}",
        "last": f"{members[-1].incident.step:,}",
    }

    def text(template: str) -> str:
        return " ".join(template.split()).format_map(facts)

    items = (each for each in re.split(r"^- ", changes, flags=re.MULTILINE) if each)
    return Advice(incident.kind, len(members), text(title), text(meaning), tuple(map(text, items)))


def _where(module: str | None) -> str:
    if module is None:
        return "somewhere in the model"
    return f"in module `{module}`" if module else "in the model itself, outside of its submodules,"
