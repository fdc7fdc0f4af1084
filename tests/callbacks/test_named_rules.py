"""Rules that go by parameter name, and rules with statistics, inside a Trainer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from stability_callbacks import GradientClipping, StepGuard
from stability_callbacks.clipping import AGC, AdaGC, AutoClip, ClipRule, NormClip, OutlierClip, PerGroup, ZClip
from tests.models import MODELS, NormNet, TwoOptimizers, assert_same_bits, fit, make_batches, poison, training_state

RULES: dict[str, Any] = {
    "auto": lambda: AutoClip(percentile=50),
    "z": lambda: ZClip(warmup_steps=2),
    "outlier": lambda: OutlierClip(window=4, z_threshold=1.0, warmup_steps=2, warmup_ratio=0.1),
    "ada": lambda: AdaGC(warmup_steps=2),
    "agc": lambda: AGC(clip=0.05, exclude=["3|head"]),
    "group": lambda: PerGroup({"weight": AutoClip(30), ".*": NormClip(0.1)}),
}


def run(rule: ClipRule, batches: Any, model: Any = NormNet, **arguments: Any) -> tuple[Any, Any]:
    pl.seed_everything(0, verbose=False)
    module = model(**({"optimizer": arguments.pop("optimizer")} if "optimizer" in arguments else {}))
    clipping = GradientClipping(rule)
    trainer = fit(module, batches, [clipping, StepGuard()], **arguments)
    return training_state(module, trainer), clipping.state_dict()["rules"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_a_skipped_step_enters_no_statistic(name: str, fused: bool) -> None:
    good = make_batches(8)
    bad = [poison(good[0]), *good[:5], poison(good[1]), *good[5:]]

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=fused)

    healed = run(RULES[name](), bad, optimizer=optimizer)
    expected = run(RULES[name](), good, optimizer=optimizer)
    assert_same_bits(healed, expected)


@pytest.mark.filterwarnings("ignore:AGC.* matches no parameter")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", RULES)
def test_rules_work_on_every_model(name: str, model: str) -> None:
    rule = RULES[name]()
    state, _ = run(rule, make_batches(4), MODELS[model])
    assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())


def test_several_optimizers_have_statistics_of_their_own() -> None:
    _, states = run(AutoClip(50), make_batches(3), TwoOptimizers)
    assert [float(rules[0]["position"]) for rules in states] == [3.0, 3.0]
    assert not torch.equal(states[0][0]["history"][:3], states[1][0]["history"][:3])


def test_patterns_may_belong_to_another_optimizer() -> None:
    run(PerGroup({"^one": NormClip(0.1), "^two": NormClip(0.2)}), make_batches(2), TwoOptimizers)


@pytest.mark.parametrize("patterns", [["nothing", ".*"], ["bias"]])
def test_patterns_that_do_not_fit_stop_the_fit_at_its_start(patterns: list[str]) -> None:
    with pytest.raises(MisconfigurationException, match="does not fit the model"):
        run(PerGroup(dict.fromkeys(patterns, NormClip())), make_batches(1))


def test_an_exclusion_of_nothing_is_said() -> None:
    with pytest.warns(
        UserWarning, match=r"AGC\(exclude=\['clasifier'\]\) matches no parameter.*there are: net\.0\.weight"
    ):
        run(AGC(exclude=["clasifier"]), make_batches(1))
