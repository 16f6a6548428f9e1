"""The training loop: a dense teacher, a student that skips, and what brings one to the other."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sdt_deploy.errors import ConfigError, InputError, TrainingError
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.probe import check_depth
from sdt_deploy.model.transformer import DenseTransformer, SparseDepthTransformer
from sdt_deploy.training.batches import BatchStream, DeviceTokens
from sdt_deploy.training.calibration import calibrated, probe_frame
from sdt_deploy.training.config import DistillConfig
from sdt_deploy.training.gates import Gate, pinned_tokens, routed_forward
from sdt_deploy.training.lora import add_adapters, merged_weights, set_factors
from sdt_deploy.training.losses import TeacherMemory, distillation_loss
from sdt_deploy.training.schedule import (
    ScoreWindow,
    depth_at,
    depth_limits,
    learning_rate_at,
    temperature_at,
)
from sdt_deploy.training.skipping import MAX_FREE_TOKENS, is_measurable, refitted_probe
from sdt_deploy.training.state import optimizer_tensors, restore_optimizer
from sdt_deploy.training.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step showed."""

    step: int
    """Steps done, this one included."""
    loss: float
    terms: Mapping[str, float]
    depth: float
    """Mean depth of the batch, padding excluded, pinned tokens included."""
    wanted_depth: float
    """What the curriculum asked for."""
    n_tokens: int
    """Tokens of the batch, padding excluded."""


