from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sdt_deploy.bundle import STATES, WEIGHTS, Bundle, Manifest, _digest
from sdt_deploy.bundle_files import MANIFEST
from sdt_deploy.errors import BundleError, BundleFormatError, BundleIntegrityError, OutputError
from sdt_deploy.exporters.export import export
from sdt_deploy.exporters.onnx import ALIGNMENT
from sdt_deploy.exporters.restore import restore
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.verification import verify_bundle
from tests.samples import CONFIGS, ExportedModel

Exported = Callable[[str], ExportedModel]
GOLDEN = Path(__file__).parent / "data" / "golden-bundle-v1"


@pytest.fixture
def copied(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported("active-lm").bundle, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, object]], None], *, sign: bool = True) -> None:
    """Change the manifest; ``sign`` makes the digest match, as a careful attacker would."""
    path = bundle / MANIFEST
    body = json.loads(path.read_text())
    body.pop("digest")
    change(body)
    body["digest"] = _digest(body) if sign else "0" * 64
    path.write_text(json.dumps(body))


def test_manifest_survives_a_round_trip(exported: Exported) -> None:
    content = (exported("all-grouped").bundle / MANIFEST).read_bytes()
    manifest = Manifest.from_json(content)
    assert manifest.to_json() == content
    assert manifest.stage_layers == ((0, 3), (3, 4))
    assert manifest.quality is None
    assert manifest.provenance["license"] == "MIT"


def test_every_byte_of_every_file_counts(copied: Path) -> None:
    """Flip bytes in every file, the manifest included: all are caught before use."""
    rng = np.random.default_rng(0)
    files = sorted(path for path in copied.iterdir())
    assert len(files) >= 9
    for path in files:
        content = path.read_bytes()
        for position in {0, len(content) - 1, *rng.integers(0, len(content), 12).tolist()}:
            altered = bytearray(content)
            altered[position] ^= 1 << int(rng.integers(0, 7))
            path.write_bytes(altered)
            with pytest.raises(BundleError):
                Bundle.open(copied)
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(BundleError):
            Bundle.open(copied)
        path.unlink()
        with pytest.raises(BundleError):
            Bundle.open(copied)
        path.write_bytes(content)
    Bundle.open(copied)


def test_a_newer_version_says_so(copied: Path) -> None:
    edit(copied, lambda body: body.update(format_version=8))
    with pytest.raises(
        BundleFormatError, match=r"format version 8; this release.*versions 1, 2, 3, 4, 5, 6, 7"
    ):
        Bundle.open(copied)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "c:\\x", "./x", ""])
def test_paths_stay_inside(copied: Path, name: str) -> None:
    def add(body: dict[str, object]) -> None:
        files = body["files"]
        assert isinstance(files, dict)
        files[name] = {"sha256": "0" * 64, "size_bytes": 0}

    edit(copied, add)
    with pytest.raises(BundleIntegrityError, match="outside the bundle"):
        Bundle.open(copied)


def test_links_are_refused(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(b"")
    (copied / "folder").symlink_to(tmp_path / "outside")

    def add(body: dict[str, Any]) -> None:
        empty = hashlib.sha256(b"").hexdigest()
        body["files"]["folder/file"] = {"sha256": empty, "size_bytes": 0}

    original = (copied / MANIFEST).read_bytes()
    edit(copied, add)
    with pytest.raises(BundleIntegrityError, match="symbolic link"):
        Bundle.open(copied)
    (copied / MANIFEST).write_bytes(original)
    weights = copied / WEIGHTS
    shutil.move(weights, tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleIntegrityError, match="symbolic link"):
        Bundle.open(copied)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"format": "sdt-bundle"}'])
def test_what_is_no_manifest(copied: Path, content: bytes) -> None:
    (copied / MANIFEST).write_bytes(content)
    with pytest.raises(BundleFormatError):
        Bundle.open(copied)


def _graphs(body: Any) -> list[dict[str, Any]]:
    graphs: list[dict[str, Any]] = body["graphs"]
    return graphs


def _in_half(body: Any, *, version: int) -> None:
    """Turn a float32 manifest into one of bfloat16."""
    body.update(format_version=version)
    body["export"]["precision"] = "bfloat16"
    for graph in _graphs(body):
        for tensor in (*graph["inputs"], *graph["outputs"]):
            if tensor["name"] in STATES:
                tensor["dtype"] = "bfloat16"


