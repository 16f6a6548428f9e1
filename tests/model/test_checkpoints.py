from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from sdt_deploy.config import HeadConfig, ModelConfig
from sdt_deploy.errors import CheckpointError, ConfigError, OutputError
from sdt_deploy.model import checkpoints
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.conversion import load_any
from sdt_deploy.tokenization import TextTokenizer
from tests.samples import random_model

CONFIG = ModelConfig(
    vocab_size=12,
    d_model=8,
    n_heads=2,
    n_layers=2,
    d_ff=8,
    max_positions=9,
    pinned_token_ids=(3,),
    head=HeadConfig(kind="classify", pooling="mean", n_classes=2),
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    sample = TokenSample(
        input_ids=np.arange(5, dtype=np.int32), cu_seqlens=np.array([0, 2, 5], dtype=np.int32)
    )
    checkpoint = Checkpoint(
        model=random_model(CONFIG, 0),
        provenance={"license": "mit"},
        score_quantiles=tuple(np.linspace(0, 1, 101)),
        pinned_share=0.25,
        tokenizer=b"{}",
        sample=sample,
    )
    checkpoints.save(checkpoint, tmp_path / "model")
    return tmp_path / "model"


def test_round_trip(saved: Path) -> None:
    loaded = load_any(saved)
    assert loaded.model.config == CONFIG
    assert loaded.provenance == {"license": "mit"}
    assert loaded.score_quantiles is not None
    assert len(loaded.score_quantiles) == 101
    assert loaded.pinned_share == 0.25
    assert loaded.tokenizer == b"{}"
    assert loaded.sample is not None
    np.testing.assert_array_equal(loaded.sample.cu_seqlens, [0, 2, 5])
    for name, tensor in random_model(CONFIG, 0).state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    with pytest.raises(OutputError, match="exists already"):
        checkpoints.save(loaded, saved)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff"])
def test_what_is_no_tokenizer(content: bytes) -> None:
    with pytest.raises(CheckpointError, match="cannot be used"):
        TextTokenizer(content)


def test_all_problems_in_one_error(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["scorer.bias"]
    tensors["surplus"] = torch.zeros(1)
    tensors["scorer.weight"] = torch.zeros(9)
    tensors["head.norm.bias"] = torch.full((8,), float("nan"))
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError) as error:
        load_any(saved)
    for part in (
        "missing: scorer.bias",
        "unexpected: surplus",
        "scorer.weight has the shape (9,), expected (8,)",
        "head.norm.bias holds values that are not finite",
    ):
        assert part in str(error.value)


def test_broken_directories(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    for change, message in (
        ({"format_version": 9}, "format version 9; this release reads version 1"),
        ({"model": {**config["model"], "depth": 3}}, "unknown keys depth"),
        ({"model": {}}, "missing"),
        ({"model": []}, "must be an object, not list"),
        ({"model": {**config["model"], "thresholds": [0.5, 0.1]}}, "must not fall"),
    ):
        (saved / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_any(saved)
    (saved / "config.json").write_text(json.dumps(config))
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_any(saved)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_any(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_any(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer"),
        ({"n_heads": 3}, "multiple of n_heads"),
        ({"activation": "swish"}, "'gelu_tanh', 'silu', not 'swish'"),
        ({"context": "some"}, "context"),
        ({"eps": 0.0}, "eps"),
        ({"thresholds": (0.1,)}, "one per layer is needed, 2"),
        ({"thresholds": (0.5, 0.2)}, "must not fall"),
        ({"thresholds": (0.5, 1.0)}, "below 1"),
        ({"thresholds": (0.5, float("nan"))}, "finite"),
        ({"pinned_token_ids": (12,)}, "vocabulary of 12"),
        ({"probe": "none"}, "no meaning without a probe"),
        ({"max_positions": True}, "max_positions"),
    ],
)
def test_configs_validate_themselves(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CONFIG.replace(**change)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "sing"}, "head.kind"),
        ({"kind": "embedding"}, "head.pooling"),
        ({"kind": "lm", "pooling": "mean"}, "no meaning"),
        ({"kind": "lm", "normalize": True}, "no meaning"),
        ({"kind": "classify", "pooling": "cls"}, "n_classes"),
        ({"kind": "hidden", "n_classes": 2}, "no meaning"),
    ],
)
def test_heads_validate_themselves(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HeadConfig(**values)  # type: ignore[arg-type]


def test_config_survives_json() -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
