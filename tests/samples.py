"""Random models, batches and the comparison that the parity tests share."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from sdt_deploy.bench.benchmark import CaseResult
from sdt_deploy.bench.run import BenchOptions, run_bench
from sdt_deploy.bundle import _digest
from sdt_deploy.bundle_files import MANIFEST, list_files
from sdt_deploy.config import ExportConfig, HeadConfig, ModelConfig, RotaryConfig
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.generation import GenerationResult
from sdt_deploy.runtime.result import RunResult
from sdt_deploy.runtime.routing import RouteRules
from sdt_deploy.runtime.session import Session
from sdt_deploy.testing import OracleBackend, memory_bundle

TOLERANCE = 1e-4
"""How far float32 outputs may be from the oracle's at equal depths, on every path and in every way
to route. The largest error seen with ONNX Runtime over thousands of random cases is 3e-5."""
GOLDEN = Path(__file__).parent / "data" / "golden-bundle-v1"
THOROUGH = bool(os.environ.get("SDT_DEPLOY_THOROUGH"))
"""Whether fuzzing and stress tests take minutes rather than seconds."""


def sign_bundle(bundle: Path, change: Callable[[Any], None] = lambda body: None) -> None:
    """Make hashes and digest of an altered bundle match, as who makes a bundle can.

    ``change`` may alter the parsed manifest first.
    """
    body = json.loads((bundle / MANIFEST).read_text())
    body.pop("digest")
    body["files"] = list_files(bundle)
    change(body)
    body["digest"] = _digest(body)
    (bundle / MANIFEST).write_text(json.dumps(body))


CONFIGS: dict[str, tuple[ModelConfig, ExportConfig]] = {
    "active-lm": (
        ModelConfig(
            vocab_size=53,
            d_model=24,
            n_heads=2,
            n_layers=3,
            d_ff=40,
            max_positions=33,
            activation="relu",
            context="active",
            head=HeadConfig(kind="lm", bias=False),
        ),
        ExportConfig(),
    ),
    "all-embedding": (
        ModelConfig(
            vocab_size=47,
            d_model=32,
            n_heads=4,
            n_layers=3,
            d_ff=56,
            max_positions=40,
            n_token_types=2,
            norm_placement="post",
            embedding_norm=True,
            final_norm=False,
            eps=1e-12,
            context="all",
            pinned_token_ids=(1, 2),
            head=HeadConfig(kind="embedding", pooling="mean", normalize=True),
        ),
        ExportConfig(),
    ),
    "active-grouped": (
        ModelConfig(
            vocab_size=31,
            d_model=16,
            n_heads=2,
            n_layers=5,
            d_ff=24,
            max_positions=30,
            position_offset=2,
            norm_placement="post",
            context="active",
            pinned_token_ids=(0,),
            head=HeadConfig(kind="classify", pooling="cls", n_classes=3, dense_tanh=True),
        ),
        ExportConfig(layers_per_stage=2),
    ),
    "dense-twin": (
        ModelConfig(
            vocab_size=29,
            d_model=12,
            n_heads=2,
            n_layers=2,
            d_ff=20,
            max_positions=30,
            probe="none",
            context="active",
            head=HeadConfig(kind="embedding", pooling="cls"),
        ),
        ExportConfig(),
    ),
    "all-grouped": (
        ModelConfig(
            vocab_size=31,
            d_model=16,
            n_heads=4,
            n_layers=4,
            d_ff=24,
            max_positions=30,
            context="all",
            head=HeadConfig(kind="hidden"),
        ),
        ExportConfig(layers_per_stage=3),
    ),
}
"""One of each kind: both contexts, norm placements, heads, one and several layers per stage."""


def tolerance(config: ModelConfig) -> float:
    """Norms over a few values magnify rounding without bounds: narrow models get more room."""
    return TOLERANCE if config.d_model >= 8 else 10 * TOLERANCE


@dataclass(frozen=True)
class ExportedModel:
    model: SparseDepthTransformer
    native: Path
    bundle: Path


def random_model(config: ModelConfig, seed: int) -> SparseDepthTransformer:
    """A model whose weights all matter: norms are not 1, biases not 0, scores spread widely."""
    generator = torch.Generator().manual_seed(seed)
    model = SparseDepthTransformer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 2 and "embeddings" not in name:
                parameter.copy_(noise * 1.5 / math.sqrt(parameter.shape[1]))
            else:
                parameter.copy_(noise * 0.5)
        if model.scorer.linear:
            ids = torch.arange(config.vocab_size)[None, : config.max_positions]
            embedded = model.embed(ids)
            logits = embedded @ model.scorer.weight
            model.scorer.weight.mul_(1.5 / logits.std())
            model.scorer.bias.copy_(-1.5 * logits.mean() / logits.std())
    return model


def separated_thresholds(scores: np.ndarray, wanted: np.ndarray) -> tuple[float, ...]:
    """Thresholds near the quantiles ``wanted``, each in a gap, so that rounding flips no depth."""
    values = np.unique(np.concatenate([scores, [-1.0, 2.0]]))
    wide = np.flatnonzero(np.diff(values) > 1e-4)
    middles = (values[wide] + values[wide + 1]) / 2
    targets = np.quantile(values, wanted)
    nearest = middles[np.abs(middles[None] - targets[:, None]).argmin(axis=1)]
    return tuple(sorted(float(x) for x in nearest))


def random_batch(config: ModelConfig, lengths: list[int], seed: int) -> TokenBatch:
    rng = np.random.default_rng(seed)
    cu_seqlens = np.cumsum([0, *lengths])
    n_tokens = int(cu_seqlens[-1])
    types = rng.integers(0, config.n_token_types, n_tokens) if config.n_token_types else None
    ids = rng.integers(0, config.vocab_size, n_tokens)
    return TokenBatch.from_packed(ids, cu_seqlens, types, config=config)


def assert_parity(
    session: Session,
    model: SparseDepthTransformer,
    batch: TokenBatch,
    thresholds: tuple[float, ...] | None = None,
    path: str = "sparse",
) -> RunResult:
    """The runtime's output and depths are those of the oracle."""
    result = session.run_batch(batch, thresholds=thresholds, path=path)  # type: ignore[arg-type]
    oracle = model.as_dense() if path == "dense" else model
    expected = oracle_output(
        oracle, batch.input_ids, batch.cu_seqlens, batch.token_type_ids, thresholds=thresholds
    )
    np.testing.assert_array_equal(result.depths, expected.depths)
    np.testing.assert_allclose(result.output, expected.output, rtol=0, atol=tolerance(model.config))
    if path != "dense":
        np.testing.assert_allclose(result.scores, expected.scores, rtol=0, atol=1e-5)
    return result


