"""What a model is, in words for people: for `inspect`, model cards and reports (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdt_deploy.config import ModelConfig


def quality_figures(quality: Mapping[str, Any]) -> dict[str, str]:
    """Return a quality record with its figures as they are shown."""
    return {
        name: f"{value:.4f}" if isinstance(value, float) else str(value)
        for name, value in quality.items()
    }


def described(config: ModelConfig) -> dict[str, str]:
    """Return names and descriptions of a model's parts, in the order to show them."""
    return {
        "model": f"{config.n_layers} layers, d_model {config.d_model}, vocabulary "
        f"{config.vocab_size}",
        "attention": _attention(config),
        "positions": _positions(config),
        "feed-forward": f"d_ff {config.d_ff}, {config.activation}"
        + (", gated" if config.gated else ""),
        "norms": f"{'RMSNorm' if config.norm == 'rms' else 'LayerNorm'}, {config.norm_placement}",
        "head": config.head.kind + (f", {config.head.pooling}" if config.head.pooling else ""),
        "context": config.context,
        "routing": _routing(config),
        "thresholds": ", ".join(f"{value:.4g}" for value in config.thresholds),
    }


def _attention(config: ModelConfig) -> str:
    heads = f"{config.n_heads} heads of {config.head_width}"
    if config.n_key_heads != config.n_heads:
        heads += f", {config.n_key_heads} of keys and values"
    return f"{heads}, {'causal' if config.causal else 'both ways'}"


def _positions(config: ModelConfig) -> str:
    rotary = config.rotary
    if rotary is None:
        return f"{config.max_positions}, learned"
    scaled = "" if rotary.scaling == "none" else f", {rotary.scaling} scaling by {rotary.factor:g}"
    return f"{config.max_positions}, rotary with theta {rotary.theta:g}{scaled}"


def _routing(config: ModelConfig) -> str:
    if config.probe == "none":
        return "none: every token passes through every layer"
    ways: list[str] = [config.routing, config.selection]
    if config.routing == "per_layer":
        ways.append(config.leaving)
    return " ".join(ways)
