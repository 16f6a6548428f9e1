"""Which models can be exported in which way; what makes no sense is refused before any work."""

from __future__ import annotations

from sdt_deploy.config import ExportConfig, ModelConfig
from sdt_deploy.errors import ConfigError


def check_combination(model: ModelConfig, config: ExportConfig) -> None:
    """Check that a bundle of ``model`` exported by ``config`` could be run.

    Raises:
        ConfigError: if nothing could run it.
    """
    if model.selection == "capacity" and (
        config.attention == "fused" or config.precision != "float32"
    ):
        raise ConfigError(
            f"{config.precision} with {config.attention} attention is for GPUs, and these route by "
            "thresholds on the scores only: export a model with selection 'capacity' in float32 "
            "or int8, with decomposed attention"
        )
