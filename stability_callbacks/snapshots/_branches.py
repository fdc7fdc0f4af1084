"""The dictionaries in which the tensors of training hang: those of modules, optimizers and the loss scaler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from stability_callbacks._optimizers import parameters_of
from stability_callbacks.snapshots._group_entries import optimizers_within

__all__ = ["Branch", "module_branches", "optimizer_branches", "scaler_branch"]

# A scaler's public methods give its numbers to the host, which has to wait for the device then.
_SCALER_TENSORS = ("_scale", "_growth_tracker")


class Branch(NamedTuple):
    """A dictionary with tensors, nested or not.

    Attributes:
        name: What the names of its tensors begin with.
        owner: Whose it is. The owner may replace it, as optimizers do when they load a state.
        attribute: Under what name the owner has it.
        keys: The only keys that matter; None for all.
        fixed: Whether no tensor may be replaced, because others know them: an optimizer knows parameters.
        closed: Whether keys that a snapshot has not are removed when it is restored.
    """

    name: str
    owner: object
    attribute: str
    keys: tuple[str, ...] | None = None
    fixed: bool = False
    closed: bool = False

    def live(self) -> dict[Any, Any]:
        """The dictionary."""
        live: dict[Any, Any] = getattr(self.owner, self.attribute)
        return live

    def content(self) -> dict[Any, Any]:
        """What matters in it, not to be written to."""
        live = self.live()
        return live if self.keys is None else {key: live[key] for key in self.keys if key in live}


def module_branches(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Branch]:
    """The parameters and buffers of named modules and their submodules, of each once."""
    seen: set[nn.Module] = set()
    for root, module in modules:
        for name, owner in module.named_modules(seen, root):
            yield Branch(name, owner, "_parameters", fixed=True)
            yield Branch(name, owner, "_buffers")


def optimizer_branches(name: str, optimizer: Optimizer, known: set[int]) -> Iterator[Branch]:
    """The state of an optimizer and those it wraps, after its parameters whose identity is not known from modules."""
    others = [parameter for parameter in parameters_of(optimizer) if id(parameter) not in known]
    if others:
        yield Branch(name, _Loose({"params": others}), "content", fixed=True)
    seen: set[int] = set()
    for depth, each in enumerate(optimizers_within(optimizer)):
        if id(each.state) not in seen:
            seen.add(id(each.state))
            yield Branch(name + ".wrapped" * min(depth, 1), each, "state", closed=True)


def scaler_branch(scaler: GradScaler) -> Branch:
    """The scale of a loss scaler and its growth tracker; both are None before its first step."""
    return Branch("scaler", scaler, "__dict__", keys=_SCALER_TENSORS)


class _Loose(NamedTuple):
    """Owns what hangs nowhere else."""

    content: dict[str, list[Any]]
