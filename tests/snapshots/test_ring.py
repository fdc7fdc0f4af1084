"""SnapshotRing: training goes back bit for bit, and on from there as if nothing had happened."""

from __future__ import annotations

import copy
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stability_callbacks.clipping import ZClip
from stability_callbacks.snapshots import RandomState, SnapshotRing
from tests.host_reads import ForbidHostReads

NAN, INF = math.nan, math.inf
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


class Net(nn.Module):
    """Tied, frozen and unused parameters; running statistics, a mask, a hidden cache and an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.full((3, 3), -INF).triu(1))
        self.register_buffer("seen", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1  # type: ignore[has-type]
        return self.second(self.frozen(self.norm(self.first(x)).tanh()))


class Table(nn.Module):
    """An embedding, whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x * 3).abs().long().clamp(max=7)).sum(1)


def batch(seed: int, device: str = "cpu") -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).to(device)


def train(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    device = str(next(model.parameters()).device)
    optimizer.zero_grad()
    model(batch(seed, device)).square().sum().backward()
    optimizer.step()


def bits(tensor: Tensor) -> list[int]:
    tensor = tensor.detach().resolve_conj().contiguous().cpu()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1).view(torch.uint8).tolist()


def all_of(value: Any) -> Any:
    """Everything in nested containers, tensors as their bits."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), bits(value)
    if isinstance(value, dict):
        return [(key if isinstance(key, str) else None, all_of(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return [all_of(each) for each in value]
    return copy.deepcopy(value)


def state_of(model: nn.Module, *optimizers: Optimizer) -> Any:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, all_of(each)) for name, each in tensors], [all_of(each.state) for each in optimizers]


def wreck(model: nn.Module, *optimizers: Optimizer) -> None:
    """Write NaN, or another number, to all of the state."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(NAN if tensor.is_floating_point() else 77)
        for optimizer in optimizers:
            for state in optimizer.state.values():
                for each in state.values():
                    if isinstance(each, Tensor):
                        each.fill_(NAN if each.is_floating_point() else 77)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


# ---- rollback and replay is as if nothing had happened


def matrices(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.dim() == 2]


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
    "SGD momentum": sgd,
    "SGD fused": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, fused=True),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.05),
    "AdamW": adam,
    "AdamW foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, foreach=True),
    "AdamW fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, fused=True),
    "AdamW amsgrad": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, amsgrad=True),
    "NAdam": lambda model: torch.optim.NAdam(model.parameters(), lr=0.05),
    "RAdam": lambda model: torch.optim.RAdam(model.parameters(), lr=0.05),
    "Adamax": lambda model: torch.optim.Adamax(model.parameters(), lr=0.05),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9, centered=True),
    "Adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.05),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.05),
    "ASGD": lambda model: torch.optim.ASGD(model.parameters(), lr=0.05, t0=3),
    "ASGD foreach": lambda model: torch.optim.ASGD(model.parameters(), lr=0.05, t0=3, foreach=True),
    "Adadelta": lambda model: torch.optim.Adadelta(model.parameters()),
    "Rprop": lambda model: torch.optim.Rprop(model.parameters(), lr=0.05),
    "SparseAdam": lambda model: torch.optim.SparseAdam(model.parameters(), lr=0.05),
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=3),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda model: torch.optim.Muon(matrices(model), lr=0.05)


def make(name: str) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = Table() if name == "SparseAdam" else Net()
    return model, OPTIMIZERS[name](model)


