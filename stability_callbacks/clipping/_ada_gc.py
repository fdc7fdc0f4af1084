"""Clipping of each tensor by its own history."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from stability_callbacks._device_state import DeviceState
from stability_callbacks._validation import check_integer, check_number
from stability_callbacks.clipping._norm_clip import norm_clip_coefficient
from stability_callbacks.clipping._rule import ClipResult, ClipRule
from stability_callbacks.gradient_pass import (
    GradientNorms,
    Parameters,
    named_gradients,
    scale_each_gradient_,
)

__all__ = ["AdaGC"]


class AdaGC(ClipRule):
    r"""Clip each tensor's gradient to a multiple of a moving average of its own norm.

    For large models, where one layer's spike should not shrink the gradients of all the others.

    .. math:: h_i = \min\Big(1, \frac{\text{ratio} \cdot \gamma_i}{\lVert g_i \rVert}\Big), \qquad
              g_i \leftarrow h_i g_i, \qquad \gamma_i \leftarrow \beta \gamma_i + (1 - \beta) h_i \lVert g_i \rVert

    During a tensor's first ``warmup_steps`` gradients it is clipped together with all others, by the total norm, and
    :math:`\gamma_i` is the smallest of its clipped norms. A tensor whose norm is zero enters no statistic in that step;
    a non-finite total norm changes nothing at all. Tensors are told apart by name; unnamed ones by their position.

    Args:
        beta: Decay of the moving average, in ``(0, 1)``. Default 0.98.
        ratio: Norms may exceed their average by this factor, >= 1. Default 1.05.
        warmup_steps: Gradients seen of a tensor before it is clipped by its own average, >= 1. Default 100.
        warmup_max_norm: Largest total norm during the warm-up, > 0. Default 1.0.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of its range.

    Example:
        >>> rule = AdaGC(ratio=1.0, warmup_steps=1, warmup_max_norm=10.0)
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> for norm in (2.0, 4.0):
        ...     weight.grad = torch.tensor([norm])
        ...     _ = rule.clip_([("weight", weight)])
        >>> weight.grad
        tensor([2.])

    References:
        Wang et al.: AdaGC: Improving Training Stability for Large Language Model Pretraining (2025), arXiv 2502.11034.
    """

    linear: ClassVar[bool] = True

    def __init__(
        self, beta: float = 0.98, ratio: float = 1.05, warmup_steps: int = 100, warmup_max_norm: float = 1.0
    ) -> None:
        self.beta = check_number("beta", beta, above=0, below=1)
        self.ratio = check_number("ratio", ratio, at_least=1)
        self.warmup_steps = check_integer("warmup_steps", warmup_steps, at_least=1)
        self.warmup_max_norm = check_number("warmup_max_norm", warmup_max_norm, above=0)
        self._names: list[str] = []
        self._state = DeviceState()

    def __repr__(self) -> str:
        return (
            f"AdaGC(beta={self.beta:g}, ratio={self.ratio:g}, warmup_steps={self.warmup_steps}, "
            f"warmup_max_norm={self.warmup_max_norm:g})"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"names": list(self._names), **self._state.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._names = list(state_dict["names"])
        self._cached = None
        self._state.load_state_dict({name: value for name, value in state_dict.items() if name != "names"})

    @torch.no_grad()
    def clip_(self, parameters: Parameters, norms: GradientNorms | None = None) -> ClipResult:
        pairs = named_gradients(parameters)
        norms = self.measure(pairs, norms)
        if not pairs:
            return ClipResult(norms.total, norms.total, torch.ones_like(norms.total))
        rows = self._rows(norms)
        average, count = self._state["average"], self._state["count"]
        seen = norms.per_tensor.to(average.dtype)
        valid = torch.isfinite(norms.total) & (seen > 0)
        mine, known = average[rows], count[rows]
        warm = known >= self.warmup_steps

        together = norm_clip_coefficient(norms.total, self.warmup_max_norm).to(seen.dtype)
        alone = (self.ratio * mine / torch.where(valid, seen, 1.0)).clamp(max=1.0)
        factor = torch.where(valid, torch.where(warm, alone, together), 1.0)
        clipped = torch.where(valid, seen * factor, seen)
        updated = torch.where(
            warm,
            self.beta * mine + (1 - self.beta) * clipped,
            torch.where(known > 0, torch.minimum(mine, clipped), clipped),
        )
        average.index_copy_(0, rows, torch.where(valid, updated, mine))
        count.index_copy_(0, rows, known + valid)

        scale_each_gradient_(pairs, factor.to(norms.per_tensor.dtype))
        return ClipResult.from_parts(norms.total, clipped, factor)

    def _rows(self, norms: GradientNorms) -> Tensor:
        """Where the statistics of the given tensors stand; new names get rows at the end."""
        device = norms.total.device
        known = set(self._names)
        added = [name for name in norms.names if name not in known]
        dtype = torch.float32 if device.type == "mps" else torch.float64
        for key in ("average", "count"):
            before = self._state[key].to(device) if key in self._state else torch.zeros(0, dtype=dtype, device=device)
            self._state[key] = torch.cat([before, before.new_zeros(len(added))]) if added else before
        self._names += added
        key_of_rows = (norms.names, len(self._names), device)
        if self._cached is None or self._cached[0] != key_of_rows:
            position = {name: row for row, name in enumerate(self._names)}
            rows = torch.tensor([position[name] for name in norms.names], device=device)
            self._cached = (key_of_rows, rows)
        return self._cached[1]

    _cached: tuple[Any, Tensor] | None = None
