"""The parity tests bite: each mistake that a compacting loop invites makes them fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sdt_deploy.config import ExportConfig, HeadConfig, ModelConfig
from sdt_deploy.runtime import session as session_module
from sdt_deploy.runtime.routing import Int32, PaddedLayout, RoutePlan, RouteStep, plan_route
from sdt_deploy.runtime.session import Session
from sdt_deploy.testing import OracleBackend, memory_bundle
from tests.samples import assert_parity, random_batch, random_model

Mutation = Callable[[RouteStep], RouteStep]


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


def swapped_sequences(step: RouteStep) -> RouteStep:
    """The first two sequences change places in the batch, their lengths do not."""
    gather = step.queries.gather_index.copy()
    if len(gather) > 1:
        gather[[0, 1]] = gather[[1, 0]]
    return dataclasses.replace(step, queries=dataclasses.replace(step.queries, gather_index=gather))


def unstable_compaction(step: RouteStep) -> RouteStep:
    """Compaction that keeps the right rows in another order."""
    if step.keep_index is None:
        return step
    return dataclasses.replace(step, keep_index=step.keep_index[::-1].copy())


def wrong_destination(step: RouteStep) -> RouteStep:
    """Finished rows go to each other's places."""
    return dataclasses.replace(step, publish_tokens=np.roll(step.publish_tokens, 1))


def attention_across_sequences(step: RouteStep) -> RouteStep:
    """The whole batch as one sequence: the defect of the original research code."""
    n = np.array([step.n_active], dtype=np.int32)
    order = np.arange(step.n_active, dtype=np.int32)
    joined = PaddedLayout(gather_index=order[None], lengths=n, scatter_index=order)
    context = step.context
    if context is not None:
        index = context.gather_index.reshape(1, -1)
        context = dataclasses.replace(
            context, gather_index=index, lengths=np.array([index.size], dtype=np.int32)
        )
    return dataclasses.replace(step, queries=joined, context=context)


def stale_rows(step: RouteStep) -> RouteStep:
    """Finished rows are never written back."""
    return dataclasses.replace(
        step, publish_rows=np.zeros(0, np.int32), publish_tokens=np.zeros(0, np.int32)
    )


def identity(step: RouteStep) -> RouteStep:
    return step


def run_with(mutation: Mutation, context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def mutated_plan(
        depths: Int32, cu: Int32, stages: tuple[tuple[int, int], ...], kind: str
    ) -> RoutePlan:
        plan = plan_route(depths, cu, stages, kind)  # type: ignore[arg-type]
        return dataclasses.replace(plan, steps=tuple(mutation(step) for step in plan.steps))

    monkeypatch.setattr(session_module, "plan_route", mutated_plan)
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
        unstable_compaction,
        wrong_destination,
        attention_across_sequences,
        stale_rows,
    ],
)
def test_parity_catches(
    mutation: Mutation, context: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        run_with(mutation, context, monkeypatch)
