"""The contract of detectors: what every detector of `stability_callbacks.detection`, and a user's own, keeps."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stability_callbacks import detection
from stability_callbacks.detection import Detector, InputRange, Spike, StepEvidence, SustainedRise, input_magnitude
from stability_callbacks.gradient_pass import measure_gradients
from tests.contracts.contract import (
    Contract,
    Make,
    assert_stable_repr,
    mesh_of_one,
    saved_and_loaded,
    sharded,
)
from tests.detection.evidence import evidence
from tests.gradients import parameter
from tests.host_reads import ForbidHostReads
from tests.loops import Net, by_hand, make_batches
from tests.models import assert_same_bits

NAN, INF = math.nan, math.inf

# What they learn from the steps below is enough to judge the later ones by.
EXAMPLES: Mapping[type[Detector], list[Callable[[], Detector]]] = {
    InputRange: [InputRange, lambda: InputRange(max_abs=50.0)],
    Spike: [lambda on=on: Spike(window=16, min_history=8, on=on) for on in ("loss", "grad_norm", "both")],  # type: ignore[misc]
    SustainedRise: [lambda: SustainedRise(patience=2, window=16, min_history=8)],
}

DETECTORS = Contract(detection, Detector, EXAMPLES, "tests/contracts/detection.py")
law = DETECTORS.law

YES, NO = torch.tensor(True), torch.tensor(False)


def ordinary(step: int) -> StepEvidence:
    """A step of a sound run."""
    generator = torch.Generator().manual_seed(step)
    loss, norm = (1 + 0.1 * torch.rand(2, generator=generator)).tolist()
    return evidence(loss, norm, input_magnitude=torch.tensor(3.0), nonfinite_buffers=torch.tensor([False, False]))


OUTLIER = evidence(50.0, 80.0, input_magnitude=torch.tensor(1e4), nonfinite_buffers=torch.tensor([False, True]))
# With steps that stand out, alone and in a row.
STEPS = [OUTLIER if step in (20, 30, 31, 32) else ordinary(step) for step in range(45)]
CUT = 31  # where a run is interrupted: in the middle of the row

UNUSABLE: dict[str, StepEvidence] = {
    "NaN": evidence(NAN, NAN, input_magnitude=torch.tensor(NAN)),
    "infinity": evidence(INF, INF, input_magnitude=torch.tensor(INF)),
    "minus infinity": evidence(-INF, INF),
    "a zero norm and no loss": evidence(None, 0.0),
    "a zero norm and a loss of NaN": evidence(NAN, 0.0),
    "no gradients": StepEvidence(torch.tensor(9.0), measure_gradients([])),
}


def judge(detector: Detector, steps: Iterable[StepEvidence]) -> list[bool]:
    """The votes on some steps in a row; those that are voted down are skipped, as `StepGuard` does."""
    votes = []
    for step in steps:
        vote = detector(step)
        detector.update(step, ~vote)
        votes.append(bool(vote))
    return votes


# ---- what a vote is


@law
def votes_by_one_boolean_of_the_device(make: Make[Detector]) -> None:
    detector = make()
    for step in [*STEPS, *UNUSABLE.values()]:
        vote = detector(step)
        assert isinstance(vote, Tensor)
        assert (vote.shape, vote.dtype, vote.device) == ((), torch.bool, step.gradients.total.device)
        detector.update(step, ~vote)
    assert detector.kind.isidentifier()


@law
def voting_changes_nothing(make: Make[Detector]) -> None:
    """A step may be voted on more than once, or never be taken in."""
    asked, expected = make(), judge(make(), STEPS)
    for step, vote in zip(STEPS, expected, strict=True):
        votes = [bool(asked(step))]
        before = saved_and_loaded(asked.state_dict())
        votes += [bool(asked(step)), bool(asked(step))]
        assert votes == [vote] * 3
        assert_same_bits(saved_and_loaded(asked.state_dict()), before)
        asked.update(step, torch.tensor(not vote))


# ---- what it remembers


@law
def learns_nothing_from_bad_steps(make: Make[Detector]) -> None:
    """NaN, infinity, zero norms and steps without gradients enter no statistic, skipped or not."""
    for history in (0, 3, 20):
        for name, bad in UNUSABLE.items():
            for accepted in (YES, NO):
                clean, tried = make(), make()
                judge(clean, STEPS[:history])
                judge(tried, STEPS[:history])
                for _ in range(2):
                    tried(bad)
                    tried.update(bad, accepted)
                assert judge(clean, STEPS[history:]) == judge(tried, STEPS[history:]), name
                assert_same_bits(clean.state_dict(), tried.state_dict(), name)


@law
def learns_nothing_from_skipped_steps(make: Make[Detector]) -> None:
    """A step whose update was not applied does not enter what later steps are compared with."""
    for step in (ordinary(1000), OUTLIER):
        clean, tried = make(), make()
        judge(clean, STEPS[:20])
        judge(tried, STEPS[:20])
        for _ in range(3):
            tried(step)
            tried.update(step, NO)
        # What is counted in a row is forgotten at the next ordinary step.
        for each in (clean, tried):
            each(ordinary(1001))
            each.update(ordinary(1001), YES)
        assert_same_bits(clean.state_dict(), tried.state_dict())
        assert judge(clean, STEPS[20:]) == judge(tried, STEPS[20:])


@law
def resumes_bit_for_bit(make: Make[Detector]) -> None:
    """Interrupted and resumed equals uninterrupted, also in a detector that knew something else before."""
    uninterrupted = make()
    expected = judge(uninterrupted, STEPS)
    first = make()
    judge(first, STEPS[:CUT])
    state = first.state_dict()
    kept = saved_and_loaded(state)
    judge(first, STEPS[:5])
    assert_same_bits(state, kept, "a state that was taken before")
    for known in (0, 7):
        second = make()
        judge(second, [ordinary(2000 + step) for step in range(known)])
        second.load_state_dict(saved_and_loaded(kept))
        assert judge(second, STEPS[CUT:]) == expected[CUT:]
        assert_same_bits(second.state_dict(), uninterrupted.state_dict())


@law
def starts_afresh_from_an_empty_state(make: Make[Detector]) -> None:
    detector, fresh = make(), make()
    judge(detector, STEPS[:CUT])
    detector.load_state_dict(make().state_dict())
    assert judge(detector, STEPS) == judge(fresh, STEPS)
    assert_same_bits(detector.state_dict(), fresh.state_dict())


@law
def survives_copies_and_pickles(make: Make[Detector]) -> None:
    """A copy goes on as the original would, and neither knows of the other."""
    expected = judge(make(), STEPS)
    detector = make()
    judge(detector, STEPS[:CUT])
    for twin in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert type(twin) is type(detector)
        assert repr(twin) == repr(detector)
        state = saved_and_loaded(detector.state_dict())
        assert judge(twin, STEPS[CUT:]) == expected[CUT:]
        assert_same_bits(detector.state_dict(), state, "the original")


@law
def has_a_stable_repr(make: Make[Detector]) -> None:
    assert_stable_repr(make, lambda detector: judge(detector, STEPS[:10]))


# ---- where it runs


@law
def never_waits_for_the_device(make: Make[Detector]) -> None:
    detector = make()
    for step in [*STEPS, *UNUSABLE.values()]:
        with ForbidHostReads():
            vote = detector(step)
            detector.update(step, ~vote)


@law
def judges_shards_as_it_judges_the_whole(make: Make[Detector]) -> None:
    """The evidence of a sharded model is the same as that of the whole one, so the votes are."""

    def steps(place: Callable[[Tensor], Tensor]) -> list[StepEvidence]:
        return [
            StepEvidence(
                step.loss,
                measure_gradients(
                    [("weight", parameter(place((step.gradients.total * torch.ones(4, 1) / 2).float())))]
                ),
                step.nonfinite_buffers,
                input_magnitude(place(torch.full((4, 2), float(step.input_magnitude or 0.0)))),
            )
            for step in [*STEPS, *(each for each in UNUSABLE.values() if each.gradients.names)]
        ]

    expected = judge(make(), steps(torch.clone))
    with mesh_of_one() as mesh:
        assert judge(make(), steps(lambda tensor: sharded(tensor, mesh))) == expected


def gentle(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@law
def lets_a_sound_loop_be(make: Make[Detector]) -> None:
    """In a loop that knows nothing of Lightning: sound training is bit for bit what it is without the detector."""
    torch.manual_seed(0)
    guarded, plain = Net(), Net()
    plain.load_state_dict(guarded.state_dict())
    detector, optimizer, skipped = make(), gentle(guarded.parameters()), 0
    sound = [(x, y) for x, y, _ in make_batches()]
    for x, y in sound:
        loss = F.cross_entropy(guarded(x), y)
        optimizer.zero_grad()
        loss.backward()
        step = StepEvidence(loss, measure_gradients(guarded.named_parameters()), input_magnitude=input_magnitude(x))
        vote = detector(step)
        if vote:
            skipped += 1
        else:
            optimizer.step()
        detector.update(step, ~vote)
    by_hand(plain, gentle, batches=[(x, y, 1.0) for x, y in sound])
    assert not skipped, f"{skipped} of {len(sound)} sound steps are voted down"
    assert_same_bits(guarded.state_dict(), plain.state_dict())
