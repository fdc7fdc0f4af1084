"""Every law can be broken: for each there is a class, nearly a good one, that it finds out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from stability_callbacks.clipping import AutoClip, ClipResult, ClipRule, NormClip, ValueClip
from stability_callbacks.detection import Detector, NonFinite, Spike
from stability_callbacks.gradient_pass import named_gradients, scale_gradients_
from stability_callbacks.initialization import Auto, InitReport, Kaiming, Normal
from stability_callbacks.schedules import WarmupConstant, WarmupLinear
from tests.contracts import clipping, detection, initialization, schedules
from tests.contracts.contract import Contract

BREACHES: dict[Callable[..., None], Callable[[], Any]] = {}


def breaks(law: Callable[..., None]) -> Callable[[Any], Any]:
    """Note that a class breaks a law."""

    def note(make: Any) -> Any:
        BREACHES[law] = make
        return make

    return note


# ---- clip rules


@breaks(clipping.says_what_it_did)
class Boastful(NormClip):
    def clip_(self, parameters: Any, norms: Any = None) -> ClipResult:
        return super().clip_(parameters, norms)._replace(clipped_norm=torch.tensor(0.5))


@breaks(clipping.takes_known_norms)
class Credulous(NormClip):
    def measure(self, parameters: Any, norms: Any = None) -> Any:
        return super().measure(parameters) if norms is None else norms


@breaks(clipping.may_be_assigned_its_parameters)
class Shy(NormClip):
    def assign(self, parameters: Any) -> None:
        self.max_norm = 0.5 / len(list(parameters))


@breaks(clipping.leaves_missing_gradients_missing)
class Filling(NormClip):
    def clip_(self, parameters: Any, norms: Any = None) -> ClipResult:
        for _, parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return super().clip_(parameters, norms)


class Spreading(ClipRule):
    """Clips as most code does: a NaN in the norm goes to every gradient."""

    def __init__(self, max_norm: float = 1.0) -> None:
        self.max_norm = max_norm

    @torch.no_grad()
    def clip_(self, parameters: Any, norms: Any = None) -> ClipResult:
        pairs = named_gradients(parameters)
        norm = self.measure(pairs, norms).total
        coefficient = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        scale_gradients_(pairs, coefficient)
        return ClipResult(norm, norm * coefficient, coefficient)


breaks(clipping.leaves_bad_gradients_alone)(Spreading)


@breaks(clipping.works_under_a_loss_scale_if_linear)
class Nonlinear(ValueClip):
    linear: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(0.1)


class Averaging(Spreading):
    """Learns from all norms, whatever they are, and keeps what it has learned to itself."""

    def __init__(self) -> None:
        super().__init__()
        self._mean = torch.tensor(1.0)

    def clip_(self, parameters: Any, norms: Any = None) -> ClipResult:
        pairs = named_gradients(parameters)
        self._mean = 0.9 * self._mean + 0.1 * self.measure(pairs, norms).total
        self.max_norm = self._mean  # type: ignore[assignment]
        return super().clip_(pairs, norms)


breaks(clipping.learns_nothing_from_bad_steps)(Averaging)
breaks(clipping.learns_nothing_from_masked_norms)(Averaging)
breaks(clipping.resumes_bit_for_bit)(Averaging)
breaks(clipping.has_a_stable_repr)(Averaging)
breaks(clipping.starts_afresh_from_an_empty_state)(Averaging)


class Shared(AutoClip):
    """Copies share the original's memory."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self


breaks(clipping.survives_copies_and_pickles)(Shared)


@breaks(clipping.never_waits_for_the_device)
class Curious(NormClip):
    def clip_(self, parameters: Any, norms: Any = None) -> ClipResult:
        result = super().clip_(parameters, norms)
        self._threshold = result.norm.item()
        return result


@breaks(clipping.clips_shards_as_it_clips_the_whole)
class Undivided(NormClip):
    def clip_(self, parameters: Any, norms: Any = None) -> ClipResult:
        pairs = named_gradients(parameters)
        whole = [type(parameter.data) is Tensor for _, parameter in pairs]
        return super().clip_(pairs if all(whole) else pairs[:1], norms)


@breaks(clipping.tames_a_spike_in_a_loop)
class Lenient(NormClip):
    def __init__(self) -> None:
        super().__init__(1e9)


# ---- detectors


@breaks(detection.votes_by_one_boolean_of_the_device)
class Verbose(NonFinite):
    def __call__(self, evidence: Any) -> Any:
        return super().__call__(evidence).reshape(1)


class Counting(Detector):
    """Takes everything in, at the wrong time too, and shows it."""

    kind: ClassVar[str] = "counting"

    def __init__(self, seen: int = 0) -> None:
        self.seen = torch.tensor(seen)

    def __call__(self, evidence: Any) -> Tensor:
        self.seen += 1
        return self.seen > 10_000

    def update(self, evidence: Any, accepted: Tensor) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


for _law in (
    detection.voting_changes_nothing,
    detection.learns_nothing_from_bad_steps,
    detection.learns_nothing_from_skipped_steps,
    detection.resumes_bit_for_bit,
    detection.has_a_stable_repr,
):
    breaks(_law)(Counting)


@breaks(detection.starts_afresh_from_an_empty_state)
class Clinging(Spike):
    def __init__(self) -> None:
        super().__init__(window=16, min_history=8)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            super().load_state_dict(state_dict)


@breaks(detection.survives_copies_and_pickles)
class Inseparable(Clinging):
    def __deepcopy__(self, memo: Any) -> Any:
        return self


@breaks(detection.never_waits_for_the_device)
class Impatient(NonFinite):
    def __call__(self, evidence: Any) -> Tensor:
        return torch.tensor(bool(super().__call__(evidence)))


