"""What test_sharded.py runs in one process and in two: measure, clip and back up sharded tensors, and write it down."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from stability_callbacks.clipping import ClipRule, NormClip, ValueClip
from stability_callbacks.gradient_pass import (
    GradientPass,
    _norms,
    measure_gradients,
    scale_each_gradient_,
    scale_gradients_,
)
from stability_callbacks.snapshots import BufferBackup
from tests.contracts.clipping import CLIP_RULES, ORDINARY
from tests.contracts.clipping import run as run_rule
from tests.contracts.contract import sharded, whole
from tests.gradients import gradient
from tests.process_pair import PROCESSES, process_group

NAN, INF = math.nan, math.inf
NORM_TYPES = [1.0, 2.0, 3.5, INF]
FACTORS = torch.tensor([0.5, 2.0, 4.0, 8.0, 0.25, 0.125, 1.0, 3.0])
RULES: dict[str, ClipRule] = {"norm": NormClip(0.5), "maximum norm": NormClip(0.5, INF), "value": ValueClip(0.1)}


def whole_gradients() -> list[tuple[Tensor, Placement | None]]:
    """Gradients and how they lie on the mesh. Of two processes, the second holds nothing of the second gradient."""
    generator = torch.Generator().manual_seed(0)
    placements: list[tuple[tuple[int, ...], Placement | None]] = [
        ((5, 3), Shard(0)),
        ((1, 4), Shard(0)),
        ((4, 3), Shard(1)),
        ((3,), Replicate()),
        ((), Replicate()),
        ((0, 3), Shard(0)),
        ((2, 2), None),
    ]
    gradients = [(torch.randn(shape, generator=generator), placement) for shape, placement in placements]
    return [*gradients, (torch.randn(7, generator=generator).half(), Shard(0))]


def parameters(mesh: DeviceMesh) -> list[nn.Parameter]:
    weights = []
    for value, placement in whole_gradients():
        placed = value if placement is None else distribute_tensor(value, mesh, [placement])
        weight = nn.Parameter(torch.zeros_like(placed))
        weight.grad = placed
        weights.append(weight)
    return weights


def gradients_of(weights: list[nn.Parameter]) -> list[Tensor]:
    return [whole(gradient(weight)).clone() for weight in weights]


def norms(mesh: DeviceMesh) -> Any:
    results: dict[float, Any] = {}
    for norm_type in NORM_TYPES:
        weights = parameters(mesh)
        with mock.patch.object(_norms, "all_reduce", wraps=_norms.all_reduce) as all_reduce:
            measured = measure_gradients(weights, norm_type)
        results[norm_type] = (measured.per_tensor, measured.total, all_reduce.call_count)
    return results


def bad_elements(mesh: DeviceMesh) -> Any:
    """Whether each gradient is found finite, with one bad element in the first, on each rank in turn."""
    results = {}
    for norm_type in (2.0, INF):
        for bad in (NAN, INF):
            for rank in range(mesh.size()):
                weights = parameters(mesh)
                if mesh.get_rank() == rank:
                    weights[0].grad.to_local()[0, 0] = bad  # type: ignore[union-attr]
                measured = measure_gradients(weights, norm_type)
                results[norm_type, bad, rank] = (torch.isfinite(measured.per_tensor), measured.finite)
    return results


def scaled(mesh: DeviceMesh) -> Any:
    together, apart = parameters(mesh), parameters(mesh)
    scale_gradients_(together, torch.tensor(0.5))
    scale_each_gradient_(apart, FACTORS)
    return gradients_of(together), gradients_of(apart)


def clipped(mesh: DeviceMesh) -> Any:
    results = {}
    for name, rule in RULES.items():
        weights = parameters(mesh)
        result = rule.clip_(weights)
        results[name] = (tuple(result), gradients_of(weights))
    return results


def untouched(mesh: DeviceMesh) -> Any:
    """What the rules leave of the gradients where one process has a NaN."""
    results = {}
    for name, rule in RULES.items():
        weights = parameters(mesh)
        if mesh.get_rank() == mesh.size() - 1:
            weights[0].grad.to_local()[0, 0] = NAN  # type: ignore[union-attr]
        before = gradients_of(weights)
        coefficient = rule.clip_(weights).coefficient
        results[name] = (before, gradients_of(weights), coefficient)
    return results


def changes(mesh: DeviceMesh) -> Any:
    """Whether a pass lets the gradients be measured again after others have changed them."""

    def halve_in_place(weights: list[nn.Parameter]) -> None:
        for weight in weights:
            weight.grad.mul_(0.5)  # type: ignore[union-attr]

    def clip_grad_norm(foreach: bool) -> Callable[[list[nn.Parameter]], Any]:
        return lambda weights: torch.nn.utils.clip_grad_norm_(weights, 0.5, foreach=foreach)

    results = {}
    for name, change in {
        "in place": halve_in_place,
        "clip_grad_norm_": clip_grad_norm(False),
        "clip_grad_norm_, grouped": clip_grad_norm(True),
        "ours": lambda weights: scale_gradients_(weights, torch.tensor(0.5)),
    }.items():
        weights = [weight for weight in parameters(mesh) if isinstance(weight, DTensor) and weight.dim() == 2][:1]
        taken = GradientPass(weights)
        taken.norms()
        change(weights)
        results[name] = taken.changed()
    return results


def partial_sums(mesh: DeviceMesh) -> Any:
    """A gradient of which every process holds one term: its norms, and what rules leave of it."""

    def make() -> nn.Parameter:
        weight = nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()]))
        term = torch.tensor([3.0, 4.0 if mesh.get_rank() == 0 else -2.0])
        weight.grad = DTensor.from_local(term, mesh, [Partial()])
        return weight

    results = {}
    for name, rule in {"norm": NormClip(1.0), "value": ValueClip(2.5)}.items():
        weight = make()
        results[name] = (rule.clip_([weight]).norm, whole(gradient(weight)).clone())
    return results


def exported(mesh: DeviceMesh) -> Any:
    """What each rule that the package exports makes of many steps, of which every process holds its shards."""
    return [
        [tuple(map(list, each)) for each in run_rule(make(), ORDINARY, place=lambda tensor: sharded(tensor, mesh))]
        for make in CLIP_RULES.makes()
    ]


def two_axes(mesh: DeviceMesh) -> Any:
    """Norms on two-dimensional meshes: replicated along one axis, and sharded along both."""
    value = whole_gradients()[0][0]
    results = []
    for shape in ((1, mesh.size()), (mesh.size(), 1)):
        grid = init_device_mesh("cpu", shape)
        for placements in ([Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(0), Shard(0)]):
            sharded = distribute_tensor(value, grid, placements)
            results += [_norms.tensor_norms([sharded], norm_type) for norm_type in (2.0, INF)]
    return results


class Buffers(nn.Module):
    """Sharded and whole buffers; half of the mask is minus infinity."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        for name, value in self.values().items():
            self.register_buffer(name, distribute_tensor(value, mesh, [Shard(0)]))
        self.register_buffer("count", torch.tensor(3))

    @staticmethod
    def values() -> dict[str, Tensor]:
        mask = torch.zeros(4, 2)
        mask[2:] = -INF
        return {
            "statistics": torch.arange(5.0),
            "single": torch.ones(1),
            "mask": mask,
            "large": torch.ones(400, 300).long(),
        }

    @torch.no_grad()
    def spoil(self) -> None:
        self.count.add_(1)
        self.single.add_(1)
        torch._foreach_add_([self.large], 1)  # of which no version counter tells
        local = self.statistics.to_local()
        local[0] = NAN

    def state(self) -> dict[str, Tensor]:
        return {name: whole(buffer).clone() for name, buffer in self.named_buffers()}


