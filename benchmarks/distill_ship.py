"""Turn what ``distill_minilm.py train`` saved into an adapter file for all-MiniLM-L6-v2.

    python benchmarks/distill_ship.py DATA OUT/main.safetensors adapter.safetensors

Thresholds and score quantiles are set on the calibration texts in ``DATA``; ``evaluate`` measures
the result. What ``sdt-deploy distill --adapter`` writes needs none of this.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import safetensors
from distill_data import default_model, read_packed

from sdt_deploy.config import ModelConfig
from sdt_deploy.model.adapters import Adapter, merged, weights_sha256, write_adapter
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.conversion import load_any
from sdt_deploy.training.calibration import calibrated


def ship(
    data: Path, trained: Path, out: Path, model: Path, target_depth: float | None = None
) -> None:
    """Write the adapter file; see the module."""
    base = load_any(model)
    with safetensors.safe_open(trained, framework="pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        meta = file.metadata()
    recipe = json.loads(meta["recipe"])
    names = [name.removesuffix(".up") for name in tensors if name.endswith(".up")]
    adapter = Adapter(
        factors={name: (tensors.pop(f"{name}.up"), tensors.pop(f"{name}.down")) for name in names},
        tensors=tensors,
        config=ModelConfig.from_dict(json.loads(meta["config"])),
        base_sha256=weights_sha256(base.model),
        about={
            "base": {"name": "all-MiniLM-L6-v2", "license": base.provenance.get("license")},
            "recipe": recipe,
        },
    )
    finished = calibrated(
        merged(base, adapter),
        read_packed(data / "calibration.xz"),
        target_depth=target_depth or recipe["target_depth"],
        levels=recipe["levels"],
        shallow_depth=recipe["shallow_depth"],
    )
    write_finished(out, adapter, finished)


def write_finished(out: Path, adapter: Adapter, finished: Checkpoint) -> None:
    """Write ``adapter`` with the probe, thresholds and score quantiles of ``finished``."""
    probe = {
        name: tensor
        for name, tensor in finished.model.state_dict().items()
        if name.startswith("scorer.")
    }
    write_adapter(
        out,
        dataclasses.replace(
            adapter,
            tensors={**adapter.tensors, **probe},
            config=finished.model.config,
            score_quantiles=finished.score_quantiles,
            pinned_share=finished.pinned_share,
        ),
    )
    print(f"{out}: {out.stat().st_size} B")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--target-depth", type=float, help="default: that of the training")
    arguments = parser.parse_args()
    model = arguments.model or default_model()
    ship(arguments.data, arguments.trained, arguments.out, model, arguments.target_depth)


if __name__ == "__main__":
    main()