@breaks(detection.judges_shards_as_it_judges_the_whole)
class Alone(NonFinite):
    def __call__(self, evidence: Any) -> Tensor:
        return super().__call__(evidence) | torch.tensor(torch.distributed.is_initialized())


@breaks(detection.lets_a_sound_loop_be)
class Suspicious(NonFinite):
    def __call__(self, evidence: Any) -> Tensor:
        return super().__call__(evidence) | (evidence.gradients.total > 0)


# ---- schedules


@breaks(schedules.gives_numbers_that_multiply)
class Sinking(WarmupConstant):
    def __call__(self, step: int, total_steps: int | None = None) -> float:
        return 1.0 - step


@breaks(schedules.depends_on_the_step_alone)
class Forgetful(WarmupConstant):
    _calls = 0

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        self._calls += 1
        return 1.0 / self._calls


@breaks(schedules.peaks_where_its_warmup_ends)
class Late(WarmupConstant):
    def warmup_steps(self, total_steps: int | None = None) -> int:
        return max(super().warmup_steps(total_steps) - 1, 0)

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        return min(1.0, step / 10)


@breaks(schedules.starts_and_ends_where_it_says)
class Lower(WarmupLinear):
    def __init__(self) -> None:
        super().__init__(start=0.5)

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        return super().__call__(step, total_steps) * 0.9


@breaks(schedules.falls_after_its_warmup)
class Rising(WarmupConstant):
    def __call__(self, step: int, total_steps: int | None = None) -> float:
        return float(step)


@breaks(schedules.says_whether_it_needs_a_total)
class Guessing(WarmupLinear):
    def __call__(self, step: int, total_steps: int | None = None) -> float:
        return super().__call__(step, 100 if total_steps is None else total_steps)


@breaks(schedules.survives_copies_and_pickles)
class Drifting(WarmupConstant):
    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, start=0.5)


@breaks(schedules.has_a_stable_repr)
class Anonymous(WarmupConstant):
    __repr__ = object.__repr__


@breaks(schedules.can_be_drawn)
class Invisible(WarmupConstant):
    def __call__(self, step: int, total_steps: int | None = None) -> float:
        return super().__call__(step, total_steps) if step else 1.0 / (total_steps or 1) * next(_numbers)


_numbers = itertools.count(1)


@breaks(schedules.drives_a_learning_rate_in_a_loop)
class Jittery(WarmupConstant):
    def __call__(self, step: int, total_steps: int | None = None) -> float:
        return 1.0 / next(_numbers)


# ---- policies


@breaks(initialization.gives_a_seed_the_same_weights)
class Unseeded(Normal):
    def apply(self, model: nn.Module, batch: Any = None) -> InitReport:
        torch.manual_seed(next(_numbers))
        return super().apply(model, batch)


@breaks(initialization.reports_each_parameter)
class Silent(Normal):
    def apply(self, model: nn.Module, batch: Any = None) -> InitReport:
        return InitReport(super().apply(model, batch).rows[1:])


@breaks(initialization.leaves_frozen_parameters_alone)
class Thawing(Auto):
    def apply(self, model: nn.Module, batch: Any = None) -> InitReport:
        return super().apply(model.requires_grad_(True), batch)


@breaks(initialization.changes_nothing_but_values)
class Replacing(Auto):
    def apply(self, model: nn.Module, batch: Any = None) -> InitReport:
        model.head.weight = nn.Parameter(torch.zeros(2, 8))  # type: ignore[union-attr, assignment]
        return super().apply(model, batch)


@breaks(initialization.says_whether_it_needs_a_batch)
class Undemanding(Auto):
    needs_batch: ClassVar[bool] = True


class Careless(Auto):
    """Writes to parameters as they come."""

    def apply(self, model: nn.Module, batch: Any = None) -> InitReport:
        for parameter in model.parameters():
            parameter.detach().zero_()
        return super().apply(model, batch)


breaks(initialization.refuses_the_meta_device)(Careless)
breaks(initialization.leaves_lazy_parameters_alone)(Careless)


@breaks(initialization.refuses_what_is_no_module)
class Obliging(Auto):
    def apply(self, model: Any, batch: Any = None) -> InitReport:
        return InitReport() if isinstance(model, list) else super().apply(model, batch)


@breaks(initialization.gives_half_precision_the_same_values)
class Precise(Auto):
    def apply(self, model: nn.Module, batch: Any = None) -> InitReport:
        torch.manual_seed(next(model.parameters()).element_size())
        return super().apply(model, batch)


@breaks(initialization.gives_shards_what_it_gives_the_whole)
class Dispersed(Auto):
    def apply(self, model: nn.Module, batch: Any = None) -> InitReport:
        if torch.distributed.is_initialized():
            torch.manual_seed(5)
        return super().apply(model, batch)


@breaks(initialization.survives_copies_and_pickles)
class Fickle(Auto):
    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, forget_bias=7.0)


@breaks(initialization.has_a_stable_repr)
class Nameless(Auto):
    __repr__ = object.__repr__


@breaks(initialization.initializes_before_a_loop)
class Deadening(Kaiming):
    def apply(self, model: nn.Module, batch: Any = None) -> InitReport:
        report = super().apply(model, batch)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        return report


CONTRACTS: list[Contract[Any]] = [
    clipping.CLIP_RULES,
    detection.DETECTORS,
    schedules.SCHEDULES,
    initialization.POLICIES,
]
LAWS = [law for contract in CONTRACTS for law in contract.laws]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law.__module__.rpartition('.')[2]}.{law.__name__}")
def test_a_law_finds_out_a_class_that_breaks_it(law: Callable[..., None]) -> None:
    assert law in BREACHES, f"write a class that breaks {law.__name__}, or the law may be empty"
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        law(BREACHES[law])
