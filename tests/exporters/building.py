"""What the tests of engines share."""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx

from sdt_deploy.bundle import Bundle
from sdt_deploy.bundle_files import MANIFEST
from sdt_deploy.config import BuildConfig
from sdt_deploy.engines import EngineSet
from tests.samples import sign_bundle

ADA = BuildConfig(flavour="tensorrt-rtx", compute_capabilities=("8.9",))


def stages_only(bundle: Bundle) -> BuildConfig:
    return dataclasses.replace(ADA, graphs=("stage-00", "stage-01"))


def built_graphs(bundle: Bundle) -> list[str]:
    others = "single", "project", "update", "decode-"
    return [name for name in bundle.manifest.graphs if not name.startswith(others)]


def reopened(bundle: Bundle) -> EngineSet:
    engines = Bundle.open(bundle.path).manifest.engines
    assert len(engines) == 1
    return engines[0]


def manifest_of(bundle: Bundle) -> bytes:
    return (bundle.path / MANIFEST).read_bytes()


def files_of(bundle: Bundle) -> dict[str, bytes]:
    return {
        path.relative_to(bundle.path).as_posix(): path.read_bytes()
        for path in sorted(bundle.path.rglob("*"))
        if path.is_file()
    }


def no_build(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("nothing had to be built")


def break_graph(bundle: Bundle, graph: str) -> Bundle:
    path = bundle.path / f"{graph}.onnx"
    proto = onnx.load(path, load_external_data=False)
    next(node for node in proto.graph.node if node.op_type == "Softmax").op_type = "Sharpmax"
    onnx.save(proto, path)
    sign_bundle(bundle.path)
    return Bundle.open(bundle.path)
