"""The last few states of training, to go back to."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from stability_callbacks._validation import check_bool, check_instance, check_integer
from stability_callbacks.gradient_pass import group_by_device_and_dtype, tensor_norms, writable_values
from stability_callbacks.snapshots._branches import Branch, module_branches, optimizer_branches, scaler_branch
from stability_callbacks.snapshots._copies import Transfer
from stability_callbacks.snapshots._group_entries import GroupEntries, entries_of
from stability_callbacks.snapshots._memory import is_float, memory_of
from stability_callbacks.snapshots._nested import leaves
from stability_callbacks.snapshots._random_state import RandomState
from stability_callbacks.snapshots._snapshot import Snapshot
from stability_callbacks.snapshots._state_bytes import missing_state_bytes
from stability_callbacks.snapshots._survey import Survey

__all__ = ["SnapshotRing"]

T = TypeVar("T")


class SnapshotRing:
    """Keeps the last few states of training in host memory and goes back to them bit for bit.

    Take a snapshot now and then, while training is healthy; when it has diverged, restore one and go on. A snapshot
    holds all parameters (frozen ones too), all buffers (integer and non-persistent ones too) and the optimizer state;
    on request a loss scaler, averaged models, other stateful objects, and the state of the random number generators.
    Hyper-parameters, such as the learning rate, are not rewound, and gradients are left alone. Of what optimizers keep
    in their parameter groups beside them, such as the ``k`` of schedule-free ones, that goes back which is ``written``.

    Snapshots lie in preallocated memory, the oldest's being used for the newest; copies run in groups. From a CUDA
    device they go to page-locked memory, beside the computation; see :meth:`take`. Sparse tensors, and tensor
    subclasses other than ``DTensor``, are cloned where they lie. Of sharded tensors each process keeps its shards.

    Args:
        model: The model, or several modules. A tensor that occurs more than once is kept once.
        optimizers: The optimizer, or several. Parameters that no module has are kept too.
        keep: Number of snapshots, >= 1. Default 2.
        scaler: The loss scaler of fp16 training. Default None.
        averaged: More modules, such as an exponential moving average of the model. Default none.
        stateful: Objects with ``state_dict`` and ``load_state_dict`` that go back with the snapshot, such as adaptive
            clip rules. Default none.
        rng: Whether the state of the random number generators goes back with the snapshot. Default False.
        written: For each optimizer the keys of parameter groups, and the names of attributes, that its arithmetic
            writes, as :class:`~stability_callbacks.snapshots.GroupWrites` finds them out; the sets may still grow.
            Default none.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``keep`` is less than 1.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ring = SnapshotRing(model, optimizer)
        >>> ring.take(step=100)
        >>> model(torch.full((1, 2), float("inf"))).sum().backward()
        >>> optimizer.step()
        >>> ring.nonfinite()
        (('weight', 'bias'), tensor([ True, False]))
        >>> ring.restore()
        100
        >>> ring.finite()
        tensor(True)
    """

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Module],
        optimizers: Optimizer | Iterable[Optimizer],
        keep: int = 2,
        *,
        scaler: GradScaler | None = None,
        averaged: nn.Module | Iterable[nn.Module] = (),
        stateful: Iterable[Any] = (),
        rng: bool = False,
        written: Mapping[Any, AbstractSet[str]] | None = None,
    ) -> None:
        self.model = _all_of("model", model, nn.Module, "a module or several")
        self.optimizers = _all_optimizers(optimizers)
        self.keep = check_integer("keep", keep, at_least=1)
        if scaler is not None:
            check_instance("scaler", scaler, GradScaler, "a torch.amp.GradScaler or None (others go to `stateful`)")
        self.scaler = scaler
        self.averaged = _all_of("averaged", averaged, nn.Module, "a module or several")
        self.stateful = _all_stateful(stateful)
        self.rng = check_bool("rng", rng)
        self.written: Mapping[Any, AbstractSet[str]] = {} if written is None else written
        self._transfer = Transfer()
        self._survey: Survey | None = None
        self._snapshots: list[Snapshot] = []
        self._taken = 0
        # A tensor of a module that was not finite at the first look is meant so.
        self._looked_at = {each.name for each in self._tensors() if is_lazy(each.tensor)}
        self._constants: set[str] = set()
        self._endless = {name for name, value in self._entries() if isinstance(value, float) and math.isinf(value)}
        self.nonfinite()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(keep={self.keep}, steps={self.steps})"

    def __len__(self) -> int:
        return len(self._snapshots)

    @property
    def steps(self) -> list[int]:
        """The steps of the snapshots, oldest first."""
        return [snapshot.step for snapshot in self._snapshots]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that a snapshot would hold now; of sparse ones, of their values."""
        return sum(_bytes(each.tensor) for each in self._tensors() if not is_lazy(each.tensor))

    def estimated_bytes(self) -> int:
        """Bytes that a snapshot will hold once the optimizers have taken their first step."""
        return self.nbytes + sum(missing_state_bytes(optimizer) for optimizer in self.optimizers)

    def resize(self, keep: int) -> None:
        """Keep another number of snapshots from now on; the oldest go if there are more.

        Args:
            keep: Number of snapshots, >= 1.
        """
        self.keep = check_integer("keep", keep, at_least=1)
        del self._snapshots[: -self.keep]

    def drop_newest(self) -> None:
        """Forget the newest snapshot.

        Raises:
            RuntimeError: If there is none.
        """
        del self._snapshots[self._position(0)]

    # ---- there and back

    @torch.no_grad()
    def take(self, step: int | None = None, *, wait: bool = True) -> None:
        """Take a snapshot, and forget the oldest if there are ``keep`` already.

        The host does not wait for the copies from a CUDA device. Its current stream does, so that nothing is written
        before it has been copied; with ``wait=False`` that is up to you: call :meth:`wait` before anything is written
        that a snapshot holds. Forward passes write to buffers, so the place for that is before the next of them.

        If an exception interrupts it, such as a lack of memory, the snapshot is not listed and the others are as good
        as before. The oldest is forgotten when all memory has been allocated and only copies are left to do.

        Args:
            step: The step that the snapshot is of, >= 0. Default: how many snapshots were taken before.
            wait: Whether the device's current stream waits for the copies. Default True.
        """
        step = self._taken if step is None else check_integer("step", step, at_least=0)
        check_bool("wait", wait)
        self.wait()
        survey = self._look()
        retired = self._snapshots[0] if len(self) == self.keep else None
        copies = survey.room(retired)
        states = [copy.deepcopy(item.state_dict()) for item in self.stateful]
        random = RandomState.capture() if self.rng else None
        entries = [GroupEntries(optimizer) for optimizer in self.optimizers]
        snapshot = Snapshot(step, survey.contents, copies, copy.deepcopy(survey.values), entries, states, random)
        if retired is not None:
            del self._snapshots[0]
        survey.fill(copies, self._transfer)
        if wait:
            self.wait()
        self._snapshots.append(snapshot)
        self._taken += 1

    def wait(self) -> None:
        """Let the current stream of each CUDA device wait for the copies of the last :meth:`take`."""
        self._transfer.wait()

    @torch.no_grad()
    def restore(self, back: int = 0) -> int:
        """Put everything back as it was at a snapshot, bit for bit; the snapshot stays in the ring.

        Tensors are written to in place. Those of buffers, optimizer state and scaler are replaced where they have
        another shape, dtype or device now, and come back where they went. Optimizer state that did not exist is
        removed. Parameters and buffers that a module got since stay as they are.

        Args:
            back: How many snapshots before the newest; 0 is the newest. Default 0.

        Returns:
            The step of the snapshot.

        Raises:
            RuntimeError: If there is no snapshot, or if a parameter of it is gone, was given another shape, dtype,
                device or sharding, or had no shape yet. Nothing has been changed then.
            ValueError: If there are not so many snapshots.
        """
        snapshot = self._snapshots[self._position(back)]
        tensors = snapshot.targets()
        dense = []
        for tensor, each in zip(tensors, snapshot.copies, strict=True):
            if each.layout is None:
                memory_of(tensor).copy_(each.values)
            else:
                dense.append((memory_of(tensor), each.values))
        for members in group_by_device_and_dtype([memory for memory, _ in dense]).values():
            self._transfer.load([dense[index][0] for index in members], [dense[index][1] for index in members])
        snapshot.hang(tensors)
        for optimizer, entries in zip(self.optimizers, snapshot.entries, strict=True):
            entries.restore(self.written.get(optimizer, frozenset()))
        for item, state in zip(self.stateful, snapshot.states, strict=True):
            item.load_state_dict(copy.deepcopy(state))
        if snapshot.random is not None:
            snapshot.random.restore()
        return snapshot.step

    # ---- whether all is well

    def finite(self) -> Tensor:
        """Whether all floating-point tensors that a snapshot would hold now are finite.

        A parameter or buffer that was not when the ring was made, such as a mask of minus infinities, is meant so and
        does not count; one that a module got later does not if it was not finite at the first look at it. A parameter
        that is trained and holds a NaN always counts.

        Returns:
            0-dim boolean on the device; of sharded tensors about all shards, at the price of collectives.
        """
        return ~self.nonfinite()[1].any()

    def nonfinite(self) -> tuple[tuple[str, ...], Tensor]:
        """Which of them hold a NaN or an infinity; see :meth:`finite`. So may parameter groups, in Python numbers too.

        Returns:
            The names of the ``B`` tensors that count, then of numbers in parameter groups that are not finite and were
            not infinite when the ring was made, and for each whether it is not finite: boolean, shape ``[B]``, on the
            first one's device.
        """
        floats = [each for each in self._measured() if _is_measurable(each.tensor)]
        new = [each for each in floats if each.of_module and each.name not in self._looked_at]
        if new:  # the only time that the host waits for the device
            norms = _maximum_norms(new).tolist()
            self._looked_at.update(each.name for each in new)
            self._constants.update(each.name for each, norm in zip(new, norms, strict=True) if _is_meant(each, norm))
        floats = [each for each in floats if each.name not in self._constants]
        flags = ~torch.isfinite(_maximum_norms(floats))
        numbers = tuple(
            name
            for name, value in self._entries()
            if isinstance(value, float) and not math.isfinite(value) and name not in self._endless
        )
        if numbers:
            flags = torch.cat([flags, torch.ones(len(numbers), dtype=torch.bool, device=flags.device)])
        return (*(each.name for each in floats), *numbers), flags

    # ---- private

    def _branches(self) -> Iterator[Branch]:
        models = zip([""] if len(self.model) == 1 else map(str, range(len(self.model))), self.model, strict=True)
        averaged = ((f"averaged[{index}]", module) for index, module in enumerate(self.averaged))
        known: set[int] = set()
        for branch in module_branches([*models, *averaged]):
            known.update(map(id, branch.live().values()))
            yield branch
        for index, optimizer in enumerate(self.optimizers):
            yield from optimizer_branches(f"optimizers[{index}]", optimizer, known)
        if self.scaler is not None:
            yield scaler_branch(self.scaler)

    def _entries(self) -> Iterator[tuple[str, Any]]:
        for index, optimizer in enumerate(self.optimizers):
            for name, value in entries_of(optimizer):
                yield f"optimizers[{index}].{name}", value

    def _look(self) -> Survey:
        """What there is to copy."""
        if self._survey is None or not self._survey.holds():
            self._survey = Survey(list(self._branches()))
        return self._survey

    def _tensors(self) -> Iterator[_Named]:
        """Every tensor once, by its first name."""
        names: dict[int, str] = {}
        for branch in self._branches():
            for path, leaf in leaves(branch.content()):
                if isinstance(leaf, Tensor) and id(leaf) not in names:
                    # Optimizer state has parameters for keys.
                    keys = (names.get(id(key), "?") if isinstance(key, Tensor) else str(key) for key in path)
                    names[id(leaf)] = ".".join(filter(None, (branch.name, *keys)))
                    yield _Named(names[id(leaf)], leaf, of_module=not branch.closed)

    def _measured(self) -> Iterator[_Named]:
        """The tensors, and those in parameter groups."""
        yield from self._tensors()
        for name, value in self._entries():
            if isinstance(value, Tensor):
                yield _Named(name, value, of_module=False)

    def _position(self, back: int) -> int:
        if not self._snapshots:
            raise RuntimeError("there is no snapshot: call `take()` first")
        return len(self) - 1 - check_integer("back", back, at_least=0, at_most=len(self) - 1)


