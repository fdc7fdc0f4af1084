"""One state of training, kept apart from the tensors of training."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from stability_callbacks.snapshots._branches import Branch
from stability_callbacks.snapshots._copies import TensorCopy
from stability_callbacks.snapshots._group_entries import GroupEntries
from stability_callbacks.snapshots._nested import leaves, map_leaves, put_back
from stability_callbacks.snapshots._random_state import RandomState

__all__ = ["HeldTensor", "HeldValue", "Snapshot"]


@dataclass(frozen=True)
class HeldTensor:
    """Stands for a tensor, by the position of its copy."""

    index: int


@dataclass(frozen=True)
class HeldValue:
    """Stands for anything else, by its position among the other values."""

    index: int


class Snapshot(NamedTuple):
    """One state of training.

    Attributes:
        step: The step that it is of.
        contents: What each branch held, with stand-ins; tensors that had no shape yet stay themselves.
        copies: Copies of the tensors.
        values: Copies of what else there was.
        entries: What each optimizer kept in its parameter groups.
        states: The state of each stateful object.
        random: The state of the random number generators.
    """

    step: int
    contents: list[tuple[Branch, Any]]
    copies: list[TensorCopy]
    values: list[Any]
    entries: list[GroupEntries]
    states: list[Any]
    random: RandomState | None

    def targets(self) -> list[Tensor]:
        """The tensors to put the copies into: those that hang where the originals did, or else new ones.

        Raises:
            RuntimeError: If a parameter can't be put back.
        """
        targets: dict[int, Tensor] = {}
        taken: set[int] = set()
        for branch, content in self.contents:
            now = dict(leaves(branch.content()))
            for path, leaf in leaves(content):
                tensor = now.get(path)
                if isinstance(leaf, Tensor) and not is_lazy(leaf):
                    raise self._refusal(branch, path, "had no shape yet")
                if not isinstance(leaf, HeldTensor) or leaf.index in targets:
                    continue
                if isinstance(tensor, Tensor) and id(tensor) not in taken and self.copies[leaf.index].fits(tensor):
                    targets[leaf.index] = tensor
                    taken.add(id(tensor))
                elif branch.fixed:
                    raise self._refusal(branch, path, "was another tensor, or had another layout")
        return [targets[index] if index in targets else each.blank() for index, each in enumerate(self.copies)]

    def hang(self, tensors: list[Tensor]) -> None:
        """Put the tensors, and copies of the other values, where the originals hung."""

        def original(leaf: Any) -> Any:
            if isinstance(leaf, HeldTensor):
                return tensors[leaf.index]
            return copy.deepcopy(self.values[leaf.index]) if isinstance(leaf, HeldValue) else leaf

        for branch, content in self.contents:
            put_back(branch.live(), map_leaves(original, content), branch.closed)

    def _refusal(self, branch: Branch, path: tuple[Any, ...], what: str) -> RuntimeError:
        name = ".".join(filter(None, (branch.name, *map(str, path))))
        return RuntimeError(
            f"the state of step {self.step} can't be restored, because the model has been changed: {name!r} {what}"
        )
