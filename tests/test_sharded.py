"""Sharded tensors (DTensor): what is measured, clipped and backed up of them equals what it would be of the whole ones.

Everything runs in one process, and in two of which the second holds nothing of some tensors: see sharded_worker.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stability_callbacks.gradient_pass import measure_gradients
from tests import sharded_worker as worker
from tests.contracts.clipping import CLIP_RULES, ORDINARY, run
from tests.contracts.contract import Make
from tests.gradients import gradient, parameter
from tests.process_pair import MARKS, PROCESSES, logs, run_processes

Results = list[dict[str, Any]]

pytestmark = MARKS


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of two processes found."""
    directory = tmp_path_factory.mktemp("pair")
    codes = run_processes(worker.__name__, directory)
    assert codes == [0] * PROCESSES, logs(directory)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a single process finds, on a mesh of its own."""
    return [worker.alone(tmp_path_factory.mktemp("alone"))]


@pytest.fixture(params=["alone", "pair"])
def found(request: pytest.FixtureRequest) -> Results:
    results: Results = request.getfixturevalue(request.param)
    return results


def whole_parameters() -> list[nn.Parameter]:
    return [parameter(value) for value, _ in worker.whole_gradients()]


def _name(each: Any) -> str:
    return repr(each()) if callable(each) else ""


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def assert_close(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("norm_type", worker.NORM_TYPES)
def test_norms_are_those_of_the_whole_tensors(found: Results, norm_type: float) -> None:
    expected = measure_gradients(whole_parameters(), norm_type)
    for result in found:
        per_tensor, total, _ = result["norms"][norm_type]
        assert_close(per_tensor, expected.per_tensor)
        assert_close(total, expected.total)


def test_there_is_one_collective_for_each_way_of_sharding(found: Results) -> None:
    for result in found:
        assert {count for *_, count in result["norms"].values()} == {2}


def test_a_bad_element_on_any_rank_is_seen_by_all(found: Results) -> None:
    for result in found:
        for finite, all_finite in result["bad_elements"].values():
            assert finite.tolist() == [False] + [True] * (len(finite) - 1)
            assert not all_finite


def test_every_rank_scales_its_shard(found: Results) -> None:
    originals = [value for value, _ in worker.whole_gradients()]
    for result in found:
        together, apart = result["scaled"]
        assert_close(together, [0.5 * value for value in originals])
        assert_close(apart, [factor * value for factor, value in zip(worker.FACTORS.tolist(), originals, strict=True)])


@pytest.mark.parametrize("name", worker.RULES)
def test_rules_clip_as_they_clip_whole_tensors(found: Results, name: str) -> None:
    weights = whole_parameters()
    expected = worker.RULES[name].clip_(weights)
    for result in found:
        outcome, gradients = result["clipped"][name]
        assert_close(outcome, tuple(expected))
        assert_close(gradients, [gradient(weight) for weight in weights])


@pytest.mark.parametrize("name", worker.RULES)
def test_a_nan_on_one_rank_leaves_all_shards_alone(found: Results, name: str) -> None:
    for result in found:
        before, after, coefficient = result["untouched"][name]
        assert coefficient == 1
        assert sum(int(value.isnan().sum()) for value in before) == 1
        assert all(same_bits(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(("place", "make"), list(enumerate(CLIP_RULES.makes())), ids=_name)
def test_exported_rules_clip_shards_as_they_clip_whole_tensors(found: Results, place: int, make: Make[Any]) -> None:
    expected = [tuple(map(list, each)) for each in run(make(), ORDINARY)]
    for result in found:
        torch.testing.assert_close(result["exported"][place], expected, rtol=1e-5, atol=1e-7)


def test_changes_never_go_unnoticed(found: Results) -> None:
    for result in found:
        assert result["changes"] == dict.fromkeys(result["changes"], True)


def test_partial_sums_are_added_first(found: Results) -> None:
    total = torch.tensor([3.0, 4.0]) if len(found) == 1 else torch.tensor([6.0, 2.0])
    for result in found:
        norm, scaled = result["partial_sums"]["norm"]
        assert_close(norm, total.norm())
        assert_close(scaled, total / (total.norm() + 1e-6))
        norm, clamped = result["partial_sums"]["value"]
        assert_close(norm, total.norm())
        assert_close(clamped, total.clamp(max=2.5))


def test_every_axis_of_the_mesh_is_reduced(found: Results) -> None:
    value = worker.whole_gradients()[0][0]
    expected = [torch.linalg.vector_norm(value, norm_type).reshape(1) for norm_type in (2.0, worker.INF)]
    for result in found:
        assert_close(result["two_axes"], expected * 6)


@pytest.mark.parametrize("restore", ["restore", "restore_where True", "restore_where False"])
def test_sharded_buffers_are_backed_up_and_restored(found: Results, restore: str) -> None:
    for result in found:
        before, after, restored, _, same_objects = result["buffers"][restore]
        assert same_objects
        assert all(not same_bits(after[name], before[name]) for name in ("statistics", "single", "large", "count"))
        expected = after if restore == "restore_where False" else before
        assert all(same_bits(restored[name], expected[name]) for name in expected)


def test_each_rank_judges_its_own_shard_of_a_buffer(found: Results) -> None:
    for result in found:
        *_, nonfinite, _ = result["buffers"]["restore"]
        assert {name for name, flag in nonfinite.items() if flag} == {"statistics"}  # not the mask
