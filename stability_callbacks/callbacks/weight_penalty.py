"""The callback that penalizes large weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stability_callbacks._validation import check_bool, check_number, check_pattern
from stability_callbacks.engine import OptimizerStep, Phase, StabilityCallback, Training
from stability_callbacks.engine._lightning import MisconfigurationException
from stability_callbacks.gradient_pass import combine_norms, tensor_norms
from stability_callbacks.penalties import add_penalty_gradients_, shrink_, zero_fraction

__all__ = ["WeightPenalty"]


class WeightPenalty(StabilityCallback):
    r"""Adds an L1 and an L2 penalty on the weights, inside the optimizer's step, after all clipping.

    Use it when the optimizer has no weight decay of the kind you want: L1 for sparse weights, L2 only on some
    parameters, either of them in any optimizer. A skipped step is not penalized.

    .. math:: g \leftarrow g + \lambda_2 w + \lambda_1 \operatorname{sign}(w)

    As with torch's own weight decay the penalty's gradient comes after clipping; the L2 part equals
    ``torch.optim.SGD(weight_decay=...)`` to the last bit. With ``decoupled=True`` it bypasses the gradients, and so the
    optimizer's moments: with the learning rate :math:`\eta` of the step,

    .. math:: w \leftarrow (1 - \eta \lambda_2) \, w \text{ before the update}, \qquad
              w \leftarrow \operatorname{sign}(w) \max(|w| - \eta \lambda_1, 0) \text{ after it}

    which is AdamW's decay and the soft-thresholding that makes small weights exactly 0.

    Args:
        l1: Strength of the L1 penalty, >= 0. Default 0.
        l2: Strength of the L2 penalty, >= 0. Default 0.
        parameters: Regular expression, searched in the full parameter name: what to penalize. Default: everything with
            two dimensions or more, so neither biases nor the scales of normalization layers.
        decoupled: Whether weights are shrunk directly instead of through their gradients. Default False.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a strength is negative or both are 0, or ``parameters`` is not a regular expression.
        MisconfigurationException: At train start, if ``parameters`` matches nothing, or if it is decoupled and an
            optimizer has no learning rate.

    Example:
        >>> from stability_callbacks import WeightPenalty
        >>> penalty = WeightPenalty(l1=1e-5, parameters=r"encoder\..*weight")

    Metrics:
        ``stability/l1``: :math:`\lambda_1 \sum |w|`; ``stability/l2``: :math:`\tfrac12 \lambda_2 \sum w^2`;
        ``stability/zero_fraction``: share of penalized weights that are exactly 0 (of this rank's, where they are
        sharded). With several optimizers they end in the optimizer's name.

    References:
        Loshchilov, Hutter: Decoupled Weight Decay Regularization (2019), arXiv 1711.05101.
        Parikh, Boyd: Proximal Algorithms (2014), for soft-thresholding.
    """

    phase = Phase.CLIP

    def __init__(
        self, l1: float = 0.0, l2: float = 0.0, parameters: str | None = None, decoupled: bool = False
    ) -> None:
        super().__init__()
        self.l1 = check_number("l1", l1, at_least=0)
        self.l2 = check_number("l2", l2, at_least=0)
        if not self.l1 and not self.l2:
            raise ValueError("`l1` or `l2` must be > 0, got 0 for both")
        self.parameters = parameters
        self.decoupled = check_bool("decoupled", decoupled)
        self._pattern = None if parameters is None else check_pattern("parameters", parameters)
        self._scalars: list[tuple[Sequence[str], Tensor]] = []
        self._thresholds: dict[int, list[tuple[list[Tensor], float | Tensor]]] = {}

    def prepare(self, training: Training) -> None:
        self._scalars = []
        self._thresholds = {}
        names = [name for step in training.steps.values() for name, _ in step.parameters]
        if self._pattern is not None and not any(map(self._pattern.search, names)):
            few = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise MisconfigurationException(
                f"WeightPenalty(parameters={self.parameters!r}) matches no parameter of an optimizer; there are: {few}"
            )
        self.on_optimizers_changed(training)

    def on_optimizers_changed(self, training: Training) -> None:
        for step in training.steps.values():
            if self.decoupled and not step.rates.known:
                raise MisconfigurationException(
                    f"WeightPenalty(decoupled=True) shrinks weights by the learning rate, and {step.label} has none "
                    "of its own ('lr' is None or absent). Give the optimizer an `lr`, or use decoupled=False."
                )

    def penalize(self, step: OptimizerStep) -> None:
        assert step.gradients is not None
        penalized = [parameter for name, parameter in step.gradients.parameters if self._applies(name, parameter)]
        if not penalized:
            return
        if self.decoupled:
            self._decay(step, {id(parameter) for parameter in penalized})
        else:
            step.drop_loss_scale()
            add_penalty_gradients_(penalized, self.l1, self.l2)
        if self.logs_now(self.training):
            self._keep_scalars(step, penalized)

    def after_update(self, step: OptimizerStep) -> None:
        for members, threshold in self._thresholds.pop(step.index, ()):
            shrink_(members, l1=threshold)

    def device_scalars(self) -> list[tuple[Sequence[str], Tensor]]:
        scalars, self._scalars = self._scalars, []
        return scalars

    def _applies(self, name: str, parameter: Tensor) -> bool:
        return parameter.dim() >= 2 if self._pattern is None else self._pattern.search(name) is not None

    def _decay(self, step: OptimizerStep, penalized: set[int]) -> None:
        thresholds = self._thresholds[step.index] = []
        rates = step.rates.effective()
        if step.skip is not None and step.skipped is None:
            # Only the device knows whether the step is skipped: shrinking by 0 changes nothing.
            rates = [torch.where(step.skip, 0.0, rate) for rate in rates]
        for group, rate in zip(step.optimizer.param_groups, rates, strict=True):
            members = [parameter for parameter in group["params"] if id(parameter) in penalized]
            shrink_(members, l2=self.l2 * rate)
            thresholds.append((members, self.l1 * rate))

    def _keep_scalars(self, step: OptimizerStep, penalized: list[Tensor]) -> None:
        names, values = [], []
        if self.l1:
            names.append("stability/l1")
            values.append(self.l1 * combine_norms(tensor_norms(penalized, 1.0), 1.0))
        if self.l2:
            names.append("stability/l2")
            values.append(0.5 * self.l2 * combine_norms(tensor_norms(penalized)).square())
        names.append("stability/zero_fraction")
        values.append(zero_fraction(penalized).to(values[0].dtype))
        self._scalars.append(([name + step.suffix for name in names], torch.stack(values)))
