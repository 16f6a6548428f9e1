"""Stages in two pieces on a device, with attention between them that is no engine's part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdt_deploy.bundle import PROJECT, UPDATE, Bundle
from sdt_deploy.runtime.device_buffers import DeviceBackend, Frame, Workspace
from sdt_deploy.runtime.ladders import Bucket

UPDATE_ROWS = 4096
"""More rows than these, and than two thirds of a batch's places, are updated in two parts: what the
feed-forward makes of them is the widest there is, and so the memory that a run takes. No part is
larger than the very first one: an arena that has to grow keeps what it had besides."""


class StagePieces:
    """The graphs ``project`` and ``update``, each for all layers, with the layers' parameters.

    Args:
        bundle: whose manifest is :attr:`~sdt_deploy.bundle.Manifest.in_pieces`.
        backend: its engines and memory.
    """

    def __init__(self, bundle: Bundle, backend: DeviceBackend) -> None:
        graphs = bundle.manifest.graphs
        self._config = bundle.manifest.model
        self._backend = backend
        self._weights = backend.layers(bundle)
        self._parameters = {
            name: [tensor.name for tensor in graphs[name].inputs if tensor.is_parameter]
            for name in (PROJECT, UPDATE)
        }
        for name in (PROJECT, UPDATE):
            backend.graph(name)

    def run(
        self,
        space: Workspace,
        frame: Frame,
        layer: int,
        size: Bucket,
        inputs: Mapping[str, Any],
        key_lengths: Any,
    ) -> None:
        """Update the rows of a stage in place.

        Args:
            space: holds them, and what is made on the way.
            frame: of the batch.
            layer: of the model.
            size: of the stage.
            inputs: ``hidden_states [1, n_tokens, d_model]``, the rows, and with context ``all``
                ``context_states [batch, max_seqlen, d_model]``.
            key_lengths: ``[batch]`` int64, keys of each sequence.
        """
        query, both = self._project(space, layer, inputs)
        key, value = both.flatten(0, 1).chunk(2, dim=1)
        context = inputs.get("context_states")
        self._backend.attention(
            query[0],
            key,
            value,
            query[0],
            query_bias=self._weights[layer]["query.bias"],
            n_heads=self._config.n_heads,
            grid=frame.plan.grid,
            query_lengths=frame.plan.active_lengths[layer],
            key_lengths=key_lengths,
            longest=size.max_seqlen,
            key_places=None if context is None else context.shape[1],
        )
        rows = inputs["hidden_states"]
        self._update(frame, layer, (rows, query, rows))

    def settle(self, space: Workspace, frame: Frame, layer: int, inputs: Mapping[str, Any]) -> None:
        """Call both graphs as :meth:`run` does, into buffers that are free."""
        query, _ = self._project(space, layer, inputs)
        rows = inputs["hidden_states"]
        free = space.key_value.view(2, *space.states.shape)[0][None, : rows.shape[1]]
        self._update(frame, layer, (rows, query, free))

    def _project(self, space: Workspace, layer: int, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return queries of the rows, and keys and values of what they see."""
        rows = inputs["hidden_states"]
        seen = inputs.get("context_states", rows)
        query = space.query[None, : rows.shape[1]]
        both = space.key_value[: seen.shape[0] * seen.shape[1]].view(*seen.shape[:2], -1)
        self._call(PROJECT, layer, inputs, {"query": query, "key_value": both})
        return query, both

    def _update(self, frame: Frame, layer: int, buffers: tuple[Any, Any, Any]) -> None:
        """Update rows; ``buffers``: these, what they attended to, and where to, maybe in place."""
        at_most = max(UPDATE_ROWS, 64 * (2 * frame.bucket.n_tokens // (3 * 64)))
        for rows, mixed, out in zip(*(each.split(at_most, 1) for each in buffers), strict=True):
            inputs = {"hidden_states": rows, "mixed_states": mixed}
            self._call(UPDATE, layer, inputs, {"updated_states": out})

    def _call(
        self, name: str, layer: int, inputs: Mapping[str, Any], outputs: dict[str, Any]
    ) -> None:
        weights = self._weights[layer]
        given = {parameter: weights[parameter] for parameter in self._parameters[name]}
        self._backend.graph(name).bind({**inputs, **given}, outputs)()
