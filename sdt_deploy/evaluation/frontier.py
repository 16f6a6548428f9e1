"""Quality over depth: one trained model at many thresholds, beside what else could be trained."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdt_deploy.config import ModelConfig
from sdt_deploy.costs import dense_flops
from sdt_deploy.errors import ConfigError, InputError
from sdt_deploy.evaluation.evaluate import (
    Quality,
    Reference,
    Subject,
    config_of,
    embedder,
    open_subject,
    reference_of,
)
from sdt_deploy.evaluation.oracle import Embedded
from sdt_deploy.extras import require
from sdt_deploy.files import write_file
from sdt_deploy.runtime.dispatch import needed_flops


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model at one depth."""

    model: str
    """Name of the directory."""
    target_depth: float | None
    """What was asked for; None: the thresholds, or the layers, that the model has."""
    flops_ratio: float
    """Operations over those of the dense teacher on the same texts, without padding."""
    quality: Quality

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, all in one object."""
        own = {"model": self.model, "target_depth": self.target_depth}
        return {**own, "flops_ratio": self.flops_ratio, **self.quality.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Points of a model, then those of each baseline, by depth."""

    teacher: str
    texts_sha256: str
    points: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**dataclasses.asdict(self), "points": [point.to_dict() for point in self.points]}


def read_depths(text: str) -> tuple[float, ...]:
    """Parse ``3,3.5,4``.

    Raises:
        InputError: if it is no list of positive numbers.
    """
    try:
        depths = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        depths = ()
    if not depths or not all(0 < depth < float("inf") for depth in depths):
        raise InputError(f"depths are positive numbers with commas between, 3,3.5,4, not {text!r}")
    return depths


def frontier(
    subject: Path,
    teacher: Path,
    texts: Sequence[str],
    depths: Sequence[float],
    *,
    baselines: Sequence[Path] = (),
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Frontier:
    """Compare a model or bundle with its dense teacher at several mean depths.

    Thresholds follow from the stored score quantiles: on a bundle by ``run(target_depth=)`` of the
    session, on a model as ``export --target-depth`` sets them. A model without a probe, a truncated
    one for instance, gives the one point that it has.

    Args:
        subject: a bundle, or any model that ``convert`` accepts.
        teacher: any model that ``convert`` accepts.
        texts: at least three, of a kind that was not trained on.
        depths: mean layers per token to aim at.
        baselines: bundles or models to set beside it.
        progress: called with a line, the points done and all points.

    Raises:
        CheckpointError: if one of them cannot be used, or not be compared with the teacher.
        ConfigError: if a depth cannot be reached, or two directories have one name.
        InputError: if there are too few texts.
    """
    paths = [subject, *baselines]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        raise ConfigError(f"the models need names of their own to tell them apart, not {names}")
    opened = [(path, open_subject(path)) for path in paths]
    n_points = sum(len(_depths_of(config_of(one), depths)) for _, one in opened)
    progress("teacher", 0, n_points)
    reference = reference_of(teacher, texts, opened)
    points: list[Point] = []
    for name, (_, one) in zip(names, opened, strict=True):
        for point in _sweep(name, one, _depths_of(config_of(one), depths), reference):
            points.append(point)
            progress(name, len(points), n_points)
    return Frontier(
        teacher=reference.teacher, texts_sha256=reference.texts_sha256, points=tuple(points)
    )


def _depths_of(config: ModelConfig, depths: Sequence[float]) -> Sequence[float | None]:
    return depths if config.probe == "linear" else [None]


def _sweep(
    name: str, subject: Subject, depths: Sequence[float | None], reference: Reference
) -> Iterator[Point]:
    with embedder(subject) as embed:
        for depth in depths:
            found = embed(reference.sample, depth)
            yield Point(
                model=name,
                target_depth=depth,
                flops_ratio=flops_ratio(config_of(subject), found, reference),
                quality=reference.quality(found),
            )


def flops_ratio(config: ModelConfig, found: Embedded, reference: Reference) -> float:
    """Return the operations of ``config`` at the depths found over those of the dense teacher."""
    starts = reference.sample.cu_seqlens
    dense = dense_flops(reference.config, np.diff(starts).tolist())
    return needed_flops(config, found.depths, starts) / dense


def plot(found: Frontier, path: Path) -> None:
    """Draw mean cosine and nearest-neighbour agreement over mean depth, as PNG.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        OutputError: if ``path`` cannot be written.
    """
    require("matplotlib", extra="demo", purpose="Drawing the plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = (("mean_cosine", "mean cosine"), ("top1_agreement", "same nearest neighbour"))
    for number, (key, label) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, number)
        for name in dict.fromkeys(point.model for point in found.points):
            own = [point.quality for point in found.points if point.model == name]
            axes.plot([q.mean_depth for q in own], [getattr(q, key) for q in own], "o-", label=name)
        axes.set_xlabel("mean layers per token")
        axes.set_ylabel(f"{label} (dense teacher)")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    write_file(path, stream.getvalue())
