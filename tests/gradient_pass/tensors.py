"""Tensors of all types, and the norms that they have."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

NAN, INF = math.nan, math.inf
NORM_TYPES = [1.0, 2.0, 3.5, INF]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
LARGEST_HALF = torch.finfo(torch.float16).max
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
NORMS = st.just(0.0) | st.floats(0.0625, 100, width=32)


def norm_reference(tensor: Tensor, norm_type: float) -> float:
    magnitudes = np.abs(tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).resolve_conj().numpy())
    if magnitudes.size == 0:
        return 0.0
    return float(magnitudes.max() if norm_type == INF else (magnitudes**norm_type).sum() ** (1 / norm_type))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from([*FLOATS, *COMPLEX]))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    exact = torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64, generator=generator)
    exact = exact * draw(st.sampled_from([1e-4, 1.0, 1e4]))
    tensor = (exact if dtype.is_complex else exact.clamp(-LARGEST_HALF, LARGEST_HALF)).to(dtype)
    return tensor.permute(tuple(reversed(range(tensor.dim())))) if draw(st.booleans()) else tensor