def assert_generates_as_oracle(
    model: SparseDepthTransformer, result: GenerationResult, thresholds: tuple[float, ...]
) -> None:
    """Each step's logits are those of the oracle over all tokens so far, and so are the layers."""
    assert result.logits is not None
    for prompt, new, logits, active in zip(
        result.prompts, result.tokens, result.logits, result.active, strict=True
    ):
        whole = np.concatenate([prompt, new])
        for step in range(len(new)):
            ids = whole[: len(prompt) + step]
            cu = np.array([0, len(ids)], dtype=np.int32)
            found = oracle_output(model, ids, cu, thresholds=thresholds)
            np.testing.assert_allclose(
                logits[step], found.output[-1], atol=tolerance(model.config), rtol=0
            )
            np.testing.assert_array_equal(active[: len(ids)], found.active)
        assert len(active) == len(whole) - 1
    usage, config = result.cache, model.config
    taken = np.concatenate(result.active)
    token_bytes = 2 * 4 * config.n_key_heads * config.head_width
    assert usage.dense_bytes == taken.size * token_bytes
    assert result.layer_usage.active_tokens == tuple(taken.sum(axis=0))
    if config.context == "active":
        assert usage.layer_tokens == tuple(taken.sum(axis=0))
        assert usage.n_bytes == taken.sum() * token_bytes


