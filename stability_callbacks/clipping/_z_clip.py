"""Clipping of norms that stand out by their z-score."""

from __future__ import annotations

import torch
from torch import Tensor

from stability_callbacks._validation import check_choice, check_integer, check_number
from stability_callbacks.clipping._adaptive import AdaptiveNormClip

__all__ = ["ZClip"]

# Standard deviation taken for at least this share of the mean. Constant norms during the warm-up would otherwise leave
# a variance of 0, and a threshold that no later norm could move.
_LEAST_DEVIATION = 0.1


class ZClip(AdaptiveNormClip):
    r"""Clip the total norm where its z-score stands out from a moving mean and variance: spikes only.

    Made for language-model pretraining, where ordinary steps should be left alone and rare spikes tamed.

    .. math:: z = \frac{\lVert g \rVert - \mu}{\sigma}, \qquad
              \lVert g \rVert \leftarrow \begin{cases}
                  \mu + z_t \sigma \cdot z_t / z & z > z_t \text{, mode "adaptive"} \\
                  \mu & z > z_t \text{, mode "mean"} \end{cases}

    After each step the statistics take in the norm so clipped, :math:`x`:
    :math:`\mu \leftarrow \alpha \mu + (1 - \alpha) x` and
    :math:`\sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha) (x - \mu)^2`. They start from the mean and the population
    variance of the first ``warmup_steps`` norms. In the z-score :math:`\sigma` is at least a tenth of :math:`\mu`, so
    that constant norms do not lock it. Zero and non-finite norms are left out of everything.

    Args:
        alpha: Decay of the moving statistics, in ``(0, 1)``. Default 0.97.
        z_threshold: z-score from which a norm is a spike, > 0. Default 2.5.
        warmup_steps: Number of norms to learn from before z-scores are used, >= 1. Default 25.
        max_norm: A cap on the norm besides, during the warm-up too; None for no cap. Default 1.0.
        mode: ``"adaptive"`` (default): the larger the spike, the harder it is clipped; ``"mean"``: down to the mean.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of its range.

    Example:
        >>> rule = ZClip(z_threshold=2.0, warmup_steps=2, max_norm=None)
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> for norm in (0.5, 1.5, 3.0):  # mean 1, standard deviation 0.5: the third is a spike with z = 4
        ...     weight.grad = torch.tensor([norm])
        ...     _ = rule.clip_([weight])
        >>> weight.grad
        tensor([1.5000])

    References:
        Kumar et al.: ZClip: Adaptive Spike Mitigation for LLM Pre-Training (2025), arXiv 2504.02507.
    """

    def __init__(
        self,
        alpha: float = 0.97,
        z_threshold: float = 2.5,
        warmup_steps: int = 25,
        max_norm: float | None = 1.0,
        mode: str = "adaptive",
    ) -> None:
        super().__init__()
        self.alpha = check_number("alpha", alpha, above=0, below=1)
        self.z_threshold = check_number("z_threshold", z_threshold, above=0)
        self.warmup_steps = check_integer("warmup_steps", warmup_steps, at_least=1)
        self.max_norm = None if max_norm is None else check_number("max_norm", max_norm, above=0)
        self.mode = check_choice("mode", mode, ("adaptive", "mean"))

    def __repr__(self) -> str:
        return (
            f"ZClip(alpha={self.alpha:g}, z_threshold={self.z_threshold:g}, warmup_steps={self.warmup_steps}, "
            f"max_norm={self.max_norm}, mode={self.mode!r})"
        )

    def _update(self, norm: Tensor, valid: Tensor) -> Tensor:
        # During the warm-up these are running moments (Welford's), which end as mean and population variance.
        count, mean, variance = self._state.on(norm.device, count=0, mean=0, variance=0)
        x = torch.where(valid, norm, mean).to(mean.dtype)
        warm = count >= self.warmup_steps

        deviation = torch.maximum(variance.sqrt(), _LEAST_DEVIATION * mean)
        z = (x - mean) / torch.where(deviation > 0, deviation, 1.0)
        target = mean if self.mode == "mean" else mean + self.z_threshold**2 * deviation / z
        spike = warm & valid & (z > self.z_threshold)
        threshold = torch.where(spike, target, float("inf"))
        x = torch.minimum(x, threshold)

        moving_mean = self.alpha * mean + (1 - self.alpha) * x
        moving_variance = self.alpha * variance + (1 - self.alpha) * (x - moving_mean).square()
        first_mean = mean + (x - mean) / (count + 1)
        first_variance = (variance * count + (x - mean) * (x - first_mean)) / (count + 1)
        mean.copy_(torch.where(valid, torch.where(warm, moving_mean, first_mean), mean))
        variance.copy_(torch.where(valid, torch.where(warm, moving_variance, first_variance), variance))
        count.add_(valid)
        return threshold if self.max_norm is None else threshold.clamp(max=self.max_norm)
