"""The torch backend on the CPU: all of it but flash attention and captures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from sdt_deploy.bundle import WEIGHTS, Bundle
from sdt_deploy.config import Activation, ExportConfig
from sdt_deploy.errors import BackendError, BundleIntegrityError
from sdt_deploy.exporters.export import export
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.runtime.backends import open_backend
from sdt_deploy.runtime.backends.torch_backend import TorchBackend
from sdt_deploy.runtime.session import Session
from tests.samples import (
    CONFIGS,
    ExportedModel,
    assert_parity,
    quantile_thresholds,
    random_batch,
    random_model,
)

Exported = Callable[[str], ExportedModel]


@pytest.mark.parametrize("name", CONFIGS)
def test_parity(fused: Exported, name: str) -> None:
    sample = fused(name)
    bundle = Bundle.open(sample.bundle)
    config = sample.model.config
    rng = np.random.default_rng(11)
    with Session(bundle, TorchBackend(bundle, device="cpu")) as session:
        for seed in range(12):
            lengths = rng.integers(1, config.max_positions + 1, rng.integers(1, 7)).tolist()
            batch = random_batch(config, lengths, seed)
            cuts = sorted(rng.random(config.n_layers).tolist())
            thresholds = None
            if config.probe != "none":
                thresholds = quantile_thresholds(sample.model, batch, cuts)
            result = assert_parity(session, sample.model, batch, thresholds)
            active = [n for n in result.layer_usage.active_tokens if n]
            assert len(result.stage_rows) >= len(active)
            assert all(n <= m for n, m in zip(active, result.stage_rows, strict=False))
            assert_parity(session, sample.model, batch, thresholds, "masked")
            assert_parity(session, sample.model, batch, None, "dense")


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_every_activation(tmp_path: Path, activation: Activation) -> None:
    """The two kinds of GELU are 5e-4 apart at most, so it takes a close look."""
    model = random_model(CONFIGS["all-embedding"][0].replace(activation=activation), seed=3)
    export(Checkpoint(model=model), tmp_path / "bundle", ExportConfig(attention="fused"))
    batch = random_batch(model.config, [17, 3, 40], seed=2)
    expected = oracle_output(model, batch.input_ids, batch.cu_seqlens, batch.token_type_ids)
    bundle = Bundle.open(tmp_path / "bundle")
    with Session(bundle, TorchBackend(bundle, device="cpu")) as session:
        for path in ("sparse", "masked"):
            found = session.run_batch(batch, path=path)
            np.testing.assert_allclose(found.output, expected.output, atol=3e-6)


def test_sessions_share_no_compiled_code(fused: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives up after some versions of a function: here after one, of two models."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for name in ("active-lm", "all-embedding"):
            sample = fused(name)
            bundle = Bundle.open(sample.bundle)
            backend = TorchBackend(bundle, device="cpu", compiled=True)
            with Session(bundle, backend) as session:
                batch = random_batch(sample.model.config, [20, 3], seed=0)
                assert_parity(session, sample.model, batch, None, "dense")


def test_keys_and_values_with_biases_that_matter(tmp_path: Path) -> None:
    """In float32 and bfloat16; the latter differs from the oracle by rounding only."""
    model = random_model(CONFIGS["all-embedding"][0], seed=3)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.key.bias.normal_()
            block.attention.value.bias.normal_()
    batch = random_batch(model.config, [17, 3, 40], seed=2)
    outputs = []
    for precision in ("float32", "bfloat16"):
        path = tmp_path / precision
        export(Checkpoint(model=model), path, ExportConfig(attention="fused", precision=precision))
        bundle = Bundle.open(path)
        with Session(bundle, TorchBackend(bundle, device="cpu")) as session:
            if precision == "float32":
                assert_parity(session, model, batch)
            outputs.append(session.run_batch(batch, path="sparse"))
    exact, rounded = outputs
    np.testing.assert_array_equal(exact.depths, rounded.depths)
    difference = np.abs(exact.output - rounded.output).max()
    assert 0 < difference < 0.03


def test_decomposed_bundles_are_refused(exported: Exported) -> None:
    bundle = Bundle.open(exported("active-lm").bundle)
    with pytest.raises(BackendError, match="--attention fused"):
        TorchBackend(bundle, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(fused: Exported) -> None:
    with pytest.raises(BackendError, match="finds no GPU"):
        open_backend("torch", Bundle.open(fused("active-lm").bundle))


def test_weights_that_are_cut_are_an_error(fused: Exported, tmp_path: Path) -> None:
    path = shutil.copytree(fused("active-lm").bundle, tmp_path / "bundle")
    bundle = Bundle.open(path)
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:4096])
    with pytest.raises(BundleIntegrityError, match="export the bundle again"):
        TorchBackend(bundle, device="cpu").graph("entry")


def test_a_closed_backend_opens_nothing(fused: Exported) -> None:
    backend = TorchBackend(Bundle.open(fused("active-lm").bundle), device="cpu")
    backend.graph("entry")
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.graph("entry")
