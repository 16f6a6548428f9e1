"""Embedding and scores of the places of a padded batch, computed by the runtime itself.

Between the ids and the first layer there is no product that an engine would be needed for: rows are
looked up, summed, normed and scored. An engine makes a pass over memory of each of these steps.

:class:`TorchEntry` says what is computed, and serves CPUs and tests;
:class:`~sdt_deploy.runtime.triton_entry.TritonEntry` does the same in one kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from sdt_deploy.config import ModelConfig
from sdt_deploy.extras import require

Parameters = Mapping[str, Any]
"""Tensors by the names that the graph ``entry`` has for them."""


class DeviceEntry(Protocol):
    """From ids to states and scores."""

    def __call__(
        self, input_ids: Any, token_type_ids: Any | None, states: Any, scores: Any
    ) -> None:
        """Fill ``states`` and ``scores``.

        Args:
            input_ids: ``[batch, max_seqlen]`` int32, any valid id in padding.
            token_type_ids: ``[batch, max_seqlen]`` int32, if the model has types.
            states: ``[batch, max_seqlen, d_model]``, in the precision of the export.
            scores: ``[batch, max_seqlen]`` float32, a text's the same in every batch; those of
                padding mean nothing.
        """


class TorchEntry:
    """The definition, operator by operator.

    Args:
        parameters: of the graph ``entry``.
        config: of a model with a position table, layer norms and one probe at most.
    """

    def __init__(self, parameters: Parameters, config: ModelConfig) -> None:
        self._torch: Any = require("torch", extra="gpu", purpose="Embedding on a device")
        self._parameters = parameters
        self._config = config

    def __call__(
        self, input_ids: Any, token_type_ids: Any | None, states: Any, scores: Any
    ) -> None:
        """See :meth:`DeviceEntry.__call__`."""
        embedded = self.embed(input_ids, token_type_ids)
        states.copy_(embedded)
        scores.copy_(self.score(input_ids, embedded))

    def embed(self, input_ids: Any, token_type_ids: Any | None) -> Any:
        """Return ``[batch, max_seqlen, d_model]`` float32."""
        p, config, functional = self._parameters, self._config, self._torch.nn.functional
        states = functional.embedding(input_ids, p["embeddings.token.weight"])
        first = config.position_offset
        states = states + p["embeddings.position.weight"][first : first + input_ids.shape[1]]
        if config.n_token_types:
            types = functional.embedding(token_type_ids, p["embeddings.token_type.weight"])
            states = states + types
        if not config.embedding_norm:
            return states
        weight, bias = p["embeddings.norm.weight"], p["embeddings.norm.bias"]
        return functional.layer_norm(states, weight.shape, weight, bias, config.eps)

    def score(self, input_ids: Any, embedded: Any) -> Any:
        """Return ``[batch, max_seqlen]`` float32; see :class:`sdt_deploy.model.blocks.Scorer`."""
        torch, p = self._torch, self._parameters
        if self._config.probe == "none":
            return torch.ones_like(input_ids, dtype=torch.float32)
        scores = torch.sigmoid((embedded * p["scorer.weight"]).sum(dim=-1) + p["scorer.bias"])
        if not self._config.pinned_token_ids:
            return scores
        pinned = (input_ids[..., None] == p["scorer.pinned_token_ids"]).any(dim=-1)
        return torch.where(pinned, 1.0, scores)
