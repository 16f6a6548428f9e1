"""The loop for GPUs, run by torch on the CPU; tests/gpu runs it on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_deploy.bundle import Bundle
from sdt_deploy.config import ExportConfig, ModelConfig
from sdt_deploy.errors import BackendError, ConfigError, RunCancelledError
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.model.probe import quantiles
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.runtime import device_loop
from sdt_deploy.runtime.device_plan import NO_ROW, DevicePlan, TorchRouting
from sdt_deploy.runtime.graph_cache import (
    MAX_TRIES,
    SETTLING_RUNS,
    GraphCache,
    UncapturedWarning,
    Work,
)
from sdt_deploy.runtime.ladders import Bucket, is_one_piece, stage_bucket
from sdt_deploy.runtime.routing import depths_from_scores, plan_route
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.splitting import PartLimits
from sdt_deploy.testing import OracleBackend, OracleDeviceBackend, memory_bundle
from tests.samples import (
    CONFIGS,
    assert_parity,
    cut_points,
    in_threads,
    lengths_lists,
    model_configs,
    quantile_thresholds,
    random_batch,
    random_model,
    rules,
    seeds,
)

FUSED = ExportConfig(attention="fused")


def in_whole_stages(bundle: Bundle) -> Bundle:
    """Return the bundle as format version 3 had it, with attention in its stages only."""
    graphs = {
        name: spec
        for name, spec in bundle.manifest.graphs.items()
        if not name.startswith(("project", "update"))
    }
    return replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))


@pytest.mark.parametrize("name", ["active-lm", "all-embedding"])
def test_bundles_whose_feed_forward_keeps_its_rows_to_itself(name: str) -> None:
    """As in format version 6, where the graph ``update`` had one output."""
    model = random_model(CONFIGS[name][0], 3)
    bundle = memory_bundle(model, FUSED)
    graphs = dict(bundle.manifest.graphs)
    graphs["update"] = replace(graphs["update"], outputs=graphs["update"].outputs[:1])
    manifest = replace(bundle.manifest, graphs=graphs, format_version=6)
    older = replace(bundle, manifest=manifest)
    with Session(older, OracleDeviceBackend(older, model)) as session:
        assert_parity(session, model, random_batch(model.config, [29, 25, 32, 30], 0))


@given(drawn=model_configs(), lengths=lengths_lists, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_what_settles_arenas_changes_nothing(
    drawn: tuple[ModelConfig, ExportConfig], lengths: list[int], seed: int
) -> None:
    """On a GPU it runs before the first run of every piece."""
    config, _ = drawn
    model = random_model(config, seed % 10_000)
    bundle = memory_bundle(model, FUSED)
    backend = OracleDeviceBackend(bundle, model)

    def launch(self: GraphCache, key: Hashable, work: Work, settle: Work | None = None) -> None:
        assert settle is not None
        settle()
        work()

    with mock.patch.object(GraphCache, "launch", launch), Session(bundle, backend) as session:
        batch = random_batch(config, lengths, seed)
        for path in ("sparse", "masked", "dense"):
            assert_parity(session, model, batch, None, path)


def test_a_run_of_dense_alone_reserves_no_states() -> None:
    model = random_model(CONFIGS["active-lm"][0], 3)
    bundle = memory_bundle(model, FUSED)
    backend = OracleDeviceBackend(bundle, model)
    with Session(bundle, backend) as session, mock.patch.object(backend, "empty") as empty:
        session.run_batch(random_batch(model.config, [20, 17], 0), path="dense")
        empty.assert_not_called()


def test_pieces_of_older_bundles_are_let_be() -> None:
    """Those of versions 4 and 5 were two for each layer; their whole stages run."""
    manifest = memory_bundle(random_model(CONFIGS["active-lm"][0], 3), FUSED).manifest
    assert manifest.in_pieces
    assert not replace(manifest, format_version=5).in_pieces


@given(
    data=st.data(),
    drawn=model_configs(),
    lengths=lengths_lists,
    seed=seeds,
    in_pieces=st.booleans(),
    small=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_any_model(
    data: st.DataObject,
    drawn: tuple[ModelConfig, ExportConfig],
    lengths: list[int],
    seed: int,
    in_pieces: bool,
    small: bool,
) -> None:
    """``small``: batches of up to 64 tokens take the way that is meant for them."""
    config, _ = drawn
    model = random_model(config, seed % 10_000)
    bundle = memory_bundle(model, FUSED)
    if not in_pieces:
        bundle = in_whole_stages(bundle)
    with mock.patch.object(device_loop, "is_one_piece", lambda b: small and is_one_piece(b)):
        check_any_model(data, model, bundle, lengths, seed)


def check_any_model(
    data: st.DataObject,
    model: SparseDepthTransformer,
    bundle: Bundle,
    lengths: list[int],
    seed: int,
) -> None:
    config, backend = model.config, OracleDeviceBackend(bundle, model)
    session = Session(bundle, backend)
    # Twice, of other sizes: what one batch leaves in the buffers must not reach the next.
    for turn, chosen in enumerate((lengths, [*lengths[1:], 3])):
        batch = random_batch(config, chosen, seed + turn)
        thresholds = quantile_thresholds(model, batch, data.draw(cut_points(config.n_layers)))
        if data.draw(st.booleans()):  # then the first stage runs before the counts are known
            thresholds = (0.0, *(max(0.0, limit) for limit in thresholds[1:]))
        backend.calls.clear()
        result = assert_parity(session, model, batch, thresholds)
        active = [n for n in result.layer_usage.active_tokens if n]
        rows = [call.n_rows for call in backend.calls]
        assert rows == list(result.stage_rows)
        # Hard skipping: a stage processes its active tokens, padded to the next rung.
        if len(rows) > len(active):  # one graph for all: more rows there are not, in any stage
            assert max(rows) <= 64
            rows = rows[: len(active)]
        assert all(n <= m < n * 1.0625 + 64 for n, m in zip(active, rows, strict=True))
        for path in ("masked", "dense"):
            assert_parity(session, model, batch, thresholds if path == "masked" else None, path)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 1000), st.integers(0, 2))
def test_it_routes_as_the_host_does(lengths: list[int], seed: int, empty: int) -> None:
    """Rows, counts and attention layouts are those of the planner for the CPU."""
    n_layers, batch, longest = 5, len(lengths) + empty, max(lengths) + empty
    bucket = Bucket(n_tokens=batch * longest, batch=batch, max_seqlen=longest)
    present = np.arange(longest) < np.array([*lengths, *[0] * empty])[:, None]
    padded = np.random.default_rng(seed).integers(0, 7, present.shape).astype(np.float32) / 6
    thresholds = (0.0, 1 / 6, 0.5, 0.5, 5 / 6)
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    depths = depths_from_scores(padded[present], thresholds)
    one_each = [(i, i + 1) for i in range(n_layers)]
    expected = plan_route(depths, cu_seqlens, rules(one_each, "active", 1))
    order = np.arange(len(depths)) if expected.order is None else expected.order

    plan = DevicePlan.empty(torch, "cpu", bucket, n_layers)
    routing = TorchRouting()
    counts = torch.tensor([*lengths, *[0] * empty])
    routing.plan(torch.from_numpy(padded).view(-1), counts, torch.tensor(thresholds), plan)
    np.testing.assert_array_equal(plan.depths.numpy()[present.reshape(-1)], depths)
    place_of_token = np.flatnonzero(present)
    np.testing.assert_array_equal(plan.place[: len(depths)], place_of_token[order])
    assert (plan.grid.numpy()[~present] == NO_ROW).all()
    for step in expected.steps:
        n_active, width = plan.counts[:, step.stage].tolist()
        assert (n_active, width) == (step.n_active, step.queries.max_seqlen)
        size = stage_bucket(n_active, width, bucket)
        gather, scatter = routing.stage_indices(plan, step.stage, size)
        assert scatter.shape == (size.n_tokens,)
        # Every active row stands where its scatter index says, among the first of its sequence.
        np.testing.assert_array_equal(gather.view(-1)[scatter[:n_active].long()], range(n_active))
        ours = [
            sorted(row[:n].tolist())
            for row, n in zip(gather, plan.active_lengths[step.stage].tolist(), strict=True)
            if n
        ]
        theirs = step.queries.padded
        assert ours == [
            sorted(row[:n].tolist())
            for row, n in zip(theirs.gather_index, theirs.lengths, strict=True)
        ]


def test_triton_routes_as_torch_does() -> None:
    """The kernels in Triton's interpreter, where triton is installed."""
    pytest.importorskip("triton")
    script = (
        "from tests.runtime.triton_check import check, check_attention;"
        "from tests.runtime.triton_check import check_entry, check_pooling;"
        "check('cpu', 40); check_attention('cpu', 16); check_entry('cpu', 24);"
        "check_pooling('cpu', 12)"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )


