from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from sdt_deploy.errors import CheckpointError
from sdt_deploy.model.huggingface import load_huggingface

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}
BERT = BertConfig(**SIZES)
ROBERTA = RobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=1)


def saved(kind: type[PreTrainedModel], config: object, path: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(path, safe_serialization=True)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(11) < torch.tensor([[11], [4], [1]])
    return torch.where(mask, torch.randint(2, 61, mask.shape), 1), mask


@pytest.mark.parametrize(("kind", "config"), [(BertModel, BERT), (RobertaModel, ROBERTA)])
@torch.no_grad()
def test_hidden_states(kind: type[PreTrainedModel], config: object, tmp_path: Path) -> None:
    theirs = saved(kind, config, tmp_path)
    ours = load_huggingface(tmp_path).model
    assert ours.config.head.kind == "hidden"
    ids, mask = batch()
    expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    found = ours(ids, mask)
    torch.testing.assert_close(found.output[mask], expected[mask], atol=1e-5, rtol=0)
    assert (found.depths[mask] == 3).all()


@pytest.mark.parametrize(
    ("kind", "config"),
    [(BertForSequenceClassification, BERT), (RobertaForSequenceClassification, ROBERTA)],
)
@torch.no_grad()
def test_classifier(kind: type[PreTrainedModel], config: object, tmp_path: Path) -> None:
    theirs = saved(kind, config, tmp_path)
    ours = load_huggingface(tmp_path).model
    ids, mask = batch()
    expected = theirs(input_ids=ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(ours(ids, mask).output, expected, atol=1e-5, rtol=0)
    hidden = load_huggingface(tmp_path, head="hidden").model
    assert hidden.config.head.kind == "hidden"


@pytest.mark.parametrize(
    "pooling",
    [
        {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True},
        {"embedding_dimension": 24, "pooling_mode": "mean", "include_prompt": True},
    ],
    ids=["flags", "since-6"],
)
@torch.no_grad()
def test_sentence_embeddings_with_token_types(pooling: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(BertModel, BERT, tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    modules = [{"type": "sentence_transformers.models.Normalize"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    ours = load_huggingface(tmp_path).model
    ids, mask = batch()
    types = torch.randint(0, 2, ids.shape)
    states = theirs(
        input_ids=ids, attention_mask=mask.long(), token_type_ids=types
    ).last_hidden_state
    weight = mask[..., None].float()
    expected = F.normalize((states * weight).sum(1) / weight.sum(1), dim=-1)
    torch.testing.assert_close(ours(ids, mask, types).output, expected, atol=1e-5, rtol=0)


def test_what_is_not_supported_is_a_typed_error(tmp_path: Path) -> None:
    saved(BertModel, BERT, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "t5"}, "'t5' is not supported"),
        ({"hidden_act": "gelu_new"}, "gelu_new"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_hidden_layers": 4}, "missing: layers.3"),
        ({"num_attention_heads": 5}, "multiple of n_heads"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_huggingface(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has neither model"):
        load_huggingface(tmp_path)
