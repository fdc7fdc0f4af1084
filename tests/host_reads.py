"""What the host may not do on the path of a step: ask for the value of a tensor."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# Besides the value of an element, the number of elements that a result will have.
_READING = {
    _aten._local_scalar_dense.default,
    _aten.is_nonzero.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
}
# What reads memory without a word to the dispatcher.
_READING_METHODS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}


class ForbidHostReads(TorchDispatchMode):
    """Inside, ``bool(tensor)``, ``tensor.item()``, ``tensor.tolist()`` and the like raise, in C++ code too.

    So do ``nonzero`` and its kin, for which the host has to learn how large their result is.
    """

    def __enter__(self) -> ForbidHostReads:
        self._methods = ExitStack()
        self._methods.enter_context(_ForbidMethods())
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._methods.close()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = operation is _aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        reads = by_mask or operation in _READING
        assert not reads, f"the host reads a tensor: {operation}"
        return operation(*args, **(kwargs or {}))


class _ForbidMethods(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function not in _READING_METHODS, f"the host reads a tensor: {function}"
        return function(*args, **(kwargs or {}))
