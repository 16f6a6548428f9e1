"""The route plan against its definition, on random depths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_deploy.config import ExportConfig
from sdt_deploy.runtime.routing import (
    PaddedLayout,
    RoutePlan,
    depths_from_scores,
    padded_layout,
    plan_route,
)


@st.composite
def routed_batches(
    draw: st.DrawFn,
) -> tuple[np.ndarray, np.ndarray, int, tuple[tuple[int, int], ...]]:
    n_layers = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    n_tokens = sum(lengths)
    top = draw(st.integers(0, n_layers))
    depths = draw(st.lists(st.integers(0, top), min_size=n_tokens, max_size=n_tokens))
    stages = ExportConfig(layers_per_stage=draw(st.integers(1, n_layers))).stage_layers(n_layers)
    cu = np.cumsum([0, *lengths], dtype=np.int32)
    return np.array(depths, dtype=np.int32), cu, n_layers, stages


def check_layout(layout: PaddedLayout, counts: np.ndarray, rows: np.ndarray) -> None:
    """Every sequence's rows stand left-aligned and in order; scatter finds them again."""
    assert (
        layout.gather_index.dtype == layout.lengths.dtype == layout.scatter_index.dtype == "int32"
    )
    assert layout.lengths.tolist() == counts.tolist()
    start = 0
    for row, count in enumerate(counts):
        assert layout.gather_index[row, :count].tolist() == rows[start : start + count].tolist()
        start += count
    flat = layout.gather_index.reshape(-1)
    np.testing.assert_array_equal(flat[layout.scatter_index], rows)
    assert layout.max_seqlen == counts.max()


@given(drawn=routed_batches(), context=st.sampled_from(["active", "all"]))
@settings(max_examples=300, deadline=None)
def test_plan_follows_its_definition(
    drawn: tuple[np.ndarray, np.ndarray, int, tuple[tuple[int, int], ...]], context: str
) -> None:
    depths, cu, _, stages = drawn
    plan = plan_route(depths, cu, stages, context)  # type: ignore[arg-type]
    sequence_of = np.repeat(np.arange(len(cu) - 1), np.diff(cu))
    everyone = np.arange(len(depths))
    previous = everyone
    assert [s.stage for s in plan.steps] == [
        i for i, (first, _) in enumerate(stages) if (depths > first).any()
    ]
    for step in plan.steps:
        first, stop = stages[step.stage]
        active = np.flatnonzero(depths > first)
        np.testing.assert_array_equal(step.token_index, active)
        assert step.n_active == len(active)
        kept = previous if step.keep_index is None else previous[step.keep_index]
        np.testing.assert_array_equal(kept, active)
        assert (step.keep_index is None) == (len(previous) == len(active))
        alive = np.unique(sequence_of[active])
        counts = np.bincount(sequence_of[active])[alive]
        np.testing.assert_array_equal(np.diff(step.cu_seqlens), counts)
        check_layout(step.queries, counts, np.arange(len(active)))
        if context == "all":
            assert step.context is not None
            context_tokens = everyone[np.isin(sequence_of, alive)]
            check_layout(step.context, np.bincount(sequence_of)[alive], context_tokens)
        else:
            assert step.context is None
        rows = np.arange(len(active)) if step.publish_rows is None else step.publish_rows
        np.testing.assert_array_equal(active[rows], step.publish_tokens)
        finished = active[depths[active] <= stop]
        published = set(step.publish_tokens.tolist())
        assert set(finished.tolist()) <= published
        if context == "active":
            assert published == set(finished.tolist())
        if stop - first > 1:
            assert step.remaining_depth is not None
            np.testing.assert_array_equal(step.remaining_depth, depths[active] - first)
            if context == "all":
                assert step.refresh_index is not None
                rows_of = np.full(len(depths), -1)
                rows_of[active] = np.arange(len(active)) + len(depths)
                expected = np.where(rows_of >= 0, rows_of, everyone)
                np.testing.assert_array_equal(step.refresh_index, expected)
        previous = active


def steps_of(depths: list[int], lengths: list[int], context: str = "active") -> RoutePlan:
    cu = np.cumsum([0, *lengths], dtype=np.int32)
    stages = ExportConfig().stage_layers(3)
    return plan_route(np.array(depths, dtype=np.int32), cu, stages, context)  # type: ignore[arg-type]


def test_nobody_leaves_nothing_is_copied() -> None:
    plan = steps_of([3, 3, 3], [1, 2])
    assert [step.keep_index for step in plan.steps] == [None] * 3
    assert [len(step.publish_tokens) for step in plan.steps] == [0, 0, 3]
    assert plan.steps[1].queries is plan.steps[0].queries


def test_depth_0_is_never_run_and_a_stage_without_tokens_is_left_out() -> None:
    assert steps_of([0, 0], [2]).steps == ()
    assert [step.stage for step in steps_of([1, 0, 1], [2, 1]).steps] == [0]


def test_finished_sequences_leave_the_attention_batch() -> None:
    plan = steps_of([1, 1, 3, 1], [2, 2], "all")
    assert [len(step.queries.lengths) for step in plan.steps] == [2, 1, 1]
    assert plan.steps[1].context is not None
    assert plan.steps[1].context.gather_index.tolist() == [[2, 3]]


@given(
    scores=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20),
    thresholds=st.lists(st.floats(-1, 2, width=32), min_size=1, max_size=6).map(sorted),
)
def test_depth_counts_thresholds_below_the_score(
    scores: list[float], thresholds: list[float]
) -> None:
    found = depths_from_scores(np.array(scores, dtype=np.float32), thresholds)
    assert found.dtype == np.int32
    assert found.tolist() == [sum(s > t for t in thresholds) for s in scores]


@pytest.mark.parametrize("counts", [[1], [3, 3], [2, 5, 1]])
def test_padding_points_at_a_valid_row(counts: list[int]) -> None:
    layout = padded_layout(np.array(counts, dtype=np.int32))
    assert layout.gather_index.min() >= 0
    assert layout.gather_index.max() == sum(counts) - 1
