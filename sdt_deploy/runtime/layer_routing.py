"""Routing with a probe for each layer: the route is found step by step, as the states change.

A stage returns, beside the states, the scores of its rows by the probes of all layers. The host
reads them back after each stage and decides who takes part in the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sdt_deploy.config import Leaving, Selection
from sdt_deploy.runtime.routing import (
    Float32,
    Int32,
    RoutePlan,
    RouteRules,
    plan_route,
    standings,
)

Bool = npt.NDArray[np.bool_]


def taken(
    scores: Float32, candidates: Bool, limit: float, cu_seqlens: Int32, selection: Selection
) -> Bool:
    """Return ``[n_tokens]`` bool, the ``candidates`` that a layer takes.

    Args:
        scores: ``[n_tokens]`` float32, of this layer.
        candidates: ``[n_tokens]`` bool; with selection ``capacity`` the others rank last.
        limit: threshold of the layer.
        cu_seqlens: ``[batch + 1]``.
        selection: what is compared with the threshold.
    """
    if selection == "capacity":
        scores = standings(np.where(candidates, scores, np.float32(-1)), cu_seqlens)
    return candidates & (scores > np.float32(limit))


def taken_by_layer(
    scores: Float32,
    thresholds: Sequence[float],
    cu_seqlens: Int32,
    *,
    leaving: Leaving,
    selection: Selection,
) -> Bool:
    """Return ``[n_tokens, n_layers]`` bool, which layers take each token, from recorded scores.

    Args:
        scores: ``[n_tokens, n_layers]`` float32, of the states that came into each layer.
        thresholds: one per layer.
        cu_seqlens: ``[batch + 1]``.
        leaving: what tokens do that a layer does not take.
        selection: what is compared with the thresholds.
    """
    found = np.empty(scores.shape, dtype=bool)
    everyone = candidates = np.ones(len(scores), dtype=bool)
    for i, limit in enumerate(thresholds):
        found[:, i] = taken(scores[:, i], candidates, limit, cu_seqlens, selection)
        candidates = found[:, i] if leaving == "exit" else everyone
    return found


class LayerRouter:
    """Yields one plan for each stage that has tokens; each has one step.

    Whoever iterates runs the stage of a plan before asking for the next one. At least one plan
    comes, though it may have no step. Afterwards :attr:`scores` and :attr:`active` say what
    happened.

    Args:
        entry_scores: ``[n_tokens, n_layers]`` float32 by token, from the entry.
        stage_scores: of the same shape, by row: where the stages write those of their active rows.
        thresholds: one per layer.
        cu_seqlens: ``[batch + 1]``.
        rules: of the bundle; one layer per stage.
        pinned: ``[n_tokens]`` bool, tokens whose score is 1.
    """

    def __init__(
        self,
        entry_scores: Float32,
        stage_scores: Float32,
        thresholds: Sequence[float],
        cu_seqlens: Int32,
        rules: RouteRules,
        pinned: Bool,
    ) -> None:
        self._latest = entry_scores
        self._stage_scores = stage_scores
        self._thresholds = thresholds
        self._cu_seqlens = cu_seqlens
        self._rules = rules
        self._pinned = pinned
        self.scores = np.empty_like(entry_scores)
        """``[n_tokens, n_layers]`` float32, of the state that came into each layer."""
        self.active = np.zeros(entry_scores.shape, dtype=bool)
        """``[n_tokens, n_layers]``, which layers took each token."""

    def __iter__(self) -> Iterator[RoutePlan]:
        """Yield the plans."""
        rules, cu_seqlens = self._rules, self._cu_seqlens
        exits = rules.leaving == "exit"
        everyone = candidates = np.ones(len(self.scores), dtype=bool)
        passed = np.zeros(len(self.scores), dtype=np.int32)
        idle = True
        for i, limit in enumerate(self._thresholds):
            self.scores[:, i] = np.where(self._pinned, np.float32(1), self._latest[:, i])
            active = taken(self.scores[:, i], candidates, limit, cu_seqlens, rules.selection)
            self.active[:, i] = active
            candidates = active if exits else everyone
            if not active.any():
                continue
            # Sorted by depth so far, those that left earlier keep their rows.
            depths = np.where(active, np.int32(i + 1), passed if exits else np.int32(0))
            plan = plan_route(
                depths, cu_seqlens, replace(rules, stage_layers=((i, i + 1),)), first_stage=i
            )
            idle = False
            yield plan
            passed = depths
            if i + 1 < len(self._thresholds):
                rows = plan.row_of[active]
                self._latest[active] = self._stage_scores[rows]
        if idle:
            yield plan_route(passed, cu_seqlens, rules)
