"""Transformer layers in packed form: the shared part of every exported graph.

Rows are packed instead of padded, so that linear layers, norms and activations run on exactly the
rows that are needed. Attention alone needs sequences apart: a :class:`HeadLayout` spreads rows to
``[batch, n_heads, max_seqlen]`` and collects them again.

Some forms are chosen for the kernels they reach (``docs/decisions/002-graph-forms.md``): weights
are stored as they are multiplied, GELU is written ``x · (1 + erf(x / √2)) · ½``, queries, keys and
values are three products, and the mask enters the attention logits as one more dimension of queries
and keys.

Products are computed in the type of their weights, which is the precision of the export. Norms,
softmax and residual sums are float32 in every precision (``docs/decisions/008-precision.md``); the
casts around them vanish where the precision is float32.

That holds for ``decomposed`` attention. :class:`FusedLayer` has the forms for GPUs
(``docs/decisions/013-fused-attention.md``).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdt_deploy.config import FUSED_OPSET
from sdt_deploy.exporters.products import PackedFeedForward, PackedLinear, packed_norm
from sdt_deploy.model.blocks import TransformerLayer, turned


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Return ``rows[index]`` for ``rows [n, width]`` and int32 ``index`` of any shape.

    An embedding lookup exports to one Gather that takes the int32 index as it is; ``index_select``
    adds a cast and two reshapes, ``rows[index]`` becomes the slower GatherND.
    """
    return functional.embedding(index, rows)


