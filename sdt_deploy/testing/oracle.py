"""A backend that computes with the oracle's own modules, one padded layer at a time.

It needs torch but no engine and no exported graph, so that routing, dispatch and the loop can be
tested anywhere, and it records which rows every stage really processed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdt_deploy.bundle import Bundle, GraphSpec, Manifest
from sdt_deploy.config import ExportConfig
from sdt_deploy.exporters.decoding import DecodeGraph
from sdt_deploy.exporters.layers import FusedLayer, PackedLayer
from sdt_deploy.exporters.modules import PackedHead
from sdt_deploy.exporters.partition import partition
from sdt_deploy.exporters.pieces import Projection, Update
from sdt_deploy.model.blocks import TransformerLayer
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.runtime.backend import Array, Call, Graph, HostMemory
from sdt_deploy.runtime.backends.device import DeviceMemory
from sdt_deploy.runtime.backends.torch_model import finish, project


@dataclass(frozen=True, kw_only=True)
class StageCall:
    """One call of a stage."""

    stage: str
    n_rows: int
    """Rows that were processed as queries."""


def memory_bundle(model: SparseDepthTransformer, config: ExportConfig | None = None) -> Bundle:
    """Make a bundle that exists in memory only: a manifest for ``model``, without any file."""
    config = config or ExportConfig()
    graphs = {
        part.name: part.spec(config, graph_sha256="0" * 64) for part in partition(model, config)
    }
    manifest = Manifest(model=model.config, export=config, graphs=graphs, files={}, created_by={})
    return Bundle(path=Path("memory"), manifest=manifest)


class OracleBackend(HostMemory):
    """Runs a bundle's graphs with the modules of ``model``.

    ``calls`` lists the stage calls since it was last cleared.
    """

    name = "oracle"

    def __init__(self, bundle: Bundle, model: SparseDepthTransformer) -> None:
        self.calls: list[StageCall] = []
        self._bundle = bundle
        self.model = model.eval()

    def has(self, name: str) -> bool:
        """See :meth:`sdt_deploy.runtime.backend.Backend.has`."""
        return name in self._bundle.manifest.graphs

    def graph(self, name: str) -> Graph:
        """See :meth:`sdt_deploy.runtime.backend.Backend.graph`."""
        return _OracleGraph(self._bundle.manifest.graphs[name], self.model, self.calls)

    def close(self) -> None:
        """See :meth:`sdt_deploy.runtime.backend.Backend.close`."""


class OracleDeviceBackend(DeviceMemory):
    """The same for the loop on a device, in torch tensors on the CPU."""

    name = "oracle-device"
    profiles = ()

    def __init__(self, bundle: Bundle, model: SparseDepthTransformer) -> None:
        super().__init__("cpu")
        self._oracle = OracleBackend(bundle, model)
        self.calls = self._oracle.calls

    def has(self, name: str) -> bool:
        """See :meth:`sdt_deploy.runtime.backend.Backend.has`."""
        return self._oracle.has(name)

    def graph(self, name: str) -> Graph:
        """See :meth:`sdt_deploy.runtime.backend.Backend.graph`."""
        return _OnTensors(self._oracle.graph(name))

    def parameters(self, bundle: Bundle, name: str) -> dict[str, Tensor]:
        """Return the model's own; there are no files."""
        model = self._oracle.model
        if name == "head":  # as exported
            head = PackedHead(model.head, torch.float32)
            return {f"head.{key}": p.detach() for key, p in head.named_parameters()}
        return {**model.state_dict(), **dict(model.named_buffers())}

    def layers(self, bundle: Bundle) -> list[dict[str, Tensor]]:
        """Return the parameters of the parts that would be exported."""
        found = []
        for block in self._oracle.model.blocks:
            layer = FusedLayer(block, torch.float32)
            parts = Projection(layer), Update(layer)
            named = {name: p.detach() for part in parts for name, p in part.named_parameters()}
            found.append({**named, "query.bias": block.attention.query.bias.detach()})
        return found

    def close(self) -> None:
        """See :meth:`sdt_deploy.runtime.backend.Backend.close`."""


