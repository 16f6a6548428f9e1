"""Random inputs of each kind of graph, and what the oracle makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from sdt_deploy.bundle import PROJECT, UPDATE
from sdt_deploy.config import Attention, ModelConfig
from sdt_deploy.exporters.layers import FusedLayer
from sdt_deploy.exporters.pieces import Projection, Update
from sdt_deploy.model.blocks import TransformerLayer, turned
from sdt_deploy.model.transformer import SparseDepthTransformer

Case = tuple[dict[str, np.ndarray], dict[str, Tensor]]
"""Inputs and expected outputs by name."""


def graph_case(
    name: str,
    layers: tuple[int, int] | None,
    model: SparseDepthTransformer,
    attention: Attention,
    lengths: np.ndarray,
    rng: np.random.Generator,
) -> Case:
    """Draw float32 inputs of the graph ``name`` and compute its outputs with the oracle.

    Args:
        name: of the graph in the manifest.
        layers: first layer and one past the last; None: not a stage.
        model: the oracle.
        attention: how the graph was exported.
        lengths: ``[batch]``, tokens of each sequence.
        rng: draws the inputs.
    """
    if layers is not None:
        return stage_case(model, layers, attention, lengths, rng)
    kind, _, number = name.partition("-")
    if kind == "decode":
        return _decode_case(model, int(number), lengths, rng)
    if name in _PIECES:
        layer = model.blocks[int(rng.integers(model.config.n_layers))]
        inputs, expected = _PIECES[name](layer, model.config, lengths, rng)
        return inputs | _parameters(layer, name), expected
    key = f"fused-{name}" if attention == "fused" else name
    return _CASES.get(key, _CASES[name])(model, lengths, rng)


class _Padded:
    """A random padded batch and how its tokens are packed."""

    def __init__(self, config: ModelConfig, lengths: np.ndarray, rng: np.random.Generator) -> None:
        self.mask = np.arange(lengths.max()) < lengths[:, None]
        shape = self.mask.shape
        self.ids = np.where(self.mask, rng.integers(0, config.vocab_size, shape), 0)
        self.types = None
        if config.n_token_types:
            self.types = np.where(self.mask, rng.integers(0, config.n_token_types, shape), 0)
        self.positions = np.broadcast_to(np.arange(shape[1]), shape)
        self.index = np.zeros(shape, dtype=np.int32)
        self.index[self.mask] = np.arange(lengths.sum())
        self.lengths = lengths.astype(np.int32)

    def packed(self, values: np.ndarray) -> np.ndarray:
        return values[self.mask].astype(np.int32)

    def torch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        types = None if self.types is None else torch.from_numpy(self.types)
        return torch.from_numpy(self.ids), torch.from_numpy(self.mask), types


def _pad_to_bucket(inputs: dict[str, np.ndarray]) -> None:
    """Append two rows that no place names, and a place more to each sequence.

    A stage must compute the same for the rows before them: engines with fixed sizes rely on it.
    """
    for name in ("hidden_states", "position_ids", "remaining_depth", "scatter_index"):
        if name in inputs:
            inputs[name] = np.concatenate([inputs[name], inputs[name][:2]])
    width = inputs["gather_index"].shape[1]
    old = inputs["scatter_index"]
    inputs["scatter_index"] = (old // width * (width + 1) + old % width).astype(np.int32)
    for name in ("gather_index", "context_gather_index", "query_places"):
        if name in inputs:
            inputs[name] = np.pad(inputs[name], ((0, 0), (0, 1)))


def _by_head(inputs: dict[str, np.ndarray], n_heads: int) -> None:
    """Turn indices of rows into indices of slices as long as a head."""
    heads = np.arange(n_heads, dtype=np.int32)
    width = inputs["gather_index"].shape[1]
    for name in ("gather_index", "context_gather_index"):
        if name in inputs:
            inputs[name] = inputs[name][:, None, :] * n_heads + heads[:, None]
    sequence, place = np.divmod(inputs["scatter_index"][:, None], width)
    inputs["scatter_index"] = ((sequence * n_heads + heads) * width + place).astype(np.int32)


def _entry_case(
    model: SparseDepthTransformer, lengths: np.ndarray, rng: np.random.Generator
) -> Case:
    batch = _Padded(model.config, lengths, rng)
    inputs = {"input_ids": batch.packed(batch.ids)}
    if model.config.rotary is None:
        inputs["position_ids"] = batch.packed(batch.positions)
    if batch.types is not None:
        inputs["token_type_ids"] = batch.packed(batch.types)
    ids, mask, types = batch.torch()
    embedded = model.embed(ids, types)
    scores = model.scorer(ids, embedded)
    return inputs, {"hidden_states": embedded[mask], "scores": scores[mask]}


def _head_case(
    model: SparseDepthTransformer, lengths: np.ndarray, rng: np.random.Generator
) -> Case:
    batch = _Padded(model.config, lengths, rng)
    states = rng.standard_normal((*batch.mask.shape, model.config.d_model)).astype(np.float32)
    inputs: dict[str, np.ndarray] = {"hidden_states": states[batch.mask]}
    head = model.config.head
    if head.per_sequence and head.pooling == "cls":
        inputs["first_index"] = batch.index[:, 0].copy()
    elif head.per_sequence:
        inputs["gather_index"], inputs["lengths"] = batch.index, batch.lengths
    mask = torch.from_numpy(batch.mask)
    output = model.head(torch.from_numpy(states), mask)
    return inputs, {"output": output if head.per_sequence else output[mask]}


def _fused_entry_case(
    model: SparseDepthTransformer, lengths: np.ndarray, rng: np.random.Generator
) -> Case:
    batch = _Padded(model.config, lengths, rng)
    inputs = _padded_inputs(batch)
    del inputs["attention_mask"]
    inputs["position_ids"] = batch.positions.astype(np.int32)
    ids, _, types = batch.torch()
    embedded = model.embed(ids, types)
    return inputs, {"hidden_states": embedded, "scores": model.scorer(ids, embedded)}


def _fused_head_case(
    model: SparseDepthTransformer, lengths: np.ndarray, rng: np.random.Generator
) -> Case:
    batch = _Padded(model.config, lengths, rng)
    states = rng.standard_normal((*batch.mask.shape, model.config.d_model)).astype(np.float32)
    inputs: dict[str, np.ndarray] = {"hidden_states": states}
    if model.config.head.pooling == "mean":
        inputs["attention_mask"] = batch.mask.astype(np.int32)
    output = model.head(torch.from_numpy(states), torch.from_numpy(batch.mask))
    return inputs, {"output": output}


def _dense_case(
    model: SparseDepthTransformer, lengths: np.ndarray, rng: np.random.Generator
) -> Case:
    batch = _Padded(model.config, lengths, rng)
    output = model.as_dense()(*batch.torch()).output
    return _padded_inputs(batch), {"output": output}


def _masked_case(
    model: SparseDepthTransformer, lengths: np.ndarray, rng: np.random.Generator
) -> Case:
    n_layers = model.config.n_layers
    for _ in range(20):  # ranks, unlike thresholds, cannot be placed in gaps between the scores
        batch = _Padded(model.config, lengths, rng)
        ids, mask, types = batch.torch()
        if model.config.routing == "once":
            scores = model.scorer(ids, model.embed(ids, types))[mask].numpy()
            thresholds = _thresholds_in_gaps(scores, n_layers, rng)
        else:
            thresholds = ()
            for i in range(n_layers):  # what comes into a layer follows from the ones before
                so_far = (*thresholds, *(0.0,) * (n_layers - i))
                scores = model(ids, mask, types, thresholds=so_far).scores[mask].numpy()
                thresholds = (*thresholds, *_thresholds_in_gaps(scores[:, i], 1, rng))
        found = model(ids, mask, types, thresholds=thresholds)
        gaps = np.diff(np.sort(found.scores[mask].numpy(), axis=0), axis=0)
        if model.config.selection == "threshold" or not ((gaps > 0) & (gaps < 1e-5)).any():
            break
    inputs = _padded_inputs(batch)
    inputs["thresholds"] = np.asarray(thresholds, dtype=np.float32)
    return inputs, {"output": found.output, "scores": found.scores}


def _padded_inputs(batch: _Padded) -> dict[str, np.ndarray]:
    inputs = {
        "input_ids": batch.ids.astype(np.int32),
        "attention_mask": batch.mask.astype(np.int32),
    }
    if batch.types is not None:
        inputs["token_type_ids"] = batch.types.astype(np.int32)
    return inputs


def _thresholds_in_gaps(
    scores: np.ndarray, n_layers: int, rng: np.random.Generator
) -> tuple[float, ...]:
    """Draw thresholds halfway between distinct scores, so that rounding flips no depth."""
    values = np.unique(np.concatenate([scores, [-1.0, 2.0]]))
    wide = np.flatnonzero(np.diff(values) > 1e-4)
    middles = (values[wide] + values[wide + 1]) / 2
    return tuple(sorted(float(x) for x in rng.choice(middles, n_layers)))


def stage_case(
    model: SparseDepthTransformer,
    layers: tuple[int, int],
    attention: Attention,
    lengths: np.ndarray,
    rng: np.random.Generator,
) -> Case:
    """Random states; every sequence keeps at least its first token active."""
    first, stop = layers
    config = model.config
    mask = np.arange(lengths.max()) < lengths[:, None]
    depth = np.where(mask, rng.integers(0, stop - first + 1, mask.shape), 0)
    depth[:, 0] = rng.integers(1, stop - first + 1, len(lengths))
    states = rng.standard_normal((*mask.shape, config.d_model)).astype(np.float32)
    active = depth > 0

    counts = active.sum(axis=1)
    places = np.arange(counts.max()) < counts[:, None]
    gather = np.zeros(places.shape, dtype=np.int32)
    gather[places] = np.arange(counts.sum())
    inputs: dict[str, np.ndarray] = {
        "hidden_states": states[active],
        "gather_index": gather,
        "scatter_index": np.flatnonzero(places).astype(np.int32),
    }
    if config.rotary is not None:
        inputs["position_ids"] = np.nonzero(active)[1].astype(np.int32)
    if config.context == "active":
        seen = [np.where(depth > i, 1, 0)[active] for i in range(stop - first)]
        visible = np.stack([places & (row[gather] > 0) for row in seen])
    else:
        context = np.zeros(mask.shape, dtype=np.int32)
        context[mask] = np.arange(lengths.sum())
        inputs["context_states"] = states[mask]
        inputs["context_gather_index"] = context
        if config.rotary is not None:
            inputs["context_position_ids"] = np.nonzero(mask)[1].astype(np.int32)
        if config.causal:
            inputs["query_places"] = np.zeros(places.shape, dtype=np.int32)
            inputs["query_places"][places] = np.nonzero(active)[1]
        visible = mask[None]
    if stop - first > 1:
        inputs["remaining_depth"] = depth[active].astype(np.int32)
        if config.context == "all":
            refresh = np.arange(lengths.sum(), dtype=np.int32)
            refresh[active[mask]] = lengths.sum() + np.arange(counts.sum())
            inputs["refresh_index"] = refresh
    if len(lengths) > 2:
        _pad_to_bucket(inputs)
        visible = np.pad(visible, ((0, 0), (0, 0), (0, 1)))
    hidden, present = torch.from_numpy(states), torch.from_numpy(mask)
    for i, layer in enumerate(model.blocks[first:stop]):
        turn = torch.from_numpy(depth > i)
        updated = layer(hidden, turn if config.context == "active" else present)
        hidden = torch.where(turn[..., None], updated, hidden)
    expected = {"updated_states": hidden[torch.from_numpy(active)]}
    if config.routing == "per_layer" and stop < config.n_layers:
        expected["scores"] = torch.sigmoid(model.scorer.logits(expected["updated_states"]))
    if attention == "fused":
        inputs["hidden_states"] = inputs["hidden_states"][None]
        expected = {name: states[None] for name, states in expected.items()}
        inputs["key_lengths"] = counts.astype(np.int64)
        if config.context == "all":
            inputs["key_lengths"] = lengths.astype(np.int64)
            inputs["context_states"] = states
            del inputs["context_gather_index"]
        return inputs, expected
    _by_head(inputs, config.n_heads)
    bias = np.where(visible, 0.0, np.finfo(np.float32).min / 2)[:, :, None, :, None]
    bias = np.repeat(bias, config.n_heads, axis=2).astype(np.float32)
    grouped = config.context == "active" and stop - first > 1
    inputs["key_bias"] = bias if grouped else bias[0]
    return inputs, expected


def _parameters(layer: TransformerLayer, piece: str) -> dict[str, np.ndarray]:
    part = (Projection if piece == PROJECT else Update)(FusedLayer(layer, torch.float32))
    return {name: parameter.detach().numpy() for name, parameter in part.named_parameters()}


def _project_case(
    layer: TransformerLayer, config: ModelConfig, lengths: np.ndarray, rng: np.random.Generator
) -> Case:
    shapes = {"hidden_states": (1, int(lengths.sum()), config.d_model)}
    if config.context == "all":
        shapes["context_states"] = (len(lengths), int(lengths.max()), config.d_model)
    inputs = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    attention = layer.attention
    normed = [
        layer.attention_norm(states) if layer.pre_norm else states
        for states in map(torch.from_numpy, inputs.values())
    ]
    query, *both = (
        states @ getattr(attention, name).weight.T
        for name, states in zip(
            ("query", "key", "value"), (*normed, *normed[-1:] * 2), strict=False
        )
    )
    return inputs, {"query": query, "key_value": torch.cat(both, dim=-1)}


def _update_case(
    layer: TransformerLayer, config: ModelConfig, lengths: np.ndarray, rng: np.random.Generator
) -> Case:
    shape = (1, int(lengths.sum()), config.d_model)
    inputs = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name in ("hidden_states", "mixed_states")
    }
    states, mixed = map(torch.from_numpy, inputs.values())
    attention = layer.attention
    states = states + attention.output(mixed + attention.value.bias)
    feed_forward = layer.feed_forward
    if not layer.pre_norm:
        states = layer.attention_norm(states)
    rows = layer.feed_forward_norm(states) if layer.pre_norm else states
    updated = states + feed_forward(rows)
    return inputs, {
        "updated_states": updated if layer.pre_norm else layer.feed_forward_norm(updated),
        "up_product": rows @ feed_forward.up.weight.T,
        "inner_states": feed_forward.activated(feed_forward.up(rows)),
    }


def _decode_case(
    model: SparseDepthTransformer, number: int, lengths: np.ndarray, rng: np.random.Generator
) -> Case:
    """Random states; the last tokens of every sequence are new, some before them have no keys yet.

    Rows of the cache are in random order, and its first one belongs to no token.
    """
    config, layer = model.config, model.blocks[number]
    mask = np.arange(lengths.max()) < lengths[:, None]
    n_new = rng.integers(1, lengths + 1)
    seen = mask & (rng.random(mask.shape) < 0.8)
    new = mask & (np.arange(mask.shape[1]) >= (lengths - n_new)[:, None])
    active = new & (rng.random(mask.shape) < 0.7)
    active[np.arange(len(lengths)), lengths - 1] = True  # a query each
    seen |= active
    # What the cache holds; with context "all" older tokens may wait for their keys.
    past = seen & ~new
    if config.context == "all":
        past &= rng.random(mask.shape) < 0.7
    fresh = seen & ~past if config.context == "all" else active
    seen = past | fresh
    states = rng.standard_normal((*mask.shape, config.d_model)).astype(np.float32)
    hidden, places = torch.from_numpy(states), np.indices(mask.shape)[1]
    normed = layer.attention_norm(hidden) if layer.pre_norm else hidden
    attention = layer.attention
    keys, values = attention.key(normed), attention.value(normed)
    if attention.frequencies:
        by_head = keys.unflatten(-1, (attention.n_kv_heads, -1))
        keys = turned(by_head, torch.from_numpy(places), attention.frequencies).flatten(-2)

    row_of = np.zeros(mask.shape, dtype=np.int64)
    n_past = int(past.sum()) + 1
    row_of[past] = 1 + rng.permutation(n_past - 1)
    row_of[fresh] = n_past + np.arange(fresh.sum())
    cached = np.zeros((2, n_past, keys.shape[-1]), dtype=np.float32)
    for old, made in zip(cached, (keys, values), strict=True):
        old[row_of[past]] = made.numpy()[past]
    index = np.zeros((len(lengths), seen.sum(axis=1).max()), dtype=np.int32)
    filled = np.arange(index.shape[1]) < seen.sum(axis=1)[:, None]
    index[filled] = row_of[seen]
    bias = np.where(filled, 0.0, np.finfo(np.float32).min / 2).astype(np.float32)
    counts = active.sum(axis=1)
    queries = np.arange(counts.max()) < counts[:, None]
    gather, query_places = np.zeros((2, *queries.shape), dtype=np.int32)
    gather[queries] = np.arange(counts.sum())
    query_places[queries] = (seen.cumsum(axis=1) - 1)[active]
    n_kv_heads = config.n_key_heads
    inputs: dict[str, np.ndarray] = {
        "hidden_states": states[active],
        "gather_index": gather,
        "scatter_index": np.flatnonzero(queries).astype(np.int32),
        "query_places": query_places,
    }
    _by_head(inputs, config.n_heads)
    inputs |= {
        "context_states": states[fresh],
        "past_keys": cached[0],
        "past_values": cached[1],
        "context_gather_index": index[:, None] * n_kv_heads + np.arange(n_kv_heads)[:, None],
        "key_bias": np.repeat(bias[:, None, :, None], n_kv_heads, axis=1),
    }
    inputs["context_gather_index"] = inputs["context_gather_index"].astype(np.int32)
    if config.rotary is not None:
        inputs["position_ids"] = places[active].astype(np.int32)
        inputs["context_position_ids"] = places[fresh].astype(np.int32)
    updated = layer(hidden, torch.from_numpy(seen))[torch.from_numpy(active)]
    expected = {
        "updated_states": updated,
        "keys": keys[torch.from_numpy(fresh)],
        "values": values[torch.from_numpy(fresh)],
    }
    if config.routing == "per_layer" and number + 1 < config.n_layers:
        expected["scores"] = torch.sigmoid(model.scorer.logits(updated))
    return inputs, expected


_PIECES = {PROJECT: _project_case, UPDATE: _update_case}
_CASES: Mapping[str, Callable[..., Case]] = {
    "entry": _entry_case,
    "fused-entry": _fused_entry_case,
    "head": _head_case,
    "fused-head": _fused_head_case,
    "dense": _dense_case,
    "masked": _masked_case,
    "single": _masked_case,
}