@dataclass(frozen=True)
class HeadLayout:
    """Where packed rows, cut into heads, stand in ``[batch, n_heads, max_seqlen]``.

    Without indices the rows already are a padded batch of ``batch`` sequences, flattened.
    """

    n_heads: int
    batch: int | None = None
    gather_index: Tensor | None = None
    """``[batch, n_heads, max_seqlen]`` int32, the slice ``row · n_heads + head`` at each place;
    padding holds any valid one."""
    scatter_index: Tensor | None = None
    """``[n_tokens, n_heads]`` int32, the flat place of each slice."""

    def spread(self, rows: Tensor) -> Tensor:
        """Lay rows ``[n_tokens, n_heads · head_dim]`` out by head.

        Returns ``[batch, n_heads, max_seqlen, head_dim]``; one Gather of slices as long as a head
        instead of a Gather of rows and a Transpose.
        """
        if self.gather_index is not None:
            slices = rows.reshape(-1, rows.shape[-1] // self.n_heads)
            return gather_rows(slices, self.gather_index)
        assert self.batch is not None
        return rows.reshape(self.batch, -1, self.n_heads, rows.shape[-1] // self.n_heads).transpose(
            1, 2
        )

    def of_keys(self, n_kv_heads: int) -> HeadLayout:
        """Lay out rows that are cut into fewer heads, each serving as many of queries."""
        if n_kv_heads == self.n_heads:
            return self
        index, size = self.gather_index, self.n_heads // n_kv_heads
        if index is not None:
            index = index[:, ::size] // size
        return HeadLayout(n_kv_heads, batch=self.batch, gather_index=index)

    def collect(self, mixed: Tensor) -> Tensor:
        """Undo :meth:`spread`."""
        width = self.n_heads * mixed.shape[-1]
        if self.scatter_index is None:
            return mixed.transpose(1, 2).reshape(-1, width)
        slices = mixed.reshape(-1, mixed.shape[-1])
        return gather_rows(slices, self.scatter_index).reshape(-1, width)


def key_bias(visible: Tensor, n_heads: int, dtype: torch.dtype) -> Tensor:
    """Turn ``visible [batch, max_seqlen]`` bool into ``[batch, n_heads, max_seqlen, 1]``.

    0 where a key is seen, and where it is hidden half the smallest number, so that adding a logit
    cannot overflow to an infinity.
    """
    hidden = torch.finfo(dtype).min / 2
    bias = torch.where(visible, 0.0, hidden).to(dtype)[:, None, :, None]
    return bias.expand(-1, n_heads, -1, -1)


def not_later(n_keys: int, places: Tensor | None = None) -> Tensor:
    """Return bool, broadcast to ``[batch, n_heads, n_queries, n_keys]``: keys at or before a query.

    ``places [batch, n_queries]`` int32 says at which key's place each query stands; None: queries
    and keys are the same.
    """
    keys = torch.arange(n_keys, dtype=torch.int32)
    if places is None:
        return keys[None, :] <= keys[:, None]
    return keys <= places[:, None, :, None]


def narrowed(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a float32 bias into ``dtype``, again with half of its smallest number."""
    if bias.dtype == dtype:
        return bias
    return bias.clamp_min(torch.finfo(dtype).min / 2).to(dtype)


def within(lengths: Tensor, max_seqlen: int) -> Tensor:
    """Return ``[batch, max_seqlen]`` bool: which places of a padded batch hold a token."""
    return torch.arange(max_seqlen, dtype=torch.int32)[None, :] < lengths[:, None]


@dataclass(frozen=True)
class Sight:
    """What the rows of a layer see: where queries and keys stand, and which keys are hidden."""

    layout: HeadLayout
    """Of the rows that are updated."""
    context_layout: HeadLayout
    """Of the rows that are seen; the same where these are the same."""
    bias: Tensor
    """:func:`key_bias` of the rows that are seen."""
    causal: Tensor | None = None
    """:func:`not_later`, where later keys are hidden as well."""
    positions: Tensor | None = None
    """``[n_tokens]`` int32, place of each updated row in its sequence; for rotary positions."""
    context_positions: Tensor | None = None
    """``[n_context]`` int32, likewise of the rows that are seen."""


class PackedLayer(nn.Module):
    """One transformer layer over packed rows, with queries and context apart.

    Rows come and leave in ``dtype``; norms, softmax and residual sums are float32.
    """

    def __init__(self, layer: TransformerLayer, dtype: torch.dtype) -> None:
        super().__init__()
        attention = layer.attention
        self.pre_norm = layer.pre_norm
        self.n_heads, self.n_kv_heads = attention.n_heads, attention.n_kv_heads
        self.frequencies = attention.frequencies
        self.query = PackedLinear(attention.query, dtype)
        self.key = PackedLinear(attention.key, dtype)
        self.value = PackedLinear(attention.value, dtype)
        self.output = PackedLinear(attention.output, dtype)
        self.feed_forward = PackedFeedForward(layer.feed_forward, dtype)
        self.attention_norm = packed_norm(layer.attention_norm)
        self.feed_forward_norm = packed_norm(layer.feed_forward_norm)

    def normed(self, rows: Tensor) -> Tensor:
        """Return ``[n_tokens, d_model]`` as attention takes it."""
        return self.attention_norm(rows.float()).to(rows.dtype) if self.pre_norm else rows

    def keys_and_values(self, context: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return both of ``context [n_context, d_model]``, which is normed: ``[n_context, width]``.

        ``positions``: see :attr:`Sight.positions`.
        """
        return self._turned(self.key(context), self.n_kv_heads, positions), self.value(context)

    def attend(self, states: Tensor, keys: Tensor, values: Tensor, sight: Sight) -> Tensor:
        """Attention from ``states`` (normed, packed) to packed keys and values."""
        layout, bias, causal = sight.layout, sight.bias, sight.causal
        query = layout.spread(self._turned(self.query(states), self.n_heads, sight.positions))
        around = sight.context_layout.of_keys(self.n_kv_heads)
        key, value = around.spread(keys), around.spread(values)
        # The mask as one more dimension of the product, [q, 1] · [k, bias]: adding it to the
        # logits would be another pass over [batch, heads, max_seqlen, max_seqlen].
        # Adjacent to the product, the scale is fused into it.
        scale = 1.0 / math.sqrt(query.shape[-1])
        query = functional.pad(query, (0, 1), value=1.0) * scale
        n_sharing = self.n_heads // self.n_kv_heads
        if n_sharing > 1:  # one more axis: queries that share a head of keys
            query = query.unflatten(1, (self.n_kv_heads, n_sharing))
            if bias.shape[1] == self.n_heads:
                bias = bias[:, ::n_sharing]
            key, value, bias = (x.unsqueeze(2) for x in (key, value, bias))
            causal = causal.unsqueeze(1) if causal is not None and causal.ndim > 2 else causal
        logits = query @ torch.cat([key, bias], -1).transpose(-1, -2)
        if causal is not None:
            logits = torch.where(causal, logits, torch.finfo(logits.dtype).min / 2)
        mixed = logits.float().softmax(dim=-1).to(value.dtype) @ value
        return self.output(layout.collect(mixed.flatten(1, 2) if n_sharing > 1 else mixed))

    def _turned(self, rows: Tensor, n_heads: int, positions: Tensor | None) -> Tensor:
        if not self.frequencies:
            return rows
        assert positions is not None
        heads = rows.reshape(-1, n_heads, rows.shape[-1] // n_heads)
        return turned(heads, positions, self.frequencies).reshape(-1, rows.shape[-1])

    def forward(self, states: Tensor, context: Tensor, sight: Sight) -> Tensor:
        """Update ``states [n_tokens, d_model]``.

        Keys and values come from ``context [n_context, d_model]``. Pass the same tensor twice where
        every token that is seen is also updated.
        """
        queries = self.normed(states)
        context = queries if context is states else self.normed(context)
        keys, values = self.keys_and_values(context, sight.context_positions)
        return self.finish(states, self.attend(queries, keys, values, sight))

    def finish(self, states: Tensor, mixed: Tensor) -> Tensor:
        """Add what attention found to ``states`` and apply the feed-forward."""
        dtype, wide = states.dtype, states.float()
        if self.pre_norm:
            wide = wide + mixed.float()
            inner = self.feed_forward_norm(wide).to(dtype)
            return (wide + self.feed_forward(inner).float()).to(dtype)
        wide = self.attention_norm(wide + mixed.float())
        return self.feed_forward_norm(wide + self.feed_forward(wide.to(dtype)).float()).to(dtype)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, n_heads: int, lengths: Tensor | Mask
) -> Tensor:
    """Attention as one ONNX operator, of opset 24; it exports only, and does not run in torch.

    Args:
        query: ``[batch, max_seqlen, d_model]``.
        key: ``[batch, max_context_seqlen, d_model]``.
        value: shaped as ``key``.
        n_heads: heads that ``d_model`` is cut into.
        lengths: ``[batch]`` int64, the keys of each sequence that are seen, its first ones; or a
            :class:`Mask`.

    Returns:
        ``[batch, max_seqlen, d_model]``.
    """
    seen = lengths.visible if isinstance(lengths, Mask) else None
    counts = None if isinstance(lengths, Mask) else lengths
    mixed: Tensor = torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value, seen, None, None, counts),
        {"q_num_heads": n_heads, "kv_num_heads": n_heads},
        dtype=query.dtype,
        shape=query.shape,
        version=FUSED_OPSET,
    )
    return mixed


