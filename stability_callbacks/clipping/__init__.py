"""Clip rules: what to do with gradients that are too large. Pure PyTorch, each usable in a hand-written loop.

Example:
    >>> import torch
    >>> from stability_callbacks.clipping import NormClip
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([30.0, 40.0])
    >>> result = NormClip(max_norm=5.0).clip_([weight])
    >>> float(result.norm), weight.grad
    (50.0, tensor([3.0000, 4.0000]))
"""

from stability_callbacks.clipping._ada_gc import AdaGC
from stability_callbacks.clipping._agc import AGC
from stability_callbacks.clipping._auto_clip import AutoClip
from stability_callbacks.clipping._norm_clip import NormClip
from stability_callbacks.clipping._outlier_clip import OutlierClip
from stability_callbacks.clipping._per_group import PerGroup
from stability_callbacks.clipping._rule import ClipResult, ClipRule
from stability_callbacks.clipping._value_clip import ValueClip
from stability_callbacks.clipping._z_clip import ZClip

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "ClipResult",
    "ClipRule",
    "NormClip",
    "OutlierClip",
    "PerGroup",
    "ValueClip",
    "ZClip",
]
