"""The sparse path: entry, route, stages with compaction between them, head."""

from __future__ import annotations

from functools import partial
from time import perf_counter

import numpy as np

from sdt_deploy.bundle import Manifest
from sdt_deploy.runtime.backend import Array, Backend
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.buffers import BufferPool
from sdt_deploy.runtime.layer_routing import LayerRouter
from sdt_deploy.runtime.loop import Stage, bind_stages, timed
from sdt_deploy.runtime.result import LayerUsage, RunResult, Timings
from sdt_deploy.runtime.routing import RoutePlan, RouteRules
from sdt_deploy.runtime.stopping import StopCheck


class PythonLoop:
    """Runs every bundle, on every backend that leaves batches to the session.

    The router gives the whole route in one plan or, with routing ``per_layer``, one plan for each
    stage; the loop is the same.

    Args:
        backend: of ``manifest``; entry, stages and head are opened.
        manifest: of the bundle.
    """

    def __init__(self, backend: Backend, manifest: Manifest) -> None:
        self._backend, self._config = backend, manifest.model
        self._rules = RouteRules.of(manifest)
        self._stages = [Stage.of(spec, backend.graph(spec.name)) for spec in manifest.stages]
        self._entry, self._head = backend.graph("entry"), backend.graph("head")

    def run(
        self,
        buffers: BufferPool,
        batch: TokenBatch,
        thresholds: tuple[float, ...],
        check: StopCheck | None,
    ) -> RunResult:
        """See :meth:`sdt_deploy.runtime.backend.SparseLoop.run`."""
        start = perf_counter()
        config, backend, n_tokens = self._config, self._backend, batch.n_tokens
        probes = config.score_axes
        lent = buffers.take()
        try:
            states, other = lent.reserve(n_tokens)
            scores = backend.empty((n_tokens, *probes), "float32")
            ids = {"input_ids": batch.input_ids}
            if config.rotary is None:
                ids["position_ids"] = batch.position_ids
            if config.n_token_types:
                ids["token_type_ids"] = batch.types
            entry_ms = timed(self._entry.bind(ids, {"hidden_states": states, "scores": scores}))
            router, stage_scores = None, None
            if probes:
                stage_scores = backend.empty(scores.shape, "float32")
                pinned = np.isin(batch.input_ids, config.pinned_token_ids)
                router = LayerRouter(
                    scores, stage_scores, thresholds, batch.cu_seqlens, self._rules, pinned
                )
            rows = len(batch.lengths) if config.head.per_sequence else n_tokens
            output = np.empty((rows, config.output_width), dtype=np.float32)
            stage_ms: list[float] = []
            stages_run: list[int] = []
            route_ms = move_ms = 0.0
            row_of: Array | None = None
            mark = perf_counter()
            for plan in router or [backend.plan(scores, thresholds, batch.cu_seqlens, self._rules)]:
                order = plan.order if row_of is None else _moved(row_of, plan)
                taking = 0.0
                if order is not None:
                    taking = timed(partial(backend.take, states, order, other))
                    states, other = other, states
                row_of = plan.row_of
                bound = bind_stages(plan, states, other, self._stages, stage_scores)
                in_order = config.head.per_sequence or plan.order is None
                last = bound.states if in_order else bound.other
                call_head = self._head.bind(
                    {"hidden_states": last, **plan.head}, {"output": output}
                )
                route_ms += (perf_counter() - mark) * 1e3 - taking
                ran_ms, copied_ms = bound.run(check)
                stage_ms += ran_ms
                stages_run += [step.stage for step in plan.steps]
                move_ms += taking + copied_ms
                states, other = bound.states, bound.other
                mark = perf_counter()
            if not in_order:
                move_ms += timed(partial(backend.take, states, plan.row_of, other))
            head_ms = timed(call_head)
            if router is None:
                depths, scores = backend.fetch(plan.depths, scores)
                usage, active = LayerUsage.from_active(n_tokens, plan.active_tokens), None
            else:
                active, scores = router.active, router.scores
                depths = active.sum(axis=1, dtype=np.int32)
                usage = LayerUsage.of(depths, active, config.n_layers)
        finally:
            buffers.give_back(lent)
        return RunResult(
            output=output,
            depths=depths,
            scores=scores,
            active=active if config.leaving == "skip" else None,
            input_ids=batch.input_ids.copy(),
            cu_seqlens=batch.cu_seqlens.copy(),
            layer_usage=usage,
            timings=Timings(
                total_ms=(perf_counter() - start) * 1e3,
                entry_ms=entry_ms,
                route_ms=route_ms,
                stage_ms=tuple(stage_ms),
                stages=tuple(stages_run),
                move_ms=move_ms,
                head_ms=head_ms,
            ),
            path="sparse",
        )


def _moved(row_of: Array, plan: RoutePlan) -> Array | None:
    """Return where each row of ``plan`` stands now, ``[n_tokens]``; None: where it should."""
    index = row_of if plan.order is None else row_of[plan.order]
    return None if (index[1:] > index[:-1]).all() else index
