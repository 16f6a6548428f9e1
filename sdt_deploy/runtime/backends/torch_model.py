"""The graphs of a bundle with fused attention, as functions of torch tensors.

What each takes and returns is in the section on fused attention of ``docs/bundle-format.md``.
Parameters are named as there, without the number of their layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sdt_deploy.config import Activation, ModelConfig
from sdt_deploy.runtime.device_entry import TorchEntry
from sdt_deploy.runtime.device_head import outputs_of

Parameters = Mapping[str, Tensor]
Tensors = Mapping[str, Tensor]


def update(
    p: Parameters,
    config: ModelConfig,
    states: Tensor,
    places: tuple[Tensor, Tensor] | None,
    context: Tensor | None,
    seen: Tensor,
) -> Tensor:
    """Apply a layer.

    Args:
        p: its parameters.
        config: of the model.
        states: ``[1, n_tokens, d_model]`` with ``places``, else ``[batch, seq, d_model]``.
        places: ``gather_index [batch, max_seqlen]`` and ``scatter_index [n_tokens]``.
        context: ``[batch, max_context_seqlen, d_model]``, what is seen; None: the states.
        seen: how many keys of each sequence are, ``[batch]``; or which, ``[batch, seq]`` bool.

    Returns:
        States of the same shape.
    """
    pre, eps = config.norm_placement == "pre", config.eps
    queries = _norm(p, "attention_norm", states, eps) if pre else states
    keys, spread = queries, places
    if context is not None:
        keys, spread = _norm(p, "attention_norm", context, eps) if pre else context, None
    query = _spread(_linear(p, "query", queries), places)
    key, value = _spread(keys @ p["key_value.weight"], spread).chunk(2, dim=-1)
    mixed = _attend(query, key, value, config.n_heads, seen)
    if places is not None:
        mixed = mixed.flatten(0, 1).index_select(0, places[1])[None]
    return finish(p, config, states, mixed)


def project(
    p: Parameters,
    config: ModelConfig,
    states: Tensor,
    context: Tensor | None,
    out: tuple[Tensor, Tensor],
) -> None:
    """Compute queries of ``states``, without bias, and keys and values of ``context``.

    ``context``: None: the states. ``out``: where to, keys and values side by side.
    """
    seen = states if context is None else context
    if config.norm_placement == "pre":
        states = _norm(p, "attention_norm", states, config.eps)
        seen = states if context is None else _norm(p, "attention_norm", seen, config.eps)
    weights = p["query.weight"], p["key_value.weight"]
    for rows, weight, into in zip((states, seen), weights, out, strict=True):
        torch.mm(rows.flatten(0, 1), weight, out=into.flatten(0, 1))


def finish(p: Parameters, config: ModelConfig, states: Tensor, mixed: Tensor) -> Tensor:
    """Update ``states`` by what attention has ``mixed`` for them, both of one shape."""
    eps, activation = config.eps, config.activation
    mixed = _linear(p, "output", mixed)
    if config.norm_placement == "pre":
        states = states + mixed
        normed = _norm(p, "feed_forward_norm", states, eps)
        return states + _feed_forward(p, normed, activation)
    states = _norm(p, "attention_norm", states + mixed, eps)
    inner = _feed_forward(p, states, activation)
    return _norm(p, "feed_forward_norm", states + inner, eps)


def finish_in_place(p: Parameters, config: ModelConfig, states: Tensor, mixed: Tensor) -> None:
    """Do what :func:`finish` does to ``states``; compiled, that takes no copy."""
    states.copy_(finish(p, config, states, mixed))


LayerFunction = Callable[
    [Parameters, ModelConfig, Tensor, tuple[Tensor, Tensor] | None, Tensor | None, Tensor], Tensor
]


@dataclass(frozen=True, kw_only=True)
class TorchModel:
    """A model's parameters, and its graphs.

    All parameters lie on one device. ``layers[i]`` holds ``key_value.weight``, the weights of keys
    and values side by side, ``[d_model, 2 · d_model]``: one product for both.
    """

    config: ModelConfig
    dtype: torch.dtype
    """Of states and products."""
    entry: TorchEntry
    layers: tuple[Parameters, ...]
    head: Parameters
    layer: LayerFunction
    """:func:`update`, or the same compiled."""
    last: Callable[[Parameters, ModelConfig, Tensor, Tensor], None]
    """:func:`finish_in_place`, or the same compiled."""

    def run_entry(self, inputs: Tensors) -> dict[str, Tensor]:
        """Embed and score the places of a padded batch."""
        embedded = self._embed(inputs)
        return {
            "hidden_states": embedded.to(self.dtype),
            "scores": self.entry.score(inputs["input_ids"], embedded),
        }

    def run_stage(self, layer: int, inputs: Tensors) -> dict[str, Tensor]:
        """Update the active rows."""
        places = inputs["gather_index"], inputs["scatter_index"]
        states = inputs["hidden_states"]
        context = inputs.get("context_states")
        return {
            "updated_states": self._layer(layer, states, places, context, inputs["key_lengths"])
        }

    def run_project(self, inputs: Tensors, outputs: Tensors) -> None:
        """Project what a stage's attention needs; the layer's parameters are inputs."""
        out = outputs["query"], outputs["key_value"]
        context = inputs.get("context_states")
        project(inputs, self.config, inputs["hidden_states"], context, out)

    def run_update(self, inputs: Tensors, outputs: Tensors) -> None:
        """Update the active rows by what attention mixed; the layer's parameters are inputs."""
        parameters = {name: tensor for name, tensor in inputs.items() if "." in name}
        out = outputs["updated_states"]
        if out.data_ptr() != inputs["hidden_states"].data_ptr():
            out.copy_(inputs["hidden_states"])
        self.last(parameters, self.config, out, inputs["mixed_states"])

    def run_head(self, inputs: Tensors) -> dict[str, Tensor]:
        """Compute outputs from the last states of a padded batch."""
        mask = inputs.get("attention_mask")
        return {"output": self._outputs(inputs["hidden_states"], mask)}

    def run_dense(self, inputs: Tensors) -> dict[str, Tensor]:
        """Run every token through every layer."""
        mask = inputs["attention_mask"]
        states = self._embed(inputs).to(self.dtype)
        lengths = mask.sum(dim=1)
        for layer in range(len(self.layers)):
            states = self._layer(layer, states, None, None, lengths)
        return {"output": self._outputs(states, mask)}

    def run_masked(self, inputs: Tensors) -> dict[str, Tensor]:
        """Run every token through every layer, and keep what is active."""
        mask, thresholds = inputs["attention_mask"], inputs["thresholds"]
        embedded = self._embed(inputs)
        scores = self.entry.score(inputs["input_ids"], embedded)
        states = embedded.to(self.dtype)
        sees_all = self.config.context == "all"
        lengths = mask.sum(dim=1)
        for layer in range(len(self.layers)):
            active = (mask > 0) & (scores > thresholds[layer])
            seen = lengths if sees_all else active
            updated = self._layer(layer, states, None, None, seen)
            states = torch.where(active[..., None], updated, states)
        return {"output": self._outputs(states, mask), "scores": scores}

    def _embed(self, inputs: Tensors) -> Tensor:
        found: Tensor = self.entry.embed(inputs["input_ids"], inputs.get("token_type_ids"))
        return found

    def _norm(self, p: Parameters, name: str, states: Tensor) -> Tensor:
        return _norm(p, name, states, self.config.eps)

    def _layer(
        self,
        layer: int,
        states: Tensor,
        places: tuple[Tensor, Tensor] | None,
        context: Tensor | None,
        seen: Tensor,
    ) -> Tensor:
        return self.layer(self.layers[layer], self.config, states, places, context, seen)

    def _outputs(self, states: Tensor, mask: Tensor | None) -> Tensor:
        p, head = self.head, self.config.head
        rows = states.float()
        if self.config.final_norm:
            rows = self._norm(p, "head.norm", rows)
        if head.pooling == "cls":
            rows = rows[:, 0]
        elif head.pooling == "mean":
            assert mask is not None
            weight = mask[..., None].float()
            rows = (rows * weight).sum(dim=1) / weight.sum(dim=1)
        found: Tensor = outputs_of(rows, p, head)
        return found


