from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from sdt_deploy.bundle import Bundle, Manifest, write_manifest
from sdt_deploy.cli import app
from sdt_deploy.config import ExportConfig
from sdt_deploy.costs import active_shares, thresholds_for_depth
from sdt_deploy.errors import BundleIntegrityError, ConfigError, SdtDeployError
from sdt_deploy.evaluation import evaluate as evaluating
from sdt_deploy.evaluation.evaluate import evaluate
from sdt_deploy.evaluation.frontier import frontier
from sdt_deploy.evaluation.oracle import embed_with_oracle
from sdt_deploy.exporters import export as exporting
from sdt_deploy.exporters.export import export
from sdt_deploy.model import checkpoints
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.conversion import ProbeFit, at_depth, convert
from sdt_deploy.runtime.session import Session
from sdt_deploy.training.students import truncated
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


def thresholds_of(manifest: Manifest, depth: float) -> tuple[float, ...]:
    return thresholds_for_depth(
        manifest.model,
        depth,
        score_quantiles=manifest.score_quantiles,
        pinned_share=manifest.pinned_share,
    )


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
        thresholds = thresholds_of(session.manifest, depth)
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
    with pytest.raises(ConfigError, match="this model has none"):
        thresholds_of(manifest, 3.0)


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
    found = thresholds_of(manifest, wanted)
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


def test_an_export_at_another_depth_is_the_bundle_run_at_that_depth(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the tracing, which knows nothing of depths and takes long."""
    _, model, bundle = made
    exported: list[Checkpoint] = []
    monkeypatch.setattr(
        exporting, "export", lambda checkpoint, *_, **__: exported.append(checkpoint)
    )
    arguments = ["export", str(model), str(tmp_path / "deep"), "--target-depth", "3.25"]
    CliRunner().invoke(app, arguments)
    (deep,) = exported
    assert deep.provenance["target_depth"] == 3.25
    with Session.open(bundle) as session:
        expected = session.run(texts(200, seed=6), target_depth=3.25)
    sample = TokenSample(input_ids=expected.input_ids, cu_seqlens=expected.cu_seqlens)
    found = embed_with_oracle(deep.model, sample)
    assert found.mean_depth == pytest.approx(3.25, abs=0.15)
    assert (found.depths == expected.depths).all()
    np.testing.assert_allclose(found.embeddings, expected.output, atol=1e-4)


def test_a_record_leaves_alone_what_came_meanwhile(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines that were built, or another export, while the evaluation ran."""
    teacher, model, bundle = made
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    compare = evaluating.reference_of

    def slow(*arguments: Any) -> Any:
        manifest = Bundle.open(copy).manifest
        write_manifest(copy, dataclasses.replace(manifest, provenance={"added": "meanwhile"}))
        return compare(*arguments)

    monkeypatch.setattr(evaluating, "reference_of", slow)
    evaluate(copy, teacher, texts(20))
    found = Bundle.open(copy).manifest
    assert found.provenance == {"added": "meanwhile"}
    assert found.quality is not None

    def slower(*arguments: Any) -> Any:
        shallower = at_depth(checkpoints.load(model), 3.5)
        export(shallower, copy, ExportConfig(), overwrite=True)
        return compare(*arguments)

    monkeypatch.setattr(evaluating, "reference_of", slower)
    with pytest.raises(BundleIntegrityError, match="exported anew"):
        evaluate(copy, teacher, texts(20))
    assert Bundle.open(copy).manifest.quality is None


@pytest.mark.parametrize(
    ("depth", "message"), [("0.5", "cannot be reached"), ("4.5", "cannot be reached")]
)
def test_an_export_at_a_depth_that_cannot_be_had(
    made: tuple[Path, Path, Path], tmp_path: Path, depth: str, message: str
) -> None:
    arguments = ["export", str(made[1]), str(tmp_path / "none"), "--target-depth", depth]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)
    assert not (tmp_path / "none").exists()


def test_an_export_at_a_depth_needs_score_quantiles(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    convert(made[0], tmp_path / "bare")
    arguments = ["export", str(tmp_path / "bare"), str(tmp_path / "none"), "--target-depth", "3"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ConfigError)
    assert "this model has none" in str(done.exception)
    assert not (tmp_path / "none").exists()


def test_a_sweep_sets_a_bundle_beside_what_else_could_be_trained(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    teacher, model, bundle = made
    short = checkpoints.load(teacher)
    checkpoints.save(truncated(short, 2), tmp_path / "first-2")
    held_out = texts(60, seed=3)
    before = Bundle.open(bundle).manifest.quality
    found = frontier(bundle, teacher, held_out, [2.0, 3.0, 4.0], baselines=[tmp_path / "first-2"])
    same = frontier(model, teacher, held_out, [2.0, 3.0, 4.0])
    assert [(p.model, p.target_depth) for p in found.points] == [
        *((bundle.name, depth) for depth in (2.0, 3.0, 4.0)),
        ("first-2", None),
    ]
    for point, other in zip(found.points, same.points, strict=False):
        assert point.flops_ratio == pytest.approx(other.flops_ratio)
        for key, value in other.quality.to_dict().items():
            assert point.quality.to_dict()[key] == pytest.approx(value, abs=2e-4), key
    ratios = [point.flops_ratio for point in found.points]
    assert ratios[0] < ratios[1] < ratios[2]
    assert ratios[2] == pytest.approx(1, abs=0.02)  # the probe's own operations
    assert ratios[3] == pytest.approx(0.5, abs=0.02)
    assert found.points[2].quality.mean_cosine == pytest.approx(1)
    assert found.points[3].quality.mean_depth == 2
    expected = evaluate(tmp_path / "first-2", teacher, held_out)
    assert found.points[3].quality == expected
    assert Bundle.open(bundle).manifest.quality == before, "a sweep records nothing"


def test_the_command_that_sweeps(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, model, bundle = made
    path, image = tmp_path / "texts.txt", tmp_path / "plot.png"
    path.write_text("\n".join(texts(40, seed=3)))
    common = ["--teacher", str(teacher), "--texts", str(path)]

    def call(*more: str) -> Result:
        return CliRunner().invoke(app, ["evaluate", str(bundle), *common, *more])

    swept = ["--depths", "4,2.5", "--baseline", str(model), "--plot", str(image)]
    done = call(*swept, "--json")
    assert done.exit_code == 0, done.output
    points = json.loads(done.stdout)["points"]
    assert [(p["model"], p["target_depth"]) for p in points] == [
        ("bundle", 2.5),
        ("bundle", 4.0),
        ("model", 2.5),
        ("model", 4.0),
    ]
    assert points[0].keys() == KEYS | {"model", "target_depth", "flops_ratio"}
    assert image.read_bytes()[:4] == b"\x89PNG"
    assert "top-10" in call("--depths", "3").output
    for more, error in (
        (["--depths", "3,x"], "positive numbers"),
        (["--depths", ""], "positive numbers"),
        (["--depths", "-1"], "positive numbers"),
        (["--depths", "9"], "cannot be reached"),
        (["--plot", str(image)], "--depths"),
        (["--depths", "3", "--baseline", str(bundle)], "names of their own"),
    ):
        done = call(*more)
        assert isinstance(done.exception, SdtDeployError), more
        assert error in str(done.exception)
