from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from sdt_deploy.config import HeadConfig
from sdt_deploy.errors import CheckpointError, ConfigError, InputError, OutputError, TrainingError
from sdt_deploy.evaluation.evaluate import evaluate
from sdt_deploy.model import checkpoints
from sdt_deploy.model.conversion import ProbeFit, convert
from sdt_deploy.training import distill as loop
from sdt_deploy.training import job
from sdt_deploy.training.config import DistillConfig
from sdt_deploy.training.distill import StepReport
from sdt_deploy.training.job import JobOptions, distill, training_directory
from sdt_deploy.training.losses import LossWeights
from tests.textmodels import CONFIG, save_teacher, texts

ROOT = Path(__file__).parent.parent.parent
TEXTS = texts(150)


def config(**changes: Any) -> DistillConfig:
    values = {"target_depth": 2.5, "n_steps": 12, "batch_size": 8, "learning_rate": 2e-3}
    return DistillConfig(**{**values, **changes})


def options(**changes: Any) -> JobOptions:
    return JobOptions(**{"save_every": 5, **changes})


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save_teacher(tmp_path / "teacher")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoints.load(path).model.state_dict())


def steps_of(out: Path) -> list[dict[str, Any]]:
    lines = (training_directory(out) / "log.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines
    ]


def test_training_brings_the_model_closer_to_its_teacher(teacher: Path, tmp_path: Path) -> None:
    convert(teacher, tmp_path / "native")
    long = config(n_steps=80, learning_rate=5e-3, batch_size=16)
    distill(teacher, tmp_path / "short", TEXTS, config(n_steps=1, learning_rate=1e-9), options())
    distill(teacher, tmp_path / "long", TEXTS, long, options())
    held_out = texts(100, seed=7)
    before = evaluate(tmp_path / "short", teacher, held_out)
    after = evaluate(tmp_path / "long", teacher, held_out)
    assert after.mean_cosine > before.mean_cosine + 0.2 * (1 - before.mean_cosine)
    assert after.mean_depth == pytest.approx(2.5, abs=0.2)
    assert [line["step"] for line in steps_of(tmp_path / "long")] == list(range(1, 81))
    left = [path.name for path in training_directory(tmp_path / "long").iterdir()]
    assert left == ["log.jsonl"]


CHILD = """
import json, os, signal, sys
from pathlib import Path
from tests.textmodels import texts
from tests.training.test_job import TEXTS, config, options
from sdt_deploy.training.job import distill

def each(report):
    if report.step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

refits = config(refit_at=json.loads(sys.argv[4]))
distill(Path(sys.argv[1]), Path(sys.argv[2]), TEXTS, refits, options(), each=each)
"""


@pytest.mark.parametrize(("at", "refit_at"), [(6, None), (10, None), (10, 0.4), (6, 0.9)])
def test_a_killed_run_goes_on_with_the_same_numbers(
    teacher: Path, tmp_path: Path, at: int, refit_at: float | None
) -> None:
    """Killed before the probe is fitted anew, and behind it."""
    whole, killed, chosen = tmp_path / "whole", tmp_path / "killed", config(refit_at=refit_at)
    distill(teacher, whole, TEXTS, chosen, options())
    refits = json.dumps(refit_at)
    arguments = [sys.executable, "-c", CHILD, str(teacher), str(killed), str(at), refits]
    done = subprocess.run(arguments, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not killed.exists()
    with pytest.raises(OutputError, match="--resume"):
        distill(teacher, killed, TEXTS, chosen, options())
    with pytest.raises(CheckpointError, match="of another run"):
        distill(teacher, killed, TEXTS, config(seed=1), options(resume=True))
    distill(teacher, killed, TEXTS, chosen, options(resume=True))
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(killed).items())
    assert steps_of(killed) == steps_of(whole)


def test_a_probe_that_is_fitted_anew_is_another(teacher: Path, tmp_path: Path) -> None:
    kept, _ = distill(teacher, tmp_path / "kept", TEXTS, config(), options())
    again, last = distill(teacher, tmp_path / "again", TEXTS, config(refit_at=0.5), options())
    assert not torch.allclose(kept.model.scorer.weight, again.model.scorer.weight, atol=1e-3)
    assert last is not None
    assert abs(last.depth - last.wanted_depth) < 0.7, "the budget holds with the new probe"
    for wrong in ({"refit_at": 1.5}, {"refit_at": 0.5, "probe": "annealed"}):
        with pytest.raises(ConfigError, match="refit_at"):
            config(**wrong)


