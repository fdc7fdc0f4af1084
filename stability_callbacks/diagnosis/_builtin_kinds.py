"""The kinds that this package finds itself, with what they mean and what to change."""

from __future__ import annotations

from stability_callbacks.diagnosis._kinds import Kind, Wording, register_kind

__all__: list[str] = []  # importing it registers them

# What the report and the record say; backticks mark code, braces what :meth:`Incident.wording` fills in.

register_kind(
    Kind(
        name="input",
        severity="warning",
        precedence=10,
        bundled=True,
        color="#b5458a",
        dark_color="#e58bc0",
        title="Inputs were out of range",
        meaning="A batch held NaN, infinities, or values above the bound of `InputRange`. The model is not to blame.",
        remedies=(
            (
                "Clean the data, or skip its bad samples in the data set; a bundle holds such a batch to look at "
                "(`batch.pt`)."
            ),
            (
                "Look for a division by a standard deviation of 0, missing values that are read as NaN, other units, "
                "and channels in another order."
            ),
            (
                "Keep `InputRange(max_abs=...)` a few times above what clean data reaches. Batch normalization hides "
                "large inputs from loss and gradient, and is ruined by them."
            ),
        ),
    )
)

register_kind(
    Kind(
        name="nonfinite",
        severity="error",
        gravity=3,
        precedence=20,
        bundled=True,
        color="#d03801",
        dark_color="#ff7a45",
        title="Loss or gradients were not finite, and it is not known where that began",
        meaning=(
            "The cause was not looked for, or running the batch once more did not reproduce the fault. In "
            "the latter case suspect another process, a kernel that is not deterministic, or the hardware."
        ),
        remedies=(
            "Let `FlightRecorder(trace=True)` look for the cause, or replay a bundle.",
            "If it can never be reproduced, see whether it is always the same machine or device.",
        ),
        phases={
            "input": Wording(
                title="Batches held values that are not finite",
                meaning="The model is not to blame: the numbers were broken before they reached it.",
                remedies=(
                    (
                        "Clean the data, or skip its bad samples in the data set; a bundle holds such a batch to look "
                        "at (`batch.pt`)."
                    ),
                    "Look for a division by a standard deviation of 0, and for missing values that are read as NaN.",
                    "Put `InputRange()` into `StepGuard`, which finds them before they do harm and says so.",
                ),
            ),
            "parameter": Wording(
                title="A parameter {where} was not finite before the step",
                meaning="An earlier update made it non-finite, or it was loaded so. Skipping steps no longer helps.",
                remedies=(
                    "Go on from the last good checkpoint. `Rollback` does so by itself.",
                    "Let `StepGuard` watch from the first step on, so that no such update is applied.",
                ),
            ),
            "buffer": Wording(
                title="A buffer {where} became non-finite",
                meaning=(
                    "Running statistics, as of batch normalization, take in whatever passes, also where the loss "
                    "stays finite. Evaluation is broken then, although all weights are fine."
                ),
                remedies=(
                    "Keep `StepGuard(protect_buffers=True)`, the default: it puts buffers back when it skips a step.",
                    "Put `InputRange()` into `StepGuard`, since most often it is a batch that does it.",
                ),
            ),
            "forward": Wording(
                title="`{operation}` {where} made a value that is not finite",
                meaning=(
                    "What it was given was as it was meant, what it gave was not{at}.{reason} Each such step is "
                    "skipped and costs a batch, and they come back until the operation is safe for every input."
                ),
                remedies=(
                    "{cure}",
                    (
                        "Masking the result with `torch.where` does not help: the masked branch still sends `0 * inf "
                        "= NaN` backward. Choose the argument first, as the functions in "
                        "`stability_callbacks.numerics` do."
                    ),
                ),
            ),
            "loss": Wording(
                title="The loss was not finite, and no operation of PyTorch made it so",
                meaning="It came from elsewhere: NumPy, a kernel of your own, or a number computed in Python.",
                remedies=("Check what `training_step` adds to the loss from outside of PyTorch.",),
            ),
            "backward": Wording(
                title="The gradient breaks in `{operation}` {where}",
                meaning=(
                    "The loss is finite, its gradient is not{at}: the slope there is infinite or undefined, or the "
                    "gradient overflows.{reason}"
                ),
                remedies=(
                    "{cure}",
                    (
                        "If the norms of layers grow over the steps before, in the heat map, gradients explode: clip "
                        "them (`GradientClipping(NormClip(1.0))`) and warm the learning rate up "
                        "(`LRSchedule(WarmupCosine())`)."
                    ),
                ),
            ),
        },
    )
)

