"""Following non-finite values through a forward pass, operation by operation, to where they came from."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from math import isinf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from stability_callbacks._names import plain_name
from stability_callbacks._nesting import named_values
from stability_callbacks.activations import ModuleStack
from stability_callbacks.diagnosis._backward_trace import node_name
from stability_callbacks.diagnosis._operations import Call, leaves_memory_unset, operation_name
from stability_callbacks.diagnosis._origin import Origin, Site
from stability_callbacks.diagnosis._source import calling_line
from stability_callbacks.diagnosis._values import describe, is_finite, kinds, numbers, tensors_in
from stability_callbacks.gradient_pass import writable_values

__all__ = ["ForwardTrace"]

# In-place operations whose result does not depend on what was there.
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_"}


class _Execution(NamedTuple):
    """An operation that ran.

    Args:
        func: The operation, in PyTorch's inner language.
        name: What a user calls it.
        site: Where it ran.
        arguments: Positional arguments and keyword arguments.
        inputs: The tensors it read.
        outputs: The tensors it gave or wrote to.
        overwritten: What those inputs held before to which it wrote, by ``id``.
    """

    func: Any
    name: str
    site: Site
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    inputs: list[Tensor]
    outputs: list[Tensor]
    overwritten: dict[int, Tensor]

    def before(self, value: Any) -> Any:
        """What an argument was before the operation."""
        return self.overwritten.get(id(value), value)

    def numbers_before(self, value: Any) -> Any:
        """What an argument was before the operation; of a tensor, the numbers that this process holds."""
        value = self.before(value)
        return numbers(value) if isinstance(value, Tensor) else value


class ForwardTrace(TorchDispatchMode):
    """Watches every operation while it is entered, and knows where the non-finite values in a tensor came from.

    An operation that makes a non-finite value from finite inputs is an origin; one with a non-finite input passes its
    origins on; one whose output is finite ends them. Infinities that an operation was told to write (``masked_fill``
    with ``-inf``), and minus infinities in buffers and in the batch, are intended: NaN made from nothing but these has
    its origin in the operation that made it, such as the softmax of a row that is masked entirely.

    Origins are kept by storage, so views and in-place operations share them.

    Args:
        modules: Tells which module an operation runs in.
        batch: The batch, for its non-finite values.
        stop: Name of the Python module that starts the run: user code is looked for inside of it.
    """

    supports_higher_order_operators = True

    def __init__(self, modules: ModuleStack, batch: Any, stop: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._modules = modules
        self._stop = stop
        self._count = 0
        self._there: list[Origin] = []
        self.first_made: Origin | None = None
        self.last_operation: tuple[str, Site] | None = None
        self._reached: dict[int, tuple[StorageWeakRef, frozenset[Origin]]] = {}
        self._unset: dict[int, tuple[StorageWeakRef, frozenset[Origin]]] = {}
        self._sites: list[Site] = []
        self._sequence_numbers: list[int] = []
        self._given: dict[int, frozenset[Origin]] = {}  # by the place among the sites
        self._finite_buffers: dict[int, str] = {}
        self._note_what_is_there(batch)

    @torch.no_grad()
    def _note_what_is_there(self, batch: Any) -> None:
        model = self._modules.model
        groups: list[tuple[str, Iterable[tuple[str, Tensor]]]] = [
            ("input", named_values(batch)),
            ("parameter", _plainly(model, model.named_parameters())),
            ("buffer", _plainly(model, model.named_buffers())),
        ]
        for phase, tensors in groups:
            for name, tensor in tensors:
                if nn.parameter.is_lazy(tensor):
                    continue
                if not is_finite(tensor):
                    what = f"{name} held {describe(tensor)} before the forward pass"
                    intended = phase != "parameter" and set(kinds(tensor)) == {"-inf"}
                    origin = self._origin(phase, name, what, intended=intended)
                    self._there.append(origin)
                    self._mark(tensor, frozenset([origin]))
                elif phase == "buffer":
                    self._finite_buffers[_storage_key(tensor)] = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, site = self.last_operation = self._name_and_site(func)
        with torch.no_grad():
            written, unread = _written(func, args, kwargs)
            overwritten = {id(each): each.clone() for each in written if id(each) not in unread}
        result = func(*args, **kwargs)
        with torch.no_grad():
            arguments, results = tensors_in((args, kwargs)), tensors_in(result)
            if leaves_memory_unset(func):
                self._note_unset_memory(results, name, site)
            elif not _is_view(func):
                inputs = [each for each in arguments if id(each) not in unread]
                # Batch normalisation writes to its statistics without saying so.
                statistics = [each for each in arguments if _storage_key(each) in self._finite_buffers]
                outputs = list({id(each): each for each in (*results, *written, *statistics)}.values())
                self._note(_Execution(func, name, site, (args, kwargs), inputs, outputs, overwritten))
        return result

    def _name_and_site(self, func: Any) -> tuple[str, Site]:
        site = Site(self._modules.current, calling_line(self._stop))
        self._sites.append(site)
        self._sequence_numbers.append(torch._C._autograd._get_sequence_nr() - 1)
        node: Any = torch._C._current_autograd_node()  # None outside of a backward pass
        if node is None:
            return operation_name(func), site
        # A backward pass inside of the forward pass, as for a gradient penalty.
        name = node_name(node)
        return name, self.site_of(node._sequence_nr(), name) or site

    def _note_unset_memory(self, tensors: Iterable[Tensor], name: str, site: Site) -> None:
        what = f"{name} allocated memory that was read before it was filled"
        origin = self._origin("forward", name, what, site=site, reason="unset_memory")
        for tensor in tensors:
            self._unset[_storage_key(tensor)] = _storage_reference(tensor), frozenset([origin])

    def _note(self, execution: _Execution) -> None:
        """Keep the account of where the non-finite values in an operation's outputs came from."""
        self._note_what_was_given(execution)
        bad = []
        for tensor in execution.outputs:
            if not is_finite(tensor):
                bad.append(tensor)
            elif _is_whole(tensor):
                self._reached.pop(_storage_key(tensor), None)
        if not bad:
            return
        sources = [
            each
            for each in execution.inputs
            if not is_finite(execution.before(each)) and not self._is_written_buffer(each)
        ]
        for source in sources:
            if not self._origins(source):
                self._note_given(execution, source)
        origins = frozenset[Origin]().union(*map(self._origins, sources))
        if not sources or (all(each.intended for each in origins) and _adds_to_infinities(execution, sources, bad)):
            origins = frozenset([self._made(execution, bad, origins)])
        for tensor in bad:
            self._mark(tensor, origins)

    def _note_what_was_given(self, execution: _Execution) -> None:
        """Keep where an operation's non-finite inputs came from, for its node in the backward pass."""
        known = [each for each in execution.inputs if self._origins(each)]
        origins = frozenset[Origin]().union(
            *(self._origins(each) for each in known if not is_finite(execution.before(each)))
        )
        if origins:
            self._given[len(self._sites) - 1] = origins

    def _made(self, execution: _Execution, bad: Sequence[Tensor], intended: Iterable[Origin]) -> Origin:
        """The operation as an origin."""
        name, site = execution.name, execution.site
        # Of sharded tensors each process looks at its own part: not all of them need to come here.
        args, kwargs = tree_map(execution.numbers_before, execution.arguments)
        if not any("NaN" in kinds(each) for each in bad) and any(
            isinstance(each, float) and isinf(each) for each in tree_leaves((args, kwargs))
        ):
            what = f"{name} wrote {describe(bad[0])}, as it was told to"
            return self._origin("forward", name, what, intended=True, site=site)
        inputs = [execution.numbers_before(each) for each in execution.inputs if not self._is_written_buffer(each)]
        reason = Call(execution.func, args, kwargs, inputs, execution.outputs).reason()
        reasons = [reason.words, *(each.what for each in sorted(intended, key=lambda each: each.order)[:1])]
        what = f"{name} made {describe(bad[0])} ({'; '.join(reasons)})"
        origin = self._origin("forward", name, what, site=site, reason=reason.kind)
        self.first_made = self.first_made or origin
        return origin

    def _note_given(self, execution: _Execution, source: Tensor) -> None:
        """Note an input with non-finite values that nobody has seen before."""
        values = execution.before(source)
        what = (
            f"{execution.name} read {describe(values)} from a tensor that no operation made"
            " and that is no parameter, no buffer and not in the batch"
        )
        intended = "NaN" not in kinds(values)
        origin = self._origin("given", execution.name, what, intended=intended, site=execution.site)
        self._mark(source, frozenset([origin]))

    def _origin(
        self,
        phase: str,
        name: str,
        what: str,
        *,
        intended: bool = False,
        site: Site | None = None,
        reason: str | None = None,
    ) -> Origin:
        self._count += 1
        return Origin(self._count, phase, name, what, intended, site, reason)

    def _origins(self, tensor: Tensor) -> frozenset[Origin]:
        key = _storage_key(tensor)
        _, origins = self._reached.get(key) or self._unset.get(key) or (None, frozenset())
        return origins

    def _mark(self, tensor: Tensor, origins: frozenset[Origin]) -> None:
        key = _storage_key(tensor)
        if key in self._reached and not _is_whole(tensor):
            origins |= self._reached[key][1]
        self._reached[key] = _storage_reference(tensor), origins

    def _is_written_buffer(self, tensor: Tensor) -> bool:
        """Whether a tensor is a buffer in which nothing bad was ever read: what may be there now was written to it."""
        key = _storage_key(tensor)
        return key in self._finite_buffers and key not in self._reached

    def origin_of(self, tensor: Tensor) -> Origin | None:
        """The first origin of a tensor's non-finite values; of the intended ones only if there is no other."""
        return min(self._origins(tensor), key=lambda each: (each.intended, each.order), default=None)

    def origin_of_operands(self, saved: Sequence[Tensor], sequence_number: int, name: str) -> Origin | None:
        """Where the non-finite values came from that a node of the backward pass works with; None if it has none.

        Args:
            saved: What the node kept of the forward pass. If nothing of it can be read, as inside of a checkpoint, what
                its operation was given counts.
            sequence_number: The node's, see :meth:`site_of`.
            name: Its name.
        """
        if saved:
            bad = [each for each in saved if not is_finite(each)]
            origins = frozenset[Origin]().union(*map(self._origins, bad))
        else:
            origins = self._given.get(self._index_of(sequence_number, name), frozenset())
        return min(origins, key=lambda each: (each.intended, each.order), default=None)

    def explained(self, origin: Origin) -> Origin:
        """The origin; values of unknown tensors came with the batch, if it holds such values, too."""
        if origin.phase != "given":
            return origin
        return next((each for each in self._there if each.phase == "input" and not each.intended), origin)

    def fault_before(self) -> Origin | None:
        """The first non-finite value in the batch, a parameter or a buffer that was not intended."""
        return next((each for each in self._there if not each.intended), None)

    def spoiled_buffers(self) -> list[tuple[str, Origin | None]]:
        """Buffers that were finite and are not now, with what spoiled them."""
        return [
            (name, self.origin_of(buffer))
            for name, buffer in _plainly(self._modules.model, self._modules.model.named_buffers())
            if name in self._finite_buffers.values() and not is_finite(buffer)
        ]

    def site_of(self, sequence_number: int, name: str) -> Site | None:
        """Where a node of the autograd graph was made, by its sequence number and name.

        A node is made just before its operation runs, except that of an in-place operation on a view.
        """
        index = self._index_of(sequence_number, name)
        return self._sites[index] if 0 <= index < len(self._sites) else None

    def _index_of(self, sequence_number: int, name: str) -> int:
        return bisect_left(self._sequence_numbers, sequence_number) - (name == "CopySlices")


