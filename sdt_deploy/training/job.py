"""A distillation from files to files: probe, training with checkpoints, calibration, result."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdt_deploy.choices import Baseline
from sdt_deploy.errors import ConfigError, InputError, OutputError
from sdt_deploy.files import check_replaceable, check_writable
from sdt_deploy.model import checkpoints
from sdt_deploy.model.adapters import Adapter, weights_sha256, write_adapter
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.conversion import encoded, load_any
from sdt_deploy.model.probe import check_depth
from sdt_deploy.training.config import DistillConfig
from sdt_deploy.training.distill import Distillation, StepReport, run
from sdt_deploy.training.lora import adapter_factors
from sdt_deploy.training.state import (
    CHECKPOINT,
    LOG,
    TEACHER_CACHE,
    JsonLog,
    load_state,
    run_key,
    save_state,
)
from sdt_deploy.training.students import begin

CALIBRATION_EVERY = 10
"""Every tenth text is not trained on: thresholds are set on it."""
MIN_TEXTS = 20


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """How a run is carried out; nothing here changes its numbers, except the device."""

    device: str = "cpu"
    """``cpu`` or ``cuda``; products are in bfloat16 on ``cuda``."""
    resume: bool = False
    save_every: int = 200
    """Steps between checkpoints."""
    cache_mb: int = 1024
    """Keep the teacher's states if they fit in so much and the texts stay as they are; 0: compute
    them as they are needed."""
    adapter: Path | None = None
    """Write the adapter there as well; low rank only."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be cpu or cuda, not {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("PyTorch sees no CUDA device here; pass --device cpu")
        if self.save_every < 1 or self.cache_mb < 0:
            raise ConfigError("save_every must be positive and cache_mb 0 or more")


def training_directory(out: Path) -> Path:
    """Return where checkpoint, log and cache of the run that makes ``out`` lie."""
    place = out.resolve()
    return place.with_name(f"{place.name}.training")


def distill(
    teacher: Path,
    out: Path,
    texts: Sequence[str],
    config: DistillConfig,
    options: JobOptions,
    *,
    start: Path | None = None,
    baseline: Baseline | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    each: Callable[[StepReport], None] = lambda report: None,
) -> tuple[Checkpoint, StepReport | None]:
    """Distil the dense ``teacher`` into the native directory ``out``.

    Checkpoint, JSON log and the teacher's cached states lie in :func:`training_directory`; the log
    stays, the others are removed at the end.

    Args:
        teacher: any model that ``convert`` accepts, with a tokenizer.
        out: directory to make.
        texts: at least :data:`MIN_TEXTS`.
        config: what to do.
        options: how.
        start: adapter file to go on from; see :func:`sdt_deploy.training.students.begin`.
        baseline: train this instead of the method itself; see the same.
        progress: called with a line, the steps done and all steps.
        each: called after each step.

    Returns:
        The student, and the report of the last step; None if none was left to make.

    Raises:
        CheckpointError: if the teacher cannot be used, has no tokenizer or one that does not fit,
            or the checkpoint is of another run.
        ConfigError: if ``config`` does not fit the model.
        InputError: if there are too few texts.
        OutputError: if ``out`` or a run for it exists, or something cannot be written.
        TrainingError: if the loss is not finite; the last checkpoint stays.
    """
    check_replaceable(out, checkpoints.MARKER, overwrite=options.overwrite)
    directory = training_directory(out)
    state = directory / CHECKPOINT
    if state.exists() and not (options.resume or options.overwrite):
        raise OutputError(
            f"{state} is of a run that did not end: pass --resume to go on, or --overwrite to "
            "begin anew"
        )
    if options.adapter is not None and config.lora_rank is None:
        raise ConfigError("an adapter file holds low-rank changes: give --lora-rank with --adapter")
    if options.adapter is not None and baseline == "truncated":
        raise ConfigError(
            "an adapter file holds changes to all layers of the teacher, and a truncated model has "
            "fewer: leave out --adapter"
        )
    if options.adapter is not None:
        check_writable(options.adapter)
    if len(texts) < MIN_TEXTS:
        raise InputError(f"at least {MIN_TEXTS} texts are needed to distil with, not {len(texts)}")
    dense = load_any(teacher)
    if not dense.model.config.scored_once:
        raise ConfigError(
            f"{teacher} routes by capacities or layer by layer, and a distillation trains routing "
            "by thresholds on one score: give the dense model"
        )
    if dense.model.config.causal or not dense.model.config.is_plain:
        raise ConfigError(
            f"{teacher} is causal, or its layers are not those of BERT: a distillation trains "
            "encoders whose tokens see each other only"
        )
    check_depth(config.target_depth, dense.model.config.n_layers)
    progress("fit the probe", 0, 0)
    begun = begin(dense, texts, config, adapter=start, baseline=baseline)
    calibration, training = _split(dense, texts, config)
    distillation = Distillation(
        begun.student,
        dense.model.as_dense(),
        training,
        config,
        factors=begun.factors,
        device=options.device,
        mixed_precision=options.device == "cuda",
    )
    same = config.to_dict(), weights_sha256(dense.model), _digest(training), begun.key
    key = run_key(*same, options.device)
    if options.resume:
        distillation.restore(*load_state(state, key=key))
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory} cannot be made: {error}") from error
    cache = directory / TEACHER_CACHE
    fits = distillation.teacher.cache_bytes() <= options.cache_mb * 2**20
    if fits and not config.augments:
        distillation.teacher.fill_cache(cache, lambda done, all_: progress("teacher", done, all_))
    last = _train(
        distillation,
        state,
        key,
        JsonLog(directory / LOG, from_step=distillation.step),
        options.save_every,
        progress,
        each,
    )
    finished = distillation.finish(calibration)
    if options.adapter is not None:
        write_adapter(options.adapter, _adapter(distillation, dense, finished))
    checkpoints.save(finished, out, overwrite=options.overwrite)
    for path in (state, cache):
        path.unlink(missing_ok=True)
    return finished, last


