from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdt_deploy.errors import ConfigError
from sdt_deploy.training.schedule import (
    ScoreWindow,
    depth_at,
    depth_limits,
    learning_rate_at,
    temperature_at,
)

CURRICULA = ("linear", "cosine", "steps")


@pytest.mark.parametrize("curriculum", CURRICULA)
@given(target=st.floats(1, 6), share=st.floats(0, 1))
def test_the_depth_falls_from_all_layers_to_the_target(
    curriculum: str, target: float, share: float
) -> None:
    depths = [
        depth_at(p, n_layers=6, target_depth=target, curriculum=curriculum, share=share)  # type: ignore[arg-type]
        for p in np.linspace(0, 1, 101)
    ]
    assert np.all(np.diff(depths) <= 1e-9)
    assert depths[-1] == pytest.approx(target)
    assert max(depths) <= 6
    if share > 0:
        assert depths[0] == pytest.approx(6)
    settled = [d for p, d in zip(np.linspace(0, 1, 101), depths, strict=True) if p >= share]
    assert settled == pytest.approx([target] * len(settled))


def test_the_curricula_have_their_shapes() -> None:
    def at(progress: float, curriculum: str) -> float:
        return depth_at(progress, n_layers=6, target_depth=3.5, curriculum=curriculum, share=0.8)  # type: ignore[arg-type]

    assert at(0.4, "linear") == pytest.approx(4.75)
    assert at(0.4, "cosine") == pytest.approx(4.75)
    assert at(0.1, "cosine") > at(0.1, "linear")
    assert at(0.7, "cosine") < at(0.7, "linear")
    assert {round(at(p, "steps"), 6) for p in np.linspace(0, 1, 300)} == {6.0, 5.0, 4.0, 3.5}


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate_at(p, warm_up=0.1) for p in np.linspace(0, 1, 101)]
    assert rates[0] == 0
    assert int(np.argmax(rates)) == 10
    assert rates[10] == pytest.approx(1)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert learning_rate_at(0, warm_up=0.0) == 1


def test_the_temperature_falls_geometrically() -> None:
    assert temperature_at(0, first=1, last=0.01) == 1
    assert temperature_at(0.5, first=1, last=0.01) == pytest.approx(0.1)
    assert temperature_at(1, first=1, last=0.01) == pytest.approx(0.01)


@given(
    seed=st.integers(0, 1000),
    target=st.floats(2, 6),
    pinned=st.sampled_from([0.0, 0.08]),
    levels=st.sampled_from(["graded", "two-level"]),
)
def test_limits_hold_the_budget(seed: int, target: float, pinned: float, levels: str) -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(seed))
    limits = depth_limits(
        logits,
        pinned,
        n_layers=6,
        target_depth=target,
        levels=levels,
        shallow_depth=1,  # type: ignore[arg-type]
    )
    assert torch.all(limits[1:] >= limits[:-1])
    depths = (logits[:, None] > limits).sum(dim=1).double()
    assert pinned * 6 + (1 - pinned) * float(depths.mean()) == pytest.approx(target, abs=0.01)


def test_the_shallow_depth_is_that_of_the_shallow_tokens() -> None:
    logits = torch.arange(1000.0)
    limits = depth_limits(
        logits, 0.0, n_layers=6, target_depth=4, levels="two-level", shallow_depth=3
    )
    depths = (logits[:, None] > limits).sum(dim=1)
    assert depths.unique(return_counts=True)[1].tolist() == [667, 333]
    assert depths.unique().tolist() == [3, 6]


@pytest.mark.parametrize("target", [0.0, -1.0, 6.1])
def test_a_target_outside_the_layers(target: float) -> None:
    with pytest.raises(ConfigError, match=r"must lie in \(0, 6\]"):
        depth_limits(
            torch.randn(9), 0.0, n_layers=6, target_depth=target, levels="graded", shallow_depth=1
        )


def test_the_window_keeps_the_newest_scores() -> None:
    window = ScoreWindow(5)
    window.add(torch.tensor([1.0, 2, 3]), n_tokens=4)
    assert window.pinned_share == 0.25
    window.add(torch.tensor([4.0, 5, 6, 7]), n_tokens=4)
    assert window.logits.tolist() == [3, 4, 5, 6, 7]
    assert window.pinned_share == pytest.approx(0.9 / 7.6)
