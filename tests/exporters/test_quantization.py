"""int8 bundles: near the float32 ones, refused where they are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sdt_deploy.bundle import Bundle
from sdt_deploy.config import ExportConfig
from sdt_deploy.errors import ConfigError, ExportError, VerificationError
from sdt_deploy.exporters import quantization
from sdt_deploy.exporters.restore import restore
from sdt_deploy.exporters.verify import verify_graph
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.verification import verify_bundle
from tests.samples import ExportedModel, random_batch
from tests.test_cli import call

Exported = Callable[[str], ExportedModel]


INT8 = ExportConfig(quantization="int8")


def test_an_int8_bundle(exported: Exported, tmp_path: Path) -> None:
    sample = exported("all-embedding")
    call("export", sample.native, tmp_path / "int8", "--quantize", "int8")
    assert "int8" in call("inspect", tmp_path / "int8")
    bundle, original = Bundle.open(tmp_path / "int8"), Bundle.open(sample.bundle)
    assert bundle.manifest.export.numbers == "int8"
    assert original.manifest.export.numbers == "float32"
    assert len({spec.graph_sha256 for spec in bundle.manifest.stages}) == 1

    batch = random_batch(sample.model.config, [9, 28, 1, 14, 3], 11)
    with Session.open(bundle) as session, Session.open(original) as exact:
        verify_bundle(bundle, session)
        for path in ("sparse", "masked", "dense"):
            found = session.run_batch(batch, path=path)  # type: ignore[arg-type]
            wanted = exact.run_batch(batch, path=path)  # type: ignore[arg-type]
            np.testing.assert_array_equal(found.depths, wanted.depths)
            if wanted.scores is not None:
                np.testing.assert_allclose(found.scores, wanted.scores, rtol=0, atol=1e-5)
            deviation = np.linalg.norm(found.output - wanted.output)
            assert 0 < deviation < 0.06 * np.linalg.norm(wanted.output)

    restored = restore(bundle).state_dict()
    for key, tensor in sample.model.state_dict().items():
        value = tensor.numpy()
        if key.startswith("layers.") and value.ndim == 2:
            step = np.abs(value).max(axis=1, keepdims=True) / 64  # seven bits
            assert (np.abs(restored[key].numpy() - value) <= 0.51 * step).all()
            assert (restored[key].numpy() != value).any()
        else:
            np.testing.assert_array_equal(restored[key].numpy(), value)

    places = set()
    for name in ("stage-00", "dense", "masked"):
        proto = onnx.load(str(bundle.file(f"{name}.onnx")), load_external_data=False)
        assert {entry.domain for entry in proto.opset_import} == {""}
        assert proto.producer_name == "sdt-deploy"
        kinds = [node.op_type for node in proto.graph.node]
        n_layers = 1 if name == "stage-00" else sample.model.config.n_layers
        assert kinds.count("MatMulInteger") == 6 * n_layers
        assert kinds.count("MatMul") == 2 * n_layers  # queries by keys, weights by values
        initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
        weight = initializers["layers.0.query.weight_quantized"]
        assert weight.data_type == onnx.TensorProto.INT8
        places.add(next(entry.value for entry in weight.external_data if entry.key == "offset"))
    assert len(places) == 1


def stage(sample: ExportedModel) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    proto = onnx.load(str(sample.bundle / "stage-00.onnx"))
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    return proto, {name: array for name, array in arrays.items() if name.startswith("layers.")}


def test_a_poor_quantisation_is_refused(exported: Exported, tmp_path: Path) -> None:
    sample = exported("all-embedding")
    proto, _ = quantization.quantize(*stage(sample))
    path = tmp_path / "stage.onnx"
    onnx.save(proto, path)
    error = verify_graph(path, "stage-00", (0, 1), sample.model, INT8)
    assert error > 1e-3
    with pytest.raises(VerificationError, match="stage-00 deviates"):
        verify_graph(path, "stage-00", (0, 1), sample.model, ExportConfig())
    for tensor in proto.graph.initializer:
        if tensor.name == "layers.0.value.weight_scale":
            tripled = onnx.numpy_helper.to_array(tensor) * 3
            tensor.CopyFrom(onnx.numpy_helper.from_array(tripled, tensor.name))
    onnx.save(proto, path)
    with pytest.raises(VerificationError, match="stage-00 deviates"):
        verify_graph(path, "stage-00", (0, 1), sample.model, INT8)


def test_what_was_not_quantised_is_an_error(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(model: onnx.ModelProto, path: Path, **options: Any) -> None:
        onnx.save(model, path)

    def fail(model: onnx.ModelProto, path: Path, **options: Any) -> None:
        raise RuntimeError("no such operator")

    proto, parameters = stage(exported("all-embedding"))
    monkeypatch.setattr(quantization, "quantize_dynamic", copy)
    with pytest.raises(ExportError, match=r"did not quantise .*layers\.0\.query\.weight"):
        quantization.quantize(proto, parameters)
    monkeypatch.setattr(quantization, "quantize_dynamic", fail)
    with pytest.raises(ExportError, match="no such operator"):
        quantization.quantize(proto, parameters)


def test_unknown_quantisations_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantization must be one of 'none', 'int8'"):
        ExportConfig(quantization="int4")  # type: ignore[arg-type]
