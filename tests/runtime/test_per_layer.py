"""A probe for each layer: the route is found step by step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_deploy.bundle import Bundle
from sdt_deploy.config import BuildConfig, ExportConfig, HeadConfig, ModelConfig
from sdt_deploy.costs import thresholds_for_depth
from sdt_deploy.errors import BackendError, ConfigError, RunCancelledError
from sdt_deploy.exporters.export import export, export_stages
from sdt_deploy.exporters.tensorrt import build_engines
from sdt_deploy.model import checkpoints
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.conversion import ProbeFit, convert, with_probe
from sdt_deploy.model.inference import PackedOutput, oracle_output
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.dispatch import needed_flops
from sdt_deploy.runtime.result import RunResult
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.splitting import PartLimits
from sdt_deploy.runtime.verification import verify_bundle
from sdt_deploy.testing import OracleBackend, OracleDeviceBackend, StageCall, memory_bundle
from tests.runtime.test_capacity import capacity_counts
from tests.samples import (
    CONFIGS,
    TOLERANCE,
    benched,
    lengths_lists,
    model_configs,
    random_batch,
    random_model,
    seeds,
)
from tests.textmodels import save_teacher, texts

EXIT = CONFIGS["all-embedding"][0].replace(routing="per_layer", thresholds=(0.3, 0.5, 0.4))
SKIP = CONFIGS["active-lm"][0].replace(
    routing="per_layer", leaving="skip", thresholds=(0.6, 0.4, 0.5)
)
WAYS = [
    (leaving, selection) for leaving in ("exit", "skip") for selection in ("threshold", "capacity")
]
limits = st.one_of(st.sampled_from([-1.0, 0.0, 1.0]), st.floats(0, 1))


def by_hand(
    model: SparseDepthTransformer, batch: TokenBatch, thresholds: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence by itself, derived the other way: tokens that are not taken are removed.

    Returns:
        The last states ``[n_tokens, d_model]`` and who was taken, ``[n_tokens, n_layers]``.
    """
    config = model.config
    states, taken = [], []
    for start, stop in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        ids = torch.from_numpy(batch.input_ids[start:stop]).long()
        types = torch.from_numpy(batch.types[start:stop]).long()[None]
        hidden = model.embed(ids[None], types if config.n_token_types else None)[0]
        left = torch.ones(len(ids), dtype=torch.bool)
        rows = []
        for i, layer in enumerate(model.blocks):
            logits = hidden @ model.scorer.weight[:, i] + model.scorer.bias[i]
            scores = torch.where(
                torch.isin(ids, torch.tensor(config.pinned_token_ids)), 1.0, logits.sigmoid()
            )
            now = left & (scores > thresholds[i])
            if config.selection == "capacity":
                ranked = sorted(range(len(ids)), key=lambda t: (not left[t], -float(scores[t]), t))
                n_taken = int(capacity_counts([len(ids)], [thresholds[i]])[0, 0])
                now = left & torch.isin(torch.arange(len(ids)), torch.tensor(ranked[:n_taken]))
            rows.append(now)
            if config.leaving == "exit":
                left = now
            if now.any():
                seen = hidden[now] if config.context == "active" else hidden
                updated = layer(seen[None], torch.ones(1, len(seen), dtype=torch.bool))[0]
                hidden = hidden.clone()
                hidden[now] = updated if config.context == "active" else updated[now]
        states.append(hidden)
        taken.append(torch.stack(rows, dim=1))
    return torch.cat(states).numpy(), torch.cat(taken).numpy()


