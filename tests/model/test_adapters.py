from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sdt_deploy.config import HeadConfig, ModelConfig
from sdt_deploy.errors import CheckpointError, ConfigError
from sdt_deploy.model import checkpoints
from sdt_deploy.model.adapters import (
    Adapter,
    merged,
    read_adapter,
    weights_sha256,
    write_adapter,
)
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.conversion import ProbeFit, convert
from tests.samples import random_model

CONFIG = ModelConfig(
    vocab_size=31,
    d_model=16,
    n_heads=2,
    n_layers=3,
    d_ff=24,
    max_positions=12,
    activation="gelu",
    context="all",
    probe="linear",
    thresholds=(0.0, 0.4, 0.6),
    head=HeadConfig(kind="embedding", pooling="mean"),
)
WEIGHT = "layers.1.feed_forward.up.weight"


def adapter_of(base: Checkpoint) -> Adapter:
    torch.manual_seed(1)
    n_out, n_in = base.model.state_dict()[WEIGHT].shape
    return Adapter(
        factors={WEIGHT: (torch.randn(n_out, 2).half(), torch.randn(2, n_in).half())},
        tensors={"layers.0.attention_norm.bias": torch.randn(16)},
        config=CONFIG.replace(thresholds=(0.0, 0.2, 0.9)),
        base_sha256=weights_sha256(base.model),
        score_quantiles=tuple(i / 100 for i in range(101)),
        pinned_share=0.25,
        about={"base": {"name": "tiny"}, "quality": {"mean_cosine": 0.5}},
    )


@pytest.fixture
def base() -> Checkpoint:
    return Checkpoint(model=random_model(CONFIG, seed=3), provenance={"license": "MIT"})


def test_a_file_brings_back_the_merged_model(base: Checkpoint, tmp_path: Path) -> None:
    adapter = adapter_of(base)
    write_adapter(tmp_path / "a.safetensors", adapter)
    checkpoints.save(base, tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "a.safetensors")
    found = checkpoints.load(tmp_path / "out")
    up, down = (x.float() for x in adapter.factors[WEIGHT])
    expected = dict(base.model.state_dict())
    expected[WEIGHT] = expected[WEIGHT] + up @ down
    expected.update(adapter.tensors)
    weights = found.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert found.model.config == adapter.config
    assert found.score_quantiles == adapter.score_quantiles
    assert found.pinned_share == 0.25
    assert found.provenance == {"license": "MIT", "adapter": adapter.about}


def test_the_hash_is_of_the_weights_not_of_the_probe(base: Checkpoint) -> None:
    before = weights_sha256(base.model)
    with torch.no_grad():
        base.model.scorer.bias.add_(1)
        assert weights_sha256(base.model) == before
        next(base.model.layers.parameters()).add_(1e-3)
    assert weights_sha256(base.model) != before


def test_other_weights_are_refused(base: Checkpoint) -> None:
    other = dataclasses.replace(base, model=random_model(CONFIG, seed=4))
    with pytest.raises(CheckpointError, match="trained for other weights: it needs tiny"):
        merged(other, adapter_of(base))


@pytest.mark.parametrize(
    "name", ["layers.9.feed_forward.up.weight", "layers.0.attention_norm.bias"]
)
def test_factors_that_do_not_fit_are_refused(base: Checkpoint, name: str) -> None:
    adapter = adapter_of(base)
    wrong = dataclasses.replace(adapter, factors={name: adapter.factors[WEIGHT]})
    with pytest.raises(CheckpointError, match=f"it changes {name}"):
        merged(base, wrong)


def test_tensors_that_do_not_fit_are_refused(base: Checkpoint) -> None:
    wrong = dataclasses.replace(adapter_of(base), tensors={"layers.7.x": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="unexpected: layers"):
        merged(base, wrong)


def test_what_is_no_adapter_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="missing"):
        read_adapter(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="no adapter of sdt-deploy"):
        read_adapter(path)
    write_adapter(path, adapter_of(base))
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(CheckpointError, match="cannot be read as an adapter"):
        read_adapter(path)
    path.write_bytes(content.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 7'))
    with pytest.raises(CheckpointError, match="format version 7"):
        read_adapter(path)
    for about in ("mine", {"base": "mine"}):
        write_adapter(path, dataclasses.replace(adapter_of(base), about=about))  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="must be objects"):
            read_adapter(path)


def test_an_adapter_and_a_fit_exclude_each_other(base: Checkpoint, tmp_path: Path) -> None:
    checkpoints.save(base, tmp_path / "base")
    fit = ProbeFit(texts=["a b", "c d"])
    with pytest.raises(ConfigError, match="brings its own probe"):
        convert(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "x", fit=fit)
