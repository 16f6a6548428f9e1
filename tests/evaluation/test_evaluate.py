from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sdt_deploy.bundle import Bundle
from sdt_deploy.cli import app
from sdt_deploy.config import ExportConfig
from sdt_deploy.costs import active_shares, thresholds_for_depth
from sdt_deploy.errors import ConfigError
from sdt_deploy.evaluation.evaluate import evaluate
from sdt_deploy.exporters.export import export
from sdt_deploy.model import checkpoints
from sdt_deploy.model.conversion import ProbeFit, convert
from sdt_deploy.runtime.session import Session
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Teacher, model with a fitted probe, bundle."""
    directory = tmp_path_factory.mktemp("evaluate")
    teacher, model, bundle = (directory / name for name in ("teacher", "model", "bundle"))
    save_teacher(teacher)
    fit = ProbeFit(texts=texts(200), target_depth=2.5, levels="two-level")
    convert(teacher, model, fit=fit)
    export(checkpoints.load(model), bundle, ExportConfig())
    return teacher, model, bundle


@pytest.mark.parametrize("depth", [1.9, 2.2, 2.5, 3.0, 3.5, 4.0])
def test_one_bundle_runs_at_several_depths(made: tuple[Path, Path, Path], depth: float) -> None:
    with Session.open(made[2]) as session:
        result = session.run(texts(300, seed=5), target_depth=depth)
        thresholds = thresholds_for_depth(session.manifest, depth)
        same = session.run(texts(300, seed=5), thresholds=thresholds)
    assert result.layer_usage.mean_depth == pytest.approx(depth, abs=0.15)
    assert set(result.depths.tolist()) <= {1, 4}
    assert (same.depths == result.depths).all()


def test_depths_that_cannot_be_had(made: tuple[Path, Path, Path]) -> None:
    with Session.open(made[2]) as session:
        for depth in (0.5, 4.1, float("nan"), "3", True):
            with pytest.raises(ConfigError):
                session.run("w3 w4", target_depth=depth)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="contradict"):
            session.run("w3 w4", target_depth=3, thresholds=[0, 0, 0, 0])
        assert session.run("w3 w4").depths.size == 4
        manifest = dataclasses.replace(session.manifest, score_quantiles=None)
    with pytest.raises(ConfigError, match="no"):
        thresholds_for_depth(manifest, 3.0)


@given(st.lists(st.floats(0.0, 0.99), min_size=4, max_size=4), st.floats(0, 0.9), st.floats(0, 1))
def test_the_depth_from_quantiles_is_the_one_asked_for(
    made: tuple[Path, Path, Path], cuts: list[float], pinned: float, place: float
) -> None:
    base = Bundle.open(made[2], check_files=False).manifest
    thresholds = (0.0, *sorted(cuts)[1:])
    manifest = dataclasses.replace(
        base,
        model=base.model.replace(thresholds=thresholds),
        score_quantiles=tuple(np.linspace(0, 1, 101) ** 2),
        pinned_share=pinned,
    )
    n_always = sum(value == 0 for value in thresholds)
    lowest = pinned * 4 + (1 - pinned) * n_always
    wanted = lowest + (4 - lowest) * place
    assume(n_always < 4)
    found = thresholds_for_depth(manifest, wanted)
    assert list(found) == sorted(found)
    assert sum(active_shares(manifest, found)) == pytest.approx(wanted, abs=1e-4)


def test_a_bundle_keeps_what_its_model_shows(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, model, bundle = made
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
