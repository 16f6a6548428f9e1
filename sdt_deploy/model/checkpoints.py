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

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sdt_deploy.arrays import read_npz
from sdt_deploy.bundle import SAMPLE, TOKENIZER
from sdt_deploy.config import ModelConfig, is_integer, is_number, shown
from sdt_deploy.errors import CheckpointError, ConfigError, OutputError
from sdt_deploy.files import MAX_JSON_BYTES, is_partial, new_directory, parse_json, read_bytes
from sdt_deploy.model.transformer import SparseDepthTransformer

FORMAT = "sdt-model"
FORMAT_VERSION = 1
MODEL_TYPE = "sdt"
"""By which Hugging Face's ``AutoModel`` knows the directory, see :mod:`sdt_deploy.hf`."""
CONFIG = "config.json"
MARKER = CONFIG, FORMAT
"""By which a native directory is known; see :func:`sdt_deploy.files.new_directory`."""
WEIGHTS = "model.safetensors"
_MAX_ELEMENTS = 2**48
"""Beyond it, torch cannot count the bytes of a tensor, let alone hold it."""
MAX_TOKENIZER_BYTES = 2**28
"""Largest ``tokenizer.json`` that is read; the largest known have some 40 MB."""


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
        "model_type": MODEL_TYPE,
        "model": model.config.to_dict(),
        "provenance": checkpoint.provenance,
        "score_quantiles": checkpoint.score_quantiles,
        "pinned_share": checkpoint.pinned_share,
    }
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with new_directory(target, marker=MARKER, overwrite=overwrite) as directory:
        (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        try:
            safetensors.torch.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # a full disk, for instance
            raise OutputError(f"{target} cannot be written: {error}") from error
        # The library writes files that nobody else may read, whatever the umask is.
        (directory / WEIGHTS).chmod((directory / CONFIG).stat().st_mode)
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
    version = config.get("format_version")
    if not is_integer(version, FORMAT_VERSION, FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format version {shown(version)}; this release reads "
            f"version {FORMAT_VERSION}"
        )
    if is_partial(source):
        raise CheckpointError(
            f"{source} is what a killed conversion left behind: remove it and convert again"
        )
    try:
        model_config = ModelConfig.from_dict(config["model"])
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    weights = source / WEIGHTS
    quantiles, share = config.get("score_quantiles"), config.get("pinned_share", 0.0)
    if quantiles is not None and not (
        isinstance(quantiles, list) and len(quantiles) == 101 and all(map(is_number, quantiles))
    ):
        raise CheckpointError(f"{path}: score_quantiles must be 101 numbers")
    if not is_number(share) or not 0.0 <= share <= 1.0:
        raise CheckpointError(f"{path}: pinned_share must lie in 0..1, not {shown(share)}")
    provenance = config.get("provenance", {})
    if not isinstance(provenance, dict):
        raise CheckpointError(f"{path}: provenance must be an object, not {shown(provenance)}")
    return Checkpoint(
        model=model_with_weights(model_config, read_safetensors(weights), where=str(weights)),
        provenance=provenance,
        score_quantiles=None if quantiles is None else tuple(quantiles),
        pinned_share=share,
        tokenizer=read_tokenizer(source / TOKENIZER),
        sample=_read_sample(source / SAMPLE, model_config),
    )


def is_native_config(config: object) -> bool:
    """Tell whether a parsed ``config.json`` belongs to a native directory."""
    return isinstance(config, dict) and config.get("format") == FORMAT


class _Uninitialised(TorchFunctionMode):
    """Leaves out ``normal_``, whose first call on the meta device loads for seconds."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.normal_:
            return args[0]
        return function(*args, **(kwargs or {}))


def model_with_weights(
    config: ModelConfig, tensors: Mapping[str, Tensor], *, where: str
) -> SparseDepthTransformer:
    """Build the model of ``config`` with ``tensors`` as its weights, ready for inference.

    Memory is taken only once every shape is known to fit, whatever sizes ``config`` names.

    Raises:
        CheckpointError: names every missing, unexpected, misshapen and non-finite tensor at once.
    """
    if config.n_layers > len(tensors) or config.largest_tensor > _MAX_ELEMENTS:
        raise CheckpointError(
            f"{where} does not fit its config: that says {config.n_layers} layers and a tensor of "
            f"{config.largest_tensor} numbers; there are {len(tensors)} tensors, of at most "
            f"{max((tensor.numel() for tensor in tensors.values()), default=0)}"
        )
    with torch.device("meta"), _Uninitialised():
        expected = SparseDepthTransformer(config).state_dict()
    problems = [f"missing: {name}" for name in expected.keys() - tensors.keys()]
    problems += [f"unexpected: {name}" for name in tensors.keys() - expected.keys()]
    weights = {}
    for name in expected.keys() & tensors.keys():
        given = tensors[name]
        if given.shape != expected[name].shape:
            problems.append(
                f"{name} has the shape {tuple(given.shape)}, expected {tuple(expected[name].shape)}"
            )
            continue
        weights[name] = given.float() if given.is_floating_point() else torch.tensor(torch.nan)
        if not bool(weights[name].isfinite().all()):
            problems.append(f"{name} holds values that are not finite numbers of 32 bits")
    if problems:
        raise CheckpointError(
            f"{where} does not fit its config:\n  " + "\n  ".join(sorted(problems))
        )
    model = SparseDepthTransformer(config)
    model.load_state_dict(weights)
    return model.eval()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: if ``path`` cannot be read.
    """
    try:
        return parse_json(read_bytes(path, max_bytes=MAX_JSON_BYTES))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: if it cannot be read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} cannot be read: it is missing or not a regular file")
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # torch refuses some sizes and types that the library lets pass
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_tokenizer(path: Path) -> bytes | None:
    """Read a ``tokenizer.json``; None if there is none.

    Raises:
        CheckpointError: if it cannot be read.
    """
    if not path.exists():
        return None
    try:
        return read_bytes(path, max_bytes=MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read_sample(path: Path, config: ModelConfig) -> TokenSample | None:
    if not path.exists():
        return None
    try:
        arrays = read_npz(path)
        ids, cu_seqlens = arrays["input_ids"], arrays["cu_seqlens"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    lengths = np.diff(cu_seqlens) if cu_seqlens.ndim == 1 else np.zeros(0)
    if (
        any(array.dtype.kind not in "iu" or array.ndim != 1 for array in (ids, cu_seqlens))
        or (lengths.min(initial=1) < 1 or lengths.max(initial=0) > config.max_positions)
        or (len(cu_seqlens) < 2 or cu_seqlens[0] != 0 or cu_seqlens[-1] != len(ids))
        or (ids.min() < 0 or ids.max() >= config.vocab_size)
    ):
        raise CheckpointError(
            f"{path} must hold ids below {config.vocab_size} and rising cu_seqlens from 0 to their "
            f"number, at most {config.max_positions} apart"
        )
    return TokenSample(input_ids=ids.astype(np.int32), cu_seqlens=cu_seqlens.astype(np.int32))
