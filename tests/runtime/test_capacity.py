"""Fixed capacity: each layer takes the top share of the tokens of each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sdt_deploy.config import ExportConfig, HeadConfig, ModelConfig
from sdt_deploy.errors import BackendError, ConfigError
from sdt_deploy.exporters.export import export
from sdt_deploy.model import blocks, checkpoints
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.conversion import ProbeFit, convert
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.runtime.result import RunResult
from sdt_deploy.runtime.routing import depths_of, standings
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.statistics import expected_mean_depth
from sdt_deploy.testing import OracleBackend, OracleDeviceBackend, memory_bundle
from tests.samples import (
    CONFIGS,
    assert_parity,
    benched,
    capacity_thresholds,
    cut_points,
    lengths_lists,
    random_batch,
    random_model,
    seeds,
)
from tests.textmodels import save_teacher, texts

CONFIG = CONFIGS["all-embedding"][0].replace(
    selection="capacity", thresholds=(0.0, 0.4, 0.75), pinned_token_ids=(1,)
)
ACTIVE = CONFIGS["active-lm"][0].replace(selection="capacity", thresholds=(0.1, 0.5, 0.9))


def capacity_counts(lengths: Sequence[int], thresholds: Sequence[float]) -> npt.NDArray[np.int64]:
    """Return ``[n_layers, batch]``, the tokens that each layer takes by selection ``capacity``.

    They depend on the lengths alone: no score is needed.
    """
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    anyone = np.zeros(cu_seqlens[-1], dtype=np.float32)
    depths = depths_of(anyone, thresholds, cu_seqlens, "capacity")
    layers = np.arange(len(thresholds))[:, None]
    return np.add.reduceat(depths > layers, cu_seqlens[:-1], axis=1, dtype=np.int64)


@given(lengths=lengths_lists, seed=seeds, n_values=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_ranks_are_those_of_a_stable_sort(lengths: list[int], seed: int, n_values: int) -> None:
    """Both forms of the standing against sorting each sequence by itself; many scores are equal."""
    cu = np.cumsum([0, *lengths], dtype=np.int32)
    scores = np.random.default_rng(seed).integers(0, n_values, cu[-1]).astype(np.float32)
    expected = []
    for part in np.split(scores, cu[1:-1]):
        order = sorted(range(len(part)), key=lambda i: (-part[i], i))
        rank = np.array([order.index(i) for i in range(len(part))], dtype=np.float32)
        standing = np.float32(1) - (rank + np.float32(0.5)) / np.float32(len(part))
        expected.append(np.where(rank == 0, np.float32(1), standing))
    found = standings(scores, cu)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.concatenate(expected))
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    padded = np.full(mask.shape, 99, dtype=np.float32)
    padded[mask] = scores
    oracle = blocks.standings(torch.from_numpy(padded), torch.from_numpy(mask))
    np.testing.assert_array_equal(oracle.numpy()[mask], found)


@given(lengths=lengths_lists, seed=seeds, capacity=st.floats(0.001, 1))
@settings(max_examples=100, deadline=None)
def test_a_layer_takes_its_share(lengths: list[int], seed: int, capacity: float) -> None:
    cu = np.cumsum([0, *lengths], dtype=np.int32)
    scores = np.random.default_rng(seed).random(cu[-1], dtype=np.float32)
    depths = depths_of(scores, (0.0, 1.0 - capacity), cu, "capacity")
    counts = capacity_counts(lengths, (0.0, 1.0 - capacity))
    for i, n in enumerate(lengths):
        part = slice(cu[i], cu[i + 1])
        taken = depths[part] == 2
        assert (depths[part] >= 1).all()
        assert counts[:, i].tolist() == [n, taken.sum()]
        assert abs(max(1.0, n * capacity) - taken.sum()) <= 0.5 + 1e-4
        assert scores[part][taken].min() >= scores[part][~taken].max(initial=-1)


def test_whole_counts_are_exact() -> None:
    for n in (1, 2, 3, 10, 30, 128, 511, 512):
        for k in range(1, n + 1):
            assert capacity_counts([n], (1 - k / n,)).tolist() == [[k]], (k, n)


@pytest.mark.parametrize("config", [CONFIG, ACTIVE])
@pytest.mark.parametrize("layers_per_stage", [1, 2])
def test_rows_are_known_before_any_score(config: ModelConfig, layers_per_stage: int) -> None:
    model = random_model(config, 4)
    bundle = memory_bundle(model, ExportConfig(layers_per_stage=layers_per_stage))
    backend = OracleBackend(bundle, model)
    batch = random_batch(config, [9, 1, 26, 14], 2)
    counts = capacity_counts(batch.lengths.tolist(), config.thresholds).sum(axis=1)
    result = assert_parity(Session(bundle, backend), model, batch)
    firsts = [first for first, _ in bundle.manifest.stage_layers]
    assert [call.n_rows for call in backend.calls] == counts[firsts].tolist()
    assert result.layer_usage.active_tokens == tuple(counts)
    assert counts[0] > counts[1] > counts[2] > 0


def test_pinned_tokens_come_first() -> None:
    model = random_model(CONFIG, 4)
    bundle = memory_bundle(model)
    ids = np.array([5, 1, 7, 9, 1, 8, 3, 4], dtype=np.int32)
    with Session(bundle, OracleBackend(bundle, model)) as session:
        depths = session.run(ids, [0, 8], path="sparse").depths
        assert depths[[1, 4]].tolist() == [3, 3]  # the last layer takes two of eight
        few = session.run(ids, [0, 8], path="sparse", thresholds=[0.0, 0.9, 0.9]).depths
    assert few.tolist() == [1, 3, 1, 1, 1, 1, 1, 1]  # no more than its share: the first of them


def test_target_depth_and_expectations() -> None:
    model = random_model(CONFIG.replace(pinned_token_ids=()), 4)
    bundle = memory_bundle(model)
    batch = random_batch(model.config, [20, 20, 40], 1)
    with Session(bundle, OracleBackend(bundle, model)) as session:
        for depth in (1.5, 2.0, 3.0):
            result = session.run(
                batch.input_ids,
                batch.cu_seqlens,
                token_type_ids=batch.token_type_ids,
                target_depth=depth,
                path="sparse",
            )
            assert result.layer_usage.mean_depth == pytest.approx(depth, abs=0.05)
    assert expected_mean_depth(bundle.manifest) == pytest.approx(1 + 0.6 + 0.25)


def test_exported(tmp_path: Path) -> None:
    """All paths on ONNX Runtime, over random cases at equal depths."""
    config = CONFIG.replace(
        n_layers=2,
        thresholds=(0.2, 0.6),
        head=HeadConfig(kind="classify", pooling="mean", n_classes=3),
    )
    model = random_model(config, 9)
    export(Checkpoint(model=model, provenance={}), tmp_path / "bundle")

    @given(lengths=lengths_lists, seed=seeds, wanted=cut_points(2))
    @settings(max_examples=25, deadline=None)
    def check(lengths: list[int], seed: int, wanted: list[float]) -> None:
        batch = random_batch(config, lengths, seed)
        thresholds = capacity_thresholds(model, batch, wanted)
        assume(thresholds is not None)
        found: list[RunResult] = [
            assert_parity(session, model, batch, thresholds, path)
            for path in ("sparse", "single", "masked")
        ]
        assert all((one.depths == found[0].depths).all() for one in found)

    with Session.open(tmp_path / "bundle") as session:
        assert session.manifest.model == config
        check()
    assert benched(tmp_path / "bundle").single_ms is not None


def test_equal_scores_are_ranked_by_position() -> None:
    config = ACTIVE.replace(thresholds=(0.0, 0.5, 0.5))
    model = random_model(config, 1)
    with torch.no_grad():
        model.scorer.weight.zero_()
    batch = random_batch(config, [6, 3], 0)
    depths = oracle_output(model, batch.input_ids, batch.cu_seqlens).depths
    assert depths.tolist() == [3, 3, 3, 1, 1, 1, 3, 1, 1]


def test_converted(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    fit = ProbeFit(texts=texts(80), target_depth=2.5, selection="capacity")
    checkpoint, report = convert(tmp_path / "teacher", tmp_path / "model", fit=fit)
    config = checkpoints.load(tmp_path / "model").model.config
    assert config == checkpoint.model.config
    assert config.selection == "capacity"
    assert sum(1 - threshold for threshold in config.thresholds) == pytest.approx(2.5)
    assert report is not None
    assert report.mean_depth == pytest.approx(2.5, abs=0.2)  # counts are rounded in each text


def test_what_makes_no_sense() -> None:
    with pytest.raises(ConfigError, match="need scores; probe 'none'"):
        ACTIVE.replace(probe="none")
    with pytest.raises(ConfigError, match="selection must be one of"):
        ACTIVE.replace(selection="top")
    model = random_model(ACTIVE, 1)
    for config in (ExportConfig(attention="fused"), ExportConfig(precision="float16")):
        with pytest.raises(ConfigError, match=r"is for GPUs.*selection 'capacity'"):
            memory_bundle(model, config)
    bundle = memory_bundle(model)
    with pytest.raises(BackendError, match=r"selection 'capacity'.*onnxruntime-cpu"):
        Session(bundle, OracleDeviceBackend(bundle, model))
