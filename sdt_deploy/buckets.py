"""Batch sizes that engines are built for: pure functions, shared by builder and runtime.

An engine takes shapes within an *optimization profile*: a range for each axis. TensorRT sizes the
scratch memory of a profile for all of its maxima together and picks kernels for its ``opt``, so a
few narrow profiles are smaller and faster than a single wide one. Here each profile covers a band
of sequence lengths, with as many sequences as keep ``batch × max_seqlen`` within a bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Self

from sdt_deploy.config import is_integer, shown
from sdt_deploy.errors import ConfigError

MAX_PROFILES = 4
"""Bands of sequence lengths, and so profiles, that are planned at most."""
_SHORTEST_BAND = 32
_ALIGNMENT = 8

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, best and largest shape of one input."""


@dataclass(frozen=True, kw_only=True)
class AxisRange:
    """Sizes of one axis in one profile."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        for name in ("min", "opt", "max"):
            if not is_integer(getattr(self, name), 1):
                raise ConfigError(
                    f"a profile's {name} must be a positive integer, not "
                    f"{shown(getattr(self, name))}"
                )
        if not self.min <= self.opt <= self.max:
            raise ConfigError(
                f"a profile needs min <= opt <= max, not {self.min}, {self.opt}, {self.max}"
            )

    def scaled(self, share: float) -> AxisRange:
        """Return the range of an axis that shrinks to about ``share`` of it, from 1 up."""
        return AxisRange(min=1, opt=max(1, round(self.opt * share)), max=self.max)


@dataclass(frozen=True, kw_only=True)
class OptimizationProfile:
    """Ranges of the three numbers that say how large a batch is."""

    n_tokens: AxisRange
    batch: AxisRange
    max_seqlen: AxisRange

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Rebuild a profile from ``dataclasses.asdict``.

        Raises:
            ConfigError: if it is none.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(data, Mapping) or sorted(data) != sorted(names):
            raise ConfigError(f"a profile has {', '.join(names)}, not {shown(data)}")
        try:
            return cls(**{name: AxisRange(**data[name]) for name in names})
        except TypeError as error:
            raise ConfigError(f"a profile's axis has min, opt and max: {error}") from error


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """The largest batches that engines have to take; larger ones run in parts."""

    max_seqlen: int
    """Tokens of the longest sequence."""
    max_batch: int = 64
    """Sequences."""
    max_padded_tokens: int = 8192
    """Sequences times the longest of them: what attention lays out, and what memory grows with."""
    max_tokens: int | None = None
    """Tokens without padding; None: ``max_padded_tokens``."""

    def __post_init__(self) -> None:
        for name in ("max_seqlen", "max_batch", "max_padded_tokens", "max_tokens"):
            value = getattr(self, name)
            if not is_integer(value, 1) and not (name == "max_tokens" and value is None):
                raise ConfigError(f"{name} must be a positive integer, not {shown(value)}")
        for name in ("max_padded_tokens", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < self.max_seqlen:
                raise ConfigError(
                    f"{name} = {value} leaves no room for one sequence of max_seqlen = "
                    f"{self.max_seqlen} tokens: raise the one or lower the other"
                )


def plan_profiles(
    limits: BatchLimits, lengths: Sequence[int] | None = None
) -> tuple[OptimizationProfile, ...]:
    """Plan profiles from short to long sequences.

    In each, ``batch.max · max_seqlen.max`` is at most ``limits.max_padded_tokens``: three
    independent maxima would multiply into memory for a batch that cannot occur.

    Args:
        limits: the largest batches.
        lengths: tokens of sequences as they were recorded; bands then hold equal numbers of them
            and ``opt`` is their median. None: bands double in length.

    Raises:
        ConfigError: if a length is not positive, or exceeds the limit.
    """
    if lengths is not None:
        lengths = sorted(lengths)
        if not lengths or not is_integer(lengths[0], 1):
            raise ConfigError("lengths must be positive numbers of tokens, at least one")
        if lengths[-1] > limits.max_seqlen:
            raise ConfigError(
                f"the recorded lengths reach {lengths[-1]} tokens, max_seqlen is "
                f"{limits.max_seqlen}: raise it or cut the texts"
            )
    profiles = []
    for below, longest in pairwise((0, *_band_edges(limits.max_seqlen, lengths))):
        batch = min(limits.max_batch, limits.max_padded_tokens // longest)
        n_tokens = min(limits.max_tokens or limits.max_padded_tokens, batch * longest)
        inside = [length for length in lengths or () if below < length <= longest]
        usual = inside[len(inside) // 2] if inside else (below + 1 + longest) // 2
        usual_batch = max(1, batch // 2)
        profiles.append(
            OptimizationProfile(
                n_tokens=AxisRange(min=1, opt=min(n_tokens, usual * usual_batch), max=n_tokens),
                batch=AxisRange(min=1, opt=usual_batch, max=batch),
                max_seqlen=AxisRange(min=below + 1, opt=usual, max=longest),
            )
        )
    return tuple(profiles)


def planned_for(profiles: Sequence[OptimizationProfile]) -> BatchLimits:
    """Return the smallest limits that :func:`plan_profiles` makes ``profiles`` of.

    It makes others of them if bands or ``opt`` came from recorded lengths.
    """
    longest = max(profile.max_seqlen.max for profile in profiles)
    padded = max(longest, *(each.batch.max * each.max_seqlen.max for each in profiles))
    tokens = max(longest, *(each.n_tokens.max for each in profiles))
    return BatchLimits(
        max_seqlen=longest,
        max_batch=max(profile.batch.max for profile in profiles),
        max_padded_tokens=padded,
        max_tokens=None if tokens == padded else tokens,
    )


def _band_edges(max_seqlen: int, lengths: Sequence[int] | None) -> list[int]:
    """Return the longest sequence of each band, rising, the last being ``max_seqlen``."""
    if lengths is None:
        inner = [max_seqlen >> i for i in range(1, MAX_PROFILES)]
    else:
        parts = range(1, MAX_PROFILES)
        inner = [lengths[i * len(lengths) // MAX_PROFILES] for i in parts]
    aligned = {-(-edge // _ALIGNMENT) * _ALIGNMENT for edge in inner if edge >= _SHORTEST_BAND}
    return [*sorted(edge for edge in aligned if edge < max_seqlen), max_seqlen]


def fitting_profile(
    profiles: Sequence[Mapping[str, Shapes]], shapes: Mapping[str, tuple[int, ...]]
) -> int | None:
    """Return the number of the first profile whose ranges hold the ``shapes`` of all inputs.

    Args:
        profiles: for each profile, smallest, best and largest shape by input.
        shapes: by input.
    """
    for number, profile in enumerate(profiles):
        if all(
            len(shape) == len(profile[name][0])
            and all(
                low <= size <= high
                for low, size, high in zip(profile[name][0], shape, profile[name][2], strict=True)
            )
            for name, shape in shapes.items()
        ):
            return number
    return None


def max_sequences(profiles: Sequence[OptimizationProfile], longest: int) -> int:
    """Return how many sequences of up to ``longest`` tokens run at once; 0: not even one."""
    fitting = [
        min(profile.batch.max, profile.n_tokens.max // longest)
        for profile in profiles
        if longest <= profile.max_seqlen.max
    ]
    return max(fitting, default=0)


def longest_sequence(profiles: Sequence[OptimizationProfile], max_positions: int) -> int:
    """Return the tokens of the longest sequence that a model and its engines, if any, take."""
    return min([max_positions, *(profile.max_seqlen.max for profile in profiles[-1:])])


SHRINKING = {"n_tokens": "n_tokens", "max_seqlen": "max_seqlen"}
"""Axes of a stage that hold active tokens only."""
_AXES = {
    "n_context": "n_tokens",
    "max_context_seqlen": "max_seqlen",
    "seq": "max_seqlen",
    "batch": "batch",
    **SHRINKING,
}


def input_shapes(
    axes: Sequence[str | int], profile: OptimizationProfile, *, active_share: float | None
) -> Shapes:
    """Return the shapes that an input with ``axes`` has in ``profile``.

    Args:
        axes: a name for each dynamic axis, a length for each static one.
        profile: the profile.
        active_share: for the inputs of stages, the share of tokens that is expected to be active;
            None for other graphs.

    Raises:
        ConfigError: if an axis has a name that is not known.
    """
    ranges = []
    for axis in axes:
        if isinstance(axis, int):
            ranges.append(AxisRange(min=axis, opt=axis, max=axis))
            continue
        if axis not in _AXES:
            raise ConfigError(f"no profile is known for the axis {axis!r}")
        whole: AxisRange = getattr(profile, _AXES[axis])
        if active_share is None:
            ranges.append(whole)
        else:  # sequences without active tokens leave, the longest ones too
            ranges.append(whole.scaled(active_share if axis in SHRINKING else 1.0))
    return (
        tuple(each.min for each in ranges),
        tuple(each.opt for each in ranges),
        tuple(each.max for each in ranges),
    )