def test_parts_threads_and_cancelling() -> None:
    config, _ = CONFIGS["all-embedding"]
    model = random_model(config, 3)
    bundle = memory_bundle(model, FUSED)
    backend = OracleDeviceBackend(bundle, model)
    session = Session(bundle, backend, part_limits=PartLimits(max_padded_tokens=64))
    batch = random_batch(config, [9, 29, 4, 17, 30, 1], seed=1)
    result = assert_parity(session, model, batch)
    assert len(result.stage_rows) > config.n_layers, "it ran in parts"

    def work(seed: int) -> None:
        for turn in range(5):
            lengths = [1 + (seed * 7 + turn) % 29, 11, 5]
            assert_parity(session, model, random_batch(config, lengths, seed))

    in_threads(6, work)

    event = threading.Event()
    event.set()
    with pytest.raises(RunCancelledError):
        session.run_batch(batch, path="sparse", cancel=event)
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session.run_batch(batch)


def test_a_warm_session_captures_nothing() -> None:
    """What a batch of the expected depths launches has been launched before."""
    config, _ = CONFIGS["all-embedding"]
    model = random_model(config, 3)
    batch = random_batch(config, [40] * 24, seed=2)
    scores = oracle_output(model, batch.input_ids, batch.cu_seqlens, batch.token_type_ids).scores
    thresholds = (0.0, *np.quantile(scores, (0.3, 0.6)).tolist())
    model = random_model(config.replace(thresholds=thresholds), 3)
    bundle = memory_bundle(model, FUSED)
    manifest = replace(bundle.manifest, score_quantiles=quantiles(scores))
    bundle = replace(bundle, manifest=manifest)
    session = Session(bundle, OracleDeviceBackend(bundle, model))
    loop = session._device_loop
    assert loop is not None
    launched: list[object] = []
    launch = loop._graphs.launch
    loop._graphs.launch = lambda key, work, **rest: (
        launched.append(key),
        launch(key, work, **rest),
    )  # type: ignore[assignment,func-returns-value]
    session.warmup([[40] * 24])
    assert session.statistics().n_tokens == 0
    warm = set(launched)
    launched.clear()
    for seed in range(5):
        assert_parity(session, model, random_batch(config, [40] * 24, seed), thresholds)
    assert len(launched) == 5 * (config.n_layers + 2)
    assert set(launched) <= warm


