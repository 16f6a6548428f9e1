"""Hugging Face directories of Llama and of models that share its layout (Mistral)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sdt_deploy.config import ModelConfig, RotaryConfig, shown
from sdt_deploy.errors import ConfigError
from sdt_deploy.model.decoders import activation_of, head_of

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_NAMES = {
    "embed_tokens.weight": "embeddings.token.weight",
    "norm.weight": "head.norm.weight",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}
_ROTARY_NUMBERS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_positions",
}


def llama_config(config: Mapping[str, Any], head: str | None) -> ModelConfig:
    """Return the model that ``config.json`` describes.

    ``head``: ``lm`` or ``hidden``; None: ``lm`` for a language model.

    Raises:
        ConfigError: if something is not supported.
        KeyError: if the file lacks something.
    """
    activation = activation_of(config, "hidden_act", ACTIVATIONS)
    n_places, window = config["max_position_embeddings"], config.get("sliding_window")
    if window is not None and config.get("use_sliding_window", True) and window < n_places:
        raise ConfigError(
            f"sliding_window {window} is not supported: attention here reaches back to the first "
            f"token. Set max_position_embeddings to {window} to use the model up to that length"
        )
    return ModelConfig(
        vocab_size=config["vocab_size"],
        d_model=config["hidden_size"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config.get("num_key_value_heads") or 0,
        head_dim=config.get("head_dim") or 0,
        n_layers=config["num_hidden_layers"],
        d_ff=config["intermediate_size"],
        max_positions=n_places,
        rotary=_rotary(config),
        activation=activation,  # type: ignore[arg-type]
        gated=True,
        attention_bias=config.get("attention_bias", False),
        feed_forward_bias=config.get("mlp_bias", False),
        norm="rms",
        norm_placement="pre",
        eps=config["rms_norm_eps"],
        context="all",
        causal=True,
        probe="none",
        head=head_of(config, head, language_model="ForCausalLM", family="Llama"),
    )


def _rotary(config: Mapping[str, Any]) -> RotaryConfig:
    """Read ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling``."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_parameters or rope_scaling must be an object, not {shown(rope)}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(
            f"rope_type {kind!r} is not supported; supported: default, linear, llama3"
        )
    for place in (rope, config):
        if (place.get("partial_rotary_factor") or 1.0) != 1.0:
            raise ConfigError(
                f"partial_rotary_factor {place['partial_rotary_factor']} is not supported: all "
                "numbers of a head are turned"
            )
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    if kind == "default":
        return RotaryConfig(theta=theta)
    names = _ROTARY_NUMBERS if kind == "llama3" else {"factor": "factor"}
    numbers = {ours: rope[theirs] for theirs, ours in names.items()}
    return RotaryConfig(theta=theta, scaling=kind, **numbers)


def llama_names(
    tensors: Mapping[str, Tensor], config: ModelConfig, *, tied: bool
) -> dict[str, Tensor]:
    """Give the tensors their names here.

    Frequencies of rotary positions are no weights. ``tied``: a language model projects with the
    token table.
    """
    renamed: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        name = full.removeprefix("model.")
        match = _LAYER.fullmatch(name)
        if match and match[2] in _LAYER_NAMES:
            renamed[f"layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"] = tensor
        elif name in _NAMES:
            renamed[_NAMES[name]] = tensor
        elif name == "lm_head.weight":
            if config.head.kind == "lm":
                renamed["head.projection.weight"] = tensor
        elif not name.endswith("rotary_emb.inv_freq"):
            renamed[name] = tensor
    if tied and config.head.kind == "lm" and "embeddings.token.weight" in renamed:
        renamed["head.projection.weight"] = renamed["embeddings.token.weight"].clone()
    return renamed
