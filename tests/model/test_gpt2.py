"""GPT-2: read from a Hugging Face directory, exported, scored against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from sdt_deploy.config import ExportConfig, HeadConfig
from sdt_deploy.errors import BackendError, CheckpointError, ConfigError
from sdt_deploy.exporters.export import export, export_stages
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.conversion import load_any
from sdt_deploy.runtime.generation import generate
from sdt_deploy.runtime.session import Session
from sdt_deploy.testing import OracleDeviceBackend, memory_bundle
from tests.samples import (
    CONFIGS,
    TOLERANCE,
    assert_generates_as_oracle,
    assert_parity,
    assert_parity_on_random_batches,
    assert_rows_of_stages,
    benched,
    random_batch,
    random_model,
)

SIZES = GPT2Config(
    vocab_size=61, n_embd=24, n_layer=3, n_head=3, n_positions=20, bos_token_id=0, eos_token_id=0
)
CAUSAL = CONFIGS["all-embedding"][0].replace(
    causal=True,
    activation="gelu_tanh",
    head=HeadConfig(kind="lm"),
    n_layers=2,
    thresholds=(0.2, 0.5),
)


def saved(path: Path, kind: type[GPT2Model | GPT2LMHeadModel]) -> GPT2Model | GPT2LMHeadModel:
    torch.manual_seed(0)
    model = kind(SIZES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(path, safe_serialization=True)
    return model


@torch.no_grad()
def test_logits_and_states_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = saved(tmp_path / "lm", GPT2LMHeadModel)
    ours = load_any(tmp_path / "lm").model
    assert ours.config.causal
    assert ours.config.head.kind == "lm"
    mask = torch.arange(11) < torch.tensor([[11], [4], [1]])
    ids = torch.where(mask, torch.randint(0, 61, mask.shape), 0)
    expected = theirs(input_ids=ids, attention_mask=mask.long()).logits
    found = ours(ids, mask)
    torch.testing.assert_close(found.output[mask], expected[mask], atol=TOLERANCE, rtol=0)
    states = saved(tmp_path / "plain", GPT2Model)
    hidden = load_any(tmp_path / "plain").model
    assert hidden.config.head.kind == "hidden"
    expected = states(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(
        hidden(ids, mask).output[mask], expected[mask], atol=TOLERANCE, rtol=0
    )
    chosen = load_any(tmp_path / "lm", head="hidden").model
    assert chosen.config.head.kind == "hidden"


@torch.no_grad()
def test_what_comes_later_changes_nothing() -> None:
    for context in ("active", "all"):
        model = random_model(CAUSAL.replace(context=context), 3)
        ids = torch.arange(3, 15)[None]
        whole = model(ids, torch.ones_like(ids, dtype=torch.bool))
        for n in (1, 5, 11):
            part = model(ids[:, :n], torch.ones(1, n, dtype=torch.bool))
            torch.testing.assert_close(part.output, whole.output[:, :n], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("context", ["active", "all"])
@pytest.mark.parametrize("stages", [(1, 1, 1), (2, 1)])
def test_rows_of_each_stage(context: str, stages: tuple[int, ...]) -> None:
    config = CAUSAL.replace(context=context, n_layers=3, thresholds=())
    model = random_model(config, 5)
    assert_rows_of_stages(model, stages)


def test_exported(tmp_path: Path) -> None:
    model = random_model(CAUSAL.replace(n_layers=3, thresholds=()), 7)
    export(Checkpoint(model=model, provenance={}), tmp_path / "b", ExportConfig(stages=(2, 1)))
    with Session.open(tmp_path / "b") as session:
        assert not session.backend.has("single")
        assert_parity_on_random_batches(
            session, model, ("sparse", "masked"), n_batches=25, longest=29
        )
        batch = random_batch(model.config, [5, 17], 0)
        assert_parity(session, model, batch, path="dense")
        prompts = batch.input_ids[:12], [0, 5, 12]
        result = generate(session, *prompts, max_new_tokens=14, return_logits=True)
        assert_generates_as_oracle(model, result, model.config.thresholds)
    assert benched(tmp_path / "b").single_ms is None


def test_stages_with_context_active(tmp_path: Path) -> None:
    model = random_model(CAUSAL.replace(n_layers=3, thresholds=(), context="active"), 7)
    config = ExportConfig(stages=(1, 2))
    bundle = export_stages(model, tmp_path, config, lambda what, done, total: None)
    with Session.open(bundle) as session:
        assert_parity_on_random_batches(session, model, ("sparse",), n_batches=25, longest=29)


def test_what_makes_no_sense(tmp_path: Path) -> None:
    model = random_model(CAUSAL, 0)
    for config in (ExportConfig(attention="fused"), ExportConfig(precision="float16")):
        with pytest.raises(ConfigError, match="causal attention needs rows in the order"):
            memory_bundle(model, config)
    with pytest.raises(ConfigError, match="--no-single-file"):
        export(Checkpoint(model=model, provenance={}), tmp_path / "b", single_file=True)
    bundle = memory_bundle(model)
    with pytest.raises(BackendError, match="order of tokens"):
        Session(bundle, OracleDeviceBackend(bundle, model))
    saved(tmp_path / "lm", GPT2LMHeadModel)
    with pytest.raises(CheckpointError, match="head 'classify' of GPT-2"):
        load_any(tmp_path / "lm", head="classify")
    path = tmp_path / "lm" / "config.json"
    raw = json.loads(path.read_text())
    for change, message in (
        ({"activation_function": "swish"}, "'swish' is not supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "is not supported"),
        ({"n_layer": 2}, "layers.2"),
    ):
        path.write_text(json.dumps({**raw, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_any(tmp_path / "lm")
    del raw["n_embd"]
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="has no 'n_embd'"):
        load_any(tmp_path / "lm")


@pytest.mark.parametrize("shape", [(), (4, 2)])
def test_products_of_odd_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    saved(tmp_path, GPT2LMHeadModel)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["transformer.h.0.attn.c_attn.weight"] = torch.zeros(shape)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="does not have the shape"):
        load_any(tmp_path)