def _norm(p: Parameters, name: str, states: Tensor, eps: float) -> Tensor:
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    return functional.layer_norm(states, weight.shape, weight, bias, eps)


def _feed_forward(p: Parameters, states: Tensor, activation: Activation) -> Tensor:
    inner = _linear(p, "feed_forward.up", states)
    if activation == "relu":
        inner = functional.relu(inner)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        inner = functional.gelu(inner, approximate=approximate)
    return _linear(p, "feed_forward.down", inner)


def _linear(p: Parameters, name: str, rows: Tensor) -> Tensor:
    bias = p.get(f"{name}.bias")
    return functional.linear(rows, p[f"{name}.weight"].T, bias)


def _spread(rows: Tensor, places: tuple[Tensor, Tensor] | None) -> Tensor:
    """Lay ``rows [1, n_tokens, width]`` out as ``[batch, max_seqlen, width]``."""
    if places is None:
        return rows
    index = places[0]
    return rows[0].index_select(0, index.flatten()).view(*index.shape, -1)


def _attend(query: Tensor, key: Tensor, value: Tensor, n_heads: int, seen: Tensor) -> Tensor:
    """Return attention ``[batch, max_seqlen, d_model]``.

    Flash attention where the keys are the first ones of each sequence and the type is a half one
    on a GPU, with heads of 8 or a multiple of that; torch's own choice otherwise.
    """
    batch, n_queries, d_model = query.shape
    n_keys = key.shape[1]
    head_dim = d_model // n_heads
    is_half = query.dtype != torch.float32
    if query.is_cuda and is_half and seen.ndim == 1 and head_dim % 8 == 0:
        starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
        mixed: Tensor = torch.ops.aten._flash_attention_forward(
            query.reshape(-1, n_heads, head_dim),
            key.reshape(-1, n_heads, head_dim),
            value.reshape(-1, n_heads, head_dim),
            starts * n_queries,
            starts * n_keys,
            n_queries,
            n_keys,
            0.0,
            False,
            False,
            seqused_k=seen.int(),
        )[0]
        return mixed.view(batch, n_queries, d_model)
    if seen.ndim == 1:
        seen = torch.arange(n_keys, device=query.device) < seen[:, None]
    query, key, value = (
        states.view(batch, -1, n_heads, head_dim).transpose(1, 2) for states in (query, key, value)
    )
    mask = seen[:, None, None]
    return (
        functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        .transpose(1, 2)
        .flatten(2)
    )
