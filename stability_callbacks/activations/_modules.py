"""The walk over the modules of a model, under the names that the user knows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from stability_callbacks._names import plain_name

__all__ = ["modules_by_name", "named_modules"]


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their plain names, in the order of ``model.named_modules()``.

    A wrapper, such as ``torch.compile`` puts around a module, and what it wraps bear the same name, the wrapper first.

    Args:
        model: The model; itself it has the name ``""``.
        remove_duplicate: Whether a module that is there several times comes once, under its first name. Default True.

    Yields:
        Plain name and module.

    Example:
        >>> shared = nn.ReLU()
        >>> [name for name, _ in named_modules(nn.Sequential(shared, nn.Linear(1, 1), shared))]
        ['', '0', '1']
    """
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        yield plain_name(name, model), module


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by all of their plain names; of a wrapper and what it wraps, the latter.

    Example:
        >>> model = nn.Sequential(nn.DataParallel(nn.Linear(1, 1)))
        >>> type(modules_by_name(model)["0"]).__name__
        'Linear'
    """
    # The inner one comes later, and stays.
    return dict(named_modules(model, remove_duplicate=False))
