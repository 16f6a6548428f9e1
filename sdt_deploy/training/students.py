"""How a student begins: with a fitted probe, from an adapter, or as a baseline to compare with."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdt_deploy.choices import Baseline
from sdt_deploy.errors import ConfigError
from sdt_deploy.model.adapters import merged, read_adapter
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.conversion import ProbeFit, with_probe
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.training.config import DistillConfig


@dataclass(frozen=True, kw_only=True)
class Start:
    """A student before its first step."""

    student: Checkpoint
    """With low-rank factors: the weights that these are added to."""
    factors: Mapping[str, tuple[Tensor, Tensor]]
    """``up [n_out, rank]`` and ``down [rank, n_in]`` by weight to go on with; empty: begin anew."""
    key: str
    """Tells ways of beginning apart."""


def begin(
    dense: Checkpoint,
    texts: Sequence[str],
    config: DistillConfig,
    *,
    adapter: Path | None = None,
    baseline: Baseline | None = None,
) -> Start:
    """Make the student of a run.

    Args:
        dense: the teacher.
        texts: to fit a probe on.
        config: of the run.
        adapter: go on from what this file changed, its probe included; with ``config.lora_rank``
            its factors are trained on, without it they are merged and every weight is trained.
        baseline: ``truncated``: every token through the first ``target_depth`` layers;
            ``random``: a probe that knows nothing of importance. None: the method itself.

    Raises:
        CheckpointError: if the adapter belongs to another model.
        ConfigError: if it has another rank, or the target of ``truncated`` is not whole.
    """
    if adapter is not None:
        if baseline is not None:
            raise ConfigError("a baseline begins with the teacher: give no adapter to start from")
        return _from_adapter(dense, adapter, config)
    if baseline == "truncated":
        return Start(student=truncated(dense, config.target_depth), factors={}, key="truncated")
    fit = ProbeFit(
        texts=texts,
        target_depth=config.target_depth,
        levels=config.levels,
        importance="random" if baseline == "random" else "attention",
    )
    return Start(student=with_probe(dense, fit)[0], factors={}, key=fit.importance)


def truncated(dense: Checkpoint, depth: float) -> Checkpoint:
    """Return the first ``depth`` layers of ``dense``, for every token.

    Raises:
        ConfigError: if ``depth`` is no whole number in 1..n_layers.
    """
    n_layers = dense.model.config.n_layers
    if depth != int(depth) or not 1 <= depth <= n_layers:
        raise ConfigError(
            f"a truncated model has a whole number of layers in 1..{n_layers}, not {depth}: give "
            "a target depth of that kind"
        )
    model = SparseDepthTransformer(
        dense.model.config.replace(
            n_layers=int(depth), thresholds=(), probe="none", pinned_token_ids=()
        )
    )
    weights = dense.model.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return dataclasses.replace(dense, model=model.eval(), score_quantiles=None, pinned_share=0.0)


def _from_adapter(dense: Checkpoint, path: Path, config: DistillConfig) -> Start:
    adapter = read_adapter(path)
    key = hashlib.sha256(path.read_bytes()).hexdigest()
    if config.lora_rank is None:
        return Start(student=merged(dense, adapter, where=str(path)), factors={}, key=key)
    ranks = sorted({up.shape[1] for up, _ in adapter.factors.values()})
    if ranks != [config.lora_rank]:
        raise ConfigError(
            f"{path} has the ranks {ranks}; going on with it needs the same, not "
            f"{config.lora_rank}, or all weights (no --lora-rank)"
        )
    # Checked as a whole first: that it belongs to these weights, and fits them.
    merged(dense, adapter, where=str(path))
    rest = dataclasses.replace(adapter, factors={})
    return Start(
        student=merged(dense, rest, where=str(path)), factors=dict(adapter.factors), key=key
    )