def _plainly(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    return ((plain_name(name, model), tensor) for name, tensor in tensors)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], set[int]]:
    """The tensors that an operation writes to, and the ids of those among them that it does not read."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return [], set()
    written: list[Tensor] = []
    unread: set[int] = set()
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        tensors = tensors_in(value)
        written += tensors
        # Lists are the parameters of a whole model, as a rule: no copies are made of them.
        if argument.kwarg_only or not isinstance(value, Tensor) or operation_name(func) in _OVERWRITING:
            unread.update(map(id, tensors))
    return written, unread


def _is_view(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    aliases = [each.alias_info for each in schema.returns if each.alias_info is not None] if schema else []
    return any(not alias.is_write for alias in aliases)


def _adds_to_infinities(execution: _Execution, sources: Sequence[Tensor], bad: Sequence[Tensor]) -> bool:
    """Whether an operation that was given infinities made NaN, or others than it was given."""
    given = set[str]().union(*(kinds(execution.before(each)) for each in sources))
    if not given.issuperset(*(kinds(each) for each in bad)):
        return True
    tensors = [*execution.inputs, *bad]
    if torch.Tag.pointwise not in getattr(execution.func, "tags", ()) or any(map(_is_sparse, tensors)):
        return False
    inputs = [numbers(execution.before(each)).isfinite() for each in execution.inputs]
    for output in bad:
        new = ~numbers(output).isfinite()
        for finite in inputs:
            new &= finite.to(new.device)
        if new.any():
            return True
    return False


def _is_sparse(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all that lies in its storage."""
    memory = writable_values(tensor)
    return memory.numel() * memory.element_size() >= memory.untyped_storage().nbytes()


def _storage_key(tensor: Tensor) -> int:
    return int(writable_values(tensor).untyped_storage()._cdata)


def _storage_reference(tensor: Tensor) -> StorageWeakRef:
    """A reference that keeps a storage's key from being given to another, but not its memory."""
    return StorageWeakRef(writable_values(tensor).untyped_storage())