@pytest.mark.parametrize("refit_at", [None, 0.5])
def test_an_adapter_file_gives_the_same_model(
    teacher: Path, tmp_path: Path, refit_at: float | None
) -> None:
    path = tmp_path / "a.safetensors"
    low_rank = config(lora_rank=4, learning_rate=1e-2, refit_at=refit_at)
    finished, last = distill(teacher, tmp_path / "out", TEXTS, low_rank, options(adapter=path))
    assert last is not None
    assert last.step == 12
    convert(teacher, tmp_path / "merged", adapter=path)
    found = checkpoints.load(tmp_path / "merged")
    assert found.model.config == finished.model.config
    assert found.score_quantiles == finished.score_quantiles
    expected = weights(tmp_path / "out")
    for name, value in found.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("changed", [{"causal": True}, {"gated": True}])
def test_what_the_loop_does_not_train_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    config_of_teacher = CONFIG.replace(n_token_types=0, **changed)
    path = save_teacher(tmp_path / "teacher", config_of_teacher)
    with pytest.raises(ConfigError, match="encoders whose tokens see each other"):
        distill(path, tmp_path / "out", TEXTS, config(), options())


@pytest.mark.parametrize("depth", [4.01, 100.0])
def test_a_depth_beyond_the_layers_is_refused(teacher: Path, tmp_path: Path, depth: float) -> None:
    with pytest.raises(ConfigError, match=r"target depth must lie in \(0, 4\]"):
        distill(teacher, tmp_path / "out", TEXTS, config(target_depth=depth), options())
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loop.distillation_loss, [0]

    def breaks(*arguments: Any) -> Any:
        calls[0] += 1
        loss, terms = real(*arguments)
        return (loss * torch.nan if calls[0] == 8 else loss), terms

    monkeypatch.setattr(loop, "distillation_loss", breaks)
    with pytest.raises(TrainingError, match="at step 8 of 12"):
        distill(teacher, tmp_path / "out", TEXTS, config(), options())
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    state = training_directory(tmp_path / "out") / "checkpoint.safetensors"
    with safetensors.safe_open(state, "pt") as file:
        assert file.metadata()["step"] == "5", "the last good one"
    distill(teacher, tmp_path / "out", TEXTS, config(), options(resume=True))
    assert [line["step"] for line in steps_of(tmp_path / "out")] == list(range(1, 13))


@pytest.mark.parametrize("full", ["checkpoint", "log"])
def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    distill(teacher, whole, TEXTS, config(), options())
    real_fsync, real_open = os.fsync, Path.open
    reached = [0]

    def fsync(descriptor: int) -> None:
        if full == "checkpoint" and reached[0] >= 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(descriptor)

    def opened(self: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if full == "log" and mode == "a" and reached[0] >= 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_open(self, mode, *rest, **named)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OutputError, match="No space left"):
        distill(
            teacher,
            out,
            TEXTS,
            config(),
            options(),
            each=lambda report: reached.__setitem__(0, report.step),
        )
    monkeypatch.undo()
    assert not out.exists()
    left = {path.name for path in training_directory(out).iterdir()}
    assert left == {"checkpoint.safetensors", "log.jsonl", "teacher.npz"}
    with safetensors.safe_open(training_directory(out) / "checkpoint.safetensors", "pt") as file:
        assert file.metadata()["step"] == "5"
    distill(teacher, out, TEXTS, config(), options(resume=True))
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(out).items())
    assert steps_of(out) == steps_of(whole)


def test_bad_input_is_refused(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="at least 20 texts"):
        distill(teacher, out, TEXTS[:5], config(), options())
    for depth in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"target_depth must be in \(0, layers\]"):
            config(target_depth=depth)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        distill(teacher, out, TEXTS, config(), options(resume=True))
    with pytest.raises(ConfigError, match="--lora-rank"):
        distill(teacher, out, TEXTS, config(), options(adapter=tmp_path / "a"))
    with pytest.raises(ConfigError, match="weights must be"):
        config(loss=LossWeights(output=0, neighbours=0, hidden=0))
    out.mkdir()
    with pytest.raises(OutputError, match="exists already"):
        distill(teacher, out, TEXTS, config(), options())


