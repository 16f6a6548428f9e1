"""What a session has run so far, and whether its depths drift from those that were expected.

Thresholds are set for a mean depth on calibration text. Where the traffic differs, tokens go deeper
than planned, which costs time, or less deep, which costs quality; nothing else would show it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from sdt_deploy.bundle import Manifest
from sdt_deploy.checks import check_above_zero, plain
from sdt_deploy.costs import active_shares
from sdt_deploy.forking import fork_safe_lock
from sdt_deploy.runtime.caches import CacheUsage

MIN_TOKENS = 2_000
"""Fewer say little: tokens of one text resemble each other, and this is a few dozen texts."""
WINDOW_TOKENS = 20_000
"""Memory of the recent mean: a token counts 1/e as much after so many others. A plain mean over
everything would need as much new traffic as it has seen old to notice a change."""
MAX_DEPTH_DRIFT = 1.0
"""Layers of drift that are reported, unless the session is told otherwise."""


class DepthDriftWarning(UserWarning):
    """The tokens of recent runs go deeper, or less deep, than those of the calibration text."""


@dataclass(frozen=True, kw_only=True)
class SessionStatistics:
    """Runs on the paths that skip, and generations, of a session at the model's own thresholds.

    Those with thresholds of their own, or a depth to aim at, are left out: their depths say nothing
    about the traffic. So are those that failed or were stopped.
    """

    n_runs: int
    """Generations included."""
    n_tokens: int
    """Tokens that were run, prompts included; the last one of a generated sequence never is."""
    n_generations: int
    """Calls of :func:`sdt_deploy.runtime.generation.generate`."""
    n_new_tokens: int
    """Tokens that these chose."""
    cache_bytes: int
    """What the caches of all generations took at their ends, summed up."""
    dense_cache_bytes: int
    """What those of a dense model would have taken."""
    depth_histogram: tuple[int, ...]
    """Tokens that passed through 0, 1, …, n_layers layers."""
    mean_depth: float | None
    """Over all tokens; None before the first."""
    recent_mean_depth: float | None
    """The same with older tokens fading out, see :data:`WINDOW_TOKENS`."""
    expected_mean_depth: float | None
    """From the scores of the calibration text; None if the bundle does not know them."""

    @property
    def drift(self) -> float | None:
        """Layers by which the recent mean depth exceeds the expected one; None if one is unknown.

        Short texts go deeper than long ones where the special tokens at their ends are pinned.
        """
        if self.recent_mean_depth is None or self.expected_mean_depth is None:
            return None
        return self.recent_mean_depth - self.expected_mean_depth


def expected_mean_depth(manifest: Manifest) -> float | None:
    """Return the mean depth on the calibration text at the model's own thresholds, if known."""
    config = manifest.model
    unknown = manifest.score_quantiles is None and config.selection == "threshold"
    if unknown or config.routing == "per_layer":
        return None
    return sum(active_shares(manifest, manifest.model.thresholds))


def drifts(drift: float, limit: float, *, reported: bool) -> bool:
    """Decide whether a drift is to be reported, or stays so.

    A reported one counts as over only when it has halved, so that a mean that wavers around the
    limit is reported once.
    """
    return abs(drift) > (limit / 2 if reported else limit)


class DepthMonitor:
    """Counts depths; thread-safe.

    Args:
        manifest: of the bundle that is run.
        max_drift: warn past so many layers; None: never.
    """

    def __init__(self, manifest: Manifest, max_drift: float | None) -> None:
        max_drift = plain(max_drift)
        if max_drift is not None:
            check_above_zero("max_depth_drift", max_drift)
        self._max_drift = max_drift
        self._expected = expected_mean_depth(manifest)
        self._lock = fork_safe_lock()
        self._n_runs = self._n_generations = self._n_new_tokens = 0
        self._cache_bytes = self._dense_cache_bytes = 0
        self._histogram = [0] * (manifest.model.n_layers + 1)
        self._recent_tokens = self._recent_depths = 0.0
        self._reported = False

    def count(
        self,
        depth_histogram: Sequence[int],
        *,
        n_new_tokens: int = 0,
        cache: CacheUsage | None = None,
    ) -> None:
        """Add one run; warns (:class:`DepthDriftWarning`) if the drift has passed the limit.

        Args:
            depth_histogram: tokens that passed through 0, 1, …, n_layers layers.
            n_new_tokens: tokens that were generated.
            cache: of a generation, at its end; None: it was none.
        """
        with self._lock:
            self._n_runs += 1
            n_tokens = depths = 0
            for depth, count in enumerate(depth_histogram):
                self._histogram[depth] += count
                n_tokens += count
                depths += depth * count
            if cache is not None:
                self._n_generations += 1
                self._n_new_tokens += n_new_tokens
                self._cache_bytes += cache.n_bytes
                self._dense_cache_bytes += cache.dense_bytes
            kept = math.exp(-n_tokens / WINDOW_TOKENS)
            self._recent_tokens = kept * self._recent_tokens + n_tokens
            self._recent_depths = kept * self._recent_depths + depths
            if self._max_drift is None or self._expected is None:
                return
            if not self._reported and sum(self._histogram) < MIN_TOKENS:
                return
            mean = self._recent_depths / self._recent_tokens
            was_reported = self._reported
            self._reported = drifts(mean - self._expected, self._max_drift, reported=was_reported)
            warn = self._reported and not was_reported
        if warn:
            warnings.warn(_message(mean, self._expected), DepthDriftWarning, stacklevel=4)

    def statistics(self) -> SessionStatistics:
        """Return the counts so far."""
        with self._lock:
            histogram, n_tokens = tuple(self._histogram), sum(self._histogram)
            depths = sum(depth * count for depth, count in enumerate(histogram))
            return SessionStatistics(
                n_runs=self._n_runs,
                n_tokens=n_tokens,
                n_generations=self._n_generations,
                n_new_tokens=self._n_new_tokens,
                cache_bytes=self._cache_bytes,
                dense_cache_bytes=self._dense_cache_bytes,
                depth_histogram=histogram,
                mean_depth=depths / n_tokens if n_tokens else None,
                recent_mean_depth=self._recent_depths / self._recent_tokens if n_tokens else None,
                expected_mean_depth=self._expected,
            )


def _message(mean: float, expected: float) -> str:
    direction = "deeper, which costs time" if mean > expected else "less deep, which costs quality"
    return (
        f"tokens lately pass through {mean:.2f} layers on average, {expected:.2f} were expected "
        f"from the calibration text: they go {direction}. If this traffic is to stay, convert and "
        "export again with --texts from it; max_depth_drift of Session.open sets the limit"
    )
