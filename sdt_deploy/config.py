"""Frozen configurations. They validate themselves; nothing here imports anything heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, Self

from sdt_deploy.checks import MAX_SIZE as MAX_SIZE
from sdt_deploy.checks import check as _check
from sdt_deploy.checks import check_choice as check_choice
from sdt_deploy.checks import check_flag as _check_flag
from sdt_deploy.checks import check_positive as _check_positive
from sdt_deploy.checks import is_integer as is_integer
from sdt_deploy.checks import is_number as is_number
from sdt_deploy.checks import shown as shown
from sdt_deploy.config_parts import HeadConfig as HeadConfig
from sdt_deploy.config_parts import Pooling as Pooling
from sdt_deploy.config_parts import RotaryConfig as RotaryConfig
from sdt_deploy.errors import ConfigError

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
Norm = Literal["layer", "rms"]
NormPlacement = Literal["pre", "post"]
Context = Literal["active", "all"]
ProbeKind = Literal["linear", "none"]
Selection = Literal["threshold", "capacity"]
Routing = Literal["once", "per_layer"]
Leaving = Literal["exit", "skip"]
Precision = Literal["float32", "float16", "bfloat16"]
Quantization = Literal["none", "int8"]
Target = Literal["onnxruntime"]
Attention = Literal["decomposed", "fused"]
EngineFlavour = Literal["tensorrt", "tensorrt-rtx"]
EngineLayout = Literal["padded", "packed"]

OPSETS: Mapping[str, int] = {"onnxruntime": 18}
"""ONNX opset of the exported graphs, per target."""
FUSED_OPSET = 24
"""The first opset whose Attention operator takes the lengths of its keys."""
MAX_LAYERS = 4096

TOLERANCES: Mapping[str, float] = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 8e-2}
"""Relative deviation from the float32 model that passes for rounding, per precision; chosen from
what was measured, see ``docs/decisions/008-precision.md``."""

INT8_TOLERANCE = 0.3
"""Largest deviation of int8 outputs from those of the float32 model, as the ratio of their norms;
``docs/decisions/007-int8.md`` says what was measured."""


def check_thresholds(thresholds: tuple[float, ...], n_layers: int, routing: Routing) -> None:
    """Check that ``thresholds`` are ``n_layers`` finite numbers, nondecreasing for one score.

    Raises:
        ConfigError: if they are not.
    """
    _check(
        len(thresholds) == n_layers,
        f"thresholds: one per layer is needed, {n_layers} in all, {len(thresholds)} were given",
    )
    for i, value in enumerate(thresholds):
        _check(is_number(value), f"thresholds[{i}] must be a finite number, not {shown(value)}")
    for i, (low, high) in enumerate(pairwise(thresholds)):
        _check(
            low <= high or routing == "per_layer",
            f"thresholds must not fall, or the sets of active tokens would not be nested: "
            f"thresholds[{i}] = {low} > thresholds[{i + 1}] = {high}",
        )


def compared(thresholds: Sequence[float]) -> tuple[float, ...]:
    """Return thresholds as scores are compared with them; those of 0 let every token through.

    A sigmoid underflows (that of ONNX Runtime is 0 for logits below -18), and 0 is not above 0.
    """
    return tuple(-1.0 if limit <= 0.0 else limit for limit in thresholds)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything about a depth-sparse transformer except its weights."""

    vocab_size: int
    d_model: int
    n_heads: int
    n_layers: int
    d_ff: int
    max_positions: int
    """The longest sequence, in tokens."""
    position_offset: int = 0
    """Row of the position table that holds the first position (RoBERTa: 2)."""
    rotary: RotaryConfig | None = None
    """Queries and keys are turned by their positions, and there is no position table."""
    n_kv_heads: int = 0
    """Heads of keys and values, each shared by as many of queries (grouped-query attention); 0:
    ``n_heads``."""
    head_dim: int = 0
    """Width of a head; 0: ``d_model / n_heads``."""
    n_token_types: int = 0
    """Size of the token type table; 0: there is none."""
    activation: Activation = "gelu"
    gated: bool = False
    """The feed-forward is ``down(activation(gate(x)) · up(x))`` (with ``silu``: SwiGLU)."""
    attention_bias: bool = True
    """Whether the products of attention have biases."""
    feed_forward_bias: bool = True
    """Whether those of the feed-forward have."""
    norm: Norm = "layer"
    """Kind of every norm: ``layer``: LayerNorm, ``rms``: RMSNorm."""
    norm_placement: NormPlacement = "pre"
    embedding_norm: bool = False
    """A norm on the embedded input."""
    final_norm: bool = True
    """A norm on the last states of all tokens."""
    eps: float = 1e-5
    """Epsilon of every norm."""
    context: Context = "all"
    """Which tokens the active ones see: ``active`` (each other) or ``all`` (finished ones too)."""
    causal: bool = False
    """Whether tokens see only themselves and those before them."""
    probe: ProbeKind = "linear"
    """``linear``: score = sigmoid(probe(embedding)). ``none``: a dense model, every score is 1."""
    routing: Routing = "once"
    """``once``: a token is scored on its embedding, for all layers. ``per_layer``: each layer has a
    probe of its own, on the states that come into it."""
    leaving: Leaving = "exit"
    """What a token does that a layer does not take (``per_layer`` only): ``exit``: it has left for
    good; ``skip``: it sits out this layer."""
    selection: Selection = "threshold"
    """``threshold``: the scores decide. ``capacity``: each layer takes the top share of the tokens
    of a sequence; what is compared with the thresholds is a token's standing among them."""
    thresholds: tuple[float, ...] = ()
    """Layer ``i`` runs for tokens with ``score > thresholds[i]``, or with ``capacity`` for those
    whose standing is above it: a share of ``1 - thresholds[i]``. Empty: ``i / n_layers``."""
    pinned_token_ids: tuple[int, ...] = ()
    """Tokens that always pass through all layers; their score is 1."""
    head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_heads", "d_ff", "max_positions"):
            _check_positive(name, getattr(self, name))
        _check_positive("n_layers", self.n_layers, MAX_LAYERS)
        for name in ("position_offset", "n_token_types", "n_kv_heads", "head_dim"):
            value = getattr(self, name)
            _check(
                is_integer(value, 0),
                f"{name} must be a non-negative integer up to {MAX_SIZE}, not {shown(value)}",
            )
        flags = ("embedding_norm", "final_norm", "causal", "gated")
        for name in (*flags, "attention_bias", "feed_forward_bias"):
            _check_flag(name, getattr(self, name))
        _check(
            self.head_dim > 0 or self.d_model % self.n_heads == 0,
            f"d_model must be a multiple of n_heads: {self.d_model} is none of {self.n_heads}",
        )
        _check(
            self.n_heads % self.n_key_heads == 0,
            f"n_heads must be a multiple of n_kv_heads: {self.n_heads} is none of "
            f"{self.n_key_heads}",
        )
        if self.rotary is not None:
            _check(
                isinstance(self.rotary, RotaryConfig),
                f"rotary must be a RotaryConfig or None, not {shown(self.rotary)}",
            )
            _check(
                self.causal and self.position_offset == 0 and self.head_width % 2 == 0,
                "rotary positions need causal attention, heads of an even width and no "
                f"position_offset; this model has causal {self.causal}, heads of "
                f"{self.head_width} and position_offset {self.position_offset}",
            )
        check_choice("activation", self.activation, Activation)
        check_choice("norm", self.norm, Norm)
        check_choice("norm_placement", self.norm_placement, NormPlacement)
        check_choice("context", self.context, Context)
        check_choice("probe", self.probe, ProbeKind)
        check_choice("selection", self.selection, Selection)
        check_choice("routing", self.routing, Routing)
        check_choice("leaving", self.leaving, Leaving)
        _check(
            isinstance(self.eps, float) and 0.0 < self.eps < 1.0,
            f"eps must lie between 0 and 1, not {shown(self.eps)}",
        )
        if not self.thresholds:
            even = tuple(i / self.n_layers for i in range(self.n_layers))
            object.__setattr__(self, "thresholds", even)
        check_thresholds(self.thresholds, self.n_layers, self.routing)
        _check(
            min(self.thresholds) >= 0.0 and max(self.thresholds) < 1.0,
            "thresholds must be at least 0 and below 1, the score of pinned tokens; "
            f"given: {self.thresholds}",
        )
        _check(
            self.probe != "none" or not self.pinned_token_ids,
            "pinned_token_ids have no meaning without a probe: every token goes to full depth",
        )
        _check(
            self.probe != "none" or self.scored_once,
            "capacities and routing per layer need scores; probe 'none' gives all the same",
        )
        _check(
            self.leaving == "exit" or self.routing == "per_layer",
            "leaving 'skip' needs routing 'per_layer': by one score a token that has left stays so",
        )
        for token_id in self.pinned_token_ids:
            _check(
                is_integer(token_id, 0, self.vocab_size - 1),
                f"pinned_token_ids must lie in the vocabulary of {self.vocab_size}: "
                f"{shown(token_id)}",
            )

    @property
    def n_key_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def is_plain(self) -> bool:
        """Whether GPUs and single files know the layers, which are then those of BERT and GPT-2.

        So with LayerNorms and biases, without a gate and rotary positions, with as many heads of
        keys as of queries, all together as wide as the model.
        """
        biased = self.attention_bias and self.feed_forward_bias
        full = self.n_key_heads == self.n_heads and self.n_heads * self.head_width == self.d_model
        others = self.gated or self.activation == "silu" or self.rotary is not None
        return self.norm == "layer" and biased and full and not others

    @property
    def score_axes(self) -> tuple[int, ...]:
        """Axes of scores behind those of the tokens: with routing ``per_layer`` one, of layers."""
        return (self.n_layers,) if self.routing == "per_layer" else ()

    @property
    def scored_once(self) -> bool:
        """Whether one score a token, compared with thresholds, decides: what GPUs route by."""
        return self.routing == "once" and self.selection == "threshold"

    @property
    def output_width(self) -> int:
        """Length of one output row."""
        widths = {"lm": self.vocab_size, "classify": self.head.n_classes}
        return widths.get(self.head.kind) or self.d_model

    @property
    def largest_tensor(self) -> int:
        """Number of elements of the largest parameter."""
        places = self.max_positions + self.position_offset if self.rotary is None else 0
        heads = self.n_heads * self.head_width
        tables = (self.vocab_size, places, self.n_token_types)
        return self.d_model * max(*tables, self.d_model, heads, self.d_ff, self.output_width)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with ``changes``, validated anew."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a config from :meth:`to_dict`.

        Raises:
            ConfigError: on unknown or missing keys, wrong types or values out of range.
        """
        values = _plain(cls, "model config", data)
        head = _plain(HeadConfig, "head", values.get("head", {}))
        if (rotary := values.get("rotary")) is not None:
            values["rotary"] = RotaryConfig(**_plain(RotaryConfig, "rotary", rotary))
        for name in ("thresholds", "pinned_token_ids"):
            if name in values:
                _check(
                    isinstance(values[name], (list, tuple)),
                    f"{name} must be a list, not {shown(values[name])}",
                )
                values[name] = tuple(values[name])
        try:
            return cls(**{**values, "head": HeadConfig(**head)})
        except TypeError as error:
            raise ConfigError(f"model config: {error}") from error


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How a model is cut into graphs."""

    layers_per_stage: int = 1
    """Consecutive layers in one stage graph."""
    stages: tuple[int, ...] = ()
    """Layers of each stage, in order, where they differ; empty: ``layers_per_stage`` each."""
    precision: Precision = "float32"
    """Type of products and of the states between graphs. Scores, norms, softmax, residual sums and
    outputs are float32 in all; with fused attention, see there."""
    quantization: Quantization = "none"
    """``int8``: the products of the layers with their weights, everything else in ``precision``."""
    target: Target = "onnxruntime"
    """Decides the opset, see :data:`OPSETS`."""
    attention: Attention = "decomposed"
    """``fused``: one Attention operator over padded rows and plain residual sums in ``precision``,
    the forms that GPU libraries have kernels for; norms and softmax are float32 inside these
    operators. ``decomposed`` suits CPUs."""

    def __post_init__(self) -> None:
        _check_positive("layers_per_stage", self.layers_per_stage)
        listed = isinstance(self.stages, list | tuple)
        _check(
            listed and all(is_integer(size, 1, MAX_LAYERS) for size in self.stages),
            f"stages must be a list of positive integers, not {shown(self.stages)}",
        )
        object.__setattr__(self, "stages", tuple(self.stages))
        _check(
            not self.stages or self.layers_per_stage == 1,
            "stages and layers_per_stage contradict each other; give one of them",
        )
        check_choice("attention", self.attention, Attention)
        grouped = self.layers_per_stage > 1 or any(size > 1 for size in self.stages)
        _check(
            self.attention == "decomposed" or not (grouped or self.quantization != "none"),
            "fused attention needs one layer per stage and no quantization",
        )
        check_choice("precision", self.precision, Precision)
        check_choice("quantization", self.quantization, Quantization)
        _check(
            self.quantization == "none" or self.precision == "float32",
            f"quantization needs precision 'float32', not {self.precision!r}",
        )
        check_choice("target", self.target, Target)

    @property
    def opset(self) -> int:
        """ONNX opset of every graph."""
        return FUSED_OPSET if self.attention == "fused" else OPSETS[self.target]

    @property
    def numbers(self) -> str:
        """What the layers compute in, in one word."""
        return self.precision if self.quantization == "none" else self.quantization

    def stage_layers(self, n_layers: int) -> tuple[tuple[int, int], ...]:
        """Return ``(first layer, one past the last)`` of every stage.

        Raises:
            ConfigError: if ``stages`` are for another number of layers.
        """
        if self.stages:
            total = sum(self.stages)
            _check(total == n_layers, f"stages have {total} layers, the model {n_layers}")
            stops = tuple(accumulate(self.stages))
            return tuple(zip((0, *stops[:-1]), stops, strict=True))
        size = self.layers_per_stage
        return tuple((i, min(i + size, n_layers)) for i in range(0, n_layers, size))


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """How engines are built from a bundle's graphs."""

    flavour: EngineFlavour
    compute_capabilities: tuple[str, ...] = ()
    """GPUs to build for, such as ``8.9``; none: the first GPU of this machine."""
    attention: EngineLayout = "padded"
    """``packed``: queries without padding, by TensorRT's own ragged attention (11.1 and newer), in
    the stages of bundles with fused attention."""
    workspace_mb: int | None = None
    """Bound on the scratch memory of each engine, in 2²⁰ bytes; None: the library's own."""
    graphs: tuple[str, ...] = ()
    """Graphs to build; none: all."""
    lengths: Path | None = None
    """File of recorded sequence lengths in tokens, one a line, to plan profiles for."""
    timing_cache: Path | None = None
    """File with measured kernel times, read and updated; it makes builds faster and repeatable."""
    pin_timing_cache: bool = False
    """Only read ``timing_cache``, and fail where it lacks a time."""

    def __post_init__(self) -> None:
        check_choice("flavour", self.flavour, EngineFlavour)
        check_choice("attention", self.attention, EngineLayout)
        if self.workspace_mb is not None:
            _check_positive("workspace_mb", self.workspace_mb)
        _check(
            self.timing_cache is not None or not self.pin_timing_cache,
            "pin_timing_cache needs a timing_cache to read",
        )


def _plain(cls: type, what: str, data: object) -> dict[str, Any]:
    """Check that ``data`` is a mapping whose keys are fields of ``cls``."""
    _check(isinstance(data, Mapping), f"{what} must be an object, not {type(data).__name__}")
    assert isinstance(data, Mapping)
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(map(str, set(data) - known))
    _check(not unknown, f"{what}: unknown keys {', '.join(unknown)}")
    return dict(data)
