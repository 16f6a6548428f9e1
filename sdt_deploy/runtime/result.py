"""What a run returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import sub

import numpy as np
import numpy.typing as npt

from sdt_deploy.choices import PathName
from sdt_deploy.runtime.routing import Int32


@dataclass(frozen=True, kw_only=True)
class LayerUsage:
    """How deep the tokens of a batch went."""

    depth_histogram: tuple[int, ...]
    """Tokens that passed through 0, 1, …, n_layers layers."""
    active_tokens: tuple[int, ...]
    """Active tokens of every layer."""

    @classmethod
    def of(cls, depths: Int32, active: npt.NDArray[np.bool_] | None, n_layers: int) -> LayerUsage:
        """Count ``depths [n_tokens]`` and ``active [n_tokens, n_layers]``.

        ``active`` may be None where a token passes through the first layers up to its depth.
        """
        counts = np.bincount(depths, minlength=n_layers + 1).tolist()
        if active is None:
            active_tokens = [*accumulate(counts[:0:-1])][::-1]
        else:
            active_tokens = active.sum(axis=0).tolist()
        return cls(depth_histogram=tuple(counts), active_tokens=tuple(active_tokens))

    @classmethod
    def from_depths(cls, depths: Int32, n_layers: int) -> LayerUsage:
        """Count ``depths [n_tokens]``."""
        return cls.of(depths, None, n_layers)

    @classmethod
    def from_active(cls, n_tokens: int, active_tokens: Sequence[int]) -> LayerUsage:
        """Take the active tokens of every layer, of ``n_tokens``; the sets are nested."""
        left = map(sub, (n_tokens, *active_tokens), (*active_tokens, 0))
        return cls(depth_histogram=tuple(left), active_tokens=tuple(active_tokens))

    @property
    def n_tokens(self) -> int:
        """All tokens."""
        return sum(self.depth_histogram)

    @property
    def mean_depth(self) -> float:
        """Layers that a token passed through on average."""
        return sum(self.active_tokens) / self.n_tokens

    @property
    def ideal_ratio(self) -> float:
        """Active layer-tokens over all layer-tokens."""
        return self.mean_depth / (len(self.depth_histogram) - 1)


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the time of a run went, in milliseconds; parts that a path lacks are 0."""

    total_ms: float
    entry_ms: float = 0.0
    """Embedding and scoring, the engine alone."""
    stage_ms: tuple[float, ...] = ()
    """Each stage call, the engine alone."""
    stages: tuple[int, ...] = ()
    """The number of the stage that each of ``stage_ms`` is of; a batch that ran in parts has calls
    for each of them."""
    head_ms: float = 0.0
    """The head, the engine alone."""
    move_ms: float = 0.0
    """Copies of rows: sorting them by depth, and compaction between stages."""
    route_ms: float = 0.0
    """Planning the route and preparing all calls."""

    @property
    def overhead_ms(self) -> float:
        """What the runtime itself takes: all but engines and copies."""
        engines = self.entry_ms + sum(self.stage_ms) + self.head_ms
        return self.total_ms - engines - self.move_ms


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Outputs of one batch. All arrays belong to the caller."""

    output: npt.NDArray[np.float32]
    """``[n_tokens, width]`` packed, or ``[batch, width]`` for heads per sequence."""
    depths: Int32
    """``[n_tokens]``, layers each token passed through."""
    scores: npt.NDArray[np.float32] | None
    """``[n_tokens]``, with routing ``per_layer`` ``[n_tokens, n_layers]``, of the state that came
    into each layer; None on the dense path, which does not score."""
    input_ids: Int32
    """``[n_tokens]``, the ids that were run, packed."""
    cu_seqlens: Int32
    """``[batch + 1]``, where each sequence starts in packed arrays."""
    layer_usage: LayerUsage
    timings: Timings
    path: PathName
    """The path that computed the result."""
    active: npt.NDArray[np.bool_] | None = None
    """``[n_tokens, n_layers]``, the layers that each token passed through; None where they are the
    first ones, as many as ``depths`` says."""
    stage_rows: tuple[int, ...] = ()
    """Rows that each stage call processed where these are padded to buckets, on a GPU; else none:
    a stage then processes its active tokens."""

    @property
    def active_layers(self) -> npt.NDArray[np.bool_]:
        """``[n_tokens, n_layers]``, the layers that each token passed through."""
        if self.active is not None:
            return self.active
        return self.depths[:, None] > np.arange(len(self.layer_usage.active_tokens))

    def split(self, packed: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        """Cut a packed array ``[n_tokens, …]`` of this result into one view per sequence."""
        return np.split(packed, self.cu_seqlens[1:-1])