def _train(
    distillation: Distillation,
    state: Path,
    key: str,
    log: JsonLog,
    save_every: int,
    progress: Callable[[str, int, int], None],
    each: Callable[[StepReport], None],
) -> StepReport | None:
    last: StepReport | None = None
    begun, n_tokens = time.perf_counter(), 0

    def note(report: StepReport) -> None:
        nonlocal last, n_tokens
        last, n_tokens = report, n_tokens + report.n_tokens
        speed = n_tokens / (time.perf_counter() - begun)
        log.write(
            step=report.step,
            loss=report.loss,
            **report.terms,
            depth=report.depth,
            wanted_depth=report.wanted_depth,
            tokens_per_second=round(speed),
        )
        said = f"loss {report.loss:.4f}, depth {report.depth:.2f}, {speed:.0f} tokens/s"
        progress(said, report.step, distillation.config.n_steps)
        each(report)

    run(
        distillation,
        each=note,
        save=lambda: save_state(state, distillation.state(), step=distillation.step, key=key),
        save_every=save_every,
    )
    return last


def _split(
    dense: Checkpoint, texts: Sequence[str], config: DistillConfig
) -> tuple[TokenSample, TokenSample]:
    """Return the texts to calibrate on and those to train on, as tokens."""
    longest = min(config.max_length, dense.model.config.max_positions)
    parts: list[Any] = [
        texts[::CALIBRATION_EVERY],
        [text for i, text in enumerate(texts) if i % CALIBRATION_EVERY],
    ]
    first, second = encoded(dense, longest, *parts)
    return first, second


def _digest(sample: TokenSample) -> str:
    digest = hashlib.sha256(sample.cu_seqlens.tobytes())
    digest.update(sample.input_ids.tobytes())
    return digest.hexdigest()


def _adapter(distillation: Distillation, dense: Checkpoint, finished: Checkpoint) -> Adapter:
    """Return what ``finished`` changed in ``dense``, the probe included."""
    factors = adapter_factors(distillation.model)
    before = dense.model.state_dict()
    changed = {
        name: tensor
        for name, tensor in finished.model.state_dict().items()
        if name not in factors
        and (name.startswith("scorer.") or not torch.equal(tensor, before[name]))
    }
    provenance = finished.provenance
    return Adapter(
        factors=factors,
        tensors=changed,
        config=finished.model.config,
        base_sha256=weights_sha256(dense.model),
        score_quantiles=finished.score_quantiles,
        pinned_share=finished.pinned_share,
        about={
            "base": {
                "name": str(provenance.get("source", "the teacher")),
                "license": provenance.get("license"),
            },
            "recipe": provenance["distillation"],
        },
    )