def test_targets_are_checked_before_training(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(*of: object, **how: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(job, "begin", begun)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(OutputError, match="will not be replaced"):
        distill(teacher, tmp_path / "mine", TEXTS, config(), options(overwrite=True))
    monkeypatch.chdir(tmp_path / "mine")
    with pytest.raises(OutputError, match="will not be replaced"):
        distill(teacher, Path(), TEXTS, config(), options(overwrite=True))
    low_rank = config(lora_rank=2)
    with pytest.raises(OutputError, match="/proc/a cannot be written"):
        distill(teacher, tmp_path / "out", TEXTS, low_rank, options(adapter=Path("/proc/a")))
    with pytest.raises(ConfigError, match="a truncated model has fewer"):
        distill(
            teacher,
            tmp_path / "out",
            TEXTS,
            low_rank,
            options(adapter=tmp_path / "a"),
            baseline="truncated",
        )


def test_texts_that_cannot_be_measured(teacher: Path, tmp_path: Path) -> None:
    long = save_teacher(tmp_path / "long", CONFIG.replace(max_positions=90))
    words = [f"{text} " * 40 for text in TEXTS]
    with pytest.raises(InputError, match="refit_at measures texts of 2 to 64 tokens"):
        distill(long, tmp_path / "out", words, config(refit_at=0.5), options())
    with pytest.raises(InputError, match="special tokens only"):
        distill(teacher, tmp_path / "out", ["[B]"] * 40, config(), options())


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    small = save_teacher(tmp_path / "small", CONFIG.replace(vocab_size=20))
    for attempt in (
        lambda: distill(small, tmp_path / "out", TEXTS, config(), options()),
        lambda: evaluate(small, small, TEXTS),
        lambda: convert(small, tmp_path / "out", fit=ProbeFit(texts=TEXTS)),
        lambda: convert(small, tmp_path / "out", sample_texts=TEXTS),
    ):
        with pytest.raises(CheckpointError, match="a vocabulary of 20"):
            attempt()
    assert not (tmp_path / "out").exists()


def test_a_damaged_cache_is_made_anew(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, out, TEXTS, config(), options(), each=interrupted_at(6))
    cache = training_directory(out) / "teacher.npz"
    cache.write_bytes(cache.read_bytes()[: cache.stat().st_size // 2])
    distill(teacher, out, TEXTS, config(), options(resume=True))
    distill(teacher, tmp_path / "whole", TEXTS, config(), options())
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(out).items())


def interrupted_at(step: int) -> Callable[[StepReport], None]:
    def each(report: StepReport) -> None:
        if report.step == step:
            raise KeyboardInterrupt

    return each


def test_quality_is_of_embeddings(teacher: Path, tmp_path: Path) -> None:
    other = save_teacher(tmp_path / "lm", CONFIG.replace(head=HeadConfig(kind="lm", bias=False)))
    with pytest.raises(CheckpointError, match="head 'lm'"):
        evaluate(teacher, other, TEXTS)
    with pytest.raises(CheckpointError, match="cannot be compared"):
        evaluate(other, teacher, TEXTS)
    with pytest.raises(InputError, match="at least 3 texts"):
        evaluate(teacher, teacher, TEXTS[:2])
    full = save_teacher(tmp_path / "full", CONFIG.replace(thresholds=(0.0,) * 4))
    same = evaluate(full, full, TEXTS)
    assert same.mean_cosine == pytest.approx(1)
    assert same.mean_depth == CONFIG.n_layers
    assert same.n_texts == len(TEXTS)


def test_the_command_line(teacher: Path, tmp_path: Path) -> None:
    good, empty, other = (tmp_path / f"{name}.txt" for name in ("good", "empty", "other"))
    good.write_text("\n".join(TEXTS))
    empty.write_text("\n \n")
    other.write_bytes("w3 w4 é\n".encode("utf-16"))
    script = Path(sys.executable).with_name("sdt-deploy")

    def call(texts: Path, out: str) -> tuple[int, str]:
        arguments = ["--texts", str(texts), "--target-depth", "2.5", "--steps", "3"]
        command = [str(script), "distill", str(teacher), str(tmp_path / out), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    code, said = call(good, "out")
    assert code == 0, said
    assert "3 steps, loss" in said
    assert checkpoints.load(tmp_path / "out").provenance["distillation"]["steps_made"] == 3
    for texts_file, message in ((empty, "holds no text"), (other, "cannot be read as UTF-8")):
        code, said = call(texts_file, "none")
        assert code == 2
        assert message in said
        assert "Traceback" not in said
        assert not (tmp_path / "none").exists()
