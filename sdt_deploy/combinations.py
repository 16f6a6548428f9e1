"""Which models can be exported in which way; what makes no sense is refused before any work."""

from __future__ import annotations

from sdt_deploy.config import ExportConfig, ModelConfig
from sdt_deploy.errors import ConfigError


def check_combination(
    model: ModelConfig, config: ExportConfig, *, single_file: bool = False
) -> None:
    """Check that a bundle of ``model`` exported by ``config`` could be run.

    Raises:
        ConfigError: if nothing could run it.
    """
    if model.causal and (
        config.attention == "fused" or config.precision != "float32" or single_file
    ):
        raise ConfigError(
            "causal attention needs rows in the order of the tokens, which single files and the "
            "GPU loop do not keep: export in float32 or int8, with decomposed attention and "
            "--no-single-file"
        )
    if not model.is_plain and (config.attention == "fused" or config.precision != "float32"):
        raise ConfigError(
            f"{config.precision} with {config.attention} attention is for GPUs, which do not know "
            "the layers of this model (RMSNorm, gates, products without bias, heads that share "
            "keys): export it in float32 or int8, with decomposed attention"
        )
    if not model.is_plain and single_file:
        raise ConfigError(
            "the single file does not know the layers of this model (RMSNorm, gates, products "
            "without bias, heads that share keys): export with --no-single-file"
        )
    how = f"routing {model.routing!r} and selection {model.selection!r}"
    if not model.scored_once and (config.attention == "fused" or config.precision != "float32"):
        raise ConfigError(
            f"{config.precision} with {config.attention} attention is for GPUs, and these route by "
            f"thresholds on one score: export a model with {how} in float32, with decomposed "
            "attention"
        )
    if model.routing == "once":
        return
    if any(stop - first > 1 for first, stop in config.stage_layers(model.n_layers)):
        raise ConfigError(
            f"with {how} the router decides after every layer: export with one layer per stage"
        )
    if config.quantization != "none":
        raise ConfigError(
            "with routing 'per_layer' the scores of inner layers would carry the errors of int8: "
            "export in float32"
        )
    if single_file:
        raise ConfigError(
            "the single file sorts rows once, by one score: with routing 'per_layer' export with "
            "--no-single-file"
        )


def can_generate(model: ModelConfig) -> bool:
    """Tell whether a model can generate tokens: what is later may change nothing.

    Capacities rank all tokens of a sequence, so there it would change who was taken before.
    """
    return model.causal and model.head.kind == "lm" and model.selection == "threshold"


def knows_single_file(model: ModelConfig, config: ExportConfig) -> bool:
    """Tell whether the whole loop can be one graph."""
    on_cpus = config.precision == "float32" and config.attention == "decomposed"
    return on_cpus and model.routing == "once" and not model.causal and model.is_plain
