"""How a distillation runs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from sdt_deploy.choices import Curriculum, Levels, ProbeTraining
from sdt_deploy.config import MAX_SIZE, is_integer, shown
from sdt_deploy.errors import ConfigError
from sdt_deploy.training.losses import LossWeights


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Everything that decides the numbers of a run, beside the teacher and the texts."""

    target_depth: float
    """Layers per token at the end, padding excluded, pinned tokens included."""
    n_steps: int = 1000
    batch_size: int = 32
    """Sequences in a step."""
    max_length: int = 128
    """Tokens of a sequence that are used; longer ones are cut."""
    learning_rate: float = 3e-4
    probe_learning_rate: float = 3e-3
    weight_decay: float = 0.0
    warm_up: float = 0.05
    """Share of the run in which the learning rate rises."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    probe: ProbeTraining = "fixed"
    """``fixed``: the probe stays as it was fitted, which won so far; ``straight-through``: it
    learns through hard gates; ``annealed``: through soft ones that become hard."""
    refit_at: float | None = None
    """``fixed``, two levels, a head per sequence: share of the run after which the probe is fitted
    anew, to what skipping a token costs the student as it is then; None: never."""
    first_temperature: float = 1.0
    last_temperature: float = 0.1
    """Of the gates, in standard deviations of the scores' logits."""
    hard_share: float = 0.3
    """``annealed``: share of the run, at its end, in which the gates are hard."""
    levels: Levels = "two-level"
    shallow_depth: int = 1
    """``two-level``: layers of the tokens that do not go through all."""
    curriculum: Curriculum = "cosine"
    curriculum_share: float = 0.4
    """Share of the run in which the depth falls from all layers to the target."""
    mixed_share: float = 0.0
    """Share of the steps whose depth is drawn between the wanted one and all layers: one model then
    serves many depths, and stays near its teacher at full depth."""
    crop_share: float = 0.0
    """Share of the sequences of which a random part is taken, the first and last token kept."""
    replaced_share: float = 0.0
    """Share of the unpinned tokens that are replaced by others of the texts; the teacher sees the
    same, so this only widens what is learned (Beyer et al., 2022)."""
    loss: LossWeights = field(default_factory=LossWeights)
    n_memory: int = 8192
    """Teacher embeddings of earlier batches that the neighbour loss compares with."""
    n_window: int = 16384
    """Tokens whose scores set the limits between depths."""
    lora_rank: int | None = None
    """Train low-rank adapters, biases and norms only; None: every weight of the layers."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_steps", "batch_size", "max_length", "shallow_depth", "n_window"):
            _check(is_integer(getattr(self, name), 1), name, self, f"in 1..{MAX_SIZE}")
        for name in ("n_memory", "seed"):
            _check(is_integer(getattr(self, name), 0), name, self, f"in 0..{MAX_SIZE}")
        if self.lora_rank is not None:
            _check(is_integer(self.lora_rank, 1), "lora_rank", self, "positive")
        for name in ("learning_rate", "gradient_clip", "first_temperature", "last_temperature"):
            _check(0 < getattr(self, name) < math.inf, name, self, "positive")
        for name in ("probe_learning_rate", "weight_decay"):
            _check(0 <= getattr(self, name) < math.inf, name, self, "0 or more")
        for name in (
            "warm_up",
            "curriculum_share",
            "hard_share",
            "mixed_share",
            "crop_share",
            "replaced_share",
        ):
            _check(0 <= getattr(self, name) <= 1, name, self, "in 0..1")
        refits = self.refit_at is not None
        _check(not refits or 0 <= self.refit_at <= 1, "refit_at", self, "in 0..1, or null")  # type: ignore[operator]
        if refits and (self.probe, self.levels) != ("fixed", "two-level"):
            raise ConfigError(
                f"refit_at is for a fixed probe and two levels, not {self.probe} and {self.levels}"
            )
        for name, choices in (
            ("probe", ProbeTraining),
            ("levels", Levels),
            ("curriculum", Curriculum),
        ):
            allowed = get_args(choices)
            _check(getattr(self, name) in allowed, name, self, f"one of {', '.join(allowed)}")
        _check(0 < self.target_depth < math.inf, "target_depth", self, "in (0, layers]")

    @property
    def augments(self) -> bool:
        """Whether the teacher sees something new at every step, so that no cache serves."""
        return self.crop_share > 0 or self.replaced_share > 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return dataclasses.asdict(self)

    def with_settings(self, settings: Sequence[str]) -> DistillConfig:
        """Return a config with fields set from ``name=value``; ``loss.name=value`` for the loss.

        Raises:
            ConfigError: if a name is unknown or a value does not fit it.
        """
        values: dict[str, Any] = {}
        loss: dict[str, Any] = {}
        for setting in settings:
            name, found, text = setting.partition("=")
            owner, key = (loss, name[5:]) if name.startswith("loss.") else (values, name)
            known = {x.name for x in dataclasses.fields(LossWeights if owner is loss else self)}
            if not found or key not in known - {"loss"}:
                names = [x.name for x in dataclasses.fields(self) if x.name != "loss"]
                names += [f"loss.{x.name}" for x in dataclasses.fields(LossWeights)]
                raise ConfigError(
                    f"settings are given as NAME=VALUE, not {shown(setting)}; NAME is one of "
                    f"{', '.join(names)}"
                )
            try:
                owner[key] = json.loads(text)
            except ValueError:
                owner[key] = text
        try:
            return dataclasses.replace(self, **values, loss=dataclasses.replace(self.loss, **loss))
        except TypeError as error:
            raise ConfigError(f"{', '.join(settings)}: a value is of another kind") from error


def _check(condition: bool, name: str, config: DistillConfig, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {expected}, not {shown(getattr(config, name))}")
