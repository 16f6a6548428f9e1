from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sdt_deploy.bundle import Bundle
from sdt_deploy.config import ExportConfig, Precision
from sdt_deploy.exporters.export import export
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.transformer import SparseDepthTransformer
from tests.samples import CONFIGS, ExportedModel, random_model

Once = Callable[[str, Callable[[Path], None]], Path]
Half = Callable[[str, Precision], tuple[SparseDepthTransformer, Path]]


@pytest.fixture
def bundle(exported: Callable[[str], ExportedModel], tmp_path: Path) -> Bundle:
    """A copy of a small bundle with both row sets, to put engines into."""
    return Bundle.open(shutil.copytree(exported("all-embedding").bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def half(once: Once) -> Half:
    """Export one of ``CONFIGS``, cut to two layers; one of them loses its probe."""

    def get(name: str, precision: Precision) -> tuple[SparseDepthTransformer, Path]:
        config, export_config = CONFIGS[name]
        config = config.replace(n_layers=2, thresholds=())
        if name == "active-grouped":
            config = config.replace(probe="none", pinned_token_ids=())
        model = random_model(config, seed=len(name))
        size = min(2, export_config.layers_per_stage)
        cut = ExportConfig(layers_per_stage=size, precision=precision)

        def fill(directory: Path) -> None:
            export(Checkpoint(model=model), directory / "bundle", cut)

        return model, once(f"{name}-{precision}", fill) / "bundle"

    return get
