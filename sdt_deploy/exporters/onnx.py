"""Graph modules to ONNX: trace, strip, move the weights out."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from torch import Tensor

from sdt_deploy.bundle import TensorSpec
from sdt_deploy.errors import ExportError
from sdt_deploy.exporters.modules import GraphModule

ALIGNMENT = 4096
"""Tensors start at multiples of this in the weights file, so that they can be memory-mapped."""
_ONNX_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
    "int8": onnx.TensorProto.INT8,
}
_INLINE_BYTES = 1024


def trace(module: GraphModule, *, opset: int) -> onnx.ModelProto:
    """Export ``module`` to an ONNX graph with every named axis dynamic.

    ``torch.export`` runs first: it raises where the ONNX exporter would silently fix an axis.

    Raises:
        ExportError: if a declared axis did not stay dynamic, or the module cannot be exported.
    """
    inputs = example_inputs(module.inputs)
    module = _with_random_parameters(module)
    dims = {
        axis: torch.export.Dim(axis)
        for spec in module.inputs
        for axis in spec.axes
        if isinstance(axis, str)
    }
    shapes = [
        {i: dims[axis] for i, axis in enumerate(spec.axes) if isinstance(axis, str)}
        for spec in module.inputs
    ]
    # A *args parameter takes all the shapes that are left as one tuple.
    n_named = module.forward.__code__.co_argcount - 1
    rest = shapes[n_named:]
    nested: tuple[Any, ...] = (*shapes[:n_named], *([tuple(rest)] if rest else []))
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(module, inputs, dynamic_shapes=nested)
            exported = torch.onnx.export(
                program,
                inputs,
                dynamo=True,
                opset_version=opset,
                input_names=[spec.name for spec in module.inputs],
                output_names=[spec.name for spec in module.outputs],
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever its passes raise
        raise ExportError(f"{type(module).__name__} cannot be exported: {error}") from error
    assert exported is not None
    proto: onnx.ModelProto = exported.model_proto
    _strip(proto)
    _declare(proto, module)
    return proto


def example_inputs(specs: tuple[TensorSpec, ...]) -> tuple[Tensor, ...]:
    """Make inputs for tracing: distinct sizes above 1, since 0 and 1 would be fixed."""
    sizes: dict[str, int] = {}
    for spec in specs:
        for axis in spec.axes:
            if isinstance(axis, str):
                sizes.setdefault(axis, 3 + 2 * len(sizes))
    return tuple(
        torch.ones(
            [sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes],
            dtype=getattr(torch, spec.dtype),
        )
        for spec in specs
    )


def graph_hash(proto: onnx.ModelProto) -> str:
    """Hash a graph without the place of its weights."""
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    for tensor in bare.graph.initializer:
        del tensor.external_data[:]
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


class WeightsWriter:
    """Appends tensors to one file and writes equal ones once."""

    def __init__(self, stream: BinaryIO, *, location: str) -> None:
        self._stream = stream
        self._location = location
        self._places: dict[str, tuple[int, int]] = {}

    def add(self, array: np.ndarray) -> tuple[int, int]:
        """Write ``array`` if it is new; return its offset and length in bytes."""
        content = np.ascontiguousarray(array).tobytes()
        key = hashlib.sha256(content).hexdigest()
        if key not in self._places:
            self._stream.write(b"\0" * (-self._stream.tell() % ALIGNMENT))
            self._places[key] = (self._stream.tell(), len(content))
            self._stream.write(content)
        return self._places[key]

    def fill(self, proto: onnx.ModelProto, parameters: Mapping[str, np.ndarray]) -> onnx.ModelProto:
        """Return a copy of ``proto`` whose parameters are references into the weights file.

        Raises:
            ExportError: if the graph holds a large constant that is no parameter; such a one would
                be lost where the trace of one layer serves for another.
        """
        filled = onnx.ModelProto()
        filled.CopyFrom(proto)
        absent = parameters.keys() - {tensor.name for tensor in filled.graph.initializer}
        if absent:
            raise ExportError(f"parameters are missing in the graph: {', '.join(sorted(absent))}")
        for tensor in filled.graph.initializer:
            if tensor.name not in parameters:
                if tensor.ByteSize() > _INLINE_BYTES:
                    raise ExportError(
                        f"constant {tensor.name} of {tensor.ByteSize()} bytes in graph"
                    )
                continue
            array = parameters[tensor.name]
            if (tuple(tensor.dims), tensor.data_type) != (
                array.shape,
                _ONNX_TYPES[array.dtype.name],
            ):
                raise ExportError(
                    f"{tensor.name}: {tuple(tensor.dims)} of type {tensor.data_type} in graph, "
                    f"{array.shape} {array.dtype} given"
                )
            offset, length = self.add(array)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            entries = {"location": self._location, "offset": str(offset), "length": str(length)}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=value)
        return filled


def parameters_of(module: GraphModule) -> dict[str, np.ndarray]:
    """Return the parameters and buffers of ``module`` by their names in the graph.

    Raises:
        ExportError: if a weight is not finite, so beyond the range of the precision.
    """
    arrays = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.isfinite().all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ExportError(
                f"{name} holds weights beyond the range of {dtype}; export with --precision "
                "bfloat16 or float32"
            )
        if tensor.numel():
            arrays[name] = to_numpy(tensor.detach().cpu())
    return arrays


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return ``tensor`` as an array, a bfloat16 one too."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))


def element_type(name: str) -> int:
    """Return the number that ONNX has for the type ``name``."""
    return _ONNX_TYPES[name]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy type ``name``; bfloat16 comes from ml_dtypes, by way of onnx."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(_ONNX_TYPES[name]))


def save(proto: onnx.ModelProto, path: Path) -> None:
    """Check ``proto`` and write it."""
    path.write_bytes(proto.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))


def _with_random_parameters(module: GraphModule) -> GraphModule:
    """Copy ``module`` with random parameters.

    The exporter merges constants of equal value (norm weights that are all ones, say), so with the
    true values the graph would depend on them, and layers of one topology would differ.
    """
    copied = copy.deepcopy(module).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.normal_(generator=generator)
    return copied


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what differs between equal layers or machines: paths, traces, intermediate types."""
    del proto.metadata_props[:]
    del proto.functions[:]
    proto.producer_name, proto.producer_version, proto.doc_string = "sdt-deploy", "", ""
    graph = proto.graph
    graph.name, graph.doc_string = "graph", ""
    del graph.value_info[:]
    del graph.metadata_props[:]
    for item in [*graph.node, *graph.initializer, *graph.input, *graph.output]:
        del item.metadata_props[:]
        item.doc_string = ""
    used = {node.domain for node in graph.node}
    kept = [entry for entry in proto.opset_import if entry.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)


