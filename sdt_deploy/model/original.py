"""Checkpoints of the original research code: a ``state_dict`` in a ``.pt`` file.

Its model is pre-norm with ReLU and two heads, a learned position table, thresholds ``i / n_layers``
compared with a strict ``>``, and active tokens that see each other only. The dense twin has the
same tensors without the scorer. The original lets the kept tokens of a whole batch attend to each
other; here attention stays inside each sequence, so outputs agree at batch size 1.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sdt_deploy.config import HeadConfig, ModelConfig
from sdt_deploy.errors import CheckpointError
from sdt_deploy.model.checkpoints import Checkpoint, model_with_weights

N_HEADS = 2
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_LAYER_NAMES = {
    "ln1.weight": "attention_norm.weight",
    "ln1.bias": "attention_norm.bias",
    "attn.out_proj.weight": "attention.output.weight",
    "attn.out_proj.bias": "attention.output.bias",
    "ln2.weight": "feed_forward_norm.weight",
    "ln2.bias": "feed_forward_norm.bias",
    "ff.0.weight": "feed_forward.up.weight",
    "ff.0.bias": "feed_forward.up.bias",
    "ff.2.weight": "feed_forward.down.weight",
    "ff.2.bias": "feed_forward.down.bias",
}
_NAMES = {
    "embed.weight": "embeddings.token.weight",
    "pos_embed.weight": "embeddings.position.weight",
    "ln_final.weight": "head.norm.weight",
    "ln_final.bias": "head.norm.bias",
    "head.weight": "head.projection.weight",
    "head.bias": "head.projection.bias",
}


def load_original(path: Path) -> Checkpoint:
    """Read a ``state_dict`` of the original research code.

    The file is read with ``weights_only=True``: pickled code in it is never run.

    Raises:
        CheckpointError: if it cannot be read safely or the tensors are not the original's.
    """
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever the file makes it raise
        raise CheckpointError(
            f"{path} cannot be read as a state_dict of tensors (code in it is not run): {error}"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"{path} does not hold a state_dict: names with tensors")
    odd = [name for name, tensor in state.items() if not _is_plain(tensor)]
    if odd:
        raise CheckpointError(
            f"{path} holds tensors that are not dense, or larger than what is stored of them: "
            f"{', '.join(odd)}"
        )
    try:
        if "pos_embed" in state:
            state["pos_embed.weight"] = state.pop("pos_embed").flatten(0, -2)
        config, tensors = _config(state, path), _rename(state)
    except (ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: a tensor does not have the shape of the original's: {error}"
        ) from error
    return Checkpoint(
        model=model_with_weights(config, tensors, where=str(path)),
        provenance={"source": path.name, "source_format": "original research code"},
    )


def _check_archive(path: Path) -> None:
    """Check that nothing in the file is compressed, or claims to be larger than the file."""
    try:
        if not zipfile.is_zipfile(path):
            return  # the format before torch 1.6 has no sizes beside its bytes
        with zipfile.ZipFile(path) as archive:
            n_bytes = sum(member.file_size for member in archive.infolist())
    except Exception as error:  # zipfile lets errors of decoding and unpacking through
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if n_bytes > path.stat().st_size:
        raise CheckpointError(
            f"{path} cannot be read: {n_bytes} bytes are packed into {path.stat().st_size}; "
            "torch.save does not compress"
        )


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _config(state: Mapping[str, Tensor], path: Path) -> ModelConfig:
    required = ("embed.weight", "pos_embed.weight", "layers.0.ff.0.weight", "head.weight")
    missing = [name for name in required if name not in state]
    if missing:
        raise CheckpointError(
            f"{path} is not a checkpoint of the original research code: no {', '.join(missing)}"
        )
    matches = (_LAYER.fullmatch(name) for name in state)
    vocab_size, d_model = state["embed.weight"].shape
    if d_model % N_HEADS:
        raise CheckpointError(f"{path}: width {d_model} cannot be split into {N_HEADS} heads")
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_heads=N_HEADS,
        n_layers=1 + max(int(match[1]) for match in matches if match),
        d_ff=state["layers.0.ff.0.weight"].shape[0],
        max_positions=state["pos_embed.weight"].shape[0],
        activation="relu",
        norm_placement="pre",
        final_norm=True,
        context="active",
        probe="linear" if "semantic_scorer.fc.weight" in state else "none",
        head=HeadConfig(kind="lm", bias="head.bias" in state),
    )


def _rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors their names here; unknown ones keep theirs, to be reported."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _LAYER.fullmatch(name)
        if name == "semantic_scorer.fc.weight":
            renamed["scorer.weight"] = tensor.flatten()
        elif name == "semantic_scorer.fc.bias":
            renamed["scorer.bias"] = tensor.reshape(())
        elif match is None:
            renamed[_NAMES.get(name, name)] = tensor
        elif match[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = match[2].rpartition("_")[2]
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"layers.{match[1]}.attention.{part}.{kind}"] = piece
        else:
            renamed[f"layers.{match[1]}.{_LAYER_NAMES.get(match[2], match[2])}"] = tensor
    return renamed
