"""Hugging Face directories of GPT-2: a decoder with learned positions and causal attention."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sdt_deploy.config import ModelConfig
from sdt_deploy.errors import ConfigError
from sdt_deploy.model.decoders import activation_of, head_of

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
_PLAIN = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
"""Settings that change what attention computes, and the only values that are read."""
_NAMES = {
    "wte.weight": "embeddings.token.weight",
    "wpe.weight": "embeddings.position.weight",
    "ln_f.weight": "head.norm.weight",
    "ln_f.bias": "head.norm.bias",
}
_LAYER = re.compile(r"h\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_NAMES = {
    "ln_1": "attention_norm",
    "ln_2": "feed_forward_norm",
    "attn.c_proj": "attention.output",
    "mlp.c_fc": "feed_forward.up",
    "mlp.c_proj": "feed_forward.down",
}


def gpt2_config(config: Mapping[str, Any], head: str | None) -> ModelConfig:
    """Return the model that ``config.json`` describes.

    ``head``: ``lm`` or ``hidden``; None: ``lm`` for a language model.

    Raises:
        ConfigError: if something is not supported.
        KeyError: if the file lacks something.
    """
    for name, value in _PLAIN.items():
        if config.get(name, value) != value:
            raise ConfigError(f"{name}: {config[name]} is not supported")
    activation = activation_of(config, "activation_function", ACTIVATIONS)
    return ModelConfig(
        vocab_size=config["vocab_size"],
        d_model=config["n_embd"],
        n_heads=config["n_head"],
        n_layers=config["n_layer"],
        d_ff=config.get("n_inner") or 4 * config["n_embd"],
        max_positions=config["n_positions"],
        activation=activation,  # type: ignore[arg-type]
        norm_placement="pre",
        eps=config["layer_norm_epsilon"],
        context="all",
        causal=True,
        probe="none",
        head=head_of(config, head, language_model="LMHead", family="GPT-2"),
    )


def gpt2_names(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Give the tensors their names here.

    Products are stored as ``[in, out]``, those of queries, keys and values as one. Masks are no
    weights. Without a projection of its own a language model takes the token table's.
    """
    renamed: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        name = full.removeprefix("transformer.")
        match = _LAYER.fullmatch(name)
        if match and match[2] == "attn.c_attn":
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3, dim=-1), strict=True):
                value = piece.T.contiguous() if match[3] == "weight" else piece.contiguous()
                renamed[f"layers.{match[1]}.attention.{part}.{match[3]}"] = value
        elif match and match[2] in _LAYER_NAMES:
            is_product = match[3] == "weight" and not match[2].startswith("ln")
            value = tensor.T.contiguous() if is_product else tensor
            renamed[f"layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"] = value
        elif name in _NAMES:
            renamed[_NAMES[name]] = tensor
        elif name == "lm_head.weight":
            if config.head.kind == "lm":
                renamed["head.projection.weight"] = tensor
        elif not name.endswith((".attn.bias", ".attn.masked_bias")):
            renamed[name] = tensor
    if config.head.kind == "lm" and "embeddings.token.weight" in renamed:
        renamed.setdefault("head.projection.weight", renamed["embeddings.token.weight"].clone())
    return renamed