def _declare(proto: onnx.ModelProto, module: GraphModule) -> None:
    """Check inputs and outputs against the module's specs and give the axes their names."""
    for values, specs in (
        (proto.graph.input, module.inputs),
        (proto.graph.output, module.outputs),
    ):
        found = [value.name for value in values]
        if found != [spec.name for spec in specs]:
            raise ExportError(f"the graph has {found}, declared are {[s.name for s in specs]}")
        for value, spec in zip(values, specs, strict=True):
            tensor = value.type.tensor_type
            if tensor.elem_type != _ONNX_TYPES[spec.dtype]:
                raise ExportError(f"{spec.name} is not {spec.dtype} in the exported graph")
            if len(tensor.shape.dim) != len(spec.axes):
                raise ExportError(f"{spec.name} has {len(tensor.shape.dim)} axes, not {spec.axes}")
            for dim, axis in zip(tensor.shape.dim, spec.axes, strict=True):
                if isinstance(axis, int):
                    if dim.dim_value != axis:
                        raise ExportError(f"{spec.name}: static axis {axis} became {dim}")
                elif dim.HasField("dim_value"):
                    raise ExportError(f"{spec.name}: axis {axis} became static ({dim.dim_value})")
                else:
                    dim.dim_param = axis


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks on packages that do not concern this export."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
