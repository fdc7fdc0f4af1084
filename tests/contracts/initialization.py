"""The contract of policies: what every one of `stability_callbacks.initialization`, and a user's own, keeps."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from stability_callbacks import initialization
from stability_callbacks.initialization import (
    Auto,
    ByPattern,
    DepthScaled,
    InitReport,
    Normal,
    Orthogonal,
    Policy,
    TruncNormal,
    ZeroResidual,
)
from tests.contracts.contract import Contract, Make, assert_stable_repr, mesh_of_one, whole
from tests.loops import Net, Train, by_hand, clip, learns, make_batches
from tests.models import assert_same_bits

# They write to `Net`, and train well from what they wrote.
EXAMPLES: Mapping[type[Policy], list[Callable[[], Policy]]] = {
    Normal: [lambda: Normal(std=0.1)],
    TruncNormal: [lambda: TruncNormal(std=0.1)],
    DepthScaled: [lambda: DepthScaled(std=0.1)],
    ZeroResidual: [lambda: ZeroResidual(Auto())],
    ByPattern: [lambda: ByPattern({"^up": Orthogonal(), "^head": None, ".*": Auto()})],
}

POLICIES = Contract(initialization, Policy, EXAMPLES, "tests/contracts/initialization.py")
law = POLICIES.law


class WithBuffers(Net):
    """What initialization must leave alone besides parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(super().forward(x)))


def build(kind: type[nn.Module] = Net) -> Any:
    """A model with the weights of seed 0."""
    torch.manual_seed(0)
    return kind()


def batch() -> Tensor:
    return make_batches()[0][0]


def apply(policy: Policy, model: nn.Module, seed: int = 1) -> InitReport:
    """Initialize from a seed."""
    torch.manual_seed(seed)
    return policy.apply(model, batch())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


@law
def gives_a_seed_the_same_weights(make: Make[Policy]) -> None:
    """By any object made alike; and whatever they were before, if it looks at no outputs."""
    results = []
    for start in (0, 0 if make().needs_batch else 1):
        torch.manual_seed(start)
        model = Net()
        report = apply(make(), model)
        written = {row.name for row in report if row.initialized}
        assert written, "nothing of the example's model is written"
        results.append({name: value for name, value in weights(model).items() if name in written})
    assert_same_bits(*results)


@law
def reports_each_parameter(make: Make[Policy]) -> None:
    """One row for each, in the model's order, with what was there before and is there after."""
    model = build()
    before = weights(model)
    report = apply(make(), model)
    after = weights(model)
    assert [row.name for row in report] == list(before)
    for row in report:
        old, new = before[row.name], after[row.name]
        assert row.what
        assert row.shape == tuple(new.shape)
        statistics = [each for value in (old, new) for each in (value.mean().item(), value.std(correction=0).item())]
        assert row[3:] == pytest.approx(statistics, abs=1e-6)
        if not row.initialized:
            assert_same_bits(new, old, row.name)


@law
def leaves_frozen_parameters_alone(make: Make[Policy]) -> None:
    written = [row.name for row in apply(make(), build()) if row.initialized]
    for frozen in (written[::2], written[1::2]):
        model = build()
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        before = weights(model)
        report = apply(make(), model)
        for name in frozen:
            assert not report[name].initialized
            assert_same_bits(model.get_parameter(name).detach(), before[name], name)
            assert not model.get_parameter(name).requires_grad


@law
def changes_nothing_but_values(make: Make[Policy]) -> None:
    """Optimizers hold the parameters, users their buffers, hooks and modes."""
    model = build(WithBuffers)
    model.norm.eval()
    parameters = {name: (each, each.data_ptr()) for name, each in model.named_parameters()}
    buffers = {name: each.clone() for name, each in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    apply(make(), model)
    for name, each in model.named_parameters():
        held, address = parameters[name]
        assert each is held
        assert each.data_ptr() == address
        assert each.grad is None
        assert each.requires_grad
        assert each.is_leaf
    assert_same_bits(dict(model.named_buffers()), buffers)
    assert [module.training for module in model.modules()] == modes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@law
def says_whether_it_needs_a_batch(make: Make[Policy]) -> None:
    policy, model = make(), build()
    before = weights(model)
    if policy.needs_batch:
        with pytest.raises(ValueError, match="`batch`"):
            policy.apply(model)
        assert_same_bits(weights(model), before)
    else:
        torch.manual_seed(1)
        policy.apply(model)
        other = build()
        apply(make(), other)
        assert_same_bits(weights(model), weights(other))


@law
def refuses_the_meta_device(make: Make[Policy]) -> None:
    """Before anything is written."""
    model = build()
    model.head = nn.Linear(8, 2, device="meta")
    before = weights(model.up)
    with pytest.raises(ValueError, match=r"`model` must have no parameters on the meta device, got .head\.weight"):
        apply(make(), model)
    assert_same_bits(weights(model.up), before)


@law
def leaves_lazy_parameters_alone(make: Make[Policy]) -> None:
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that lazy layers are new
        model.later = nn.LazyLinear(4)
    with pytest.warns(UserWarning, match=r"lazy and were not initiali[sz]ed: later.weight, later.bias"):
        report = apply(make(), model)
    for name in ("later.weight", "later.bias"):
        assert report[name].shape is None
        assert not report[name].initialized
        assert nn.parameter.is_lazy(model.get_parameter(name))


@law
def refuses_what_is_no_module(make: Make[Policy]) -> None:
    with pytest.raises(TypeError, match="`model`"):
        make().apply([nn.Linear(1, 1)], batch())  # type: ignore[arg-type]


@law
def gives_half_precision_the_same_values(make: Make[Policy]) -> None:
    """They are drawn in float32 and cast. What is found from the outputs of a model depends on its precision."""
    if make().needs_batch:
        return
    half, full = build().bfloat16(), build()
    apply(make(), half)
    report = apply(make(), full)
    written = [row.name for row in report if row.initialized]
    for name in written:
        assert_same_bits(half.get_parameter(name).detach(), full.get_parameter(name).detach().bfloat16(), name)


@law
def gives_shards_what_it_gives_the_whole(make: Make[Policy]) -> None:
    """A sharded model gets the weights of the whole one; a policy that looks at outputs may refuse it instead."""
    expected = build()
    rows = apply(make(), expected)
    with mesh_of_one() as mesh:
        model = build()
        fully_shard(model, mesh=mesh)
        before = weights(model)
        if make().needs_batch:
            with pytest.raises(ValueError, match="`model` must not be sharded"):
                apply(make(), model)
            assert_same_bits(weights(model), before)
            return
        report = apply(make(), model)
        assert_same_bits(weights(model), weights(expected))
        assert [row[:3] for row in report] == [row[:3] for row in rows]


@law
def survives_copies_and_pickles(make: Make[Policy]) -> None:
    policy = make()
    expected = build()
    apply(policy, expected)
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        model = build()
        assert repr(twin) == repr(policy)
        apply(twin, model)
        assert_same_bits(weights(model), weights(expected))


@law
def has_a_stable_repr(make: Make[Policy]) -> None:
    assert_stable_repr(make, lambda policy: apply(policy, build()))


@law
def initializes_before_a_loop(make: Make[Policy], train: Train = by_hand) -> None:
    """In a loop that knows nothing of Lightning."""
    net = build()
    before = weights(net)
    report = apply(make(), net)
    after = weights(net)
    assert any(not torch.equal(after[row.name], before[row.name]) for row in report if row.initialized)
    assert learns(train(net, before_step=lambda *_: clip(net)))
