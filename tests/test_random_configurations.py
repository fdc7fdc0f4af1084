"""Laws 2 and 3 on random trainings; ``python -m benchmarks.random_configurations`` draws more of them."""

from __future__ import annotations

import pytest

from benchmarks.random_configurations import check

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]


@pytest.mark.parametrize("seed", range(30))
def test_no_law_breaks(seed: int) -> None:
    assert not check(seed)
