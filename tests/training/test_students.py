from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from sdt_deploy.cli import app
from sdt_deploy.config import HeadConfig
from sdt_deploy.errors import CheckpointError, ConfigError, SdtDeployError
from sdt_deploy.evaluation.evaluate import evaluate
from sdt_deploy.model import checkpoints
from sdt_deploy.model.adapters import read_adapter
from sdt_deploy.model.conversion import convert
from sdt_deploy.training.config import DistillConfig
from sdt_deploy.training.job import JobOptions, distill
from sdt_deploy.training.losses import LossWeights
from sdt_deploy.training.students import begin, truncated
from tests.textmodels import CONFIG, save_teacher, texts

TEXTS = texts(150)


def config(**changes: Any) -> DistillConfig:
    values = {"target_depth": 2.5, "n_steps": 12, "batch_size": 8, "learning_rate": 1e-2}
    return DistillConfig(**{**values, **changes})


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save_teacher(tmp_path / "teacher")


def test_a_run_goes_on_from_an_adapter(teacher: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{name}.safetensors" for name in "abc")
    low_rank = config(lora_rank=4)
    distill(teacher, tmp_path / "a", TEXTS, low_rank, JobOptions(adapter=first))
    still = config(lora_rank=4, learning_rate=1e-12, curriculum_share=0)
    distill(teacher, tmp_path / "b", TEXTS, still, JobOptions(adapter=second), start=first)
    whole = config(learning_rate=1e-12)
    distill(teacher, tmp_path / "c", TEXTS, whole, JobOptions(), start=first)
    expected = dict(checkpoints.load(tmp_path / "a").model.state_dict())
    for name in "bc":
        found = checkpoints.load(tmp_path / name).model
        for key, value in found.state_dict().items():
            torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-4)
    # What it wrote is for the dense teacher, as the first adapter is.
    convert(teacher, tmp_path / "merged", adapter=second)
    for key, value in checkpoints.load(tmp_path / "merged").model.state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-4)
    moving = config(lora_rank=4, n_steps=20)
    _, last = distill(
        teacher, tmp_path / "d", TEXTS, moving, JobOptions(adapter=third), start=first
    )
    assert last is not None
    name = next(iter(read_adapter(first).factors))
    assert not torch.equal(
        read_adapter(third).factors[name][0], read_adapter(first).factors[name][0]
    )


def test_an_adapter_to_start_from_must_fit(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    distill(
        teacher, tmp_path / "a", TEXTS, config(n_steps=2, lora_rank=4), JobOptions(adapter=path)
    )
    other = save_teacher(tmp_path / "other", seed=5)

    def go(source: Path = teacher, start: Path = path, baseline: Any = None, rank: int = 4) -> None:
        options = JobOptions()
        run = config(lora_rank=rank)
        distill(source, tmp_path / "out", TEXTS, run, options, start=start, baseline=baseline)

    with pytest.raises(ConfigError, match=r"has the ranks \[4\]"):
        go(rank=3)
    with pytest.raises(CheckpointError, match="trained for other weights"):
        go(source=other)
    with pytest.raises(CheckpointError, match="missing"):
        go(start=tmp_path / "missing")
    with pytest.raises(ConfigError, match="begins with the teacher"):
        go(baseline="random")
    assert not (tmp_path / "out").exists()


def test_another_start_is_another_run(teacher: Path, tmp_path: Path) -> None:
    stops = config(n_steps=4)

    def dies(report: Any) -> None:
        if report.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(teacher, tmp_path / "out", TEXTS, stops, JobOptions(save_every=2), each=dies)
    with pytest.raises(CheckpointError, match="another run"):
        distill(teacher, tmp_path / "out", TEXTS, stops, JobOptions(resume=True), baseline="random")


def test_a_truncated_model_is_the_first_layers(teacher: Path) -> None:
    dense = checkpoints.load(teacher)
    short = truncated(dense, 3.0).model
    assert short.config.n_layers == 3
    assert short.config.probe == "none"
    weights = dense.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in short.state_dict().items())
    for depth in (2.5, 0.0, 5.0):
        with pytest.raises(ConfigError, match="whole number of layers"):
            truncated(dense, depth)


def test_a_random_probe_knows_nothing_of_importance(teacher: Path) -> None:
    dense = checkpoints.load(teacher)
    fitted, random = (begin(dense, TEXTS, config(), baseline=name) for name in (None, "random"))
    again = begin(dense, TEXTS, config(), baseline="random")
    a, b = fitted.student.model.scorer.weight, random.student.model.scorer.weight
    assert torch.equal(b, again.student.model.scorer.weight)
    assert abs(float(torch.cosine_similarity(a, b, dim=0).detach())) < 0.9
    assert random.key != fitted.key


