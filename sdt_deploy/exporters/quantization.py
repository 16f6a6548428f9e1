"""Float32 graphs to int8 by ONNX Runtime's dynamic quantisation."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from sdt_deploy.errors import ExportError

QUANTIZED, SCALE, ZERO_POINT = "_quantized", "_scale", "_zero_point"
"""What ONNX Runtime appends to the name of a weight."""


def quantize(
    proto: onnx.ModelProto, parameters: Mapping[str, np.ndarray]
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Quantise the products of the layers; everything else stays float32.

    Weights become int8 of seven bits, symmetric, with a scale per output column. The rows they are
    multiplied with become uint8 when the graph runs, with one scale for all rows of a call
    (``docs/decisions/007-int8.md``). Products between activations stay float32, and so do entry and
    head, so that scores and depths are those of the float32 bundle.

    Args:
        proto: a graph whose nodes have names.
        parameters: its parameters by name.

    Returns:
        The new graph and its parameters; the old ones if there is nothing to quantise.

    Raises:
        ExportError: if ONNX Runtime fails, or leaves a product as it was.
    """
    products = [
        node
        for node in proto.graph.node
        if node.op_type == "MatMul"
        and node.input[1].startswith("layers.")
        and node.input[1] in parameters
    ]
    if not products:
        return proto, dict(parameters)
    filled = onnx.ModelProto()
    filled.CopyFrom(proto)
    for tensor in filled.graph.initializer:
        if tensor.name in parameters:
            content = onnx.numpy_helper.from_array(parameters[tensor.name], tensor.name)
            tensor.CopyFrom(content)
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # remarks on preprocessing, which the exporter makes needless
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "quantized.onnx"
            quantize_dynamic(
                filled,
                path,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=[node.name for node in products],
                per_channel=True,
                weight_type=QuantType.QInt8,
                reduce_range=True,  # CPUs without VNNI add pairs of products in 16 bits
            )
            quantized = onnx.load(path)
    except Exception as error:  # ONNX Runtime's tools raise whatever comes up
        raise ExportError(f"ONNX Runtime cannot quantise the graph: {error}") from error
    finally:
        logger.setLevel(level)
    return _stripped(proto, quantized, parameters, {node.input[1] for node in products})


def dequantize(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return float32 ``[in, out]`` of int8 ``weight [in, out]`` and float32 ``scale [out]``."""
    return np.multiply(weight, scale, dtype=np.float32)


def _stripped(
    traced: onnx.ModelProto,
    quantized: onnx.ModelProto,
    parameters: Mapping[str, np.ndarray],
    weights: set[str],
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Undo what ONNX Runtime's tools add beside the quantisation, and tell parameters apart."""
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in quantized.graph.initializer}
    left = sorted(name for name in weights if name in arrays or name + QUANTIZED not in arrays)
    if left:
        raise ExportError(f"ONNX Runtime did not quantise {', '.join(left)}")
    for tensor in quantized.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))
    del quantized.metadata_props[:]
    del quantized.graph.value_info[:]
    quantized.producer_name, quantized.producer_version = traced.producer_name, ""
    quantized.graph.name = traced.graph.name
    used = {node.domain for node in quantized.graph.node}
    if used != {""}:
        raise ExportError(f"the quantised graph uses operators of {', '.join(sorted(used))}")
    del quantized.opset_import[:]
    quantized.opset_import.extend(traced.opset_import)
    made = {weight + suffix for weight in weights for suffix in (QUANTIZED, SCALE, ZERO_POINT)}
    return quantized, {name: arrays[name] for name in arrays if name in made | parameters.keys()}