class Distillation:
    """A run of :class:`DistillConfig`; :meth:`run_step` until :attr:`done`, then :meth:`finish`.

    The embeddings, the scorer's input, stay as they are, and so does an output projection.

    Args:
        start: the student as it begins, with a probe; its model is copied.
        teacher: the dense model; its config may have more layers, its head must be the same. It is
            copied too: it shares its weights with the checkpoint that it was made of.
        sample: the texts as token ids.
        config: how to run.
        device: where.
        mixed_precision: compute products in bfloat16 (CUDA only).
        factors: low-rank factors to begin with, by the name of the weight; none: zero.
        progress: gives the share of the run that is over from the steps made; None: by their
            number. A clock makes a run that ends in time, whatever a step costs.

    Raises:
        ConfigError: if ``config`` does not fit the model.
        InputError: if there are too few texts, or none of the length that ``refit_at`` measures.
    """

    def __init__(
        self,
        start: Checkpoint,
        teacher: DenseTransformer,
        sample: TokenSample,
        config: DistillConfig,
        *,
        device: torch.device | str = "cpu",
        mixed_precision: bool = False,
        factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        progress: Callable[[int], float] | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._start, self.config = start, config
        self._progress = progress or (lambda step: step / config.n_steps)
        _check_fit(start.model, teacher, sample, config)
        torch.manual_seed(config.seed)
        self.model = copy.deepcopy(start.model).to(self._device).train()
        self._train_some()
        set_factors(self.model, factors or {})
        self._autocast = partial(
            torch.autocast, self._device.type, torch.bfloat16, enabled=mixed_precision
        )
        max_length = min(config.max_length, start.model.config.max_positions)
        self._tokens = DeviceTokens(sample, max_length, self._device)
        self._stream = BatchStream(self._tokens.lengths, config.batch_size, config.seed)
        frozen = copy.deepcopy(teacher).to(self._device)
        self.teacher = Teacher(frozen, self._tokens, self._autocast)
        self._memory = TeacherMemory(config.n_memory)
        self._window = ScoreWindow(config.n_window)
        self._learns_probe = config.probe != "fixed" and self.model.scorer.linear
        self._frame = probe_frame(start.model, sample, self._device)
        self._place_probe()
        groups = [
            {"params": self._trained(probe=False), "lr": config.learning_rate},
            {"params": self._trained(probe=True), "lr": config.probe_learning_rate},
        ]
        groups = [group for group in groups if group["params"]]
        self._optimizer = torch.optim.AdamW(
            groups,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.98),
            fused=self._device.type == "cuda",
        )
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._sample, self._refitted = sample, config.refit_at is None
        self.step = 0

    @property
    def done(self) -> bool:
        """Whether all steps were made."""
        return self.step >= self.config.n_steps or self._progress(self.step) >= 1.0

    def _train_some(self) -> None:
        """Freeze what is not trained, and put adapters in if they are wanted."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith(("layers.", "head.norm.")))
        if self.config.lora_rank is not None:
            add_adapters(self.model, self.config.lora_rank, seed=self.config.seed)
        self.model.scorer.requires_grad_(self.config.probe != "fixed")

    def _trained(self, *, probe: bool) -> list[nn.Parameter]:
        return [
            parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and name.startswith("scorer.") == probe
        ]

    def _place_probe(self) -> None:
        if self._learns_probe:
            self._frame.place(self.model.scorer.weight, self.model.scorer.bias)

    def _gate(self, progress: float) -> tuple[Gate, float]:
        """Return the kind of gate and its temperature, in standard deviations."""
        config = self.config
        if config.probe == "fixed":
            return "hard", 1.0
        soft_share = 1.0 if config.probe == "straight-through" else 1 - config.hard_share
        temperature = temperature_at(
            progress / max(soft_share, 1e-9),
            first=config.first_temperature,
            last=config.last_temperature,
        )
        if config.probe == "annealed" and progress < soft_share:
            return "soft", temperature
        return "straight-through", temperature

    def run_step(self) -> StepReport:
        """Make one step.

        Raises:
            TrainingError: if the loss or the gradient is not finite; the weights are then those
                before the step.
        """
        config, model = self.config, self.model
        progress = min(1.0, self._progress(self.step))
        if config.refit_at is not None and progress >= config.refit_at and not self._refitted:
            self._refit()
        after = min(1.0, self._progress(self.step + 1))
        factor = learning_rate_at(after, warm_up=config.warm_up)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        rng = np.random.default_rng([config.seed, self.step, 1])
        ids, mask, index = self._batch(rng)
        wanted = self.teacher(ids, mask, index)
        with torch.no_grad():
            embedded = model.embed(ids)
        scored = model.scorer.linear
        logits = model.scorer.logits(embedded) if scored else embedded.new_zeros(mask.shape)
        n_tokens = int(mask.sum())
        self._window.add(logits[mask & ~pinned_tokens(model, ids)], n_tokens)
        wanted_depth = self._wanted_depth(progress, rng)
        limits = self._limits(wanted_depth)
        gate, temperature = self._gate(progress)
        with self._autocast():
            routed = routed_forward(
                model,
                ids,
                mask,
                embedded,
                logits,
                limits,
                gate=gate,
                temperature=temperature,
            )
        loss, terms = distillation_loss(
            model.head,
            routed.hidden_states,
            wanted,
            self.teacher.model.head,
            mask,
            config.loss,
            self._memory,
            routed.depths == model.config.n_layers,
        )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, config.gradient_clip)
        value = float(loss.detach())
        if not np.isfinite([value, float(norm)]).all():
            raise TrainingError(
                f"the loss is {value} and its gradient {float(norm)} at step {self.step + 1} of "
                f"{config.n_steps}: stopped. Lower the learning rate and begin anew, or look at "
                "the texts; the last checkpoint is as it was"
            )
        self._optimizer.step()
        self._place_probe()
        self.step += 1
        return StepReport(
            step=self.step,
            loss=value,
            terms={name: float(term.detach()) for name, term in terms.items()},
            depth=float(routed.depths.sum()) / n_tokens,
            wanted_depth=wanted_depth,
            n_tokens=n_tokens,
        )

    def _refit(self) -> None:
        """Fit the probe to what skipping costs the student as it is; see :mod:`.skipping`."""
        student, scorer = self._merged().to(self._device), self.model.scorer
        limits = torch.zeros(student.config.n_layers)
        if len(self._window.logits):
            limits = self._limits(self.config.target_depth).sigmoid()
        found = refitted_probe(
            student,
            self.teacher.model,
            self._sample,
            limits.tolist(),
            shallow_depth=self.config.shallow_depth,
        )
        with torch.no_grad():
            for parameter, value in zip((scorer.weight, scorer.bias), found, strict=True):
                parameter.copy_(value)
        self._window = ScoreWindow(self.config.n_window)  # of this probe from now on
        self._refitted = True

    def _merged(self) -> SparseDepthTransformer:
        model = SparseDepthTransformer(self.model.config)
        model.load_state_dict(merged_weights(self.model))
        return model.eval()

    def _batch(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        config, tokens = self.config, self._tokens
        ids, mask, index = tokens.padded(self._stream(self.step), config.crop_share, rng)
        if config.replaced_share:
            pinned = self.model.scorer.pinned_token_ids
            kept = ~mask | pinned_tokens(self.model, ids)
            ids = tokens.replaced(ids, kept, config.replaced_share, pinned, rng)
        return ids, mask, index

    def _wanted_depth(self, progress: float, rng: np.random.Generator) -> float:
        lowest = depth_at(
            progress,
            n_layers=self.model.config.n_layers,
            target_depth=self.config.target_depth,
            curriculum=self.config.curriculum,
            share=self.config.curriculum_share,
        )
        if rng.random() >= self.config.mixed_share:
            return lowest
        return float(rng.uniform(lowest, self.model.config.n_layers))

    def _limits(self, wanted_depth: float) -> Tensor:
        config, n_layers = self.config, self.model.config.n_layers
        share = self._window.pinned_share
        floor = config.shallow_depth if config.levels == "two-level" else 1
        # A batch of short texts may hold so many pinned tokens that it cannot be held there.
        lowest = share * n_layers + (1 - share) * min(floor, n_layers)
        wanted_depth = max(wanted_depth, lowest)
        return depth_limits(
            self._window.logits,
            share,
            n_layers=n_layers,
            target_depth=wanted_depth,
            levels=config.levels,
            shallow_depth=config.shallow_depth,
        )

    def state(self) -> dict[str, Tensor]:
        """Return all that later steps depend on, the step's number aside."""
        trained = {
            f"model/{name}": parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        memory = self._memory.rows()
        rest = {} if memory is None else {"memory": memory}
        window = {"window/logits": self._window.logits, "window/counts": self._window.counts}
        if self.config.refit_at is not None and self._refitted:
            rest |= {f"scorer/{name}": p for name, p in self.model.scorer.named_parameters()}
        return {**trained, **optimizer_tensors(self._optimizer), **window, **rest}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Go back to a :meth:`state` of this run, after ``step`` steps."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[f"model/{name}"])
        for name, parameter in self.model.scorer.named_parameters():
            if f"scorer/{name}" in tensors:
                parameter.copy_(tensors[f"scorer/{name}"])
                self._refitted = True
        restore_optimizer(self._optimizer, tensors)
        self._window.logits = tensors["window/logits"].to(self._device)
        self._window.counts = tensors["window/counts"]
        self._memory = TeacherMemory(self.config.n_memory)
        if "memory" in tensors:
            self._memory.add(tensors["memory"].to(self._device))
        self.step = step

    def finish(self, calibration: TokenSample) -> Checkpoint:
        """Return the student, with thresholds for the target depth on ``calibration``.

        Adapters are rounded to float16, as their file holds them, and merged.

        Raises:
            ConfigError: if the depth cannot be reached on that text.
        """
        model = self._merged()
        provenance = {
            **self._start.provenance,
            "distillation": {**self.config.to_dict(), "steps_made": self.step},
        }
        checkpoint = dataclasses.replace(self._start, model=model, provenance=provenance)
        return calibrated(
            checkpoint,
            calibration,
            target_depth=self.config.target_depth,
            levels=self.config.levels,
            shallow_depth=self.config.shallow_depth,
        )


def _check_fit(
    student: SparseDepthTransformer,
    teacher: DenseTransformer,
    sample: TokenSample,
    config: DistillConfig,
) -> None:
    mine, its = student.config, teacher.config
    check_depth(config.target_depth, mine.n_layers)
    if config.refit_at is not None and not (mine.head.per_sequence and mine.probe == "linear"):
        raise ConfigError(
            "refit_at needs a probe and a head per sequence, embedding or classify, not "
            f"{mine.head.kind}"
        )
    if mine.probe != "linear" and config.target_depth < mine.n_layers:
        raise ConfigError("the student has no probe: fit one with texts first")
    if mine.head != its.head or (mine.vocab_size, mine.d_model) != (its.vocab_size, its.d_model):
        raise ConfigError(
            f"teacher and student must have one head, vocabulary and width: {its.head}, "
            f"{its.vocab_size}, {its.d_model}; {mine.head}, {mine.vocab_size}, {mine.d_model}"
        )
    if len(sample.cu_seqlens) < 3:
        raise InputError("at least two texts are needed to distil with")
    if config.refit_at is not None and not is_measurable(sample, mine.pinned_token_ids):
        raise InputError(
            f"refit_at measures texts of 2 to {MAX_FREE_TOKENS} tokens, special ones not counted, "
            "and there is none: add shorter texts, or leave refit_at out"
        )


def run(
    distillation: Distillation,
    *,
    each: Callable[[StepReport], None] = lambda report: None,
    save: Callable[[], None] = lambda: None,
    save_every: int = 200,
    keep_on: Callable[[], bool] = lambda: True,
) -> None:
    """Make all remaining steps, or stop when ``keep_on`` says no.

    Args:
        distillation: the run.
        each: called after each step.
        save: called after every ``save_every`` steps and at the end.
        save_every: steps.
        keep_on: asked before each step.
    """
    while not distillation.done and keep_on():
        each(distillation.run_step())
        if distillation.step % save_every == 0 or distillation.done:
            save()