def call(teacher: Path, out: Path, *more: str) -> Result:
    path = out.with_name("texts.txt")
    path.write_text("\n".join(TEXTS))
    arguments = ["distill", str(teacher), str(out), "--texts", str(path), "--batch-size", "8"]
    return CliRunner().invoke(
        app, [*arguments, *(() if "--steps" in more else ("--steps", "4")), *more]
    )


@pytest.mark.parametrize(("baseline", "depth"), [("truncated", "3"), ("random", "2.5")])
def test_baselines_are_trained_by_the_command(
    teacher: Path, tmp_path: Path, baseline: str, depth: str
) -> None:
    done = call(teacher, tmp_path / "out", "--baseline", baseline, "--target-depth", depth)
    assert done.exit_code == 0, done.output
    found = evaluate(tmp_path / "out", teacher, texts(100, seed=4))
    assert found.mean_depth == pytest.approx(float(depth), abs=0.2)


@pytest.mark.parametrize(
    "head",
    [
        HeadConfig(kind="lm", bias=False),
        HeadConfig(kind="classify", pooling="cls", n_classes=3, dense_tanh=True),
        HeadConfig(kind="hidden"),
    ],
)
def test_every_head_is_distilled_by_the_command(head: HeadConfig, tmp_path: Path) -> None:
    """Towards the outputs of its teacher, on texts that were not trained on."""
    teacher = save_teacher(tmp_path / "teacher", CONFIG.replace(head=head))
    dense = checkpoints.load(teacher).model
    more = ["--target-depth", "2.5", "--learning-rate", "1e-2", "--set", "curriculum_share=0"]
    ids = torch.randint(2, 60, (40, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)

    def distance(steps: int) -> float:
        out = tmp_path / f"out-{steps}"
        done = call(teacher, out, *more, "--steps", str(steps))
        assert done.exit_code == 0, done.output
        with torch.no_grad():
            found = checkpoints.load(out).model(ids, mask).output
            wanted = dense.as_dense()(ids, mask).output
        if head.kind == "hidden":
            return float((found - wanted).square().mean())
        pair = found.log_softmax(-1), wanted.log_softmax(-1)
        return float(torch.nn.functional.kl_div(*pair, reduction="batchmean", log_target=True))

    assert distance(60) < 0.8 * distance(1)


def test_any_setting_can_be_given(teacher: Path, tmp_path: Path) -> None:
    settings = ["mixed_share=0.5", "loss.neighbours=1.5", "curriculum=steps", "crop_share=0.3"]
    more = [part for setting in settings for part in ("--set", setting)]
    done = call(teacher, tmp_path / "out", "--target-depth", "2.5", *more)
    assert done.exit_code == 0, done.output
    recipe = checkpoints.load(tmp_path / "out").provenance["distillation"]
    assert (recipe["mixed_share"], recipe["loss"]["neighbours"]) == (0.5, 1.5)
    assert (recipe["curriculum"], recipe["crop_share"]) == ("steps", 0.3)
    for bad, message in (
        ("mixed_share", "given as NAME=VALUE"),
        ("loss=3", "given as NAME=VALUE"),
        ("losses.output=3", "given as NAME=VALUE"),
        ("loss.output=x", "of another kind"),
        ("mixed_share=2", "mixed_share must be in 0..1"),
        ("curriculum=never", "curriculum must be one of"),
        ("n_steps=0.5", "n_steps must be"),
    ):
        done = call(teacher, tmp_path / "none", "--target-depth", "2.5", "--set", bad)
        assert isinstance(done.exception, SdtDeployError), bad
        assert message in str(done.exception)
    assert not (tmp_path / "none").exists()


def test_texts_that_change_are_not_cached(teacher: Path, tmp_path: Path) -> None:
    """The cache holds states of the texts as they are, not of parts of them."""
    changing = config(crop_share=0.6, replaced_share=0.2, loss=LossWeights(hidden=1.0))
    losses = []
    for mb in (0, 1024):
        log = tmp_path / f"{mb}.training" / "log.jsonl"
        distill(teacher, tmp_path / str(mb), TEXTS, changing, JobOptions(cache_mb=mb))
        losses.append([json.loads(line)["loss"] for line in log.read_text().splitlines()])
    assert losses[0] == losses[1]
