"""Embedding and scores on an NVIDIA GPU: one Triton kernel, one pass over the states.

What it computes is said, and tested against, by
:class:`~sdt_deploy.runtime.device_entry.TorchEntry`.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the kernel's source: its parameters are pointers, sizes and compile-time constants.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from sdt_deploy.config import ModelConfig
from sdt_deploy.runtime.device_entry import Parameters
from sdt_deploy.runtime.triton_routing import tile


@triton.jit  # type: ignore[untyped-decorator]
def _enter(
    ids, types, tokens, positions, kinds, norm_weight, norm_bias, probe, probe_bias, pinned,
    states, scores, n_places, longest, offset, width, eps,
    has_types: tl.constexpr, normed: tl.constexpr, scored: tl.constexpr, n_pinned: tl.constexpr,
    block: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Some places; a row is summed up within one program, so always in the same order."""
    place = tl.program_id(0) * block + tl.arange(0, block)
    is_place = place < n_places
    column = tl.arange(0, block_width)[None, :]
    is_column = column < width
    inside = is_place[:, None] & is_column
    token = tl.load(ids + place, mask=is_place, other=0)
    state = tl.load(tokens + token[:, None].to(tl.int64) * width + column, mask=inside, other=0.0)
    position = (place % longest + offset)[:, None] * width
    state += tl.load(positions + position + column, mask=inside, other=0.0)
    if has_types:
        kind = tl.load(types + place, mask=is_place, other=0)
        state += tl.load(kinds + kind[:, None] * width + column, mask=inside, other=0.0)
    if normed:
        mean = tl.sum(state, axis=1) / width
        state = tl.where(is_column, state - mean[:, None], 0.0)
        variance = tl.sum(state * state, axis=1) / width
        weight = tl.load(norm_weight + column, mask=is_column, other=0.0)
        state = state / tl.sqrt(variance + eps)[:, None] * weight
        state += tl.load(norm_bias + column, mask=is_column, other=0.0)
    target = states + place[:, None].to(tl.int64) * width + column
    tl.store(target, state.to(states.dtype.element_ty), mask=inside)
    score = tl.full([block], 1.0, dtype=tl.float32)
    if scored:
        weight = tl.load(probe + column, mask=is_column, other=0.0)
        score = tl.sigmoid(tl.sum(state * weight, axis=1) + tl.load(probe_bias))
        for i in tl.static_range(n_pinned):
            score = tl.where(token == tl.load(pinned + i), 1.0, score)
    tl.store(scores + place, score, mask=is_place)


class TritonEntry:
    """See :class:`~sdt_deploy.runtime.device_entry.DeviceEntry`.

    Args:
        parameters: as of :class:`~sdt_deploy.runtime.device_entry.TorchEntry`.
        config: likewise.
    """

    def __init__(self, parameters: Parameters, config: ModelConfig) -> None:
        self._config = config
        self._parameters = parameters

    def __call__(
        self, input_ids: Any, token_type_ids: Any | None, states: Any, scores: Any
    ) -> None:
        """See :meth:`~sdt_deploy.runtime.device_entry.DeviceEntry.__call__`."""
        config = self._config
        tokens, *others = (
            self._parameters.get(name)
            for name in (
                "embeddings.token.weight",
                "embeddings.position.weight",
                "embeddings.token_type.weight",
                "embeddings.norm.weight",
                "embeddings.norm.bias",
                "scorer.weight",
                "scorer.bias",
                "scorer.pinned_token_ids",
            )
        )
        n_places, longest = input_ids.numel(), input_ids.shape[1]
        types = input_ids if token_type_ids is None else token_type_ids
        block, block_width = tile(config.d_model)
        _enter[(triton.cdiv(n_places, block),)](
            input_ids, types, tokens, *(tokens if other is None else other for other in others),
            states, scores, n_places, longest, config.position_offset, config.d_model, config.eps,
            has_types=config.n_token_types > 0, normed=config.embedding_norm,
            scored=config.probe == "linear", n_pinned=len(config.pinned_token_ids),
            block=block, block_width=block_width,
        )  # fmt: skip
