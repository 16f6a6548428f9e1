"""Parts of a model's configuration that are configurations of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sdt_deploy.checks import check, check_choice, check_flag, check_positive, is_number, shown

HeadKind = Literal["hidden", "lm", "embedding", "classify"]
Pooling = Literal["mean", "cls"]
RotaryScaling = Literal["none", "linear", "llama3"]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What is computed from the last hidden states."""

    kind: HeadKind = "hidden"
    """``hidden``: the states themselves. ``lm``: logits per token. ``embedding``: one vector per
    sequence. ``classify``: logits per sequence."""
    pooling: Pooling | None = None
    """How a sequence becomes one vector (``embedding`` and ``classify`` only)."""
    normalize: bool = False
    """Scale embeddings to unit L2 norm (``embedding`` only)."""
    n_classes: int | None = None
    """Number of classes (``classify`` only)."""
    dense_tanh: bool = False
    """A linear layer and a tanh before the classifier, as BERT has them (``classify`` only)."""
    bias: bool = True
    """Whether the output projection has a bias (``lm`` and ``classify`` only)."""

    def __post_init__(self) -> None:
        check_choice("head.kind", self.kind, HeadKind)
        for name in ("normalize", "dense_tanh", "bias"):
            check_flag(f"head.{name}", getattr(self, name))
        if self.per_sequence:
            check_choice("head.pooling", self.pooling, Pooling)
        else:
            check(self.pooling is None, f"head.pooling has no meaning for head {self.kind!r}")
        check(
            not self.normalize or self.kind == "embedding",
            f"head.normalize has no meaning for head {self.kind!r}",
        )
        if self.kind == "classify":
            check_positive("head.n_classes", self.n_classes)
        else:
            check(
                self.n_classes is None and not self.dense_tanh,
                f"head.n_classes and head.dense_tanh have no meaning for head {self.kind!r}",
            )

    @property
    def per_sequence(self) -> bool:
        """Whether there is one output row per sequence rather than one per token."""
        return self.kind in ("embedding", "classify")


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Base and scaling of rotary positions (Su et al., 2021)."""

    theta: float = 10_000.0
    """Pair ``j`` of ``head_dim / 2`` turns by ``theta ** (-2 j / head_dim)`` radians a position."""
    scaling: RotaryScaling = "none"
    """``linear``: all pairs turn ``factor`` times slower. ``llama3``: only those whose turn is
    longer than ``original_max_positions / low_freq_factor`` positions; those shorter than
    ``original_max_positions / high_freq_factor`` stay, and between both it goes over evenly."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    """The longest sequence before scaling, in tokens (``llama3`` only)."""

    def __post_init__(self) -> None:
        check_choice("rotary.scaling", self.scaling, RotaryScaling)
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            value, low = getattr(self, name), 1.0 if name in ("theta", "factor") else 0.0
            check(
                is_number(value) and value >= low,
                f"rotary.{name} must be a number of at least {low:g}, not {shown(value)}",
            )
            object.__setattr__(self, name, float(value))
        check_positive("rotary.original_max_positions", self.original_max_positions)
        check(
            self.scaling != "none" or self.factor == 1.0,
            f"rotary.factor {self.factor} needs rotary.scaling 'linear' or 'llama3'",
        )
        check(
            self.low_freq_factor < self.high_freq_factor,
            f"rotary.low_freq_factor {self.low_freq_factor} must be below "
            f"rotary.high_freq_factor {self.high_freq_factor}",
        )

    def frequencies(self, head_dim: int) -> tuple[float, ...]:
        """Return the radians by which each of ``head_dim / 2`` pairs turns a position.

        ``llama3`` follows Llama 3.1's model code.
        """
        plain = (self.theta ** (-j / head_dim) for j in range(0, head_dim, 2))
        return tuple(map(self._scaled, plain))

    def _scaled(self, frequency: float) -> float:
        if self.scaling != "llama3":
            return frequency / self.factor
        turns = self.original_max_positions * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = min(1.0, max(0.0, kept))
        return frequency * (kept + (1 - kept) / self.factor)
