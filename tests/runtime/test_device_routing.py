"""The planner for GPUs, run by torch on the CPU; tests/gpu runs it on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_deploy.config import ExportConfig, ModelConfig
from sdt_deploy.runtime.backends.device import DeviceMemory
from sdt_deploy.runtime.device_routing import plan_on_device
from sdt_deploy.runtime.routing import (
    HeadLayout,
    RoutePlan,
    RouteRules,
    depths_from_scores,
    plan_route,
)
from sdt_deploy.runtime.session import Session
from sdt_deploy.testing import OracleBackend, memory_bundle
from tests.samples import (
    assert_parity,
    cut_points,
    lengths_lists,
    model_configs,
    quantile_thresholds,
    random_batch,
    random_model,
    seeds,
)


def host(value: Any) -> Any:
    """A plan, or a part of one, with arrays in place of tensors."""
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return value.numpy()
    if isinstance(value, HeadLayout):
        names = ("lengths", "gather_index", "scatter_index", "key_bias")
        return replace(value, **{name: host(getattr(value, name)) for name in names})
    return value


def plan(scores: Any, thresholds: Sequence[float], cu_seqlens: Any, rules: RouteRules) -> RoutePlan:
    memory = DeviceMemory("cpu")
    found = plan_on_device(memory, torch.from_numpy(scores), thresholds, cu_seqlens, rules)
    steps = []
    for step in found.steps:
        names = ("queries", "context", "key_bias", "remaining_depth", "refresh_index")
        steps.append(replace(step, **{name: host(getattr(step, name)) for name in names}))
    assert found.order is not None
    return replace(
        found,
        depths=host(found.depths),
        order=host(found.order),
        row_of=host(found.row_of),
        steps=tuple(steps),
        head={name: host(array) for name, array in found.head.items()},
    )


class PlannedByTorch(OracleBackend):
    def plan(
        self, scores: Any, thresholds: Sequence[float], cu_seqlens: Any, rules: RouteRules
    ) -> RoutePlan:
        return plan(scores, thresholds, cu_seqlens, rules)


@given(data=st.data(), drawn=model_configs(), lengths=lengths_lists, seed=seeds)
@settings(max_examples=150, deadline=None)
def test_any_model(
    data: st.DataObject,
    drawn: tuple[ModelConfig, ExportConfig],
    lengths: list[int],
    seed: int,
) -> None:
    config, export_config = drawn
    model = random_model(config, seed % 10_000)
    bundle = memory_bundle(model, export_config)
    backend = PlannedByTorch(bundle, model)
    batch = random_batch(config, lengths, seed)
    thresholds = quantile_thresholds(model, batch, data.draw(cut_points(config.n_layers)))
    result = assert_parity(Session(bundle, backend), model, batch, thresholds)
    expected = [int((result.depths > first).sum()) for first, _ in bundle.manifest.stage_layers]
    assert [call.n_rows for call in backend.calls] == [n for n in expected if n]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from(["active", "all"]),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_it_routes_as_the_host_does(lengths: list[int], context: str, size: int, seed: int) -> None:
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    # Few distinct scores, so that some lie on a threshold.
    scores = np.random.default_rng(seed).integers(0, 7, cu_seqlens[-1]).astype(np.float32) / 6
    thresholds = (0.0, 1 / 6, 0.5, 0.5, 5 / 6)
    rules = RouteRules(
        stage_layers=tuple((i, min(i + size, 5)) for i in range(0, 5, size)),
        context=context,  # type: ignore[arg-type]
        n_heads=2,
        pooling="mean",
    )
    found = plan(scores, thresholds, cu_seqlens, rules)
    expected = plan_route(depths_from_scores(scores, thresholds), cu_seqlens, rules)
    np.testing.assert_array_equal(found.depths, expected.depths)
    n_tokens = len(scores)
    order = np.arange(n_tokens) if expected.order is None else expected.order
    np.testing.assert_array_equal(found.order, order)
    np.testing.assert_array_equal(found.row_of, expected.row_of)
    for one, other in zip(found.steps, expected.steps, strict=True):
        assert (one.stage, one.n_active) == (other.stage, other.n_active)
        queries, keys = one.queries, one.context or one.queries
        assert queries.scatter_index is not None
        assert queries.max_seqlen == other.queries.max_seqlen
        # Every active row stands where its scatter index says.
        flat = queries.gather_index.reshape(-1)
        slices = np.arange(one.n_active)[:, None] * 2 + np.arange(2)
        np.testing.assert_array_equal(flat[queries.scatter_index], slices)
        # The keys that are seen are the host's, sequence by sequence.
        last = one.key_bias if one.key_bias.ndim == 4 else one.key_bias[-1]
        seen = other.key_bias if other.key_bias.ndim == 4 else other.key_bias[-1]
        theirs = (other.context or other.queries).gather_index
        ours_visible = [
            sorted(keys.gather_index[b, 1][last[b, 1, :, 0] == 0].tolist())
            for b in range(len(lengths))
        ]
        their_visible = [
            sorted(theirs[b, 1][seen[b, 1, :, 0] == 0].tolist()) for b in range(len(theirs))
        ]
        # Slices, of which those of active rows are the first; other sequences need not be there.
        alive = [each for each in ours_visible if each and each[0] < 2 * one.n_active]
        assert alive == [each for each in their_visible if each]
