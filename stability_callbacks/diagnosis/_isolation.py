"""Running code of a training step once more, as if it had not been run."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from stability_callbacks._validation import check_instance
from stability_callbacks.snapshots import BufferBackup, RandomState

__all__ = ["RandomState", "isolated"]

# Larger tensors that a module holds without registering them are data sets rather than statistics.
_LARGEST_COPY = 1 << 20


@contextmanager
def isolated(model: nn.Module, rng: RandomState | None = None) -> Iterator[None]:
    """Run code that uses a model, and put back what it changes: to repeat a step in the middle of training.

    Put back, also after an exception: the random states; all buffers, bit for bit; the attributes of the model and its
    submodules, such as ``training``, counters, lists of outputs and a metric's sums; the parameters' ``requires_grad``
    and ``.grad``, the same objects with the same values. Inside, every ``.grad`` is None.

    Not put back: parameters, which code that does not step an optimizer leaves alone; the insides of objects other than
    modules, tensors, lists, dicts and sets; unregistered tensors of more than 1,048,576 elements that are written to.

    Args:
        model: The model.
        rng: Random state to begin with. Default: as it is.

    Raises:
        TypeError: If an argument has the wrong type.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with isolated(norm):
        ...     output = norm(torch.randn(4, 2))
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([0., 0.]), tensor(0))
    """
    check_instance("model", model, nn.Module, "a torch.nn.Module")
    if rng is not None:
        check_instance("rng", rng, RandomState, "a RandomState")
    buffers = BufferBackup(model)
    buffers.take()
    with ExitStack() as put_back:
        put_back.callback(RandomState.capture().restore)
        put_back.callback(_restoring_gradients(model))
        put_back.callback(_restoring_attributes(model))
        put_back.callback(buffers.restore)  # first: it replaces buffers by name
        torch.clear_autocast_cache()  # casts of weights would be taken from there, and not made again
        for parameter in model.parameters():
            parameter.grad = None
        if rng is not None:
            rng.restore()
        yield


def _restoring_gradients(model: nn.Module) -> Callable[[], None]:
    taken = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for parameter, gradient, requires_grad in taken:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient

    return restore


def _restoring_attributes(model: nn.Module) -> Callable[[], None]:
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    values = list(chain.from_iterable(taken.values() for _, taken in attributes))
    containers = [(value, copy.copy(value)) for value in values if type(value) in _REFILL]
    registered = {id(tensor) for tensor in chain(model.parameters(), model.buffers())}
    tensors: dict[int, tuple[Tensor, int, Tensor]] = {}
    for value in chain(values, *(_members(container) for container, _ in containers)):
        if isinstance(value, Tensor) and id(value) not in registered and _is_small(value):
            tensors[id(value)] = value, value._version, value.detach().clone()

    @torch.no_grad()
    def restore() -> None:
        for module, taken in attributes:
            vars(module).clear()
            vars(module).update(taken)
        for container, content in containers:
            container.clear()
            _REFILL[type(container)](container, content)
        for tensor, version, content in tensors.values():
            if tensor._version != version:
                tensor.copy_(content)

    return restore


_REFILL: dict[type, Callable[[Any, Any], None]] = {
    list: list.extend,
    deque: deque.extend,
    set: set.update,
    dict: dict.update,
    OrderedDict: OrderedDict.update,
    defaultdict: defaultdict.update,
}


def _members(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _is_small(tensor: Tensor) -> bool:
    return not nn.parameter.is_lazy(tensor) and not tensor.is_inference() and tensor.numel() <= _LARGEST_COPY