def test_old_buckets_go_with_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_loop, "MAX_FRAMES", 2)
    config, _ = CONFIGS["all-embedding"]
    model = random_model(config, 3)
    bundle = memory_bundle(model, FUSED)
    session = Session(bundle, OracleDeviceBackend(bundle, model))
    loop = session._device_loop
    assert loop is not None
    for turn in range(3):
        for longest in (8, 16, 24):
            assert_parity(session, model, random_batch(config, [longest, 3], turn))
            for bucket in loop._frames:
                loop._graphs._graphs[("entry", bucket)] = loop._graphs._graphs[
                    ("stage", 1, bucket, bucket)
                ] = "graph"
            assert len(loop._frames) <= 2
            assert len(loop._graphs) <= 4
            assert list(loop._frames)[-1].max_seqlen == longest


def test_bundles_for_gpus_are_refused_on_the_cpu() -> None:
    config, _ = CONFIGS["all-embedding"]
    model = random_model(config, 3)
    bundle = memory_bundle(model, FUSED)
    with pytest.raises(BackendError, match="--attention decomposed"):
        Session(bundle, OracleBackend(bundle, model))


@pytest.mark.parametrize("options", [{"layers_per_stage": 2}, {"quantization": "int8"}])
def test_fused_attention_takes_one_layer_in_floats(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="one layer per stage and no quantization"):
        ExportConfig(attention="fused", **options)  # type: ignore[arg-type]


