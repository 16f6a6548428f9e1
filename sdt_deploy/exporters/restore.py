"""A bundle back into the model it was exported from: the oracle, wherever torch is installed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sdt_deploy.bundle import WEIGHTS, Bundle, GraphSpec
from sdt_deploy.exporters.quantization import QUANTIZED, SCALE, ZERO_POINT, dequantize
from sdt_deploy.extras import require
from sdt_deploy.model.checkpoints import model_with_weights
from sdt_deploy.model.transformer import SparseDepthTransformer

_ATTENTION = ("query", "key", "value", "output")


def restore(bundle: Bundle) -> SparseDepthTransformer:
    """Rebuild the float32 model from the weights in a bundle's entry, stages and head.

    Weights that the bundle holds in half precision come back as they were rounded. Of fused
    attention the biases come back where they were folded to, so the function is the model's.

    int8 weights come back as the float32 numbers that they stand for.

    Raises:
        MissingExtraError: if onnx is not installed.
        CheckpointError: if the graphs do not hold exactly the model's weights.
    """
    tensors: dict[str, Tensor] = {}
    graphs = bundle.manifest.graphs
    for spec in (graphs["entry"], *bundle.manifest.stages, graphs["head"]):
        offset = spec.layers[0] if spec.layers is not None else 0
        for name, array in _initializers(bundle, spec):
            key, transposed = _model_name(name, offset)
            if key is not None:
                weight = (array.T if transposed else array).astype(np.float32, order="C")
                tensors[key] = torch.from_numpy(weight)
    if bundle.manifest.export.attention == "fused":
        zeros = torch.zeros(bundle.manifest.model.d_model)
        for layer in range(bundle.manifest.model.n_layers):
            tensors |= {f"layers.{layer}.attention.{name}.bias": zeros for name in ("key", "value")}
    return model_with_weights(bundle.manifest.model, tensors, where=str(bundle.path))


def _initializers(bundle: Bundle, spec: GraphSpec) -> Iterator[tuple[str, np.ndarray]]:
    onnx = require("onnx", extra="export", purpose="Reading the weights of a bundle")
    graph = onnx.load(str(bundle.file(spec.file)), load_external_data=False).graph
    # The package itself would refuse weights that have a second name, as in copies by hard links.
    for tensor in filter(onnx.external_data_helper.uses_external_data, graph.initializer):
        place = onnx.external_data_helper.ExternalDataInfo(tensor)
        with bundle.file(WEIGHTS).open("rb") as weights:
            weights.seek(place.offset)
            tensor.raw_data = weights.read(place.length)
        tensor.data_location = onnx.TensorProto.DEFAULT
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name, array in arrays.items():
        weight = name.removesuffix(QUANTIZED)
        if weight != name:
            yield weight, dequantize(array, arrays[weight + SCALE])
        elif name.removesuffix(SCALE).removesuffix(ZERO_POINT) + QUANTIZED not in arrays:
            yield name, array


def _model_name(name: str, first_layer: int) -> tuple[str | None, bool]:
    """Return the model's name of an initializer, None for constants; is it transposed?"""
    parts = name.split(".")
    if parts[0] == "layer":  # the only one of a stage with fused attention
        parts[:1] = ["layers", "0"]
    if parts[0] == "layers":
        parts[1] = str(int(parts[1]) + first_layer)
        product = parts[2] in _ATTENTION or parts[2] == "feed_forward"
        if parts[2] in _ATTENTION:
            parts.insert(2, "attention")
        return ".".join(parts), product and parts[-1] == "weight"
    if parts[0] == "head":
        return name, parts[1] in ("dense", "projection") and parts[-1] == "weight"
    if parts[0] == "embeddings" or name in ("scorer.weight", "scorer.bias"):
        return name, False
    return None, False
