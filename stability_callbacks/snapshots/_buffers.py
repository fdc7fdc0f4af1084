"""A copy of a module's buffers, taken before a forward pass and put back if the step is skipped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from stability_callbacks.gradient_pass import group_by_device_and_dtype, tensor_norms
from stability_callbacks.snapshots._memory import address_of, copy_in_groups, is_float, memory_of

__all__ = ["BufferBackup"]

# Batch normalization writes to its statistics without raising their version counter, and so do writes through `.data`,
# as codebooks and queues make them. So only where large masks and tables of integers are concerned is it relied on.
_ALWAYS_COPIED = 65_536

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class BufferBackup:
    """Backs up all buffers of a module, integer ones too, and puts them back bit for bit.

    One bad batch ruins the running statistics of a normalization layer for good, although its update is skipped:
    forward has written to them. Take a backup before the forward pass and restore it when the step is skipped.
    Restoring also undoes the replacement of a buffer by another tensor. Buffers registered since the backup stay, and
    are in the next one; lazy buffers are, once they have a shape.

    Copies go to preallocated storage, in groups. Integer and boolean buffers of more than 65,536 elements, and sparse
    ones, are copied only when their version counter says that they were written to; writes through ``.data`` escape it.

    Args:
        module: The module whose buffers are backed up, shared ones once.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> backup = BufferBackup(norm)
        >>> backup.take()
        >>> _ = norm(torch.full((2, 1), float("nan")))
        >>> backup.nonfinite()  # the batch counter is an integer, so no candidate
        (('running_mean', 'running_var'), tensor([True, True]))
        >>> backup.restore()
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([0.]), tensor(0))
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._taken: list[tuple[_Slot, Tensor | None]] | None = None
        self._copies: dict[int, _Copy] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look for submodules that were added or removed; registered buffers are noticed without it."""
        self._registries = [owner._buffers for owner in self.module.modules()]
        self._slots = [
            _Slot(f"{prefix}.{key}" if prefix else key, owner, key)
            for prefix, owner in self.module.named_modules()
            for key in owner._buffers
        ]

    @torch.no_grad()
    def take(self) -> None:
        """Back up every buffer as it is now."""
        if sum(map(len, self._registries)) != len(self._slots):
            self.refresh()
        self._taken = [(slot, slot.current()) for slot in self._slots if slot.exists()]
        copies: dict[int, _Copy] = {}
        outdated = []
        for _, buffer in self._taken:
            if buffer is None or id(buffer) in copies:
                continue
            copy = self._copies.get(id(buffer))
            if copy is None or copy.has_moved():
                copy = _Copy(buffer)
            elif copy.may_differ():
                outdated.append(copy)
            copies[id(buffer)] = copy
        self._copies = copies
        copy_in_groups([copy.values for copy in outdated], [copy.memory() for copy in outdated])
        for copy in outdated:
            copy.note_version()

    def nonfinite(self) -> tuple[tuple[str, ...], Tensor]:
        """Which floating-point buffers hold a non-finite value now and did not at the backup.

        A buffer that held one before, such as a mask of minus infinities, does not count. Of a sharded buffer each
        process judges its own shard.

        Returns:
            The names of the ``B`` candidates, and for each whether it became non-finite: boolean, shape ``[B]``, on
            the first candidate's device.
        """
        names, now, before = [], [], []
        for name, memory, copy in self._changes():
            if memory is not None and copy is not None and is_float(memory) and is_float(copy.values):
                names.append(name)
                now.append(memory)
                before.append(copy.values)
        # The maximum norm is finite exactly where all elements are.
        flags = torch.isfinite(tensor_norms(before, math.inf)) & ~torch.isfinite(tensor_norms(now, math.inf))
        return tuple(names), flags

    @torch.no_grad()
    def restore(self) -> None:
        """Put every buffer back as it was at the backup: the same tensor objects, with the same bits.

        Raises:
            RuntimeError: If there is no backup.
        """
        changed = [copy for copy in self._copies.values() if copy.may_differ()]
        for slot, buffer in self._backup():
            if slot.current() is not buffer:
                slot.owner._buffers[slot.key] = buffer
        copy_in_groups([copy.memory() for copy in changed], [copy.values for copy in changed])

    @torch.no_grad()
    def restore_where(self, condition: Tensor) -> None:
        """Put every buffer back if a condition holds that only the device knows, without asking it.

        Args:
            condition: 0-dim boolean on the device.

        Raises:
            RuntimeError: If there is no backup, or if it can't be put back on the device because a buffer appeared,
                went, was replaced by one of another shape or type, or is sparse and was written to.
        """
        targets, sources = [], []
        for name, memory, copy in self._changes():
            if memory is None or copy is None or memory.layout != torch.strided or not copy.fits(memory):
                raise RuntimeError(
                    f"buffer {name!r} appeared, went, changed its shape or type, or is sparse and was written to, so a "
                    "skipped step can't be undone on the device; write to it in place, or use an optimizer without "
                    "`fused=True`"
                )
            targets.append(_as_integers(memory))
            sources.append(_as_integers(copy.values))
        for (device, dtype), members in group_by_device_and_dtype(targets).items():
            group = [targets[index] for index in members]
            # A choice between bits as integer arithmetic: NaN can't spread through it, and it runs in groups. Buffers
            # may overlap, so the result is written at the end.
            chosen = condition.to(device=device, dtype=dtype)
            result = torch._foreach_mul(group, 1 - chosen)
            torch._foreach_add_(result, torch._foreach_mul([sources[index] for index in members], chosen))
            torch._foreach_copy_(group, result)

    @torch.no_grad()
    def adopt_changes_since(self, other: BufferBackup) -> None:
        """What was written to buffers since another backup was taken stays, also if this one is restored.

        Use it when other code than that which may be undone has run since this backup was taken.

        Args:
            other: A later backup of the same module.

        Raises:
            RuntimeError: If there is no backup.
        """
        before = dict(self._backup())
        places = {slot.name: slot for slot, _ in other._backup()}
        for name, memory, then in list(other._changes()):
            slot = places[name]
            now = slot.current()
            ours = self._copies.get(id(now))
            if memory is None or now is None or ours is None or then is None or before.get(slot) is not now:
                if now is not None:
                    self._copies[id(now)] = _Copy(now)
                before[slot] = now
            elif memory.layout == torch.strided and ours.fits(memory) and then.fits(memory):
                current, earlier, kept = map(_as_integers, (memory, then.values, ours.values))
                kept.copy_(torch.where(current != earlier, current, kept))
            else:
                self._copies[id(now)] = _Copy(now)
        self._taken = list(before.items())

    def restorable_where(self) -> bool:
        """Whether :meth:`restore_where` can put back what was written since the backup; a look at the host only."""
        return all(
            memory is not None and copy is not None and memory.layout == torch.strided and copy.fits(memory)
            for _, memory, copy in self._changes()
        )

    def _backup(self) -> list[tuple[_Slot, Tensor | None]]:
        if self._taken is None:
            raise RuntimeError("there is no backup of the buffers: call `take()` first")
        return self._taken

    def _changes(self) -> Iterator[tuple[str, Tensor | None, _Copy | None]]:
        """Name, memory now, and copy of each buffer that may differ from its backup."""
        for slot, buffer in self._backup():
            now = slot.current()
            copy = None if buffer is None else self._copies[id(buffer)]
            if now is not buffer:
                yield slot.name, None if now is None else memory_of(now), copy
            elif copy is not None and copy.may_differ():
                yield slot.name, copy.memory(), copy


class _Slot(NamedTuple):
    """A place where a module keeps a buffer, or None."""

    name: str
    owner: nn.Module
    key: str

    def current(self) -> Tensor | None:
        return self.owner._buffers.get(self.key)

    def exists(self) -> bool:
        """Whether the buffer is registered and has a shape, or is None."""
        buffer = self.owner._buffers.get(self.key)
        return self.key in self.owner._buffers if buffer is None else not is_lazy(buffer)


class _Copy:
    """A buffer and a copy of the numbers that this process holds of it."""

    __slots__ = ("_address", "_always", "_memory", "_version", "buffer", "values")

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self._address = address_of(buffer)
        self._memory = memory = memory_of(buffer)
        self.values = memory.clone()
        # Grouped writes to a DTensor leave no trace either.
        unwatched = is_float(memory) or memory.numel() <= _ALWAYS_COPIED or isinstance(buffer, DTensor)
        self._always = unwatched and memory.layout == torch.strided
        self.note_version()

    def note_version(self) -> None:
        self._version = _version(self.buffer)

    def has_moved(self) -> bool:
        """Whether the buffer's memory was replaced behind it, by an assignment to ``.data``."""
        return address_of(self.buffer) != self._address

    def may_differ(self) -> bool:
        """Whether the buffer may hold other values than the copy."""
        return self._always or _version(self.buffer) != self._version or self.has_moved()

    def memory(self) -> Tensor:
        """The memory behind the buffer."""
        return memory_of(self.buffer) if self.has_moved() else self._memory

    def fits(self, memory: Tensor) -> bool:
        """Whether the copy can be put into some memory as it is."""
        values = self.values
        return memory.shape == values.shape and memory.dtype == values.dtype and memory.device == values.device


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors have none: they hardly ever change


def _as_integers(tensor: Tensor) -> Tensor:
    """The same bits, seen as integers."""
    return tensor.view(_INTEGER_OF_SIZE[tensor.element_size()])