def assert_parity_on_random_batches(
    session: Session,
    model: SparseDepthTransformer,
    paths: tuple[str, ...],
    *,
    n_batches: int,
    longest: int,
) -> None:
    """Run up to five sequences of up to ``longest`` tokens at random depths, again and again."""
    rng = np.random.default_rng(0)
    n_layers = model.config.n_layers
    for seed in range(n_batches):
        lengths = rng.integers(1, longest + 1, rng.integers(1, 6)).tolist()
        batch = random_batch(model.config, lengths, seed)
        limits = quantile_thresholds(model, batch, rng.random(n_layers).tolist())
        for path in paths:
            assert_parity(session, model, batch, limits, path)


def assert_rows_of_stages(model: SparseDepthTransformer, stages: tuple[int, ...]) -> None:
    """Every stage gets the rows that are active in its first layer, and no others."""
    bundle = memory_bundle(model, ExportConfig(stages=stages))
    backend = OracleBackend(bundle, model)
    batch = random_batch(model.config, [9, 1, 26, 14], 2)
    limits = quantile_thresholds(model, batch, [0.1, 0.4, 0.7])
    result = assert_parity(Session(bundle, backend), model, batch, limits)
    firsts = [first for first, _ in bundle.manifest.stage_layers]
    assert [call.n_rows for call in backend.calls] == [
        int((result.depths > first).sum()) for first in firsts
    ]


def benched(bundle: Path) -> CaseResult:
    """What ``bench`` says of a bundle: it is near the oracle and needs fewer operations."""
    options = BenchOptions(cases="2x9", budget_s=0.1, with_memory=False)
    (case,) = run_bench(bundle, options).cases
    assert case.max_abs_error is not None
    assert case.max_abs_error < TOLERANCE
    assert case.flops_ratio < 1
    return case


def deviation(
    model: SparseDepthTransformer, batch: TokenBatch, found: RunResult
) -> tuple[float, int]:
    """How far a run is from the oracle at the run's own depths, and how many depths differ.

    The largest error is relative to the root mean square of what is expected.
    """
    oracle = model.as_dense() if found.path == "dense" else model
    args = (batch.input_ids, batch.cu_seqlens, batch.token_type_ids)
    expected = oracle_output(oracle, *args, depths=found.depths).output
    scale = np.sqrt(np.mean(expected**2))
    flips = (found.depths != oracle_output(oracle, *args).depths).sum()
    return float(np.abs(found.output - expected).max() / scale), int(flips)


def in_threads(n_threads: int, work: Callable[[int], None]) -> None:
    """Call ``work(0)``, ``work(1)``, … at once, and raise what one of them raises."""
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(work, range(n_threads)))


def quantile_thresholds(
    model: SparseDepthTransformer, batch: TokenBatch, wanted: list[float]
) -> tuple[float, ...]:
    """Thresholds for ``batch`` at the given quantiles of its scores."""
    found = oracle_output(model, batch.input_ids, batch.cu_seqlens, batch.token_type_ids)
    return separated_thresholds(found.scores, np.sort(wanted))


def capacity_thresholds(
    model: SparseDepthTransformer, batch: TokenBatch, wanted: list[float]
) -> tuple[float, ...] | None:
    """Thresholds on standings; None if rounding could swap the ranks of two tokens."""
    found = oracle_output(model, batch.input_ids, batch.cu_seqlens, batch.token_type_ids)
    for scores in np.split(found.scores, batch.cu_seqlens[1:-1]):
        gaps = np.diff(np.sort(scores))
        if ((gaps > 0) & (gaps < 1e-5)).any():
            return None
    return tuple(sorted(wanted))


def rules(stage_layers: Sequence[tuple[int, int]], context: str, n_heads: int) -> RouteRules:
    """Routing rules of a model whose head does not pool."""
    return RouteRules(
        stage_layers=tuple(stage_layers),
        context=context,  # type: ignore[arg-type]
        n_heads=n_heads,
        pooling=None,
    )