@dataclass(frozen=True)
class Mask:
    """Keys seen wherever they stand, for which engines have slower kernels than for lengths."""

    visible: Tensor
    """``[batch, 1, max_seqlen, max_context_seqlen]`` bool."""


class FusedLayer(nn.Module):
    """One transformer layer in the forms that GPU libraries have kernels for.

    Rows are in ``dtype`` throughout. LayerNormalization and Attention compute in float32 inside.

    Keys and values have no bias of their own. That of the keys adds one number to all logits of a
    query, which softmax takes away; that of the values passes through the weighted mean as it is,
    and is part of the output's.

    Everything has three axes, and packed rows a first one of length 1: only so does ONNX Runtime
    fuse residual sums into norms.
    """

    def __init__(self, layer: TransformerLayer, dtype: torch.dtype) -> None:
        super().__init__()
        attention = layer.attention
        self.pre_norm = layer.pre_norm
        self.n_heads = attention.n_heads
        output = copy.deepcopy(attention.output)
        with torch.no_grad():
            output.bias.add_(attention.output.weight @ attention.value.bias)
        self.query = PackedLinear(attention.query, dtype)
        self.key = PackedLinear(attention.key, dtype, biased=False)
        self.value = PackedLinear(attention.value, dtype, biased=False)
        self.output = PackedLinear(output, dtype)
        self.feed_forward = PackedFeedForward(layer.feed_forward, dtype)
        self.attention_norm = copy.deepcopy(layer.attention_norm).to(dtype)
        self.feed_forward_norm = copy.deepcopy(layer.feed_forward_norm).to(dtype)

    def forward(
        self,
        states: Tensor,
        places: tuple[Tensor, Tensor] | None,
        context: Tensor | None,
        lengths: Tensor | Mask,
    ) -> Tensor:
        """Update ``states``.

        Args:
            states: ``[1, n_tokens, d_model]`` with ``places``, else a batch
                ``[batch, seq, d_model]``, padded on the right.
            places: ``gather_index [batch, max_seqlen]`` int32, the row at each place, and
                ``scatter_index [n_tokens]`` int32, the flat place of each row.
            context: ``[batch, max_context_seqlen, d_model]``, what is seen; None: the states.
            lengths: see :func:`fused_attention`.
        """
        queries, keys = self.normed(states, context)
        query, key, value = self.query(queries), self.key(keys), self.value(keys)
        laid_out = places if context is None else None
        mixed = fused_attention(
            _spread(query, places),
            _spread(key, laid_out),
            _spread(value, laid_out),
            self.n_heads,
            lengths,
        )
        if places is not None:
            mixed = gather_rows(mixed.reshape(-1, mixed.shape[-1]), places[1]).unsqueeze(0)
        return self.update(states, mixed)

    def normed(self, states: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the states, and ``context`` or the states again, as their products take them."""
        queries = self.attention_norm(states) if self.pre_norm else states
        if context is None:
            return queries, queries
        return queries, self.attention_norm(context) if self.pre_norm else context

    def update(self, states: Tensor, mixed: Tensor) -> Tensor:
        """Update ``states`` by what attention has ``mixed`` for them, of the same shape."""
        mixed = self.output(mixed)
        if self.pre_norm:
            states = states + mixed
            return states + self.feed_forward(self.feed_forward_norm(states))
        states = self.attention_norm(states + mixed)
        return self.feed_forward_norm(states + self.feed_forward(states))


def _spread(rows: Tensor, places: tuple[Tensor, Tensor] | None) -> Tensor:
    """Lay ``rows [1, n_tokens, d_model]`` out as ``[batch, max_seqlen, d_model]``."""
    return rows if places is None else gather_rows(rows.squeeze(0), places[0])