class _OnTensors:
    """A graph over NumPy arrays, given tensors on the CPU: they share memory."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """See :meth:`sdt_deploy.runtime.backend.Graph.bind`."""
        arrays = ({name: t.numpy() for name, t in side.items()} for side in (inputs, outputs))
        return self._graph.bind(*arrays)


class _OracleGraph:
    def __init__(
        self, spec: GraphSpec, model: SparseDepthTransformer, calls: list[StageCall]
    ) -> None:
        self._spec = spec
        self._model = model
        self._calls = calls

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """See :meth:`sdt_deploy.runtime.backend.Graph.bind`."""
        return lambda: self._run(inputs, outputs)

    @torch.no_grad()
    def _run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        for specs, arrays in ((self._spec.inputs, inputs), (self._spec.outputs, outputs)):
            assert {s.name for s in specs} == set(arrays), f"{self._spec.name}: {sorted(arrays)}"
            for spec in specs:
                array = arrays[spec.name]
                assert array.dtype == spec.dtype, f"{spec.name} is {array.dtype}"
                assert array.flags.c_contiguous, spec.name
                assert array.size, f"{self._spec.name} was called with nothing in {spec.name}"
        if self._spec.layers is not None:
            found = self._stage(inputs)
        elif self._spec.name.startswith("decode-"):
            found = self._decode(inputs)
        else:
            found = getattr(self, f"_{self._spec.name}")(inputs)
        for name, tensor in found.items():
            np.copyto(outputs[name], tensor.numpy(), casting="no")

    def _entry(self, inputs: Mapping[str, Array]) -> dict[str, Tensor]:
        ids = _long(inputs["input_ids"])
        positions = _long(inputs["position_ids"]) if "position_ids" in inputs else None
        types = _long(inputs["token_type_ids"]) if "token_type_ids" in inputs else None
        embedded = self._model.embeddings(ids, positions, types)
        return {"hidden_states": embedded, "scores": self._model.scorer(ids, embedded)}

    def _stage(self, inputs: Mapping[str, Array]) -> dict[str, Tensor]:
        assert self._spec.layers is not None
        first, stop = self._spec.layers
        states = torch.from_numpy(inputs["hidden_states"])
        self._calls.append(StageCall(stage=self._spec.name, n_rows=states.shape[-2]))
        if self._spec.attention_layout == "padded-rows":
            return {"updated_states": self._fused(self._model.blocks[first], inputs)}
        sees_all = self._model.config.context == "all"
        remaining = torch.full(states.shape[:1], stop - first, dtype=torch.int32)
        if "remaining_depth" in inputs:
            remaining = torch.from_numpy(inputs["remaining_depth"])
        n_heads = self._model.config.n_heads
        gather = _long(inputs["gather_index"])[:, 0] // n_heads
        scatter = _long(inputs["scatter_index"])[:, 0]
        sequence = scatter // (n_heads * gather.shape[1])
        scatter = sequence * gather.shape[1] + scatter % gather.shape[1]
        biases = torch.from_numpy(inputs["key_bias"])
        biases = biases.reshape(-1, *biases.shape[-4:])
        context = torch.from_numpy(inputs["context_states"]) if sees_all else states
        for i, layer in enumerate(self._model.blocks[first:stop]):
            active = remaining > i
            if i and sees_all:
                both = torch.cat([torch.from_numpy(inputs["context_states"]), states])
                context = both[_long(inputs["refresh_index"])]
            queries = states[gather]
            keys = queries
            if sees_all:
                keys = context[_long(inputs["context_gather_index"])[:, 0] // n_heads]
            visible = biases[min(i, len(biases) - 1), :, 0, :, 0] == 0
            places = None
            if layer.attention.causal:
                own, theirs = (
                    torch.arange(x.shape[1]).expand(x.shape[:2]) for x in (queries, keys)
                )
                if sees_all:
                    own = _long(inputs["query_places"])
                if layer.attention.frequencies:
                    own = theirs = _long(inputs["position_ids"])[gather]
                    if sees_all:
                        index = _long(inputs["context_gather_index"])[:, 0] // n_heads
                        theirs = _long(inputs["context_position_ids"])[index]
                places = torch.cat([own, theirs], dim=1)
            # The oracle's layer updates all it sees: run it on queries and keys side by side.
            joined = torch.cat([queries, keys], dim=1)
            mask = torch.cat([torch.zeros(gather.shape, dtype=torch.bool), visible], dim=1)
            updated = layer(joined, mask, places)[:, : gather.shape[1]].flatten(0, 1)[scatter]
            states = torch.where(active[:, None], updated, states)
        if len(self._spec.outputs) == 1:
            return {"updated_states": states}
        return {"updated_states": states, "scores": self._model.scorer.logits(states).sigmoid()}

    def _decode(self, inputs: Mapping[str, Array]) -> dict[str, Tensor]:
        """Run the module that is exported: the oracle keeps no keys of earlier calls."""
        states = inputs["hidden_states"]
        self._calls.append(StageCall(stage=self._spec.name, n_rows=len(states)))
        number, config = int(self._spec.name.removeprefix("decode-")), self._model.config
        layer = PackedLayer(self._model.blocks[number], torch.float32)
        scorer = self._model.scorer if len(self._spec.outputs) > 3 else None
        module = DecodeGraph(layer, config, scorer)
        found = module(*(torch.from_numpy(inputs[spec.name].copy()) for spec in self._spec.inputs))
        return dict(zip((spec.name for spec in self._spec.outputs), found, strict=True))

    def _fused(self, layer: TransformerLayer, inputs: Mapping[str, Array]) -> Tensor:
        gather, scatter = _long(inputs["gather_index"]), _long(inputs["scatter_index"])
        queries = torch.from_numpy(inputs["hidden_states"])[0][gather]
        keys = queries
        if "context_states" in inputs:
            keys = torch.from_numpy(inputs["context_states"])
        visible = _within(inputs["key_lengths"], keys.shape[1])
        joined = torch.cat([queries, keys], dim=1)
        mask = torch.cat([torch.zeros(gather.shape, dtype=torch.bool), visible], dim=1)
        return layer(joined, mask)[:, : gather.shape[1]].flatten(0, 1)[scatter][None]

    def _project(self, inputs: Mapping[str, Array]) -> dict[str, Tensor]:
        given = {name: torch.from_numpy(array) for name, array in inputs.items()}
        states, context = given["hidden_states"], given.get("context_states")
        seen, d_model = states if context is None else context, states.shape[-1]
        query, both = torch.empty_like(states), seen.new_empty(*seen.shape[:2], 2 * d_model)
        project(given, self._model.config, states, context, (query, both))
        return {"query": query, "key_value": both}

    def _update(self, inputs: Mapping[str, Array]) -> dict[str, Tensor]:
        given = {name: torch.from_numpy(array) for name, array in inputs.items()}
        states = given["hidden_states"]
        self._calls.append(StageCall(stage=self._spec.name, n_rows=states.shape[-2]))
        updated = finish(given, self._model.config, states, given["mixed_states"])
        # The other outputs are for the engine's own use: whatever is there is written over first.
        names = [spec.name for spec in self._spec.outputs if spec.name != "updated_states"]
        width = self._model.config.d_ff
        spoilt = states.new_full((*states.shape[:-1], width), torch.nan)
        return {**dict.fromkeys(names, spoilt), "updated_states": updated}

    def _head(self, inputs: Mapping[str, Array]) -> dict[str, Tensor]:
        states = torch.from_numpy(inputs["hidden_states"])
        if states.ndim == 3:
            mask = torch.from_numpy(inputs.get("attention_mask", np.ones(states.shape[:2], "i4")))
            return {"output": self._model.head(states, mask > 0)}
        if "first_index" in inputs:
            padded, mask = states[_long(inputs["first_index"])][:, None], torch.ones(1, 1).bool()
        elif "gather_index" in inputs:
            index = _long(inputs["gather_index"])
            padded = states[index]
            mask = _within(inputs["lengths"], index.shape[1])
        else:
            return {"output": self._model.head(states[None], torch.ones(1, 1).bool())[0]}
        return {"output": self._model.head(padded, mask)}

    def _dense(self, inputs: Mapping[str, Array]) -> dict[str, Tensor]:
        return {"output": self._model.as_dense()(*_padded(inputs)).output}

    def _single(self, inputs: Mapping[str, Array]) -> dict[str, Tensor]:
        return self._masked(inputs)

    def _masked(self, inputs: Mapping[str, Array]) -> dict[str, Tensor]:
        limits = inputs["thresholds"].tolist()
        found = self._model(*_padded(inputs), thresholds=limits)
        return {"output": found.output, "scores": found.scores}


def _long(array: Array) -> Tensor:
    return torch.from_numpy(array).long()


def _within(lengths: Array, max_seqlen: int) -> Tensor:
    return torch.arange(max_seqlen) < torch.from_numpy(lengths)[:, None]


def _padded(inputs: Mapping[str, Array]) -> tuple[Tensor, Tensor, Tensor | None]:
    types = _long(inputs["token_type_ids"]) if "token_type_ids" in inputs else None
    return _long(inputs["input_ids"]), torch.from_numpy(inputs["attention_mask"]) > 0, types
