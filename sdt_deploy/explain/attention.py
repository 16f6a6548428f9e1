"""Attention weights of the oracle, in the layers that a bundle chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sdt_deploy.bundle import Bundle
from sdt_deploy.errors import CheckpointError
from sdt_deploy.explain.routing import ExplainedText
from sdt_deploy.exporters.restore import restore
from sdt_deploy.model.blocks import Attention
from sdt_deploy.model.checkpoints import load
from sdt_deploy.model.transformer import SparseDepthTransformer


def oracle_of(bundle: Bundle, model: Path | None = None) -> SparseDepthTransformer:
    """Return the oracle of a bundle.

    Args:
        bundle: what the texts are run on.
        model: the native directory that it was exported from; None: rebuild it from the bundle.

    Raises:
        CheckpointError: if the model cannot be used, or is another one than the bundle's.
    """
    if model is None:
        return restore(bundle)
    found = load(model).model
    if found.config != bundle.manifest.model:
        raise CheckpointError(
            f"{model} is not the model of {bundle.path}: their configurations differ. Give the "
            "directory that the bundle was exported from, or none"
        )
    return found


@torch.no_grad()
def attention_weights(
    model: SparseDepthTransformer, text: ExplainedText
) -> npt.NDArray[np.float32]:
    """Return the softmax of every layer and head.

    Args:
        model: the oracle of the bundle that ``text`` was run on.
        text: one text; its route is used, not the one that the oracle would choose.

    Returns:
        ``[n_layers, n_heads, n_tokens, n_tokens]``, queries before keys. Rows of queries that a
        layer did not process are NaN: they attend to nothing there.
    """
    found: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert isinstance(module, Attention)
        found.append(module.weights(*given, **named)[0])

    hooks = [
        block.attention.register_forward_pre_hook(keep, with_kwargs=True) for block in model.blocks
    ]
    try:
        ids = torch.from_numpy(text.input_ids).long()[None]
        active = torch.from_numpy(text.active)[None]
        model(ids, torch.ones_like(ids, dtype=torch.bool), active=active)
    finally:
        for hook in hooks:
            hook.remove()
    weights = torch.stack(found).numpy()
    return np.where(text.active.T[:, None, :, None], weights, np.float32(np.nan))