@given(
    drawn=model_configs(),
    way=st.sampled_from(WAYS),
    lengths=lengths_lists,
    seed=seeds,
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
@torch.no_grad()
def test_the_oracle_against_a_derivation_that_removes_tokens(
    drawn: tuple[ModelConfig, ExportConfig],
    way: tuple[str, str],
    lengths: list[int],
    seed: int,
    data: st.DataObject,
) -> None:
    config = drawn[0].replace(
        routing="per_layer", leaving=way[0], selection=way[1], head=HeadConfig(), final_norm=False
    )
    model = random_model(config, seed % 10_000)
    batch = random_batch(config, lengths, seed)
    thresholds = tuple(data.draw(limits) for _ in range(config.n_layers))
    found = oracle(model, batch, thresholds)
    states, taken = by_hand(model, batch, thresholds)
    if not clear(found, thresholds, way[1]):
        return
    np.testing.assert_array_equal(found.active, taken)
    np.testing.assert_array_equal(found.depths, taken.sum(axis=1))
    if config.d_model >= 8:  # norms of two values magnify rounding without bounds
        np.testing.assert_allclose(found.output, states, rtol=0, atol=TOLERANCE)


def oracle(
    model: SparseDepthTransformer,
    batch: TokenBatch,
    thresholds: tuple[float, ...] | None,
    active: np.ndarray | None = None,
) -> PackedOutput:
    return oracle_output(
        model,
        batch.input_ids,
        batch.cu_seqlens,
        batch.token_type_ids,
        thresholds=thresholds,
        active=active,
    )


def clear(found: PackedOutput, thresholds: tuple[float, ...], selection: str) -> bool:
    """Whether rounding can change no decision."""
    gaps = np.diff(np.sort(found.scores, axis=0), axis=0)
    if selection == "capacity":
        return not ((gaps > 0) & (gaps < 1e-4)).any()
    return bool((np.abs(found.scores - np.float32(thresholds)) > 1e-4).all())


def assert_same(
    session: Session,
    model: SparseDepthTransformer,
    batch: TokenBatch,
    thresholds: tuple[float, ...] | None = None,
    path: str = "sparse",
) -> RunResult:
    """Outputs, scores and usage are the oracle's with every token through the same layers.

    Who is taken is the oracle's choice too, unless rounding may decide.
    """
    result = session.run_batch(batch, thresholds=thresholds, path=path)  # type: ignore[arg-type]
    config = model.config
    assert (result.active is None) == (config.leaving == "exit")
    active = result.active_layers
    expected = oracle(model, batch, None, active)
    np.testing.assert_allclose(result.output, expected.output, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(result.depths, active.sum(axis=1))
    assert result.layer_usage.active_tokens == tuple(active.sum(axis=0))
    free = oracle(model, batch, thresholds)
    if clear(free, thresholds or config.thresholds, config.selection):
        np.testing.assert_array_equal(active, free.active)
    return result


@given(
    drawn=model_configs(causal=True),
    way=st.sampled_from(WAYS),
    lengths=lengths_lists,
    seed=seeds,
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_any_model_on_the_oracle_backend(
    drawn: tuple[ModelConfig, ExportConfig],
    way: tuple[str, str],
    lengths: list[int],
    seed: int,
    data: st.DataObject,
) -> None:
    """Every stage processes the rows that were taken, and no other."""
    config = drawn[0].replace(routing="per_layer", leaving=way[0], selection=way[1])
    model = random_model(config, seed % 10_000)
    bundle = memory_bundle(model)
    backend = OracleBackend(bundle, model)
    batch = random_batch(config, lengths, seed)
    thresholds = tuple(data.draw(limits) for _ in range(config.n_layers))
    with Session(bundle, backend) as session:
        if config.d_model >= 8:
            result = assert_same(session, model, batch, thresholds)
        else:
            result = session.run_batch(batch, thresholds=thresholds, path="sparse")
        usage = result.layer_usage.active_tokens
        assert [call.n_rows for call in backend.calls] == [n for n in usage if n]
        masked = session.run_batch(batch, thresholds=thresholds, path="masked")
        assert (masked.active is None) == (result.active is None)
        assert session.run_batch(batch, thresholds=thresholds).path == "sparse"


def test_tokens_come_back_after_sitting_out() -> None:
    model = random_model(SKIP, 3)
    bundle = memory_bundle(model)
    backend = OracleBackend(bundle, model)
    batch = random_batch(SKIP, [9, 1, 26, 14], 2)
    with Session(bundle, backend) as session:
        result = assert_same(session, model, batch)
        assert result.active is not None
        came_back = ~result.active[:, 0] & result.active[:, 1]
        assert came_back.any()
        usage = result.layer_usage
        assert usage.active_tokens[1] > usage.active_tokens[0]
        assert sum(usage.depth_histogram) == batch.n_tokens
        assert usage.mean_depth == pytest.approx(result.depths.mean())
        everyone = session.run_batch(batch, path="sparse", thresholds=(-1.0,) * 3)
    flops = needed_flops(SKIP, result.depths, batch.cu_seqlens, result.active)
    assert 0 < flops < needed_flops(SKIP, everyone.depths, batch.cu_seqlens)


def test_parts_are_put_together() -> None:
    model = random_model(SKIP, 3)
    bundle = memory_bundle(model)
    batch = random_batch(SKIP, [9, 1, 26, 14, 20], 2)
    with Session(bundle, OracleBackend(bundle, model)) as session:
        whole = session.run_batch(batch, path="sparse")
    limits = PartLimits(max_padded_tokens=30)
    with Session(bundle, OracleBackend(bundle, model), part_limits=limits) as session:
        split = session.run_batch(batch, path="sparse")
    np.testing.assert_array_equal(whole.active, split.active)
    np.testing.assert_allclose(whole.scores, split.scores, rtol=0, atol=1e-5)
    np.testing.assert_allclose(whole.output, split.output, rtol=0, atol=TOLERANCE)
    assert whole.layer_usage == split.layer_usage


def test_pinned_tokens_stay() -> None:
    model = random_model(EXIT, 5)
    bundle = memory_bundle(model)
    with Session(bundle, OracleBackend(bundle, model)) as session:
        result = session.run([1, 9, 9, 2], [0, 4], path="sparse", thresholds=[0.9999] * 3)
    assert result.depths.tolist() == [3, 0, 0, 3]
    assert result.scores is not None
    assert (result.scores[[0, 3]] == 1).all()


def check_on_onnxruntime(
    session: Session, model: SparseDepthTransformer, paths: tuple[str, ...]
) -> None:
    """Paths over random cases at equal routes."""

    @given(lengths=lengths_lists, seed=seeds, drawn=st.lists(limits, min_size=3, max_size=3))
    @settings(max_examples=25, deadline=None)
    def check(lengths: list[int], seed: int, drawn: list[float]) -> None:
        batch = random_batch(model.config, lengths, seed)
        for path in paths:
            assert_same(session, model, batch, tuple(drawn), path)

    check()


def test_exported_with_exit(tmp_path: Path) -> None:
    """Bench and verify know the mode."""
    model = random_model(EXIT, 9)
    export(Checkpoint(model=model, provenance={}), tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.model == EXIT
    assert "single" not in bundle.manifest.graphs
    with Session.open(bundle) as session:
        check_on_onnxruntime(session, model, ("sparse", "masked"))
        assert [one.path for one in verify_bundle(bundle, session)] == ["sparse", "masked", "dense"]
    case = benched(tmp_path / "bundle")
    assert case.single_ms is None
    assert case.auto_path == "sparse"


def test_stages_with_skip(tmp_path: Path) -> None:
    model = random_model(SKIP, 9)
    bundle = export_stages(model, tmp_path, ExportConfig(), lambda what, done, total: None)
    with Session.open(bundle) as session:
        check_on_onnxruntime(session, model, ("sparse",))


def test_a_run_stops_between_stages() -> None:
    model = random_model(EXIT, 5)
    bundle = memory_bundle(model)
    backend, event = OracleBackend(bundle, model), threading.Event()

    class Calls(list[StageCall]):
        def append(self, call: StageCall) -> None:
            super().append(call)
            event.set()

    backend.calls = Calls()
    with Session(bundle, backend) as session, pytest.raises(RunCancelledError):
        session.run([3, 4, 5], [0, 3], path="sparse", thresholds=[-1] * 3, cancel=event)
    assert len(backend.calls) == 1


@pytest.mark.parametrize(("leaving", "selection"), WAYS)
def test_converted(leaving: str, selection: str, tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    fit = ProbeFit(
        texts=texts(150),
        target_depth=2.5,
        routing="per_layer",
        leaving=leaving,  # type: ignore[arg-type]
        selection=selection,  # type: ignore[arg-type]
    )
    _, report = convert(tmp_path / "teacher", tmp_path / "model", fit=fit)
    checkpoint = checkpoints.load(tmp_path / "model")
    config = checkpoint.model.config
    assert (config.routing, config.leaving, config.selection) == ("per_layer", leaving, selection)
    assert checkpoint.score_quantiles is None
    assert report is not None
    assert report.mean_depth == pytest.approx(2.5, abs=0.4)  # on other texts
    again = ProbeFit(texts=texts(150))
    plain, _ = with_probe(checkpoint, again)  # back to one score
    assert plain.model.config.scored_once


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "grouped": (
        lambda: memory_bundle(random_model(EXIT, 0), ExportConfig(stages=(1, 2))),
        "decides after every layer",
    ),
    "half": (
        lambda: memory_bundle(random_model(EXIT, 0), ExportConfig(precision="float16")),
        "is for GPUs",
    ),
    "fused": (
        lambda: memory_bundle(random_model(EXIT, 0), ExportConfig(attention="fused")),
        "is for GPUs",
    ),
    "int8": (
        lambda: memory_bundle(random_model(EXIT, 0), ExportConfig(quantization="int8")),
        "errors of int8",
    ),
    "skip by one score": (
        lambda: EXIT.replace(routing="once", leaving="skip"),
        "must not fall|needs",
    ),
    "one score, rising": (lambda: EXIT.replace(routing="once"), "must not fall"),
    "no probe": (lambda: EXIT.replace(probe="none", pinned_token_ids=()), "need scores"),
    "unknown": (lambda: EXIT.replace(routing="twice"), "routing must be one of"),
    "engines": (
        lambda: build_engines(
            memory_bundle(random_model(EXIT, 0)),
            BuildConfig(flavour="tensorrt-rtx", compute_capabilities=("8.9",)),
        ),
        "route by thresholds on one score",
    ),
    "depth": (
        lambda: thresholds_for_depth(EXIT, 2.0, score_quantiles=None, pinned_share=0.0),
        "do not follow",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        call()


def test_single_file_and_devices_are_refused(tmp_path: Path) -> None:
    model = random_model(SKIP, 0)
    with pytest.raises(ConfigError, match="--no-single-file"):
        export(Checkpoint(model=model, provenance={}), tmp_path / "b", single_file=True)
    assert not (tmp_path / "b").exists()
    bundle = memory_bundle(model)
    with pytest.raises(BackendError, match="routing 'per_layer'"):
        Session(bundle, OracleDeviceBackend(bundle, model))
