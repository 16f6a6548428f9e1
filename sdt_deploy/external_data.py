"""Where the tensors of an ONNX graph lie, read from its bytes.

A graph names the file that holds its weights. A reader must not follow such a name out of the
bundle, and not every engine refuses to. This reads just enough of the protobuf encoding to see
every tensor, so neither the onnx package nor an engine is needed. Field numbers are those of
``onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdt_deploy.errors import BundleIntegrityError
from sdt_deploy.files import read_bytes

MAX_GRAPH_BYTES = 2**28
"""Largest ONNX file that is read; its weights lie in another file."""
_EXTERNAL = 1
_MAX_DEPTH = 64

_TENSOR = "TensorProto"
_CHILDREN: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: _TENSOR, 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: _TENSOR,
        6: "GraphProto",
        10: _TENSOR,
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: _TENSOR, 2: _TENSOR},
}
"""Messages that may hold tensors, by the field that holds them."""


@dataclass(frozen=True, kw_only=True)
class ExternalTensor:
    """A tensor whose values lie in another file."""

    name: str
    dims: tuple[int, ...]
    data_type: int
    """Element type, by its number in ``TensorProto.DataType``."""
    location: str
    """Path relative to the graph, as written."""
    offset: int
    """In bytes."""
    length: int
    """In bytes."""


def check_places(graph: Path, *, weights: Path, n_bytes: int) -> None:
    """Check that all tensors of a graph lie in it or in one file.

    Args:
        graph: an ONNX file.
        weights: the file that may hold its tensors.
        n_bytes: size of ``weights``.

    Raises:
        BundleIntegrityError: if a tensor lies anywhere else, or the graph cannot be read.
    """
    try:
        tensors = list(external_tensors(read_bytes(graph, max_bytes=MAX_GRAPH_BYTES)))
    except (OSError, ValueError) as error:
        raise BundleIntegrityError(f"{graph} is not an ONNX graph of a bundle: {error}") from error
    for tensor in tensors:
        if graph.parent / tensor.location != weights:
            raise BundleIntegrityError(
                f"{graph}: tensor {tensor.name!r} lies in {tensor.location!r}; only {weights.name} "
                "of the bundle may hold weights"
            )
        if tensor.offset + tensor.length > n_bytes:
            raise BundleIntegrityError(
                f"{graph}: tensor {tensor.name!r} ends at byte {tensor.offset + tensor.length}; "
                f"{weights.name} has {n_bytes}"
            )


def external_tensors(model: bytes) -> Iterator[ExternalTensor]:
    """Find every tensor of an ONNX model that lies in another file.

    Raises:
        ValueError: if ``model`` is no protobuf message, or a place is not written as the format
            asks for: ``location``, ``offset`` and ``length``, once each, the latter in decimal.
    """
    return _tensors(memoryview(model), "ModelProto", 0)


def _tensors(message: memoryview, kind: str, depth: int) -> Iterator[ExternalTensor]:
    if depth > _MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    if kind == _TENSOR:
        yield from _external(message)
        return
    children = _CHILDREN[kind]
    for number, value in _fields(message):
        if number in children:
            if not isinstance(value, memoryview):
                raise ValueError(f"field {number} of {kind} is not a message")
            yield from _tensors(value, children[number], depth + 1)


def _external(tensor: memoryview) -> Iterator[ExternalTensor]:
    name, is_external, places = "", False, []
    dims: list[int] = []
    data_type = 0
    for number, value in _fields(tensor):
        if number == 1:
            dims += [value] if isinstance(value, int) else _varints(value)
        elif number == 2 and isinstance(value, int):
            data_type = value
        elif number == 8 and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif number == 14:
            is_external = value == _EXTERNAL
        elif number == 13 and isinstance(value, memoryview):
            entry = {n: str(v, "utf-8") for n, v in _fields(value) if isinstance(v, memoryview)}
            places.append((entry.get(1, ""), entry.get(2, "")))
    if not is_external and not places:
        return
    found = dict(places)
    if sorted(key for key, _ in places) != ["length", "location", "offset"]:
        raise ValueError(f"tensor {name!r} has {sorted(found)} for location, offset and length")
    sizes = [found["offset"], found["length"]]
    if not all(text.isascii() and text.isdecimal() and len(text) < 20 for text in sizes):
        raise ValueError(f"tensor {name!r} lies at {sizes}, which are no sizes in bytes")
    yield ExternalTensor(
        name=name,
        dims=tuple(dims),
        data_type=data_type,
        location=found["location"],
        offset=int(found["offset"]),
        length=int(found["length"]),
    )


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field: integers as they are, all else as bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise ValueError("it is not a protobuf message")
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError("it is not a protobuf message")
        if at + size > len(message):
            raise ValueError("it ends in the middle of a field")
        yield number, message[at : at + size]
        at += size


def _varints(message: memoryview) -> list[int]:
    """Read integers that lie one after the other, as repeated ones do."""
    found, at = [], 0
    while at < len(message):
        value, at = _varint(message, at)
        found.append(value)
    return found


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("it ends in the middle of a number" if shift < 70 else "a number is too long")
