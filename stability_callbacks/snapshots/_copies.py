"""Copies of tensors in host memory that is used again and again."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from stability_callbacks.snapshots._memory import memory_of

__all__ = ["HostMemory", "Layout", "TensorCopy", "Transfer"]


class Layout(NamedTuple):
    """How a dense tensor lies in memory, and its shards on a mesh: what it takes to make such a tensor again."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    conjugated: bool
    sharding: _Sharding | None

    @classmethod
    def of(cls, tensor: Tensor) -> Layout | None:
        """The layout of a tensor; None if grouped copies do not take it, as below."""
        sharding = None
        if isinstance(tensor, DTensor):
            sharding = _Sharding(tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())
            tensor = tensor.to_local()
        if tensor.layout != torch.strided or type(tensor.detach()) is not Tensor or tensor.is_neg():
            return None
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj(), sharding)

    def empty(self) -> Tensor:
        """A new tensor with this layout."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        if self.conjugated:
            tensor = tensor.conj()
        if self.sharding is None:
            return tensor
        mesh, placements, shape, stride = self.sharding
        return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=shape, stride=stride)


class _Sharding(NamedTuple):
    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]


class TensorCopy(NamedTuple):
    """A copy of one tensor.

    Attributes:
        values: Host memory with a copy of the memory that this process holds of the tensor. Without a ``layout``, a
            clone that lies where the tensor does.
        layout: The tensor's layout. None if it is sparse, of a class of its own other than ``DTensor``, or lazily
            negated.
    """

    values: Tensor
    layout: Layout | None

    def fits(self, tensor: Tensor) -> bool:
        """Whether the copy can be put into a tensor as it is."""
        memory, values, layout = memory_of(tensor), self.values, Layout.of(tensor)
        if self.layout is not None and layout is not None:
            return layout._replace(stride=self.layout.stride) == self.layout and memory.shape == values.shape
        kind, wanted = (
            (type(each.detach()), each.layout, each.shape, each.dtype, each.device) for each in (memory, values)
        )
        # Of sparse tensors, only coordinate lists take another number of elements.
        resizes = values.layout in (torch.strided, torch.sparse_coo)
        return layout is self.layout and kind == wanted and (resizes or memory._nnz() == values._nnz())

    def blank(self) -> Tensor:
        """A new tensor like the original, to put the copy into."""
        return self.values.clone() if self.layout is None else self.layout.empty()


class HostMemory:
    """Hands out memory for copies of dense tensors; page-locked for those on a CUDA device.

    Args:
        retired: Copies whose memory is handed out first.
    """

    def __init__(self, retired: Iterable[TensorCopy]) -> None:
        self._retired: dict[tuple[torch.Size, torch.dtype, bool], deque[Tensor]] = defaultdict(deque)
        for values, layout in retired:
            if layout is not None:
                self._retired[values.shape, values.dtype, layout.device.type == "cuda"].append(values)

    def like(self, memory: Tensor) -> Tensor:
        """Room for a copy of a dense tensor."""
        retired = self._retired.get((memory.shape, memory.dtype, memory.is_cuda))
        return retired.popleft() if retired else torch.empty_like(memory, device="cpu", pin_memory=memory.is_cuda)


class Transfer:
    """Grouped copies between tensors and host memory.

    Those from a CUDA device run on a stream of their own, beside the computation. Tensors that are being saved must not
    be written to before :meth:`wait`.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # The tensors are kept, because their memory is not free before it has been read.
        self._running: list[tuple[torch.cuda.Event, list[Tensor]]] = []

    def save(self, tensors: list[Tensor], host: list[Tensor]) -> None:
        """Copy dense tensors of one device and dtype to host memory."""
        device = tensors[0].device
        if device.type != "cuda":
            torch._foreach_copy_(host, tensors)
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            torch._foreach_copy_(host, tensors, non_blocking=True)
        self._running.append((stream.record_event(), tensors))

    def load(self, tensors: list[Tensor], host: list[Tensor]) -> None:
        """Copy host memory to dense tensors of one device and dtype, once it is complete."""
        self.wait()
        torch._foreach_copy_(tensors, host, non_blocking=True)

    def wait(self) -> None:
        """Let the current stream of each CUDA device wait until everything is saved; the host does not wait."""
        for event, tensors in self._running:
            torch.cuda.current_stream(tensors[0].device).wait_event(event)
        self._running.clear()