register_kind(
    Kind(
        name="spike",
        severity="warning",
        bundled=True,
        color="#c98a00",
        dark_color="#f2c14e",
        title="Loss or gradient norm leapt far above its recent values",
        meaning=(
            "A few in a long run are normal: an odd batch, or a learning rate at the edge of what is stable. If they "
            "become more frequent, or the loss does not come back after them, training is about to diverge."
        ),
        remedies=(
            (
                "Clip harder: a threshold near the median of the raw norm in the chart (`NormClip(max_norm=...)`), or "
                "one that follows the norm by itself (`ZClip`, `AutoClip`)."
            ),
            (
                "Lower the peak of the learning rate, or warm up longer if the spikes fall into its rise "
                "(`LRSchedule(WarmupCosine(warmup=0.1))`)."
            ),
            (
                "With Adam try a `beta2` of 0.95: at 0.999 its second moment is still that of small gradients when "
                "large ones come."
            ),
            (
                "Look at the batches in the bundles. If they are clean and the steps did no harm, raise "
                "`Spike(threshold=...)`."
            ),
        ),
    )
)

register_kind(
    Kind(
        name="checkpoint_refused",
        severity="error",
        gravity=2,
        color="#6b4fc4",
        dark_color="#a995f5",
        title="Checkpoints were not written, because the state was not finite",
        meaning="They would have taken the place of good ones. The last one that was written is good.",
        remedies=(
            "Go on from that one, or let `Rollback` put the state right while training runs.",
            "Look for the update that did it: the first incident before, or a step that no guard saw.",
        ),
    )
)

register_kind(
    Kind(
        name="rollback",
        severity="error",
        gravity=1,
        color="#0068a8",
        dark_color="#58b4f0",
        title="Training went back to an earlier state",
        meaning=(
            "Steps went wrong in a row, the loss stayed high, or the state itself was not finite. The last good state "
            "was restored and the learning rate lowered; the work since then is lost."
        ),
        remedies=(
            "Look at the first incident before each rollback: it began there.",
            "If rollbacks follow each other, the learning rate is too high for good: lower it, or warm up longer.",
            "If much work is lost each time, take snapshots more often (`Rollback(every_n_steps=...)`).",
        ),
    )
)

register_kind(
    Kind(
        name="loss_scale",
        severity="info",
        color="#4e8a20",
        dark_color="#98cf62",
        title="The loss scale of fp16 was too large",
        meaning=(
            "Gradients overflowed under it while the loss was finite, from step {first} to {last}. The scaler then "
            "skips the step and halves the scale. At the start, and about once in 2,000 steps, this is how it works."
        ),
        remedies=(
            "If it goes on and the scale keeps falling, train with `precision='bf16-mixed'`, which needs no scale.",
            (
                "If the device has no bf16, start lower: `MixedPrecision('16-mixed', device, "
                "scaler=GradScaler(init_scale=2**10))`."
            ),
        ),
    )
)

register_kind(
    Kind(
        name="exception",
        severity="error",
        gravity=2,
        color="#a3195b",
        dark_color="#ff8fb8",
        title="An exception ended training",
        meaning=(
            "It was raised in the training step, and nothing tells that bad numbers caused it: neither the exception "
            "itself nor a tensor near the line that raised it."
        ),
        remedies=(
            "Look at the line that `raised_at` names.",
            "If numbers did cause it, check them there and return a loss of NaN: `StepGuard` then skips the step.",
        ),
    )
)

register_kind(
    Kind(
        name="update_arithmetic",
        severity="error",
        gravity=3,
        color="#8a5a00",
        dark_color="#e0b060",
        title="The optimizer made weights that are not finite from gradients that are",
        meaning=(
            "A setting of the optimizer does not fit the type of the weights. Going back does not help, since the same "
            "arithmetic follows."
        ),
        remedies=(
            "Change the setting that the evidence names.",
            "Keep the weights in float32: `precision='bf16-mixed'` or `'16-mixed'` instead of the `-true` ones.",
        ),
    )
)