lengths_lists = st.lists(st.integers(1, 29), min_size=1, max_size=6)
seeds = st.integers(0, 2**32 - 1)


def cut_points(n_layers: int) -> st.SearchStrategy[list[float]]:
    """Quantiles for thresholds; 0 and 1 (everyone, nobody) are drawn often."""
    point = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
    return st.lists(point, min_size=n_layers, max_size=n_layers)


@st.composite
def llama_like(draw: st.DrawFn, config: ModelConfig) -> ModelConfig:
    """The parts of a Llama layout, in any combination; rotary positions if it is causal."""
    n_kv_heads = draw(st.integers(1, 2))
    head_dim = draw(st.integers(1, 4)) * 2
    rotary = None
    if config.causal and draw(st.booleans()):
        theta = draw(st.sampled_from([2.0, 50.0, 10_000.0]))
        rotary = draw(
            st.sampled_from(
                [
                    RotaryConfig(theta=theta),
                    RotaryConfig(theta=theta, scaling="linear", factor=3.0),
                    RotaryConfig(
                        theta=theta, scaling="llama3", factor=4.0, original_max_positions=12
                    ),
                ]
            )
        )
    return config.replace(
        n_kv_heads=n_kv_heads,
        n_heads=n_kv_heads * draw(st.integers(1, 3)),
        head_dim=head_dim,
        rotary=rotary,
        position_offset=0 if rotary else config.position_offset,
        gated=draw(st.booleans()),
        activation=draw(st.sampled_from(["silu", config.activation])),
        attention_bias=draw(st.booleans()),
        feed_forward_bias=draw(st.booleans()),
        norm=draw(st.sampled_from(["layer", "rms"])),
    )


@st.composite
def model_configs(
    draw: st.DrawFn, selections: Sequence[str] = ("threshold",), causal: bool = False
) -> tuple[ModelConfig, ExportConfig]:
    n_heads = draw(st.integers(1, 3))
    n_layers = draw(st.integers(1, 5))
    vocab_size = draw(st.integers(2, 60))
    kind = draw(st.sampled_from(["hidden", "lm", "embedding", "classify"]))
    per_sequence = kind in ("embedding", "classify")
    head = HeadConfig(
        kind=kind,
        pooling=draw(st.sampled_from(["mean", "cls"])) if per_sequence else None,
        normalize=kind == "embedding" and draw(st.booleans()),
        n_classes=draw(st.integers(1, 4)) if kind == "classify" else None,
        dense_tanh=kind == "classify" and draw(st.booleans()),
        bias=draw(st.booleans()),
    )
    config = ModelConfig(
        vocab_size=vocab_size,
        d_model=n_heads * draw(st.integers(2, 8)),
        n_heads=n_heads,
        n_layers=n_layers,
        d_ff=draw(st.integers(1, 30)),
        max_positions=29,
        position_offset=draw(st.integers(0, 2)),
        n_token_types=draw(st.integers(0, 2)),
        activation=draw(st.sampled_from(["relu", "gelu", "gelu_tanh"])),
        norm_placement=draw(st.sampled_from(["pre", "post"])),
        embedding_norm=draw(st.booleans()),
        final_norm=draw(st.booleans()),
        context=draw(st.sampled_from(["active", "all"])),
        pinned_token_ids=tuple(range(draw(st.integers(0, 2)))),
        selection=draw(st.sampled_from(selections)),
        head=head,
    )
    if causal:
        config = config.replace(causal=draw(st.booleans()))
        if draw(st.booleans()):
            config = draw(llama_like(config))
    stops = sorted({*draw(st.lists(st.integers(1, n_layers), max_size=4)), n_layers})
    sizes = tuple(b - a for a, b in pairwise([0, *stops]))
    even = ExportConfig(layers_per_stage=draw(st.integers(1, n_layers)))
    return config, draw(st.sampled_from([even, ExportConfig(stages=sizes)]))