def test_half_precision_came_with_version_2(copied: Path) -> None:
    edit(copied, lambda body: _in_half(body, version=2))
    assert Bundle.open(copied).manifest.export.precision == "bfloat16"


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(graphs=[{"name": "entry"}]),
        lambda body: body.update(graphs=_graphs(body)[1:]),
        lambda body: body.update(graphs=[*_graphs(body), _graphs(body)[0]]),
        lambda body: _graphs(body)[2].update(layers=[2, 3]),
        lambda body: _graphs(body)[1].update(attention_layout="ragged"),
        lambda body: _graphs(body)[0]["inputs"][0].update(dtype="float99"),
        lambda body: _graphs(body)[0].update(file="other.onnx"),
        lambda body: body.update(score_quantiles=[0.5]),
        lambda body: body.update(pinned_share="x"),
        lambda body: body.update(files=[]),
        lambda body: body["files"]["entry.onnx"].pop("size_bytes"),
        lambda body: body.update(format_version=True),
        lambda body: body["model"].update(thresholds=[0.5, 0.1, 0.2]),
        lambda body: body["export"].update(precision="int3"),
        lambda body: body["export"].update(precision="float16"),
        lambda body: _graphs(body)[1]["outputs"][0].update(dtype="float16"),
        lambda body: _in_half(body, version=1),
        lambda body: body.update(model=[]),
    ],
)
def test_a_signed_but_senseless_manifest(copied: Path, change: Callable[[Any], None]) -> None:
    edit(copied, change)
    with pytest.raises(BundleFormatError):
        Bundle.open(copied)


def test_the_golden_bundle_keeps_opening() -> None:
    bundle = Bundle.open(GOLDEN)
    with Session.open(bundle) as session:
        checks = verify_bundle(bundle, session)
    assert [check.path for check in checks] == ["sparse", "masked", "dense"]
    assert all(check.max_abs_error < 1e-4 and check.routing_flips == 0 for check in checks)


@pytest.mark.parametrize("name", CONFIGS)
def test_verify_and_restore(exported: Exported, name: str) -> None:
    sample = exported(name)
    bundle = Bundle.open(sample.bundle)
    with Session.open(bundle) as session:
        assert all(check.n_cases == 3 for check in verify_bundle(bundle, session))
    restored = restore(bundle).state_dict()
    for key, tensor in sample.model.state_dict().items():
        np.testing.assert_array_equal(restored[key].numpy(), tensor.numpy())


def test_a_copy_by_hard_links_is_as_good(exported: Exported, tmp_path: Path) -> None:
    """As backups and package stores make them; the onnx package refuses to read such weights."""
    sample = exported("all-embedding")
    shutil.copytree(sample.bundle, tmp_path / "a")  # other tests use the sample
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=os.link)
    bundle = Bundle.open(tmp_path / "b")
    with Session.open(bundle) as session:
        verify_bundle(bundle, session)
    restored = restore(bundle).state_dict()
    for key, tensor in sample.model.state_dict().items():
        np.testing.assert_array_equal(restored[key].numpy(), tensor.numpy())


@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_are_dynamic_clean_and_equal_where_layers_are(exported: Exported, name: str) -> None:
    sample = exported(name)
    manifest = Bundle.open(sample.bundle).manifest
    by_size: dict[int, set[str]] = {}
    for spec in manifest.stages:
        assert spec.layers is not None
        assert spec.attention_layout == "padded-heads"
        by_size.setdefault(spec.layers[1] - spec.layers[0], set()).add(spec.graph_sha256)
    assert all(len(hashes) == 1 for hashes in by_size.values())
    for spec in manifest.graphs.values():
        content = (sample.bundle / spec.file).read_bytes()
        assert b"/site-packages" not in content
        assert b".py" not in content
        graph = onnx.load(str(sample.bundle / spec.file), load_external_data=False).graph
        for value in [*graph.input, *graph.output]:
            declared = {t.name: t for t in (*spec.inputs, *spec.outputs)}[value.name]
            dims = value.type.tensor_type.shape.dim
            assert [d.dim_param or d.dim_value for d in dims] == list(declared.axes)
        assert "GatherND" not in {node.op_type for node in graph.node}


def test_weights_are_stored_once_and_aligned(exported: Exported) -> None:
    sample = exported("active-lm")
    n_bytes = sum(t.numel() * 4 for t in sample.model.state_dict().values())
    n_tensors = len(sample.model.state_dict())
    size = (sample.bundle / WEIGHTS).stat().st_size
    assert size < n_bytes + n_tensors * ALIGNMENT
    graph = onnx.load(str(sample.bundle / "dense.onnx"), load_external_data=False).graph
    offsets = [
        int(entry.value)
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset"
    ]
    assert len(offsets) >= 3 * 16
    assert all(offset % ALIGNMENT == 0 for offset in offsets)


def test_existing_targets_are_kept(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("content")
    with pytest.raises(OutputError, match="exists already"):
        export(Checkpoint(model=exported("active-lm").model), tmp_path / "precious")
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]
    assert (tmp_path / "precious" / "file").read_text() == "content"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere such names do not exist")
def test_paths_that_are_not_utf8(exported: Exported, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"\xe9")
    shutil.copytree(exported("active-lm").bundle, odd)
    with pytest.raises(BundleFormatError, match="not UTF-8"):
        Bundle.open(odd)
    checkpoint = Checkpoint(model=exported("active-lm").model)
    with pytest.raises(OutputError, match="not UTF-8"):
        export(checkpoint, odd / "out")
