"""What a contract is: the laws of one kind of policy, and an example of each class that a room exports."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

T = TypeVar("T")
Make = Callable[[], T]
Law = Callable[[Make[T]], None]


class Contract(Generic[T]):
    """The laws that each class of a kind keeps.

    Args:
        room: The module that exports the classes.
        base: What they derive from.
        examples: Ways to make each class in a test; a class that can be made without arguments needs none.
        place: The file in which the examples stand, for the message about one that is missing.
    """

    def __init__(
        self, room: ModuleType, base: type[T], examples: Mapping[type[T], Sequence[Make[T]]], place: str
    ) -> None:
        self.room, self.base, self.examples, self.place = room, base, examples, place
        self.laws: list[Law[T]] = []

    def law(self, check: Law[T]) -> Law[T]:
        """Add a law: a function that is given a way to make a policy, and fails where the policy breaks the law."""
        self.laws.append(check)
        return check

    def exported(self) -> list[type[T]]:
        """The classes of the kind that the room exports, without abstract ones."""
        exports = [getattr(self.room, name) for name in self.room.__all__]
        classes = [each for each in exports if isinstance(each, type) and issubclass(each, self.base)]
        return [each for each in classes if not inspect.isabstract(each)]

    def makes(self) -> list[Make[T]]:
        """A way, or several, to make each exported class that can be made."""
        found: list[Make[T]] = []
        for each in self.exported():
            found += self.examples.get(each) or ([each] if _needs_no_arguments(each) else [])
        return found

    def cases(self) -> list[tuple[str, Law[T], Make[T]]]:
        """Each law with each way to make a policy, named."""
        return [(f"{law.__name__}-{make()!r}", law, make) for make in self.makes() for law in self.laws]

    def complaint(self) -> str:
        """What to do about exported classes that no law is tried on; empty where there are none."""
        missing = [
            each.__name__ for each in self.exported() if not self.examples.get(each) and not _needs_no_arguments(each)
        ]
        if not missing:
            return ""
        return (
            f"{self.room.__name__} exports {', '.join(missing)}, which can't be made without arguments: "
            f"add an example to EXAMPLES in {self.place}"
        )


def _needs_no_arguments(each: type[Any]) -> bool:
    parameters = inspect.signature(each).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(each.default is not each.empty or each.kind in variadic for each in parameters)


# ---- what laws of several kinds use


def saved_and_loaded(state: Any) -> Any:
    """A state as it comes back from a checkpoint that is loaded safely."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_stable_repr(make: Make[T], use: Callable[[T], Any]) -> None:
    """Callbacks find their state in a checkpoint by their policies' representation."""
    one, other = make(), make()
    before = repr(one)
    use(one)
    assert repr(one) == before, f"the representation changes with use: {before} becomes {one!r}"
    assert repr(other) == before, f"two made alike differ: {before} and {other!r}"
    assert " at 0x" not in before, f"the representation holds an address: {before}"
    assert type(one).__name__ in before


@contextmanager
def mesh_of_one() -> Iterator[DeviceMesh]:
    """A device mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def sharded(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """A tensor spread over a mesh by its first dimension, as ``fully_shard`` does."""
    return distribute_tensor(tensor, mesh, [Shard(0) if tensor.dim() else Replicate()])


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together again."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
