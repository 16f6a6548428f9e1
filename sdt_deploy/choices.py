"""Choices that the command line offers."""

from __future__ import annotations

from enum import StrEnum


class ContextChoice(StrEnum):
    """What active tokens see."""

    active = "active"
    all = "all"


class SelectionChoice(StrEnum):
    """What decides which tokens a layer takes."""

    threshold = "threshold"
    capacity = "capacity"


class RoutingChoice(StrEnum):
    """When tokens are scored, and what those do that a layer does not take."""

    once = "once"
    exit = "exit"
    skip = "skip"


class LevelsChoice(StrEnum):
    """Which depths thresholds allow."""

    graded = "graded"
    two_level = "two-level"


class ImportanceChoice(StrEnum):
    """What the probe is fitted to."""

    attention = "attention"
    stability = "stability"
    change = "change"
    rarity = "rarity"
    random = "random"


class QuantizationChoice(StrEnum):
    """What the products of the layers are computed in, if not in the precision."""

    none = "none"
    int8 = "int8"


class PrecisionChoice(StrEnum):
    """Type of products and states; scores, norms, softmax and outputs are float32 in all."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class AttentionChoice(StrEnum):
    """How attention stands in the graphs."""

    decomposed = "decomposed"
    fused = "fused"


class EngineLayoutChoice(StrEnum):
    """How engines lay queries out for attention."""

    padded = "padded"
    packed = "packed"


class HeadChoice(StrEnum):
    """What is computed from the last hidden states."""

    hidden = "hidden"
    lm = "lm"
    embedding = "embedding"
    classify = "classify"


class PathChoice(StrEnum):
    """Which path computes the answer."""

    auto = "auto"
    sparse = "sparse"
    single = "single"
    masked = "masked"
    dense = "dense"


class ProfiledPathChoice(StrEnum):
    """Paths that are profiled: those that are run, not chosen among."""

    sparse = "sparse"
    single = "single"
    masked = "masked"
    dense = "dense"


class TargetChoice(StrEnum):
    """Library that engines are built for."""

    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class BackendChoice(StrEnum):
    """What runs the graphs of a bundle."""

    onnxruntime_cpu = "onnxruntime-cpu"
    onnxruntime_compiled = "onnxruntime-compiled"
    onnxruntime_cuda = "onnxruntime-cuda"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"
    torch = "torch"


class ProbeTrainingChoice(StrEnum):
    """How a probe is trained."""

    fixed = "fixed"
    straight_through = "straight-through"
    annealed = "annealed"


class BaselineChoice(StrEnum):
    """What to train for comparison."""

    truncated = "truncated"
    random = "random"


class CurriculumChoice(StrEnum):
    """How the depth falls."""

    linear = "linear"
    cosine = "cosine"
    steps = "steps"


class DeviceChoice(StrEnum):
    """Where to train."""

    cpu = "cpu"
    cuda = "cuda"
