"""``export --stages auto``: measures what stages cost here, and groups the layers of a model."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch

from sdt_deploy.bench.cases import check_cases
from sdt_deploy.config import ExportConfig, HeadConfig, ModelConfig
from sdt_deploy.errors import ConfigError, InputError
from sdt_deploy.exporters.export import Progress, export_stages
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.probe import depth_histogram
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.result import RunResult
from sdt_deploy.runtime.session import Session
from sdt_deploy.stages import StageCosts, active_rows, plan_stages

DEFAULT_BATCH = (8, 128)
"""Sequences and tokens of each, for which stages are planned unless told otherwise."""
MIN_TOKENS = 8
"""Of such a batch: some have to leave, and some to stay."""
_ROUNDS = 15
_WARM_UP = 3
_FEW = 0.25
"""Share of active tokens at the smaller of the two measurements."""


def auto_stages(
    checkpoint: Checkpoint,
    config: ExportConfig,
    *,
    batch: tuple[int, int] | None = None,
    n_threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> tuple[int, ...]:
    """Return the layers of every stage that together should take the least time here.

    Args:
        checkpoint: the model, with the text sample that says how deep tokens go.
        config: how it will be exported, apart from the stages.
        batch: sequences, and tokens of each, of a typical batch; None: :data:`DEFAULT_BATCH`, cut
            to the model's positions.
        n_threads: see :meth:`sdt_deploy.runtime.session.Session.open`.
        progress: see :data:`sdt_deploy.exporters.export.Progress`.

    Raises:
        ConfigError: if there is no text sample, or ``config`` is for GPUs, or asks for stages.
        InputError: if ``batch`` does not fit the model, or has too few tokens.
    """
    model = checkpoint.model.config
    if config.attention != "decomposed" or config.precision != "float32":
        raise ConfigError(
            "stages are planned from times on this CPU, and fused attention, float16 and bfloat16 "
            "are for GPUs: leave out --stages auto, or give the layers of each stage"
        )
    if config.stages or config.layers_per_stage != 1:
        raise ConfigError("stages are given already; leave them out to have them planned")
    if checkpoint.sample is None:
        raise ConfigError(
            "--stages auto needs to know how deep tokens go, and this model has no text sample: "
            "convert it with --texts, or give the layers of each stage"
        )
    if batch is None:
        batch = DEFAULT_BATCH[0], min(DEFAULT_BATCH[1], model.max_positions)
    check_cases([batch], model.max_positions)
    if batch[0] * batch[1] < MIN_TOKENS:
        raise InputError(
            f"stages are planned from batches of at least {MIN_TOKENS} tokens, not "
            f"{batch[0]}x{batch[1]}"
        )
    histogram = depth_histogram(checkpoint.model, checkpoint.sample)
    costs = measure_stage_costs(model, config, batch, n_threads=n_threads, progress=progress)
    return plan_stages(active_rows(histogram, batch[0] * batch[1]), costs)


def measure_stage_costs(
    model: ModelConfig,
    config: ExportConfig,
    batch: tuple[int, int],
    *,
    n_threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> StageCosts:
    """Measure stages of one and of two layers of the sizes of ``model``, at two numbers of rows.

    A model of three layers with random weights is cut into graphs in a temporary directory and run.
    What the runtime itself takes for a call is how much more it takes for two calls than for one.

    Args:
        model: its sizes.
        config: numbers of the export.
        batch: sequences, and tokens of each.
        n_threads: see :meth:`sdt_deploy.runtime.session.Session.open`.
        progress: see :data:`sdt_deploy.exporters.export.Progress`.
    """
    small = model.replace(
        n_layers=3,
        thresholds=(),
        vocab_size=min(model.vocab_size, 256),
        pinned_token_ids=(),
        probe="linear",
        head=HeadConfig(),
    )
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    random_model = SparseDepthTransformer(small).eval()
    torch.random.set_rng_state(torch_state)
    ids = np.random.default_rng(0).integers(0, small.vocab_size, batch, dtype=np.int32)
    tokens = TokenBatch.from_padded(ids, config=small)
    with tempfile.TemporaryDirectory() as directory:
        cut = dataclasses.replace(config, stages=(1, 2))
        bundle = export_stages(random_model, Path(directory), cut, progress)
        with Session.open(
            bundle, n_threads=n_threads, max_padded_tokens=tokens.n_tokens
        ) as session:
            scores = session.run_batch(tokens, path="sparse").scores
            assert scores is not None
            limit = float(np.quantile(scores, 1 - _FEW))
            cases = (-1.0, -1.0, -1.0), (limit,) * 3, (-1.0, 2.0, 2.0)
            runs: list[list[RunResult]] = [[] for _ in cases]
            for turn in range(_WARM_UP + _ROUNDS):
                for case, found in zip(cases, runs, strict=True):
                    result = session.run_batch(tokens, thresholds=case, path="sparse")
                    if turn >= _WARM_UP:
                        found.append(result)
    many, few, alone = runs
    overhead = max(0.0, _overhead(many) - _overhead(alone))

    def points(stage: int) -> list[tuple[int, float]]:
        return [
            (
                found[0].layer_usage.active_tokens[0],
                overhead + median(one.timings.stage_ms[stage] for one in found),
            )
            for found in (few, many)
        ]

    return StageCosts.fit(points(0), points(1))


def _overhead(runs: list[RunResult]) -> float:
    return median(one.timings.overhead_ms for one in runs)
