"""Telling an overflow from a pole: the operation is run once more, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from stability_callbacks.diagnosis._reasons import Reason, overflow_from, overflow_of, type_name
from stability_callbacks.diagnosis._values import largest, numbers, tensors_in

__all__ = ["reason_in_double"]

# Arguments and results of more elements are not computed again.
_MOST_ELEMENTS = 1 << 24

# At a pole a step away the value is finite; beyond an overflow it is not.
_STEP = 1e-3

# Scaling the input down, an overflow is come to by way of numbers such as these; a pole is not.
_HUGE = 1e60
_MOST_HALVINGS = 40
_MOST_VALUES = 3


class _Run(NamedTuple):
    """An operation as it was called."""

    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]

    def __call__(self, change: Callable[[Tensor], Tensor] = lambda x: x) -> list[Tensor]:
        """Its results in float64, of arguments that are changed before."""
        names = [argument.name for argument in self.func._schema.arguments]
        args = [False if name == "half_to_float" else each for name, each in zip(names, self.args, strict=False)]

        def widened(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(_double(value)) if value.is_floating_point() or value.is_complex() else value.clone()
            return _double_type(value) if isinstance(value, torch.dtype) else value

        return tensors_in(self.func(*tree_map(widened, args), **tree_map(widened, self.kwargs)))


@torch.no_grad()
def reason_in_double(func: Any, args: Sequence[Any], kwargs: dict[str, Any], outputs: Sequence[Tensor]) -> Reason:
    """Why an operation gave values that are not finite, by what it gives in float64.

    Where it is finite there, the type's range or precision was too small. Where it is not, the arguments are moved a
    little: a pole is left by that. An overflow of float64 itself is told by the huge numbers on the way to it.

    Args:
        func: The operation, in PyTorch's inner language.
        args: Its arguments, with the values before the call, and numbers for tensors.
        kwargs: The same.
        outputs: Its results, as it gave them, before what else it wrote to.

    Returns:
        The reason; empty where the operation can't be run again, or nothing can be told.
    """
    run = _Run(func, args, kwargs)
    if not _can_run(run, outputs):
        return Reason()
    try:
        wide = run()
        pairs = [
            (numbers(narrow), each)
            for narrow, each in zip(outputs, wide, strict=False)
            if each.shape == numbers(narrow).shape and (each.is_floating_point() or each.is_complex())
        ]
        return _of_range(run, pairs) or _of_place(run, pairs)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # not every kernel knows float64
        return Reason()


def _can_run(run: _Run, outputs: Sequence[Tensor]) -> bool:
    if getattr(run.func, "namespace", "") != "aten" or torch.Tag.nondeterministic_seeded in run.func.tags:
        return False
    tensors = [*tensors_in((run.args, run.kwargs)), *outputs]
    plain = all(each.layout == torch.strided and each.device.type not in ("mps", "meta") for each in tensors)
    return plain and sum(each.numel() for each in tensors) <= _MOST_ELEMENTS


def _of_range(run: _Run, pairs: Iterable[tuple[Tensor, Tensor]]) -> Reason:
    """What was finite, had the type only been wider."""
    size = _largest_finite((run.args, run.kwargs))
    for narrow, wide in pairs:
        mended = ~narrow.isfinite() & wide.isfinite()
        if not mended.any():
            continue
        limit, name = torch.finfo(narrow.dtype).max, type_name(narrow.dtype)
        result = largest(wide[mended])
        if result >= limit:
            return overflow_from(size, narrow.dtype)
        if size**2 >= limit:
            words = f"overflow on the way: the largest input is {size:.6g}, {name} ends at {limit:.6g}"
            return Reason(overflow_of(narrow.dtype), f"{words}; in float64 the result is at most {result:.6g}")
        words = f"{name} is too coarse or too narrow for it: in float64 the result is at most {result:.6g}"
        return Reason("precision", words)
    return Reason()


def _of_place(run: _Run, pairs: Sequence[tuple[Tensor, Tensor]]) -> Reason:
    """What is not finite in float64 either."""
    inputs = [each for each in tensors_in((run.args, run.kwargs)) if each.is_floating_point() or each.is_complex()]
    if not all(bool(each.isfinite().all()) for each in inputs):
        return Reason()
    for index, (narrow, wide) in enumerate(pairs):
        bad = ~narrow.isfinite() & ~wide.isfinite()
        if not bad.any():
            continue
        where, undefined = _places(run, inputs, bad), bool(wide[bad].isnan().all())
        is_near_finite = _is_near_finite(run, index, bad)
        if is_near_finite and not undefined:
            return Reason("pole", f"it has a pole{where}: it is infinite in float64, too")
        if not is_near_finite and _is_reached_by_huge_numbers(run, index, bad):
            return overflow_from(_largest_finite((run.args, run.kwargs)), narrow.dtype)
        if undefined:
            return Reason("domain", f"it is not defined{where}, in float64 neither")
        return Reason(None, f"it is infinite{where}, in float64 too")
    return Reason()


def _is_near_finite(run: _Run, index: int, bad: Tensor) -> bool:
    return any(_some_finite(run, index, bad, partial(_moved, step=step)) for step in (_STEP, -_STEP))


def _moved(x: Tensor, step: float) -> Tensor:
    """A little to one side, not by the same in each place: singular matrices become regular."""
    pattern = 1 + 0.5 * torch.arange(x.numel(), device=x.device).double().mul(1.7).sin().reshape(x.shape)
    return x + step * pattern * (1 + x.abs())


def _is_reached_by_huge_numbers(run: _Run, index: int, bad: Tensor) -> bool:
    low, high = -300.0, 0.0  # of the factor's logarithm; all is infinite above, and something finite below
    if not _some_finite(run, index, bad, lambda x: x * 10.0**low):
        return False
    for _ in range(_MOST_HALVINGS):
        middle = (low + high) / 2
        values = run(lambda x, factor=10.0**middle: x * factor)[index][bad]  # type: ignore[misc]
        finite = values.isfinite()
        if not finite.any():
            high = middle
            continue
        if largest(values[finite]) > _HUGE:
            return True
        low = middle
    return False


def _some_finite(run: _Run, index: int, bad: Tensor, change: Callable[[Tensor], Tensor]) -> bool:
    return bool(run(change)[index][bad].isfinite().any())


def _places(run: _Run, inputs: Sequence[Tensor], bad: Tensor) -> str:
    """Which numbers it was given there."""
    if torch.Tag.pointwise in run.func.tags:
        try:
            given = [each.expand(bad.shape)[bad].unique() for each in inputs]
        except RuntimeError:
            return ""
        return " at " + ", ".join(_some(each) for each in given) if given else ""
    zeros = sum(int((each == 0).sum()) for each in inputs)
    return f" for what it was given, with {zeros} zero{'' if zeros == 1 else 's'} in it" if zeros else ""


def _some(values: Tensor) -> str:
    shown = [f"{each:.6g}" for each in values[:_MOST_VALUES].tolist()]
    return " or ".join(shown) + (" and others" if len(values) > _MOST_VALUES else "")


def _largest_finite(tree: Any) -> float:
    return max(_sizes(tree), default=0.0)


def _sizes(tree: Any) -> Iterator[float]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            finite = leaf[leaf.isfinite()]
            if finite.numel():
                yield largest(finite)
        elif isinstance(leaf, float) and math.isfinite(leaf):
            yield abs(leaf)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_double_type(tensor.dtype), copy=True)


def _double_type(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.double if dtype.is_floating_point else dtype