def steps(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    for seed in range(first, last):
        if isinstance(optimizer, torch.optim.LBFGS):

            def closure(seed: int = seed) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = model(batch(seed)).square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            train(model, optimizer, seed)


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replay_equals_never_interrupted(name: str, before: int) -> None:
    model, optimizer = make(name)
    steps(model, optimizer, 0, before)
    ring = SnapshotRing(model, optimizer)
    ring.take(before)
    steps(model, optimizer, 100, 102)  # the bad stretch
    for _ in range(2):  # the snapshot serves more than once
        wreck(model, optimizer)
        assert ring.restore() == before
        steps(model, optimizer, before, before + 3)
        twin, twin_optimizer = make(name)
        steps(twin, twin_optimizer, 0, before + 3)
        assert state_of(model, optimizer) == state_of(twin, twin_optimizer)


@pytest.mark.parametrize("device", DEVICES)
def test_everything_comes_back_into_the_same_tensors(device: str) -> None:
    model = Net().to(device)
    optimizer = adam(model)
    train(model, optimizer, 0)
    ring = SnapshotRing(model, optimizer)
    state = [tensor for each in optimizer.state.values() for tensor in each.values()]
    objects = [*model.parameters(), *model.buffers(), *state]
    containers = [optimizer.state, *optimizer.state.values()]
    for step in range(3):  # into new memory, and into memory that exists
        before = state_of(model, optimizer)
        ring.take(step)
        wreck(model, optimizer)
        assert state_of(model, optimizer) != before
        assert ring.restore() == step
        assert state_of(model, optimizer) == before
        state = [tensor for each in optimizer.state.values() for tensor in each.values()]
        assert all(
            now is then for now, then in zip([*model.parameters(), *model.buffers(), *state], objects, strict=True)
        )
        assert all(
            now is then for now, then in zip([optimizer.state, *optimizer.state.values()], containers, strict=True)
        )
        assert model.second.weight is model.first.weight
        train(model, optimizer, step)


def test_hyper_parameters_and_gradients_are_left_alone() -> None:
    model = Net()
    optimizer = sgd(model)
    train(model, optimizer, 0)
    ring = SnapshotRing(model, optimizer)
    ring.take(1)
    optimizer.param_groups[0]["lr"] = 0.001
    group, gradient = optimizer.param_groups[0], model.first.weight.grad
    ring.restore()
    assert optimizer.param_groups[0] is group
    assert group["lr"] == 0.001
    assert model.first.weight.grad is gradient


@pytest.mark.parametrize("device", DEVICES)
def test_training_may_go_on_once_it_has_waited(device: str) -> None:
    model = nn.Sequential(nn.Linear(4, 2000), nn.Linear(2000, 2000)).to(device)
    ring = SnapshotRing(model, sgd(model))
    for step in range(4):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        ring.take(step, wait=False)
        ring.wait()
        for parameter in model.parameters():
            parameter.detach().fill_(step)
        ring.restore()
        assert all(map(torch.equal, model.parameters(), before))
        for parameter in model.parameters():
            parameter.detach().add_(1)


# ---- the ring


def test_the_last_few_states_are_kept() -> None:
    model = nn.Linear(1, 1, bias=False)
    ring = SnapshotRing(model, [], keep=3)
    for step in range(5):
        model.weight.data.fill_(step)
        ring.take(step)
        assert ring.steps == list(range(max(step - 2, 0), step + 1))
    for back, step in ((2, 2), (0, 4), (1, 3)):
        assert ring.restore(back) == step
        assert model.weight.item() == step
    assert len(ring) == 3
    ring.drop_newest()
    assert ring.steps == [2, 3]
    assert ring.restore() == 3
    assert model.weight.item() == 3
    ring.take(9)
    assert ring.steps == [2, 3, 9]
    ring.resize(1)
    assert ring.steps == [9]
    ring.take(10)
    assert ring.steps == [10]
    ring.resize(2)
    ring.take(11)
    assert ring.steps == [10, 11]


def test_memory_is_used_again() -> None:
    model = Net()
    optimizer = adam(model)
    train(model, optimizer, 0)
    ring = SnapshotRing(model, optimizer, keep=2)

    def addresses() -> set[int]:
        return {each.values.data_ptr() for snapshot in ring._snapshots for each in snapshot.copies}

    ring.take(0)
    ring.take(1)
    before = addresses()
    for step in range(2, 5):
        ring.take(step)
        assert addresses() == before
    model.seen = torch.ones(2)  # another tensor for which the old memory does
    for step in range(5, 8):
        ring.take(step)
        assert addresses() == before
    model.register_buffer("late", torch.ones(1))
    ring.take(8)
    assert before & addresses()
    model.late.fill_(5)
    ring.take(9)
    ring.restore(1)
    assert model.late.item() == 1


def test_what_is_not_there_is_an_error() -> None:
    ring = SnapshotRing(nn.Linear(1, 1), [])
    for call in (ring.restore, ring.drop_newest):
        with pytest.raises(RuntimeError, match=r"no snapshot: call `take\(\)` first"):
            call()
    ring.take(0)
    for back in (1, -1):
        with pytest.raises(ValueError, match=f"`back` must be an integer >= 0 and <= 0, got {back}"):
            ring.restore(back)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "`model` must be a module or several, got 3"),
        ({"model": nn.Linear}, TypeError, "a class was passed"),
        ({"optimizers": [None]}, TypeError, "`optimizers` must be an optimizer or several, got None"),
        ({"keep": 0}, ValueError, "`keep` must be an integer >= 1, got 0"),
        ({"keep": 1.5}, TypeError, "`keep` must be an integer"),
        ({"scaler": 65536.0}, TypeError, "`scaler` must be a torch.amp.GradScaler or None"),
        ({"averaged": "ema"}, TypeError, "`averaged` must be a module or several, got 'e'"),
        ({"stateful": [NAN]}, TypeError, "`stateful` must be objects with `state_dict` and `load_state_dict`, got nan"),
        ({"stateful": 3}, TypeError, "`stateful` must be objects with"),
        ({"rng": 1}, TypeError, "`rng` must be True or False, got 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SnapshotRing(**{"model": nn.Linear(1, 1), "optimizers": [], **arguments})


def test_bad_arguments_of_methods_are_refused() -> None:
    ring = SnapshotRing(nn.Linear(1, 1), [])
    with pytest.raises(ValueError, match="`step` must be an integer >= 0, got -1"):
        ring.take(-1)
    with pytest.raises(ValueError, match="`keep` must be an integer >= 1, got 0"):
        ring.resize(0)
    with pytest.raises(TypeError, match="`wait` must be True or False"):
        ring.take(0, wait=None)  # type: ignore[arg-type]
    assert len(ring) == 0
    assert repr(ring) == "SnapshotRing(keep=2, steps=[])"


# ---- interruptions


class Explodes(nn.Module):
    """Has a state that can't be had."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no more")


@pytest.mark.parametrize("keep", [1, 2])
def test_a_lack_of_memory_leaves_the_ring_as_it_was(keep: int) -> None:
    model = Net()
    optimizer = adam(model)
    ring = SnapshotRing(model, optimizer, keep=keep)
    ring.take(0)
    train(model, optimizer, 0)  # the state that it makes needs memory
    before = ring.steps, state_of(model, optimizer)
    with mock.patch("torch.empty_like", side_effect=MemoryError), pytest.raises(MemoryError):
        ring.take(1)
    assert (ring.steps, state_of(model, optimizer)) == before
    ring.restore()
    assert not optimizer.state
    assert ring.steps == [0]
    ring.take(2)
    assert ring.steps == [0, 2][-keep:]


def test_a_state_that_cannot_be_had_leaves_the_ring_as_it_was() -> None:
    model = nn.Linear(1, 1)
    ring = SnapshotRing(model, [], keep=1, stateful=[thing := nn.Linear(1, 1)])
    ring.take(0)
    with torch.no_grad():
        model.weight.fill_(5)
    thing.__class__ = Explodes  # type: ignore[assignment]
    with pytest.raises(MemoryError):
        ring.take(1)
    thing.__class__ = nn.Linear
    assert ring.steps == [0]
    ring.restore()
    assert model.weight.item() != 5


@pytest.mark.parametrize("keep", [1, 3])
def test_a_copy_that_breaks_off_is_not_listed(keep: int) -> None:
    model = nn.Linear(1, 1, bias=False)
    ring = SnapshotRing(model, [], keep=keep)
    for step in range(3):
        model.weight.data.fill_(step)
        ring.take(step)
    model.weight.data.fill_(NAN)
    with mock.patch("torch._foreach_copy_", side_effect=RuntimeError("device")), pytest.raises(RuntimeError):
        ring.take(3)
    assert ring.steps == [1, 2][: keep - 1]
    for back in range(len(ring)):
        assert ring.restore(back) == 2 - back == model.weight.item()
    ring.take(4)
    assert ring.steps == [1, 2, 4][-keep:]


# ---- what a snapshot holds


@pytest.mark.parametrize("device", DEVICES)
def test_every_dtype_comes_back_bit_for_bit(device: str) -> None:
    dtypes = [
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.complex64,
        torch.complex128, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.bool,
    ]  # fmt: skip
    module = nn.Module()
    for dtype in dtypes:
        raw = torch.randint(2 if dtype == torch.bool else 256, (48,), dtype=torch.uint8, device=device)
        module.register_buffer(f"of_{dtype}".replace(".", "_"), raw.view(dtype).view(3, -1))
    ring = SnapshotRing(module, [])
    for step in range(3):
        before = {name: bits(buffer) for name, buffer in module.named_buffers()}
        ring.take(step)
        for buffer in module.buffers():
            (torch.view_as_real(buffer) if buffer.is_complex() else buffer).view(torch.uint8).bitwise_xor_(1)
        assert all(bits(buffer) != before[name] for name, buffer in module.named_buffers())
        ring.restore()
        assert {name: bits(buffer) for name, buffer in module.named_buffers()} == before


SHAPES: dict[str, Callable[[], Tensor]] = {
    "0-dim": lambda: torch.tensor(3.0),
    "empty": lambda: torch.zeros(0, 4),
    "transposed": lambda: torch.arange(12.0).reshape(3, 4).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "strided": lambda: torch.arange(12.0)[::2],
    "expanded": lambda: torch.tensor([[1.0], [2.0]]).expand(2, 3),
    "conjugated": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "negated": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
}


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_every_shape_comes_back(make: Callable[[], Tensor], gone: bool) -> None:
    module = nn.Module()
    module.register_buffer("held", make())
    expected = module.held.clone()
    original = module.held
    ring = SnapshotRing(module, [])
    ring.take(0)
    if gone:
        del module.held
    else:
        (original[:, :1] if original.dim() == 2 else original).mul_(2).add_(1)
    ring.restore()
    assert torch.equal(module.held, expected)
    if not gone or not original.is_neg():
        assert module.held.stride() == original.stride()
    assert (module.held is original) is not gone


def test_the_rest_of_the_memory_stays() -> None:
    base = torch.zeros(3, 4)
    module = nn.Module()
    module.register_buffer("part", base[:, 1:3])
    ring = SnapshotRing(module, [])
    ring.take(0)
    base.fill_(7)
    ring.restore()
    assert torch.equal(base, torch.tensor([7.0, 0.0, 0.0, 7.0]).expand(3, 4))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("compressed", [False, True], ids=["coo", "csr"])
def test_sparse_buffers_come_back(compressed: bool, grown: bool) -> None:
    def sparse(*values: float) -> Tensor:
        dense = torch.tensor(values, dtype=torch.float32).reshape(2, 2)
        return dense.to_sparse_csr() if compressed else dense.to_sparse()

    module = nn.Module()
    module.register_buffer("adjacency", sparse(0, 2, 3, 0))
    original = module.adjacency
    ring = SnapshotRing(module, [])
    assert ring.nbytes == 8
    for step in range(3):
        ring.take(step)
        module.adjacency = sparse(1, 2, 3, NAN) if grown else module.adjacency.mul_(NAN)
        assert not ring.finite()
        ring.restore()
        assert torch.equal(module.adjacency.to_dense(), sparse(0, 2, 3, 0).to_dense())
    assert ring.steps == [1, 2]
    assert (module.adjacency is original) is not grown


class Tagged(Tensor):
    """A tensor of a class of its own."""


def test_tensors_of_other_classes_come_back() -> None:
    module = nn.Module()
    module.register_buffer("tagged", torch.ones(3).as_subclass(Tagged))
    original = module.tagged
    ring = SnapshotRing(module, [])
    ring.take(0)
    original.zero_()
    assert ring.restore() == 0
    assert module.tagged is original
    assert module.tagged.tolist() == [1, 1, 1]
    module.tagged = torch.zeros(3)  # a plain one, into which the copy does not fit
    ring.restore()
    assert type(module.tagged) is Tagged
    assert module.tagged.tolist() == [1, 1, 1]


def test_parameters_that_only_the_optimizer_knows_come_back() -> None:
    model = nn.Linear(1, 1)
    temperatures = [nn.Parameter(torch.full((1,), float(index))) for index in range(300)]
    optimizer = torch.optim.Adam([*model.parameters(), *temperatures])
    ring = SnapshotRing(model, optimizer)
    ring.take(0)
    with torch.no_grad():
        temperatures[7].fill_(NAN)
    names, flags = ring.nonfinite()
    assert [name for name, flag in zip(names, flags.tolist(), strict=True) if flag] == ["optimizers[0].params.7"]
    ring.restore()
    assert [temperature.item() for temperature in temperatures] == list(range(300))
    assert ring._survey is not None
    assert ring._survey.holds()  # so the next snapshot is a quick one


def test_several_models_and_optimizers_come_back() -> None:
    generator, critic = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizers = [sgd(generator), adam(critic)]
    ring = SnapshotRing([generator, critic], optimizers)
    ring.take(0)
    before = state_of(generator, optimizers[0]), state_of(critic, optimizers[1])
    for model, optimizer in zip((generator, critic), optimizers, strict=True):
        train(model, optimizer, 0)
    assert ring.nonfinite()[0][:5] == (
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "optimizers[0].0.weight.momentum_buffer",
    )
    ring.restore()
    assert (state_of(generator, optimizers[0]), state_of(critic, optimizers[1])) == before


def test_averaged_models_come_back() -> None:
    model = Net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = sgd(model)
    ring = SnapshotRing(model, optimizer, averaged=average)
    train(model, optimizer, 0)
    average.update_parameters(model)
    before = state_of(average)
    assert average.n_averaged == 1
    ring.take(1)
    train(model, optimizer, 1)
    wreck(average)
    names, flags = ring.nonfinite()
    assert "averaged[0].module.first.weight" in [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]
    ring.restore()
    assert state_of(average) == before
    assert ring.finite()


@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_scaler_comes_back(device: str) -> None:
    model = nn.Linear(1, 1, device=device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**60, growth_interval=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ring = SnapshotRing(model, optimizer, scaler=scaler, keep=3)

    def step() -> None:
        loss = model(torch.full((1, 1), 1e30, device=device)).square().sum()  # overflows
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    ring.take(0)
    assert scaler._scale is None
    step()
    after_first = scaler.state_dict()
    assert after_first["scale"] == 2.0**59
    ring.take(1)
    tensors = scaler._scale, scaler._growth_tracker
    step()
    scaler._growth_tracker.fill_(1)  # type: ignore[union-attr]
    ring.restore()
    assert scaler.state_dict() == after_first
    assert (scaler._scale, scaler._growth_tracker) == tensors
    assert scaler._scale is tensors[0]
    ring.restore(back=1)
    assert scaler._scale is scaler._growth_tracker is None
    step()
    assert scaler.state_dict() == after_first


def test_a_disabled_loss_scaler_is_no_obstacle() -> None:
    ring = SnapshotRing(nn.Linear(1, 1), [], scaler=torch.amp.GradScaler("cpu", enabled=False))
    ring.take(0)
    assert ring.restore() == 0


def test_stateful_objects_come_back() -> None:
    rule = ZClip(warmup_steps=2)
    weight = nn.Parameter(torch.zeros(2))
    ring = SnapshotRing(nn.Linear(1, 1), [], stateful=[rule])

    def clip(size: float) -> None:
        weight.grad = torch.full((2,), size)
        rule.clip_([weight])

    for size in (1.0, 2.0, 1.5):
        clip(size)
    before = copy.deepcopy(rule.state_dict())
    ring.take(3)
    for _ in range(2):
        clip(3.0)
        assert all_of(rule.state_dict()) != all_of(before)
        ring.restore()
        assert all_of(rule.state_dict()) == all_of(before)


class Diary:
    """Gives its state away, and takes one, as it is."""

    def __init__(self) -> None:
        self.pages: dict[str, list[int]] = {"read": [1]}

    def state_dict(self) -> dict[str, list[int]]:
        return self.pages

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        self.pages = state


def test_states_that_objects_share_are_copied() -> None:
    diary = Diary()
    ring = SnapshotRing(nn.Linear(1, 1), [], stateful=[diary])
    ring.take(0)
    for _ in range(2):
        diary.pages["read"].append(2)
        ring.restore()
        assert diary.pages == {"read": [1]}


@pytest.mark.parametrize("device", DEVICES)
def test_random_state_comes_back_where_asked_for(device: str) -> None:
    def draw() -> list[float]:
        return [torch.rand((), device=device).item(), torch.rand(()).item(), random.random(), np.random.rand()]  # noqa: NPY002

    states = RandomState.capture()
    rings = {rng: SnapshotRing(nn.Linear(1, 1), [], rng=rng) for rng in (False, True)}
    for rng, ring in rings.items():
        draw()
        ring.take(0)
        first = draw()
        ring.restore()
        assert all(map(rng.__eq__, map(float.__eq__, first, draw())))
        if rng:
            ring.restore()
            assert draw() == first
    states.restore()


# ---- how training may change


def test_buffers_may_be_replaced() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    ring = SnapshotRing(model, [])
    ring.take(0)
    replacement = model[0].running_mean = torch.full((2,), NAN)
    model[0].running_var = torch.ones(5)
    model[0].num_batches_tracked = None
    ring.restore()
    assert model[0].running_mean is replacement
    assert replacement.tolist() == [0, 0]
    assert model[0].running_var.tolist() == [1, 1]
    assert model[0].num_batches_tracked.item() == 0
    model[0].running_mean, model[0].running_var = torch.full((2,), 3.0), torch.full((2,), 4.0)
    ring.take(1)
    model[0].running_mean.zero_()
    model[0].running_var.zero_()
    ring.restore()
    assert (model[0].running_mean.tolist(), model[0].running_var.tolist()) == ([3, 3], [4, 4])


def test_buffers_that_change_places_come_back() -> None:
    module = nn.Module()
    module.register_buffer("front", torch.zeros(2))
    module.register_buffer("back", torch.ones(2))
    ring = SnapshotRing(module, [])
    for step in range(3):
        ring.take(step)
        before = module.front.tolist(), module.back.tolist()
        module.front, module.back = module.back, module.front
        ring.restore()
        assert (module.front.tolist(), module.back.tolist()) == before
        module.front, module.back = module.back, module.front


def test_buffers_that_came_to_be_one_tensor_are_two_again() -> None:
    module = nn.Module()
    module.register_buffer("one", torch.zeros(2))
    module.register_buffer("two", torch.ones(2))
    ring = SnapshotRing(module, [])
    ring.take(0)
    module.two = module.one
    ring.restore()
    assert (module.one.tolist(), module.two.tolist()) == ([0, 0], [1, 1])


def test_none_comes_back() -> None:
    module = nn.Module()
    module.register_buffer("cache", None)
    ring = SnapshotRing(module, [])
    ring.take(0)
    module.cache = torch.ones(3)
    ring.restore()
    assert module.cache is None


def test_what_was_registered_later_stays() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    ring = SnapshotRing(model, [])
    ring.take(0)
    model.append(nn.BatchNorm1d(1))
    model[0].register_buffer("late", torch.ones(1))
    ring.restore()
    assert model[0].late.tolist() == [1]
    assert len(model) == 2
    ring.take(1)
    wreck(model)
    ring.restore()
    assert model[0].late.tolist() == model[1].running_var.tolist() == [1]


def test_what_was_added_since_is_in_the_next_snapshot() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    optimizer = sgd(model)
    ring = SnapshotRing(model, optimizer)
    ring.take(0)
    model.append(nn.Linear(1, 1))
    ring.take(1)
    before = state_of(model)
    wreck(model)
    ring.restore()
    assert state_of(model) == before
    optimizer.add_param_group({"params": [scale := nn.Parameter(torch.ones(1))]})
    ring.take(2)
    scale.detach().zero_()
    ring.restore()
    assert scale.item() == 1


@pytest.mark.parametrize(
    "replace", [torch.full_like, lambda tensor, value: tensor.fill_(value)], ids=["moved", "in place"]
)
def test_writes_through_data_are_noticed(replace: Callable[[Tensor, float], Tensor]) -> None:
    model = nn.BatchNorm1d(3)
    ring = SnapshotRing(model, [])
    for step in range(4):
        for tensor in (model.weight, model.running_mean):
            tensor.data = replace(tensor.data, step)
        ring.take(step)
        for tensor in (model.weight, model.running_mean):
            tensor.data = replace(tensor.data, 77)
        ring.restore()
        assert model.weight.tolist() == model.running_mean.tolist() == [step] * 3


def test_a_buffer_that_shrinks_in_its_memory_is_noticed() -> None:
    module = nn.Module()
    module.register_buffer("queue", torch.arange(4.0))
    ring = SnapshotRing(module, [])
    ring.take(0)
    module.queue.data = module.queue.data[:2]
    ring.take(1)
    module.queue.zero_()
    ring.restore()
    assert module.queue.tolist() == [0, 1]
    ring.restore(back=1)
    assert module.queue.tolist() == [0, 1, 2, 3]


def reshape(model: nn.Linear) -> None:
    model.weight.data = torch.ones(3, 3)


def cast(model: nn.Linear) -> None:
    model.double()


def remove(model: nn.Linear) -> None:
    del model.weight


def tie(model: nn.Linear) -> None:
    model.weight = model.bias


@pytest.mark.parametrize(("change", "name"), [(reshape, "weight"), (cast, "weight"), (remove, "weight"), (tie, "bias")])
def test_parameters_that_cannot_come_back_are_an_error(change: Callable[[nn.Linear], None], name: str) -> None:
    model = nn.Sequential(nn.Linear(1, 2))
    if change is tie:
        model[0].weight = nn.Parameter(torch.ones(2))
    model.insert(0, first := nn.Linear(1, 1))
    ring = SnapshotRing(model, [])
    ring.take(7)
    change(model[1])
    first.weight.data.fill_(5)
    with pytest.raises(RuntimeError, match=f"state of step 7 can't be restored.* '1.{name}' was another tensor"):
        ring.restore()
    assert first.weight.item() == 5  # nothing was changed


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_join_when_they_have_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    ring = SnapshotRing(model, sgd(model))
    assert ring.nbytes == ring.estimated_bytes() == 8  # a count of batches
    ring.take(0)
    lazy = model[0].weight
    ring.restore()
    assert model[0].weight is lazy
    model(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match=r"'0\.weight' had no shape yet"):
        ring.restore()
    ring.take(1)
    before = state_of(model)
    wreck(model)
    ring.restore()
    assert state_of(model) == before
    model[1].running_mean.fill_(NAN)
    assert not ring.finite()  # also at the first look since it has a shape


# ---- optimizer state


class Pair(NamedTuple):
    first: Tensor
    second: float


class Hoarder(Optimizer):
    """Keeps state of every shape and makes some of it late."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state.update(
                    step=0,
                    nested=OrderedDict(deep={"tensor": torch.zeros_like(parameter)}),
                    listed=[torch.zeros(2), [1.5]],
                    pair=Pair(torch.zeros(1), 0.0),
                    queue=deque([torch.zeros(())], maxlen=2),
                    nothing=None,
                    marks=set(),
                )
            state["marks"].add(state["step"])
            state["step"] += 1
            state["nested"]["deep"]["tensor"] += 1
            state["listed"][0] = state["listed"][0] + 1  # replaced, not written to
            state["listed"][1].append(float(state["step"]))
            state["pair"] = Pair(state["pair"].first.add_(1), float(state["step"]))
            state["queue"].append(torch.tensor(float(state["step"])))
            if state["step"] == 2:
                state["late"] = torch.ones(3)
                del state["nothing"]
            parameter.sub_(state["nested"]["deep"]["tensor"] * state["pair"].second)


