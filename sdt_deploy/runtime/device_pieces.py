"""Stages in two pieces on a device, with attention between them that is no engine's part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdt_deploy.bundle import PROJECT, UPDATE, Bundle
from sdt_deploy.runtime.device_buffers import DeviceBackend, Frame, Workspace
from sdt_deploy.runtime.ladders import Bucket

UPDATED = "updated_states"


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
        self._inner = [spec.name for spec in graphs[UPDATE].outputs if spec.name != UPDATED]
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
        self._update(space, layer, inputs["hidden_states"], query, inputs["hidden_states"])

    def settle(self, space: Workspace, layer: int, inputs: Mapping[str, Any]) -> None:
        """Call both graphs as :meth:`run` does, into buffers that are free."""
        query, _ = self._project(space, layer, inputs)
        self._update(space, layer, inputs["hidden_states"], query, query)

    def _project(self, space: Workspace, layer: int, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return queries of the rows, and keys and values of what they see."""
        rows = inputs["hidden_states"]
        seen = inputs.get("context_states", rows)
        query = space.query[None, : rows.shape[1]]
        both = space.wide(*seen.shape[:2], 2 * self._config.d_model)
        self._call(PROJECT, layer, inputs, {"query": query, "key_value": both})
        return query, both

    def _update(self, space: Workspace, layer: int, rows: Any, mixed: Any, out: Any) -> None:
        """Update rows by what they attended to; ``out`` may be either.

        What the feed-forward makes of them, before and after its activation, has one buffer: the
        activation goes element by element, so it works in place.
        """
        inner = space.wide(*rows.shape[:2], self._config.d_ff)
        outputs = {UPDATED: out, **dict.fromkeys(self._inner, inner)}
        self._call(UPDATE, layer, {"hidden_states": rows, "mixed_states": mixed}, outputs)

    def _call(
        self, name: str, layer: int, inputs: Mapping[str, Any], outputs: dict[str, Any]
    ) -> None:
        weights = self._weights[layer]
        given = {parameter: weights[parameter] for parameter in self._parameters[name]}
        self._backend.graph(name).bind({**inputs, **given}, outputs)()
