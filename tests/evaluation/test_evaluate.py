from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdt_deploy.bundle import Bundle
from sdt_deploy.cli import app
from sdt_deploy.config import ExportConfig
from sdt_deploy.evaluation.evaluate import evaluate
from sdt_deploy.exporters.export import export
from sdt_deploy.model import checkpoints
from sdt_deploy.model.conversion import ProbeFit, convert
from tests.textmodels import save_teacher, texts

KEYS = {
    "mean_cosine",
    "p5_cosine",
    "spearman",
    "top1_agreement",
    "top10_agreement",
    "mean_depth",
    "n_texts",
}


def test_a_bundle_keeps_what_its_model_shows(tmp_path: Path) -> None:
    teacher, model, bundle = (tmp_path / name for name in ("teacher", "model", "bundle"))
    save_teacher(teacher)
    fit = ProbeFit(texts=texts(200), target_depth=2.5, levels="two-level")
    convert(teacher, model, fit=fit)
    export(checkpoints.load(model), bundle, ExportConfig())
    held_out = texts(60, seed=3)
    expected = evaluate(model, teacher, held_out)
    assert 1 < expected.mean_depth < 4
    assert expected.mean_cosine < 1
    assert Bundle.open(bundle).manifest.quality is None
    assert evaluate(bundle, teacher, held_out, record=False).n_texts == 60
    assert Bundle.open(bundle).manifest.quality is None

    path = tmp_path / "texts.txt"
    path.write_text("\n".join(held_out))
    arguments = ["evaluate", str(bundle), "--teacher", str(teacher), "--texts", str(path), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found.keys() == KEYS
    for key, value in expected.to_dict().items():
        assert found[key] == pytest.approx(value, abs=2e-4), key
    kept = Bundle.open(bundle).manifest.quality
    assert kept is not None
    assert {key: kept[key] for key in KEYS} == found
    assert len(kept["texts_sha256"]) == 64