def test_nested_optimizer_state_comes_back() -> None:
    model = nn.Linear(2, 1)
    optimizer = Hoarder(model.parameters())
    ring = SnapshotRing(model, optimizer, keep=4)
    states = []
    for step in range(4):
        states.append(state_of(model, optimizer))
        ring.take(step)
        optimizer.step()
    for back in (0, 3, 1, 2, 0):
        optimizer.step()
        assert ring.restore(back) == 3 - back
        assert state_of(model, optimizer) == states[3 - back]
        for state in optimizer.state.values():
            assert type(state["nested"]) is OrderedDict
            assert type(state["pair"]) is Pair
            assert state["queue"].maxlen == 2
    ring.restore()
    assert {name.rpartition("weight.")[2] for name in ring.nonfinite()[0] if ".weight." in name} == {
        "nested.deep.tensor", "listed.0", "pair.0", "queue.0", "queue.1", "late",
    }  # fmt: skip


def test_state_that_vanished_comes_back_and_what_came_goes() -> None:
    model = Net()
    optimizer = adam(model)
    train(model, optimizer, 0)
    ring = SnapshotRing(model, optimizer)
    before = {parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()}
    ring.take(1)
    del optimizer.state[model.first.bias]["exp_avg"]
    del optimizer.state[model.norm.weight]
    optimizer.state[model.unused]["exp_avg"] = torch.zeros(3)
    optimizer.state[model.first.weight]["extra"] = torch.zeros(3)
    assert ring.restore() == 1
    assert set(map(id, optimizer.state)) == set(map(id, before))
    for parameter, state in before.items():
        restored = optimizer.state[parameter]
        assert {key: all_of(each) for key, each in restored.items()} == {
            key: all_of(each) for key, each in state.items()
        }