def buffers(mesh: DeviceMesh) -> Any:
    restores: dict[str, Callable[[BufferBackup], None]] = {
        "restore": lambda backup: backup.restore(),
        "restore_where True": lambda backup: backup.restore_where(torch.tensor(True)),
        "restore_where False": lambda backup: backup.restore_where(torch.tensor(False)),
    }
    results = {}
    for name, restore in restores.items():
        module = Buffers(mesh)
        before, objects = module.state(), list(module.buffers())
        backup = BufferBackup(module)
        backup.take()
        module.spoil()
        names, flags = backup.nonfinite()
        after = module.state()
        restore(backup)
        same_objects = all(one is other for one, other in zip(objects, module.buffers(), strict=True))
        results[name] = (before, after, module.state(), dict(zip(names, flags.tolist(), strict=True)), same_objects)
    return results


SCENARIOS = [norms, bad_elements, scaled, clipped, untouched, changes, partial_sums, exported, two_axes, buffers]


def run(processes: int) -> dict[str, Any]:
    """Run all scenarios as one of so many processes, which have met."""
    mesh = init_device_mesh("cpu", (processes,))
    return {scenario.__name__: scenario(mesh) for scenario in SCENARIOS}


def alone(directory: Path) -> dict[str, Any]:
    """Run all scenarios in this process."""
    torch.distributed.init_process_group("gloo", init_method=(directory / "rendezvous").as_uri(), rank=0, world_size=1)
    try:
        return run(1)
    finally:
        torch.distributed.destroy_process_group()


def main(rank: int, directory: Path) -> None:
    with process_group(rank, directory):
        torch.save(run(PROCESSES), directory / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