class _FakeTorch:
    """CUDA graphs as lists of what ran while they were captured."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.cuda = self
        fake = self

        class Graph:
            def capture_begin(self, *, pool: object, capture_error_mode: str) -> None:
                assert (pool, capture_error_mode) == ("pool", "thread_local")
                self.begin = len(fake.log)

            def capture_end(self) -> None:
                self.work = fake.log[self.begin :]
                del fake.log[self.begin :]  # nothing runs while it is captured

            def replay(self) -> None:
                fake.log.extend(f"replayed {each}" for each in self.work)

        self.CUDAGraph = Graph

    def graph_pool_handle(self) -> str:
        return "pool"


def _logs(fake: _FakeTorch, what: str) -> Callable[[], None]:
    return lambda: fake.log.append(what)


def test_graphs_are_captured_once_and_the_oldest_goes() -> None:
    fake = _FakeTorch()
    graphs = GraphCache(fake, enabled=True, max_graphs=2)
    for key in ("a", "b", "a", "c", "a", "b"):
        graphs.launch(key, _logs(fake, key))
    assert fake.log == ["a", "b", "replayed a", "c", "replayed a", "b"]
    assert len(graphs) == 2
    graphs.clear()
    graphs.launch("a", _logs(fake, "a"))
    assert fake.log[-1] == "a"


@pytest.mark.parametrize("n_failures", [1, MAX_TRIES])
def test_an_engine_that_cannot_be_captured_runs_as_it_is(n_failures: int) -> None:
    """Its arena may grow while it is captured, which CUDA refuses; the answer is there already."""
    fake = _FakeTorch()
    graphs = GraphCache(fake, enabled=True)
    failures = iter([True] * n_failures)
    captured = []

    class Graph(fake.CUDAGraph):  # type: ignore[misc,name-defined]
        def capture_begin(self, **options: Any) -> None:
            super().capture_begin(**options)
            captured.append(self)

    fake.CUDAGraph = Graph

    def work() -> None:
        fake.log.append("work")
        tried = len(captured) > n_ended
        if tried and next(failures, False):
            raise BackendError("no memory while capturing")

    warned = []
    for turn in range(n_failures + 2):
        n_ended = len(captured)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            graphs.launch("a", work, settle=_logs(fake, "settle"))
        warned += [(turn, each.category) for each in found]
        first = ["settle"] * SETTLING_RUNS + ["work"]
        if turn > n_failures or (turn == n_failures == MAX_TRIES):
            first = ["work"] if n_failures == MAX_TRIES else ["replayed work"]
        assert fake.log == first
        fake.log.clear()
    assert len(graphs) == (n_failures < MAX_TRIES)
    assert warned == [(MAX_TRIES - 1, UncapturedWarning)] * (n_failures == MAX_TRIES)


def test_a_capture_that_fails_leaves_no_graph() -> None:
    fake = _FakeTorch()
    graphs = GraphCache(fake, enabled=True)
    runs = iter([None, RuntimeError("not while capturing")])

    def work() -> None:
        error = next(runs)
        if error is not None:
            raise error

    with pytest.raises(RuntimeError):
        graphs.launch("a", work)
    assert len(graphs) == 0