def test_a_loaded_optimizer_state_is_no_obstacle() -> None:
    model = Net()
    optimizer = adam(model)
    train(model, optimizer, 0)
    ring = SnapshotRing(model, optimizer)
    ring.take(1)
    before = state_of(model, optimizer)
    optimizer.load_state_dict(adam(model).state_dict())  # an empty one, in another dictionary
    assert not optimizer.state
    ring.restore()
    assert state_of(model, optimizer) == before
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ring.take(2)
    wreck(model, optimizer)
    ring.restore()
    assert state_of(model, optimizer) == before


# ---- size


def bytes_of(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_bytes_are_those_of_the_copies() -> None:
    model = Net()
    optimizer = adam(model)
    for seed in range(2):
        ring = SnapshotRing(model, optimizer, averaged=[AveragedModel(model)])
        ring.take(0)
        assert ring.nbytes == sum(each.values.nbytes for each in ring._snapshots[0].copies)
        train(model, optimizer, seed)
    module = nn.Module()
    module.register_buffer("expanded", torch.zeros(1, 1).expand(1000, 1000))
    assert SnapshotRing(module, []).nbytes == 4


@pytest.mark.parametrize("name", [*sorted(OPTIMIZERS.keys() - {"LBFGS"}), "SGD bf16", "unknown", "subclass"])
def test_state_is_estimated_before_it_exists(name: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = Table() if name == "SparseAdam" else nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 4))
    model.requires_grad_(True)
    if name == "SGD bf16":
        model.bfloat16()
        optimizer = OPTIMIZERS["SGD momentum"](model)
    elif name == "unknown":
        optimizer = Hoarder(model.parameters())
    elif name == "subclass":
        optimizer = type("Mine", (torch.optim.Adam,), {})(model.parameters())
    else:
        optimizer = OPTIMIZERS[name](model)
    frozen = nn.Parameter(torch.zeros(500), requires_grad=False)
    optimizer.param_groups[0]["params"].append(frozen)
    ring = SnapshotRing(model, optimizer)
    estimate = ring.estimated_bytes()
    if name == "unknown":
        assert estimate == 3 * ring.nbytes - 2 * frozen.nbytes
        return
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter).to_sparse(1) if name == "SparseAdam" else torch.ones_like(parameter)
    optimizer.step()
    if name == "Adagrad":  # has all its state from the start
        assert estimate == ring.nbytes
    else:
        scalars = [each.tensor for each in ring._tensors() if each.tensor.numel() == 1 and not each.of_module]
        assert estimate == ring.nbytes - bytes_of(scalars)
    assert ring.estimated_bytes() == ring.nbytes


