"""The kinds of findings of a signal report, and the remarks that are none."""

from __future__ import annotations

from stability_callbacks.diagnosis._kinds import Kind, register_kind

__all__ = [
    "DEAD",
    "DETACHED",
    "EXPLODING_BACKWARD",
    "EXPLODING_FORWARD",
    "FROZEN",
    "NON_FINITE",
    "REMEDIES",
    "SILENT",
    "UNUSED",
]
__all__ += ["VANISHING_BACKWARD", "VANISHING_FORWARD"]

NON_FINITE = "non-finite"
DEAD = "dead"
DETACHED = "detached"
EXPLODING_FORWARD = "exploding forward"
EXPLODING_BACKWARD = "exploding backward"
VANISHING_FORWARD = "vanishing forward"
VANISHING_BACKWARD = "vanishing backward"
SILENT = "silent by zero initialisation"
UNUSED = "unused"
FROZEN = "frozen"

# Of the faults, gravest first; the other flags are remarks.
REMEDIES = {
    NON_FINITE: "look at the first of them: at its input, and at logarithms, roots and divisions before it"
    " (stability_callbacks.numerics has safe ones)",
    DEAD: "no gradient can get back: look for rectifiers that no input passes (large negative biases), gates at zero,"
    " two zero-initialised layers in a row",
    DETACHED: "the loss depends on what these layers give, but no gradient comes back: look for `.detach()`, `.item()`,"
    " `torch.no_grad()`, `argmax`, rounding and casts to integers between them and the loss; if it is meant, say"
    " `requires_grad_(False)`",
    EXPLODING_FORWARD: "initialise with Auto() or LSUV(); where residual branches add up without norms, with"
    " ZeroResidual() or DepthScaled()",
    EXPLODING_BACKWARD: "add skip connections, since norms alone let gradients grow toward the input; where activations"
    " explode too, initialise with Auto() or LSUV()",
    VANISHING_FORWARD: "initialise with Auto() or LSUV(), add skip connections, use ReLU or GELU instead of sigmoid",
    VANISHING_BACKWARD: "initialise with Auto() or LSUV(), add skip connections, use ReLU or GELU instead of sigmoid",
}

for _name in REMEDIES:
    register_kind(Kind(_name, "error" if _name in (NON_FINITE, DEAD) else "warning"))
