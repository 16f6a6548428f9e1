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
from sdt_deploy.exporters import export as exporting
from sdt_deploy.exporters import quantization
from sdt_deploy.exporters.restore import restore
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.verification import verify_bundle
from tests.samples import ExportedModel, random_batch

Exported = Callable[[str], ExportedModel]


def export_int8(sample: ExportedModel, target: Path, layers_per_stage: int) -> Bundle:
    config = ExportConfig(layers_per_stage=layers_per_stage, quantization="int8")
    exporting.export(Checkpoint(model=sample.model), target, config)
    return Bundle.open(target)


@pytest.mark.parametrize("name", ["all-embedding", "active-grouped"])
def test_int8_is_near_float32(exported: Exported, tmp_path: Path, name: str) -> None:
    sample = exported(name)
    original = Bundle.open(sample.bundle)
    bundle = export_int8(sample, tmp_path / "int8", original.manifest.export.layers_per_stage)
    assert Bundle.open(bundle.path).manifest.export.numbers == "int8"
    assert original.manifest.export.numbers == "float32"
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
            step = np.abs(value).max(axis=1, keepdims=True) / 127
            assert (np.abs(restored[key].numpy() - value) <= 0.51 * step).all()
            assert (restored[key].numpy() != value).any()
        else:
            np.testing.assert_array_equal(restored[key].numpy(), value)


def test_int8_graphs_are_plain_and_share_their_weights(exported: Exported, tmp_path: Path) -> None:
    bundle = export_int8(exported("all-embedding"), tmp_path / "int8", 1)
    stages = bundle.manifest.stages
    assert len({spec.graph_sha256 for spec in stages}) == 1
    offsets = {}
    for name in ("stage-00", "dense", "masked"):
        proto = onnx.load(str(bundle.file(f"{name}.onnx")), load_external_data=False)
        assert {entry.domain for entry in proto.opset_import} == {""}
        assert proto.producer_name == "sdt-deploy"
        kinds = [node.op_type for node in proto.graph.node]
        n_layers = 1 if name == "stage-00" else len(stages)
        assert kinds.count("MatMulInteger") == 6 * n_layers
        assert kinds.count("MatMul") == 2 * n_layers  # queries by keys, weights by values
        tensor = next(
            t for t in proto.graph.initializer if t.name == "layers.0.query.weight_quantized"
        )
        assert tensor.data_type == onnx.TensorProto.INT8
        offsets[name] = next(e.value for e in tensor.external_data if e.key == "offset")
    assert len(set(offsets.values())) == 1


def test_a_poor_quantisation_is_refused(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(*arguments: Any) -> Any:
        proto, parameters = quantization.quantize(*arguments)
        scale = "layers.0.value.weight_scale"
        if scale in parameters:
            parameters[scale] = parameters[scale] * 3
        return proto, parameters

    monkeypatch.setattr(exporting, "quantize", doubled)
    with pytest.raises(VerificationError, match="stage-00 deviates"):
        export_int8(exported("active-lm"), tmp_path / "int8", 1)
    assert not (tmp_path / "int8").exists()


def test_what_was_not_quantised_is_an_error(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(model: onnx.ModelProto, path: Path, **options: Any) -> None:
        onnx.save(model, path)

    monkeypatch.setattr(quantization, "quantize_dynamic", copy)
    with pytest.raises(ExportError, match=r"did not quantise .*layers\.0\.query\.weight"):
        export_int8(exported("active-lm"), tmp_path / "int8", 1)

    def fail(model: onnx.ModelProto, path: Path, **options: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(quantization, "quantize_dynamic", fail)
    with pytest.raises(ExportError, match="no such operator"):
        export_int8(exported("active-lm"), tmp_path / "int8", 1)


def test_unknown_quantisations_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantization must be one of 'none', 'int8'"):
        ExportConfig(quantization="int4")  # type: ignore[arg-type]
