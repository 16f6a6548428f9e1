"""The native model directory: config, safetensors, optional tokenizer and text sample.

``sample.npz`` holds packed token ids of real text (``input_ids``, ``cu_seqlens``), so that exports
can be verified and bundles benchmarked on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor

from sdt_deploy.bundle import SAMPLE, TOKENIZER
from sdt_deploy.config import ModelConfig
from sdt_deploy.errors import CheckpointError, ConfigError
from sdt_deploy.files import new_directory
from sdt_deploy.model.transformer import SparseDepthTransformer

FORMAT = "sdt-model"
FORMAT_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class TokenSample:
    """Real text as packed token ids."""

    input_ids: np.ndarray
    """``[n_tokens]`` int32"""
    cu_seqlens: np.ndarray
    """``[batch + 1]`` int32"""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model with all that travels beside its weights."""

    model: SparseDepthTransformer
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where the weights come from, their licence, how the probe was made."""
    score_quantiles: tuple[float, ...] | None = None
    """101 quantiles of the scores of unpinned tokens on the calibration text."""
    pinned_share: float = 0.0
    """Share of pinned tokens on the calibration text."""
    tokenizer: bytes | None = None
    """Content of ``tokenizer.json``."""
    sample: TokenSample | None = None


def save(checkpoint: Checkpoint, target: Path, *, overwrite: bool = False) -> None:
    """Write the native directory, whole or not at all.

    Raises:
        OutputError: if ``target`` exists and ``overwrite`` is False, or cannot be written.
    """
    model = checkpoint.model
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": model.config.to_dict(),
        "provenance": checkpoint.provenance,
        "score_quantiles": checkpoint.score_quantiles,
        "pinned_share": checkpoint.pinned_share,
    }
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with new_directory(target, marker=(CONFIG, FORMAT), overwrite=overwrite) as directory:
        (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        safetensors.torch.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        if checkpoint.tokenizer is not None:
            (directory / TOKENIZER).write_bytes(checkpoint.tokenizer)
        if checkpoint.sample is not None:
            np.savez(
                directory / SAMPLE,
                input_ids=checkpoint.sample.input_ids,
                cu_seqlens=checkpoint.sample.cu_seqlens,
            )


def load(source: Path) -> Checkpoint:
    """Read a native directory.

    Raises:
        CheckpointError: if it is incomplete, of another format, or the weights do not fit.
    """
    path = source / CONFIG
    config = read_json(path)
    if not is_native_config(config):
        raise CheckpointError(
            f"{source} is not a native model directory; turn it into one with: "
            f"sdt-deploy convert {source} OUT"
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {config.get('format_version')!r}; this release reads "
            f"version {FORMAT_VERSION}"
        )
    try:
        model = SparseDepthTransformer(ModelConfig.from_dict(config["model"]))
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    load_weights(model, read_safetensors(source / WEIGHTS), where=str(source / WEIGHTS))
    tokenizer, sample = source / TOKENIZER, source / SAMPLE
    quantiles = config.get("score_quantiles")
    return Checkpoint(
        model=model,
        provenance=config.get("provenance", {}),
        score_quantiles=None if quantiles is None else tuple(quantiles),
        pinned_share=config.get("pinned_share", 0.0),
        tokenizer=tokenizer.read_bytes() if tokenizer.exists() else None,
        sample=_read_sample(sample) if sample.exists() else None,
    )


def is_native_config(config: object) -> bool:
    """Tell whether a parsed ``config.json`` belongs to a native directory."""
    return isinstance(config, dict) and config.get("format") == FORMAT


def load_weights(
    model: SparseDepthTransformer, tensors: Mapping[str, Tensor], *, where: str
) -> None:
    """Copy ``tensors`` into ``model`` and switch it to inference.

    Raises:
        CheckpointError: names every missing, unexpected, misshapen and non-finite tensor at once.
    """
    expected = model.state_dict()
    problems = [f"missing: {name}" for name in expected.keys() - tensors.keys()]
    problems += [f"unexpected: {name}" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        given = tensors[name]
        if given.shape != expected[name].shape:
            problems.append(
                f"{name} has the shape {tuple(given.shape)}, expected {tuple(expected[name].shape)}"
            )
        elif not given.is_floating_point() or not bool(given.isfinite().all()):
            problems.append(f"{name} holds values that are not finite numbers")
    if problems:
        raise CheckpointError(
            f"{where} does not fit its config:\n  " + "\n  ".join(sorted(problems))
        )
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    model.eval()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: if ``path`` cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read_sample(path: Path) -> TokenSample:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return TokenSample(input_ids=arrays["input_ids"], cu_seqlens=arrays["cu_seqlens"])
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
