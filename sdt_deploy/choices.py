"""What there is to choose from where the command line and a heavy module have the same choice."""

from __future__ import annotations

from typing import Literal

Importance = Literal["attention", "stability", "change", "rarity", "random"]
"""What a probe is fitted to; see :mod:`sdt_deploy.model.probe`."""
Levels = Literal["graded", "two-level"]
"""Which depths thresholds allow."""
ProbeRouting = Literal["once", "exit", "skip"]
"""When tokens are scored, and what those do that a layer does not take: ``once`` before the first
layer; before each, by a probe of its own, and they leave or sit one layer out."""
ProbeTraining = Literal["fixed", "straight-through", "annealed"]
"""How a probe is trained."""
Curriculum = Literal["linear", "cosine", "steps"]
"""How the mean depth falls while training."""
Baseline = Literal["truncated", "random"]
"""What to train for comparison."""
Device = Literal["cpu", "cuda"]
"""Where to train."""
PathName = Literal["sparse", "single", "masked", "dense"]
"""How a batch is run."""
PathChoice = Literal["auto", "sparse", "single", "masked", "dense"]
"""The same, or the fastest that computes the sparse model's function."""
BackendName = Literal[
    "onnxruntime-cpu",
    "onnxruntime-compiled",
    "onnxruntime-cuda",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
]
"""What runs the graphs of a bundle."""
