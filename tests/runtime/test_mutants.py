"""The parity tests bite: each mistake that a compacting loop invites makes them fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sdt_deploy.config import ExportConfig, HeadConfig, ModelConfig
from sdt_deploy.runtime import backend as backend_module
from sdt_deploy.runtime.routing import (
    Int32,
    RoutePlan,
    RouteRules,
    RouteStep,
    head_layouts,
    plan_route,
)
from sdt_deploy.runtime.session import Session
from sdt_deploy.testing import OracleBackend, memory_bundle
from tests.samples import assert_parity, random_batch, random_model

Mutation = Callable[[RoutePlan], RoutePlan]


def every_step(change: Callable[[RouteStep], RouteStep]) -> Mutation:
    return lambda plan: dataclasses.replace(plan, steps=tuple(change(step) for step in plan.steps))


def model_config(context: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=50,
        d_model=16,
        n_heads=2,
        n_layers=4,
        d_ff=24,
        max_positions=30,
        context=context,  # type: ignore[arg-type]
        head=HeadConfig(kind="hidden"),
    )


@every_step
def swapped_sequences(step: RouteStep) -> RouteStep:
    """The first two sequences change places in the batch, their lengths do not."""
    gather = step.queries.gather_index.copy()
    if len(gather) > 1:
        gather[[0, 1]] = gather[[1, 0]]
    return dataclasses.replace(step, queries=dataclasses.replace(step.queries, gather_index=gather))


def wrong_destination(plan: RoutePlan) -> RoutePlan:
    """Finished rows go to each other's tokens."""
    return dataclasses.replace(plan, row_of=np.roll(plan.row_of, 1))


def unsorted_rows(plan: RoutePlan) -> RoutePlan:
    """Rows stay in the order of tokens, so that those which are dropped are not the finished."""
    return dataclasses.replace(plan, order=None)


@every_step
def attention_across_sequences(step: RouteStep) -> RouteStep:
    """The whole batch as one sequence: the defect of the original research code."""
    n_heads = step.queries.gather_index.shape[1]
    rows = np.arange(step.n_active, dtype=np.int32)
    (joined,) = head_layouts(
        np.ones((1, len(rows)), dtype=bool),
        rows,
        rows,
        np.array([0, len(rows)]),
        n_heads,
        n_queries=1,
        with_bias=True,
    )
    context, bias = step.context, joined.key_bias
    if context is not None:
        assert context.key_bias is not None
        index = context.gather_index.swapaxes(0, 1).reshape(1, n_heads, -1)
        bias = context.key_bias.swapaxes(0, 1).reshape(1, n_heads, -1, 1)
        context = dataclasses.replace(context, gather_index=np.ascontiguousarray(index))
    assert bias is not None
    bias = np.ascontiguousarray(bias)
    return dataclasses.replace(step, queries=joined, context=context, key_bias=bias)


@every_step
def shifted_rows(step: RouteStep) -> RouteStep:
    """Attention's outputs go to each other's rows."""
    assert step.queries.scatter_index is not None
    scatter = np.roll(step.queries.scatter_index, 1, axis=0)
    return dataclasses.replace(
        step, queries=dataclasses.replace(step.queries, scatter_index=scatter)
    )


def identity(plan: RoutePlan) -> RoutePlan:
    return plan


def run_with(mutation: Mutation, context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def mutated_plan(depths: Int32, cu: Int32, rules: RouteRules) -> RoutePlan:
        return mutation(plan_route(depths, cu, rules))

    monkeypatch.setattr(backend_module, "plan_route", mutated_plan)
    config = model_config(context)
    model = random_model(config, 0)
    bundle = memory_bundle(model, ExportConfig())
    session = Session(bundle, OracleBackend(bundle, model))
    batch = random_batch(config, [12, 9, 12, 5], 3)
    thresholds = (0.1, 0.3, 0.5, 0.7)
    result = assert_parity(session, model, batch, thresholds)
    assert 1 < result.layer_usage.mean_depth < 3


@pytest.mark.parametrize("context", ["active", "all"])
def test_without_a_mutation_parity_holds(context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with(identity, context, monkeypatch)


@pytest.mark.parametrize("context", ["active", "all"])
@pytest.mark.parametrize(
    "mutation",
    [
        swapped_sequences,
        unsorted_rows,
        wrong_destination,
        attention_across_sequences,
        shifted_rows,
    ],
)
def test_parity_catches(
    mutation: Mutation, context: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        run_with(mutation, context, monkeypatch)
