"""Parameters of a bundle's graphs as torch tensors, for what computes without an engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from sdt_deploy.bundle import WEIGHTS, Bundle, GraphSpec
from sdt_deploy.errors import BundleIntegrityError
from sdt_deploy.external_data import MAX_GRAPH_BYTES, external_tensors
from sdt_deploy.files import read_bytes

_TYPES = {1: "float32", 6: "int32", 10: "float16", 16: "bfloat16"}
"""By number in ONNX's TensorProto."""


def layer_parameters(bundle: Bundle, torch: Any, device: Any) -> tuple[dict[str, Any], ...]:
    """Load the parameters of the layers of a bundle with fused attention to a device.

    Returns:
        For each layer tensors by the names that ``project`` and ``update`` have for them, and
        ``query.bias [d_model]``. Weights of keys and values lie side by side.

    Raises:
        BundleIntegrityError: if the files do not describe them.
    """
    layers = []
    for spec in bundle.manifest.stages:
        named = graph_parameters(bundle, spec, torch, device)
        layer = {name.removeprefix("layers.0."): tensor for name, tensor in named.items()}
        pair = layer.pop("key.weight"), layer.pop("value.weight")
        layers.append({**layer, "key_value.weight": torch.cat(pair, dim=1)})
    return tuple(layers)


def graph_parameters(bundle: Bundle, spec: GraphSpec, torch: Any, device: Any) -> dict[str, Any]:
    """Load the parameters of a graph to a device.

    Args:
        bundle: that it is of.
        spec: the graph.
        torch: the module.
        device: where to.

    Returns:
        Tensors by the names that the graph has for them.

    Raises:
        BundleIntegrityError: if the files do not describe them.
    """
    path = bundle.file(spec.file)
    try:
        weights = np.memmap(bundle.file(WEIGHTS), dtype=np.uint8, mode="r")
        found = {}
        for tensor in external_tensors(read_bytes(path, max_bytes=MAX_GRAPH_BYTES)):
            values = weights[tensor.offset : tensor.offset + tensor.length].copy()
            dtype = getattr(torch, _TYPES[tensor.data_type])
            typed = torch.from_numpy(values).view(dtype).view(tensor.dims)
            found[tensor.name] = typed.to(device)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BundleIntegrityError(
            f"{path} does not describe its parameters: {error}; export the bundle again"
        ) from error
    return found