class _Named(NamedTuple):
    name: str
    tensor: Tensor
    of_module: bool


def _all_of(name: str, values: Any, kind: type[T], allowed: str) -> list[T]:
    values = [values] if isinstance(values, kind) or not isinstance(values, Iterable) else list(values)
    return [check_instance(name, value, kind, allowed) for value in values]


def _all_optimizers(values: Any) -> list[Any]:
    """Optimizers by what they have, since not all of them are of torch's class."""
    several = list(values) if isinstance(values, Iterable) and not _is_optimizer(values) else [values]
    return [
        value if _is_optimizer(value) else check_instance("optimizers", value, Optimizer, "an optimizer or several")
        for value in several
    ]


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Optimizer) or all(hasattr(value, name) for name in ("param_groups", "state", "step"))


def _all_stateful(values: Any) -> list[Any]:
    objects = list(values) if isinstance(values, Iterable) else [values]
    for value in objects:
        if not all(callable(getattr(value, method, None)) for method in ("state_dict", "load_state_dict")):
            raise TypeError(
                "`stateful` must be objects with `state_dict` and `load_state_dict`, "
                f"got {value!r} of type {type(value).__name__}"
            )
    return objects


def _bytes(tensor: Tensor) -> int:
    memory = memory_of(tensor) if tensor.layout == torch.strided else writable_values(tensor)
    return memory.numel() * memory.element_size()


def _is_measurable(tensor: Tensor) -> bool:
    """Whether it can be told whether a tensor is finite: subclasses may lack the operations for that."""
    if is_lazy(tensor) or not is_float(tensor):
        return False
    return isinstance(tensor, DTensor) or not is_traceable_wrapper_subclass(tensor)


def _maximum_norms(tensors: Sequence[_Named]) -> Tensor:
    # They are finite exactly where all elements are.
    return tensor_norms([each.tensor for each in tensors], math.inf)


def _is_meant(each: _Named, norm: float) -> bool:
    """Whether a tensor that is not finite at the first look is meant so; a NaN among trained weights never is."""
    return not math.isfinite(norm) and not (math.isnan(norm) and each.tensor.requires_grad)
