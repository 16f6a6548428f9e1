"""The route plan against its definition, on random depths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_deploy.config import ExportConfig
from sdt_deploy.runtime.routing import (
    HIDDEN,
    HeadLayout,
    RoutePlan,
    depths_from_scores,
    padded_rows,
    plan_route,
)
from tests.samples import rules


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


N_HEADS = 3


def check_layout(layout: HeadLayout, counts: np.ndarray, rows: np.ndarray) -> None:
    """Every head of every row has a place of its own, in order; scatter finds it again."""
    batch, longest = len(counts), int(counts.max())
    assert layout.lengths.tolist() == counts.tolist()
    assert layout.gather_index.shape == (batch, N_HEADS, longest)
    bias = layout.key_bias
    assert bias is None or (bias.shape == (batch, N_HEADS, longest, 1) and bias.dtype == np.float32)
    assert layout.max_seqlen == longest
    for array in (layout.gather_index, layout.lengths, layout.scatter_index):
        assert array is None or (array.dtype == np.int32 and array.flags.c_contiguous)
    start = 0
    for sequence, count in enumerate(counts):
        for head in range(N_HEADS):
            expected = rows[start : start + count] * N_HEADS + head
            np.testing.assert_array_equal(layout.gather_index[sequence, head, :count], expected)
            if bias is not None:
                assert (bias[sequence, head, :count] == 0).all()
                assert (bias[sequence, head, count:] == HIDDEN).all()
        start += count
    assert layout.gather_index.min() >= 0
    assert layout.gather_index.max() < (rows.max() + 1) * N_HEADS
    padded = layout.padded
    assert padded.gather_index.shape == (batch, longest)
    if layout.scatter_index is None or padded.scatter_index is None:
        return
    places = layout.gather_index.reshape(-1)[layout.scatter_index]
    np.testing.assert_array_equal(places, np.arange(len(rows) * N_HEADS).reshape(-1, N_HEADS))
    places = padded.gather_index.reshape(-1)[padded.scatter_index]
    np.testing.assert_array_equal(places, np.arange(len(rows)))


@given(drawn=routed_batches(), context=st.sampled_from(["active", "all"]))
@settings(max_examples=300, deadline=None)
def test_plan_follows_its_definition(
    drawn: tuple[np.ndarray, np.ndarray, int, tuple[tuple[int, int], ...]], context: str
) -> None:
    depths, cu, _, stages = drawn
    plan = plan_route(depths, cu, rules(stages, context, N_HEADS))
    sequence_of = np.repeat(np.arange(len(cu) - 1), np.diff(cu))
    everyone = np.arange(len(depths))
    order = everyone if plan.order is None else plan.order
    np.testing.assert_array_equal(order, sorted(everyone, key=lambda token: -depths[token]))
    np.testing.assert_array_equal(plan.row_of[order], everyone)
    assert [s.stage for s in plan.steps] == [
        i for i, (first, _) in enumerate(stages) if (depths > first).any()
    ]
    for step in plan.steps:
        first, stop = stages[step.stage]
        active = np.flatnonzero(depths > first)
        assert step.n_active == len(active)
        assert set(order[: step.n_active]) == set(active)
        alive = np.unique(sequence_of[active])
        counts = np.bincount(sequence_of[active])[alive]
        check_layout(step.queries, counts, plan.row_of[active])
        if context == "all":
            assert step.context is not None
            context_tokens = everyone[np.isin(sequence_of, alive)]
            rows = plan.row_of[context_tokens]
            check_layout(step.context, np.bincount(sequence_of)[alive], rows)
        else:
            assert step.context is None
        if context == "active" and stop - first > 1:
            assert step.key_bias.shape[0] == stop - first
            assert step.remaining_depth is not None
            places = step.queries.scatter_index
            assert places is not None
            for i, bias in enumerate(step.key_bias):
                seen = bias.reshape(-1)[places] == 0
                deeper = depths[order[: step.n_active]] > first + i
                assert (seen == deeper[:, None]).all()
                assert (bias[step.queries.key_bias != 0] == HIDDEN).all()
        else:
            seen_by = step.context or step.queries
            np.testing.assert_array_equal(step.key_bias, seen_by.key_bias)
        if stop - first > 1:
            assert step.remaining_depth is not None
            rows_depths = depths[order[: step.n_active]]
            np.testing.assert_array_equal(step.remaining_depth, rows_depths - first)
            if context == "all":
                assert step.refresh_index is not None
                expected = np.arange(len(depths)) + len(depths) * (everyone < step.n_active)
                np.testing.assert_array_equal(step.refresh_index, expected)


def steps_of(depths: list[int], lengths: list[int], context: str = "active") -> RoutePlan:
    cu = np.cumsum([0, *lengths], dtype=np.int32)
    stages = ExportConfig().stage_layers(3)
    return plan_route(np.array(depths, dtype=np.int32), cu, rules(stages, context, N_HEADS))


def test_nobody_leaves_nothing_is_copied() -> None:
    plan = steps_of([3, 3, 3], [1, 2])
    assert plan.order is None
    assert [step.n_active for step in plan.steps] == [3] * 3
    assert plan.steps[1].queries is plan.steps[0].queries


def test_tokens_of_a_sequence_keep_their_order() -> None:
    """Which causal attention and rotary positions will need: places follow tokens, rows do not."""
    plan = steps_of([1, 3, 2, 3], [4])
    assert plan.order is not None
    assert plan.order.tolist() == [1, 3, 2, 0]
    tokens = [plan.order[step.queries.padded.gather_index[0]].tolist() for step in plan.steps]
    assert tokens == [[0, 1, 2, 3], [1, 2, 3], [1, 3]]


def test_depth_0_is_never_run_and_a_stage_without_tokens_is_left_out() -> None:
    assert steps_of([0, 0], [2]).steps == ()
    assert [step.stage for step in steps_of([1, 0, 1], [2, 1]).steps] == [0]


def test_finished_sequences_leave_the_attention_batch() -> None:
    plan = steps_of([1, 1, 3, 1], [2, 2], "all")
    assert [len(step.queries.lengths) for step in plan.steps] == [2, 1, 1]
    assert plan.steps[1].context is not None
    assert plan.steps[1].context.padded.gather_index.tolist() == [[0, 3]]


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
    rows = np.arange(sum(counts), dtype=np.int32)[::-1]
    padded = padded_rows(rows, np.array(counts, dtype=np.int32))
    assert padded.min() >= 0
    start = 0
    for line, count in zip(padded, counts, strict=True):
        np.testing.assert_array_equal(line[:count], rows[start : start + count])
        start += count
