"""Llama: read from a Hugging Face directory, exported, scored against transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sdt_deploy.bundle import Bundle
from sdt_deploy.config import ExportConfig, HeadConfig, ModelConfig, RotaryConfig
from sdt_deploy.costs import dense_flops
from sdt_deploy.errors import BackendError, CheckpointError, ConfigError
from sdt_deploy.exporters.export import export, export_stages
from sdt_deploy.exporters.restore import restore
from sdt_deploy.model.checkpoints import Checkpoint, load, save
from sdt_deploy.model.conversion import convert, load_any
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.verification import verify_bundle
from sdt_deploy.testing import OracleDeviceBackend, memory_bundle
from tests.samples import (
    CONFIGS,
    TOLERANCE,
    assert_parity,
    assert_parity_on_random_batches,
    assert_rows_of_stages,
    benched,
    random_batch,
    random_model,
)

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
LLAMA = ModelConfig(
    vocab_size=53,
    d_model=20,
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
    n_layers=3,
    d_ff=36,
    max_positions=33,
    rotary=RotaryConfig(theta=100.0, scaling="llama3", factor=4.0, original_max_positions=16),
    activation="silu",
    gated=True,
    attention_bias=False,
    feed_forward_bias=False,
    norm="rms",
    causal=True,
    head=HeadConfig(kind="lm", bias=False),
)


def saved(path: Path, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(path, **options)
    return model.eval()


def assert_same_logits(path: Path, theirs: PreTrainedModel) -> SparseDepthTransformer:
    ours = load_any(path).model
    mask = torch.arange(40) < torch.tensor([[40], [17], [1]])
    ids = torch.where(mask, torch.randint(1, 61, mask.shape), 0)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long())[0]
        found = ours(ids, mask).output
    torch.testing.assert_close(found[mask], expected[mask], atol=TOLERANCE, rtol=0)
    return ours


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 30.0, "factor": 2.0}},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6},
        {"num_key_value_heads": 1, "head_dim": 4, "hidden_act": "gelu"},
    ],
)
def test_logits_are_those_of_transformers(tmp_path: Path, change: dict[str, Any]) -> None:
    theirs = saved(tmp_path, LlamaForCausalLM(LlamaConfig(**{**SIZES, **change})))
    ours = assert_same_logits(tmp_path, theirs)
    assert ours.config.head.kind == "lm"
    assert ours.config.causal
    chosen = load_any(tmp_path, head="hidden").model
    assert chosen.config.head.kind == "hidden"


def test_states_shards_and_mistral(tmp_path: Path) -> None:
    theirs = saved(tmp_path / "plain", LlamaModel(LlamaConfig(**SIZES)))
    assert assert_same_logits(tmp_path / "plain", theirs).config.head.kind == "hidden"

    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    shards = tmp_path / "shards"
    saved(shards, model, max_shard_size="9KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    assert_same_logits(shards, model.eval())

    mistral = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))
    assert_same_logits(tmp_path / "mistral", saved(tmp_path / "mistral", mistral))


def test_old_names_of_rotary_settings(tmp_path: Path) -> None:
    theirs = saved(tmp_path, LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)))
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(raw))
    assert_same_logits(tmp_path, theirs)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    rope = {**LLAMA3, "rope_type": kind, "original_max_position_embeddings": 8192}
    config = LlamaConfig(**{**SIZES, "head_dim": 64}, rope_parameters=rope)
    expected = LlamaRotaryEmbedding(config).inv_freq
    scaling = "none" if kind == "default" else kind
    factor = 1.0 if kind == "default" else 4.0
    found = RotaryConfig(theta=500.0, scaling=scaling, factor=factor).frequencies(64)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6)


def test_native_directory_keeps_everything(tmp_path: Path) -> None:
    saved(tmp_path / "hf", LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)))
    checkpoint, _ = convert(tmp_path / "hf", tmp_path / "native")
    again = load(tmp_path / "native").model
    assert again.config == checkpoint.model.config
    ids = torch.randint(0, 61, (2, 9))
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert torch.equal(again(ids, mask).output, checkpoint.model(ids, mask).output)


@torch.no_grad()
@pytest.mark.parametrize("context", ["active", "all"])
def test_positions_are_those_in_the_sequence(context: str) -> None:
    """Derived the other way: tokens that a layer does not take are removed, positions kept."""
    model = random_model(LLAMA.replace(context=context), 3)
    ids = torch.arange(5, 25)[None]
    found = model(ids, torch.ones_like(ids, dtype=torch.bool))
    assert len(found.depths.unique()) == 3
    hidden = model.embed(ids)
    for i, layer in enumerate(model.blocks):
        takes = found.depths[0] > i
        kept = takes if context == "active" else torch.ones_like(takes)
        places = torch.arange(20)[kept][None]
        updated = layer(hidden[:, kept], torch.ones_like(places, dtype=torch.bool), places)
        hidden = hidden.clone()
        hidden[:, takes] = updated[:, takes[kept]]
    torch.testing.assert_close(model.head(hidden, None), found.output, atol=1e-5, rtol=0)
    part = model(ids[:, :7], torch.ones(1, 7, dtype=torch.bool))  # nothing later is seen
    torch.testing.assert_close(part.output, found.output[:, :7], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_turning_keeps_only_distances() -> None:
    model = random_model(LLAMA, 1)
    attention = model.blocks[0].attention
    hidden = torch.randn(1, 6, 20)
    seen = torch.ones(1, 6, dtype=torch.bool)
    places = torch.tensor([[0, 1, 4, 5, 9, 10]])
    near, far = (attention.weights(hidden, seen, places + shift) for shift in (0, 20))
    torch.testing.assert_close(near, far, atol=1e-5, rtol=0)
    assert (near - attention.weights(hidden, seen)).abs().max() > 1e-2


@pytest.mark.parametrize("context", ["active", "all"])
@pytest.mark.parametrize("stages", [(1, 1, 1), (2, 1)])
def test_rows_of_each_stage(context: str, stages: tuple[int, ...]) -> None:
    model = random_model(LLAMA.replace(context=context), 5)
    assert_rows_of_stages(model, stages)


def test_exported(tmp_path: Path) -> None:
    model = random_model(LLAMA, 7)
    export(Checkpoint(model=model, provenance={}), tmp_path / "b", ExportConfig(stages=(2, 1)))
    with Session.open(tmp_path / "b") as session:
        assert not session.backend.has("single")
        assert_parity_on_random_batches(
            session, model, ("sparse", "masked"), n_batches=15, longest=32
        )
        batch = random_batch(model.config, [5, 17, 33], 0)
        assert_parity(session, model, batch, path="dense")
        assert session.run_batch(batch).path in ("sparse", "masked")
        for check in verify_bundle(Bundle.open(tmp_path / "b"), session):
            assert check.max_abs_error < TOLERANCE
    assert benched(tmp_path / "b").single_ms is None
    again = restore(Bundle.open(tmp_path / "b"))
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


@pytest.mark.parametrize("stages", [(1, 2), (1, 1, 1)])
def test_stages_with_context_active(tmp_path: Path, stages: tuple[int, ...]) -> None:
    config = LLAMA.replace(context="active", attention_bias=True, n_kv_heads=3, norm="layer")
    model = random_model(config, 7)
    config = ExportConfig(stages=stages)
    bundle = export_stages(model, tmp_path, config, lambda what, done, total: None)
    with Session.open(bundle) as session:
        assert_parity_on_random_batches(session, model, ("sparse",), n_batches=15, longest=32)


def test_operations_are_counted() -> None:
    n, d, ff, heads, keys, pairs = 5, 20, 36, 48, 16, 25
    layer = n * 2 * d * (2 * heads + 2 * keys + 3 * ff) + pairs * 4 * heads
    assert dense_flops(LLAMA, [n]) == 3 * layer + n * 2 * d * 53


def test_what_makes_no_sense(tmp_path: Path) -> None:
    model = random_model(LLAMA, 0)
    free = random_model(LLAMA.replace(causal=False, rotary=None), 0)
    for config in (ExportConfig(attention="fused"), ExportConfig(precision="float16")):
        with pytest.raises(ConfigError, match="causal attention needs rows in the order"):
            memory_bundle(model, config)
        with pytest.raises(ConfigError, match="do not know the layers of this model"):
            memory_bundle(free, config)
    with pytest.raises(ConfigError, match="does not know the layers of this model"):
        export(Checkpoint(model=free, provenance={}), tmp_path / "b", single_file=True)
    bundle = memory_bundle(model)
    with pytest.raises(BackendError, match="order of tokens"):
        Session(bundle, OracleDeviceBackend(bundle, model))
    for change, message in (
        ({"causal": False}, "rotary positions need causal attention"),
        ({"head_dim": 7}, "heads of an even width"),
        ({"position_offset": 2}, "no position_offset"),
        ({"n_kv_heads": 4}, "n_heads must be a multiple of n_kv_heads"),
        ({"head_dim": -1}, "head_dim must be a non-negative integer"),
        ({"norm": "batch"}, "norm must be one of 'layer', 'rms'"),
        ({"gated": 1}, "gated must be true or false"),
        ({"rotary": {"theta": 5.0}}, "must be a RotaryConfig"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLAMA.replace(**change)
    for change, message in (
        ({"theta": 0.5}, "rotary.theta must be a number of at least 1"),
        ({"theta": math.inf}, "rotary.theta"),
        ({"factor": 2.0}, "needs rotary.scaling"),
        ({"scaling": "yarn"}, "rotary.scaling must be one of"),
        ({"low_freq_factor": 4.0}, "must be below"),
        ({"original_max_positions": 0}, "positive integer"),
    ):
        with pytest.raises(ConfigError, match=message):
            RotaryConfig(**change)  # type: ignore[arg-type]
    raw = LLAMA.to_dict()
    assert ModelConfig.from_dict(json.loads(json.dumps(raw))) == LLAMA
    raw["rotary"] = {"base": 3}
    with pytest.raises(ConfigError, match="rotary: unknown keys base"):
        ModelConfig.from_dict(raw)
    assert CONFIGS["all-embedding"][0].is_plain
    assert not LLAMA.is_plain


def test_directories_that_cannot_be_read(tmp_path: Path) -> None:
    saved(tmp_path, LlamaForCausalLM(LlamaConfig(**SIZES)))
    with pytest.raises(CheckpointError, match="head 'classify' of Llama"):
        load_any(tmp_path, head="classify")
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    for change, message in (
        ({"hidden_act": "mish"}, "'mish' is not supported"),
        ({"hidden_act": ["silu"]}, "config.json"),
        ({"rope_parameters": yarn}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "has no 'factor'"),
        ({"rope_parameters": [3]}, "config.json"),
        ({"rope_parameters": None, "rope_scaling": "linear"}, "must be an object, not 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"sliding_window": 16}, "sliding_window 16 is not supported"),
        ({"num_key_value_heads": 3}, "shape"),
        ({"num_key_value_heads": 4}, "multiple of n_kv_heads"),
        ({"head_dim": 4}, "attention.query.weight has the shape"),
        ({"num_hidden_layers": 2}, "layers.2"),
        ({"attention_bias": True}, "missing: layers.0.attention.key.bias"),
    ):
        path.write_text(json.dumps({**raw, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_any(tmp_path)
    path.write_text(json.dumps({key: raw[key] for key in raw if key != "rms_norm_eps"}))
    with pytest.raises(CheckpointError, match="has no 'rms_norm_eps'"):
        load_any(tmp_path)


def test_shards_that_cannot_be_read(tmp_path: Path) -> None:
    saved(tmp_path, LlamaForCausalLM(LlamaConfig(**SIZES)), max_shard_size="9KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = "model.norm.weight"
    for place in ("../other.safetensors", "a/b.safetensors", ".safetensors", "weights.bin", 3):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], name: place}}))
        with pytest.raises(CheckpointError, match="weight_map must say"):
            load_any(tmp_path)
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "model.more.weight": place}}))
    first = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "more": first}}))
    with pytest.raises(CheckpointError, match="are missing: \\['more'\\]"):
        load_any(tmp_path)
    path.write_text(json.dumps(index))
    (tmp_path / first).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_any(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="has neither model"):
        load_any(tmp_path)


def test_save_and_load_without_scaling(tmp_path: Path) -> None:
    model = random_model(LLAMA.replace(rotary=RotaryConfig()), 2)
    save(Checkpoint(model=model), tmp_path / "m")
    assert load(tmp_path / "m").model.config == model.config