# ---- finiteness


def found(ring: SnapshotRing) -> list[str]:
    names, flags = ring.nonfinite()
    assert flags.shape == (len(names),)
    assert flags.dtype == torch.bool
    assert ring.finite().shape == ()
    assert bool(ring.finite()) is not bool(flags.any())
    return [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_element_is_found_and_named(bad: float, device: str) -> None:
    model = Net().to(device)
    optimizer = adam(model)
    train(model, optimizer, 0)
    ring = SnapshotRing(model, optimizer)
    assert found(ring) == []
    places = {
        "second.weight": None,
        "first.weight": model.first.weight,
        "frozen.bias": model.frozen.bias,
        "unused": model.unused,
        "norm.running_mean": model.norm.running_mean,
        "seen": model.seen,
        "optimizers[0].first.weight.exp_avg": optimizer.state[model.first.weight]["exp_avg"],
        "optimizers[0].norm.bias.exp_avg_sq": optimizer.state[model.norm.bias]["exp_avg_sq"],
    }
    for name, tensor in places.items():
        if tensor is None:
            assert name not in ring.nonfinite()[0]  # tied to another
            continue
        before = tensor.detach().clone()
        tensor.detach().view(-1)[-1] = bad
        assert found(ring) == [name]
        tensor.detach().copy_(before)
    assert found(ring) == []


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_large_values_of_every_dtype_are_finite(dtype: torch.dtype) -> None:
    module = nn.Module()
    module.register_buffer("large", torch.full((2000,), torch.finfo(dtype).max / 2, dtype=torch.float64).to(dtype))
    ring = SnapshotRing(module, [])
    assert found(ring) == []
    module.large[3] = NAN
    assert found(ring) == ["large"]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_was_not_finite_from_the_start_is_meant_so(bad: float) -> None:
    model = Net()
    model.mask[0, 0] = bad
    optimizer = sgd(model)
    ring = SnapshotRing(model, optimizer)
    assert found(ring) == []
    model.register_buffer("late", torch.full((2,), bad))
    assert found(ring) == []  # its first look
    train(model, optimizer, 0)
    optimizer.state[model.first.weight]["momentum_buffer"][0] = bad
    assert found(ring) == ["optimizers[0].first.weight.momentum_buffer"]  # a state is never meant so
    assert SnapshotRing(model, optimizer).finite().item() is False
    model.register_buffer("later", torch.ones(2))
    assert len(found(ring)) == 1
    model.later[0] = bad
    assert len(found(ring)) == 2


def test_nothing_is_finite() -> None:
    ring = SnapshotRing(nn.Identity(), [])
    assert ring.finite().item() is True
    assert ring.nonfinite()[0] == ()
    assert ring.nbytes == ring.estimated_bytes() == 0
    for step in range(3):
        ring.take(step)
    assert ring.steps == [1, 2]
    assert ring.restore(1) == 1


def test_the_host_reads_nothing() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    ring = SnapshotRing(model, optimizer, scaler=scaler)
    train(model, optimizer, 0)
    with ForbidHostReads():
        ring.take(0)
        ring.finite()
        ring.wait()
        ring.restore()
        ring.take(1, wait=False)
        assert ring.estimated_bytes() > 0


# ---- sharded tensors


@pytest.fixture
def mesh() -> Iterator[Any]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_tensors_come_back(mesh: Any) -> None:
    model = nn.Linear(4, 4)
    for name, parameter in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    ring = SnapshotRing(model, optimizer)

    def state() -> Any:
        tensors = [*model.parameters(), *(each for state in optimizer.state.values() for each in state.values())]
        return [bits(each.to_local() if isinstance(each, DTensor) else each) for each in tensors]

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    for count in range(3):
        before, objects = state(), list(model.parameters())
        ring.take(count)
        step()
        assert state() != before
        ring.restore()
        assert state() == before
        assert all(now is then for now, then in zip(model.parameters(), objects, strict=True))
        step()
    ring.take(3)
    before = state()
    expected = optimizer.state[model.weight]["exp_avg"]
    optimizer.state.clear()
    ring.restore()
    assert state() == before
    made = optimizer.state[model.weight]["exp_avg"]
    assert isinstance(made, DTensor)
    assert made is not expected
    assert (made.placements, made.device_mesh, made.shape) == (
        expected.placements,
        expected.device_mesh,
        expected.shape,
    )
    made.to_local()[0, 0] = NAN
    assert found(ring) == ["optimizers[0].weight.exp_avg"]


# ---- whatever the order


@settings(max_examples=40, deadline=None)
@given(
    keep=st.integers(1, 3),
    actions=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["step", "take", "drop", "wreck", "replace"]), st.just(0)),
            st.tuples(st.just("restore"), st.integers(0, 3)),
            st.tuples(st.just("resize"), st.integers(1, 3)),
        ),
        max_size=14,
    ),
)
def test_any_sequence_agrees_with_deep_copies(keep: int, actions: list[tuple[str, int]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    ring = SnapshotRing(model, optimizer, keep=keep)
    expected: list[tuple[int, Any]] = []
    for step, (action, number) in enumerate(actions):
        if action == "step":
            train(model, optimizer, step)
        elif action == "take":
            ring.take(step)
            expected = [*expected, (step, state_of(model, optimizer))][-keep:]
        elif action == "wreck":
            wreck(model, optimizer)
        elif action == "replace":
            model[1].running_mean = torch.full((2,), float(step))
        elif action == "resize":
            keep = number
            ring.resize(keep)
            expected = expected[-keep:]
        elif action == "drop" and expected:
            ring.drop_newest()
            del expected[-1]
        elif action == "restore" and number < len(expected):
            assert ring.restore(number) == expected[-1 - number][0]
            assert state_of(model, optimizer) == expected[-1 - number][1]
        assert ring.steps == [each for each, _ in expected]


def test_snapshots_are_numbered_where_no_step_is_given() -> None:
    model = nn.Linear(2, 1)
    ring = SnapshotRing(model, torch.optim.SGD(model.parameters(), lr=0.1), keep=2)
    for _ in range(3):
        ring.take()
    assert ring.steps == [1, 2]
    assert ring.restore() == 2
