"""Adapter files: what a distillation changed, to be merged onto the dense weights it began with.

One safetensors file. ``NAME.up [n_out, rank]`` and ``NAME.down [rank, n_in]``, float16, stand for
a weight ``NAME`` that becomes ``weight + up @ down`` (Hu et al., 2021). Every other tensor replaces
the one of its name; the probe is among them. The header's ``sdt-adapter`` is JSON: the base's name,
licence and SHA-256, the config of the result, its score quantiles, recipe and measured quality.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sdt_deploy.config import ModelConfig, is_number
from sdt_deploy.errors import CheckpointError, ConfigError
from sdt_deploy.files import parse_json, write_file
from sdt_deploy.model.checkpoints import Checkpoint, model_with_weights
from sdt_deploy.model.transformer import SparseDepthTransformer

KEY = "sdt-adapter"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Low-rank changes, replaced tensors and the config that they belong to."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """``up [n_out, rank]`` and ``down [rank, n_in]`` by the name of the weight."""
    tensors: Mapping[str, Tensor]
    """Float32 tensors that replace the base's."""
    config: ModelConfig
    """Of the result, thresholds included."""
    base_sha256: str
    """See :func:`weights_sha256`."""
    score_quantiles: tuple[float, ...] | None = None
    pinned_share: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict)
    """``base`` (name, licence), ``recipe``, ``quality``: for the reader, and kept in provenance."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.pinned_share <= 1.0:
            raise ConfigError(f"pinned_share must lie in 0..1, not {self.pinned_share}")
        if self.score_quantiles is not None and len(self.score_quantiles) != 101:
            raise ConfigError(f"101 score quantiles are needed, not {len(self.score_quantiles)}")
        for name, (up, down) in self.factors.items():
            if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
                raise ConfigError(
                    f"the factors of {name} do not fit each other: {tuple(up.shape)} and "
                    f"{tuple(down.shape)}"
                )


def weights_sha256(model: SparseDepthTransformer) -> str:
    """Return the SHA-256 over name, shape and float32 content of all tensors but the probe's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("scorer."):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_adapter(path: Path, adapter: Adapter) -> None:
    """Write the file, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    tensors = {name: tensor.detach().float() for name, tensor in adapter.tensors.items()}
    for name, (up, down) in adapter.factors.items():
        tensors[f"{name}.up"], tensors[f"{name}.down"] = up.detach().half(), down.detach().half()
    record = {
        "format_version": FORMAT_VERSION,
        "base_sha256": adapter.base_sha256,
        "model": adapter.config.to_dict(),
        "score_quantiles": adapter.score_quantiles,
        "pinned_share": adapter.pinned_share,
        "about": adapter.about,
    }
    content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, safetensors.torch.save(content, metadata={KEY: json.dumps(record)}))


def read_adapter(path: Path) -> Adapter:
    """Read what :func:`write_adapter` wrote.

    Raises:
        CheckpointError: if it cannot be read, is no adapter, or contradicts itself.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} cannot be read: it is missing or not a regular file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if KEY not in meta:
                raise CheckpointError(
                    f"{path} is no adapter of sdt-deploy: its header has no entry {KEY!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        record = parse_json(meta[KEY].encode())
        if record["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {record['format_version']}; this release reads "
                f"version {FORMAT_VERSION}"
            )
        found, share = record["score_quantiles"], record["pinned_share"]
        if not all(map(is_number, [share, *(found or ())])):
            raise ValueError("score_quantiles and pinned_share must be numbers")
        about = record["about"]
        if not isinstance(about, dict) or not isinstance(about.get("base", {}), dict):
            raise ValueError("about, and base in it, must be objects")
        factors = {
            name.removesuffix(".up"): (tensors.pop(name), tensors.pop(f"{name[:-3]}.down"))
            for name in [name for name in tensors if name.endswith(".up")]
        }
        return Adapter(
            factors=factors,
            tensors=tensors,
            config=ModelConfig.from_dict(record["model"]),
            base_sha256=str(record["base_sha256"]),
            score_quantiles=None if found is None else tuple(found),
            pinned_share=share,
            about=about,
        )
    except CheckpointError:
        raise
    except Exception as error:  # torch and safetensors raise many kinds on damaged files
        raise CheckpointError(f"{path} cannot be read as an adapter: {error!r}") from error


@torch.no_grad()
def merged(base: Checkpoint, adapter: Adapter, *, where: str = "the adapter") -> Checkpoint:
    """Return ``base`` with ``adapter`` merged into its weights, and the adapter's config.

    Args:
        base: the model that the adapter was made for; its own probe is not used.
        adapter: what to merge.
        where: names the adapter in messages.

    Raises:
        CheckpointError: if the adapter belongs to other weights, or its tensors do not fit.
    """
    found = weights_sha256(base.model)
    if found != adapter.base_sha256:
        name = adapter.about.get("base", {}).get("name", "another model")
        raise CheckpointError(
            f"{where} was trained for other weights: it needs {name} with SHA-256 "
            f"{adapter.base_sha256[:16]}…, and these have {found[:16]}…. Give the model that it "
            "was trained for, unchanged"
        )
    weights = dict(base.model.state_dict())
    for name, (up, down) in adapter.factors.items():
        weight = weights.get(name)
        if weight is None or weight.shape != (len(up), down.shape[1]):
            has = "none" if weight is None else str(tuple(weight.shape))
            raise CheckpointError(
                f"{where} does not fit: it changes {name} of shape {(len(up), down.shape[1])}; "
                f"the model has {has}"
            )
        weights[name] = weight + up.float() @ down.float()
    weights.update(adapter.tensors)
    return dataclasses.replace(
        base,
        model=model_with_weights(adapter.config, weights, where=where),
        score_quantiles=adapter.score_quantiles,
        pinned_share=adapter.pinned_share,
        provenance={**base.provenance, "adapter": dict(adapter.about)},
    )
