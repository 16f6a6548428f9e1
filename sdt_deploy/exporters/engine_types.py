"""What TensorRT 8.6 is told to compute in float32: it has no strong types of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONVERTS = frozenset({"CAST", "SHAPE"})
"""Kinds of layers whose outputs need not have the type of their inputs."""


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """What of a layer decides its precision."""

    kind: str
    """The name of its ``LayerType``."""
    names: tuple[str, ...]
    """Its inputs and outputs of floating point."""


def float32_tensors(layers: Sequence[LayerTensors], types: Mapping[str, str]) -> frozenset[str]:
    """Return the names of all tensors of a network that are float32 in the graph it was made of.

    The parser adds tensors that the graph does not have: constants and what layers of its own make.
    One has the type of the other floating-point tensors of a layer, unless the layer converts.

    Args:
        layers: of the network.
        types: the graph's values and their types.
    """
    found = {name for name, kind in types.items() if kind == "float32"}
    while True:
        reached = {
            name
            for layer in layers
            if layer.kind not in CONVERTS and not found.isdisjoint(layer.names)
            for name in layer.names
            if name not in types
        }
        if reached <= found:
            return frozenset(found)
        found |= reached


def keep_float32(library: Any, types: Mapping[str, str], network: Any) -> None:
    """Make 8.6 compute in float32 what is float32 in the graph; all else may be float16.

    Casts are left alone: in either type they round no more than the graph does, except integers
    above 2048, which no graph casts. Layers for shapes have no other type than their own.

    Args:
        library: the module.
        types: as in :func:`float32_tensors`.
        network: what the parser made of the graph; changed in place.
    """
    floating = library.DataType.FLOAT, library.DataType.HALF
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    described = []
    for layer in layers:
        inputs = [layer.get_input(index) for index in range(layer.num_inputs)]  # None: left out
        outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
        tensors = [each for each in (*inputs, *outputs) if each is not None]
        names = tuple(each.name for each in tensors if each.dtype in floating)
        described.append(LayerTensors(kind=layer.type.name, names=names))
    wide = float32_tensors(described, types)
    for layer, of_layer in zip(layers, described, strict=True):
        if of_layer.kind in CONVERTS or wide.isdisjoint(of_layer.names):
            continue
        outputs = [layer.get_output(index).name for index in range(layer.num_outputs)]
        written = [index for index, name in enumerate(outputs) if name in wide]
        if not written and layer.precision not in floating:
            continue  # it has a type of its own, whatever it reads
        layer.precision = library.DataType.FLOAT
        for index in written:  # not the bool of a comparison
            layer.set_output_type(index, library.DataType.FLOAT)
