"""What the host may not do on the path of a step: ask for the value of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ForbidHostReads(TorchDispatchMode):
    """Inside, ``bool(tensor)``, ``tensor.item()`` and the like raise, in C++ code too."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert operation is not torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
        return operation(*args, **(kwargs or {}))
