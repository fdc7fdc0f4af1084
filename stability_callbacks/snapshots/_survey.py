"""Which tensors of training there are now, where they hang, and where they lie in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from stability_callbacks._identity import same_objects
from stability_callbacks.gradient_pass import group_by_device_and_dtype
from stability_callbacks.snapshots._branches import Branch
from stability_callbacks.snapshots._copies import HostMemory, Layout, TensorCopy, Transfer
from stability_callbacks.snapshots._memory import address_of, memory_of
from stability_callbacks.snapshots._nested import flatten, map_leaves
from stability_callbacks.snapshots._snapshot import HeldTensor, HeldValue, Snapshot

__all__ = ["Survey"]


class Survey:
    """All that a snapshot needs to know and that hardly ever changes from one to the next.

    To find it out takes small models longer than to copy it, so a survey is kept while it :meth:`holds`.

    Args:
        branches: Where the tensors hang.

    Attributes:
        contents: See :class:`Snapshot`.
        values: What else there is, as of the last look.
    """

    def __init__(self, branches: list[Branch]) -> None:
        self._branches = branches
        self._modules = [branch.owner for branch in branches if isinstance(branch.owner, nn.Module) and branch.fixed]
        self._optimizers: list[Any] = [branch.owner for branch in branches if hasattr(branch.owner, "param_groups")]
        self._tensors: list[Tensor] = []
        self._complete = True
        values = 0
        held: dict[int, HeldTensor] = {}

        def stand_in(leaf: Any) -> Any:
            nonlocal values
            if not isinstance(leaf, Tensor):
                values += 1
                return HeldValue(values - 1)
            if is_lazy(leaf):
                self._complete = False
                return leaf
            if id(leaf) not in held:
                held[id(leaf)] = HeldTensor(len(held))
                self._tensors.append(leaf)
            return held[id(leaf)]

        self.contents = [(branch, map_leaves(stand_in, branch.content())) for branch in branches]
        self._layouts = [Layout.of(tensor) for tensor in self._tensors]
        dense = [index for index, layout in enumerate(self._layouts) if layout is not None]
        # The memory is kept, so no other can come to lie at its address.
        memory = [memory_of(self._tensors[index]) for index in dense]
        self._groups = [
            ([dense[member] for member in members], [memory[member] for member in members])
            for members in group_by_device_and_dtype(memory).values()
        ]
        self._others = [index for index, layout in enumerate(self._layouts) if layout is None]
        self._local = [self._tensors[index] for index in dense if not isinstance(self._tensors[index], DTensor)]
        self._sharded = [tensor for tensor in self._tensors if isinstance(tensor, DTensor)]
        self._structure, self.values = self._take_apart()
        self._where = self._look()

    def holds(self) -> bool:
        """Look again: whether modules, containers, keys and tensors are the same objects, with the same memory."""
        structure, self.values = self._take_apart()
        return self._complete and same_objects(structure, self._structure) and self._look() == self._where

    def room(self, retired: Snapshot | None) -> list[TensorCopy]:
        """Room for copies of the tensors; of those that are not dense, clones.

        Args:
            retired: A snapshot whose memory may be used.
        """
        if retired is not None and retired.contents is self.contents:
            copies = retired.copies
        else:
            host = HostMemory(() if retired is None else retired.copies)
            copies = [
                TensorCopy(tensor, None) if layout is None else TensorCopy(host.like(memory_of(tensor)), layout)
                for tensor, layout in zip(self._tensors, self._layouts, strict=True)
            ]
        if not self._others:
            return copies
        copies = list(copies)
        for index in self._others:
            copies[index] = TensorCopy(memory_of(self._tensors[index]).detach().clone(), None)
        return copies

    def fill(self, copies: list[TensorCopy], transfer: Transfer) -> None:
        """Copy the dense tensors."""
        for members, memory in self._groups:
            transfer.save(memory, [copies[index].values for index in members])

    def _take_apart(self) -> tuple[list[Any], list[Any]]:
        structure: list[Any] = []
        values: list[Any] = []
        for module in self._modules:
            structure.extend(module._modules.values())
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                structure.extend(group["params"])
        for branch in self._branches:
            flatten(branch.content(), structure, values)
        return structure, values

    def _look(self) -> tuple[list[torch.Size], list[int]]:
        """The tensors' shapes and addresses."""
        shapes = [tensor.shape for tensor in self._tensors]
        return shapes, [tensor.data_ptr() for tensor in self._local] + [address_of(tensor) for tensor in self._sharded]
