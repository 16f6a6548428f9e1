"""Fuzz what reads a bundle before it is trusted, guided by coverage (atheris).

    pip install atheris
    python benchmarks/fuzz_readers.py manifest -max_total_time=60
    python benchmarks/fuzz_readers.py signed -max_total_time=60
    python benchmarks/fuzz_readers.py graph -max_total_time=60

``manifest`` gives any bytes to the reader of manifests, ``signed`` any JSON with a digest that
matches, as who makes a bundle can, and ``graph`` any bytes to what looks for the weights of an ONNX
graph, which is compared with what protobuf finds. Seeds come from the bundle of the tests. A typed
error, or an answer, is right; anything else ends the run with the input that did it. The tests with
hypothesis change manifests by their structure (``tests/test_fuzz_manifest.py``); this one finds
what only bytes can say.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import atheris
import onnx
from google.protobuf.message import DecodeError, Message

with atheris.instrument_imports(include=["sdt_deploy", "json"]):
    from sdt_deploy.bundle import Manifest, _digest
    from sdt_deploy.bundle_files import MANIFEST
    from sdt_deploy.errors import BundleError
    from sdt_deploy.external_data import external_tensors

GOLDEN = Path(__file__).parents[1] / "tests" / "data" / "golden-bundle-v1"


def manifest(content: bytes) -> None:
    """Read bytes as a manifest; what is accepted survives being written and read again."""
    try:
        found = Manifest.from_json(content)
    except BundleError:
        return
    if Manifest.from_json(found.to_json()) != found:
        raise RuntimeError("a manifest changed on its way to the disk and back")


def signed(content: bytes) -> None:
    """Sign bytes that are a JSON object, and read that."""
    try:
        body = json.loads(content)
        digest = _digest(body)
    except (ValueError, RecursionError):
        return
    if isinstance(body, dict):
        manifest(json.dumps({**body, "digest": digest}).encode())


def graph(content: bytes) -> None:
    """Look for tensors in bytes as if they were an ONNX graph; protobuf must not see more."""
    try:
        found = {tensor.location for tensor in external_tensors(content)}
        model = onnx.ModelProto.FromString(content)
    except (ValueError, DecodeError):  # refused by either
        return
    missed = set(_locations(model)) - found
    if missed:
        raise RuntimeError(f"protobuf sees {missed}, which were not found")


def _locations(message: Message) -> Iterator[str]:
    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL:
            yield from (entry.value for entry in message.external_data if entry.key == "location")
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for child in value if isinstance(value, Sequence) else [value]:
                yield from _locations(child)


def seeds(target: Callable[[bytes], None]) -> list[bytes]:
    """Return inputs to start from."""
    content = (GOLDEN / MANIFEST).read_bytes()
    if target is graph:
        return [path.read_bytes() for path in sorted(GOLDEN.glob("*.onnx"))]
    if target is manifest:
        return [content]
    body = json.loads(content)
    del body["digest"]
    return [json.dumps(body, separators=(",", ":")).encode()]


def main() -> None:
    """Read the command line; libFuzzer reads the rest of it."""
    targets = {one.__name__: one for one in (manifest, signed, graph)}
    if len(sys.argv) < 2 or sys.argv[1] not in targets:
        raise SystemExit(f"usage: {sys.argv[0]} {'|'.join(targets)} [libFuzzer options]")
    target = targets[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory() as corpus:
        for i, content in enumerate(seeds(target)):
            (Path(corpus) / f"seed-{i}").write_bytes(content)
        atheris.Setup([*sys.argv, "-max_len=65536", corpus], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
