"""Any supported checkpoint becomes a native model, with a probe fitted on a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sdt_deploy.bundle_files import MANIFEST
from sdt_deploy.choices import Importance, Levels
from sdt_deploy.config import Context, Leaving, Routing, Selection
from sdt_deploy.costs import thresholds_for_depth
from sdt_deploy.errors import CheckpointError, ConfigError, InputError
from sdt_deploy.files import check_replaceable
from sdt_deploy.model import checkpoints
from sdt_deploy.model.adapters import merged, read_adapter
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.huggingface import load_huggingface
from sdt_deploy.model.layer_probes import with_layer_probes
from sdt_deploy.model.original import load_original
from sdt_deploy.model.probe import (
    capacity_thresholds,
    check_depth,
    depth_histogram,
    depth_shares,
    fit_probe,
    joined,
    quantiles,
    set_thresholds,
    token_features,
)
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.tokenization import TextTokenizer

HELD_OUT_EVERY = 5
FIT_TOKENS = 60_000
FIT_LENGTH = 1024
"""Longest sequence that a probe is fitted on where embeddings know no places (rotary)."""
SAMPLE_TOKENS = 32_768


@dataclass(frozen=True, kw_only=True)
class ProbeFit:
    """How a probe is made."""

    texts: Sequence[str]
    """Real text, one sequence each; every fifth is held out."""
    target_depth: float | None = None
    """Layers per token, pinned tokens included; None: 60 % of the layers."""
    levels: Levels = "graded"
    importance: Importance = "attention"
    selection: Selection = "threshold"
    routing: Routing = "once"
    leaving: Leaving = "exit"


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What came out of a fit, on the held-out texts."""

    n_fit_tokens: int
    n_held_out_tokens: int
    mean_depth: float
    depth_histogram: tuple[int, ...]
    """Tokens at depth 0, 1, …, n_layers."""


def load_any(source: Path, *, head: str | None = None) -> Checkpoint:
    """Read any supported checkpoint.

    Args:
        source: a native directory, a Hugging Face directory, or a ``.pt`` file of the original.
        head: for Hugging Face directories, see :func:`load_huggingface`.

    Raises:
        CheckpointError: if it is none of these or cannot be used.
    """
    try:
        is_file, has_config = source.is_file(), (source / "config.json").exists()
    except OSError as error:  # too long a name, a folder that may not be read
        raise CheckpointError(f"{source} cannot be read: {error}") from error
    if is_file:
        _only_for_huggingface(source, head)
        return load_original(source)
    if not has_config and (source / MANIFEST).is_file():
        raise CheckpointError(
            f"{source} is a bundle, which is made of a model: give the model's directory"
        )
    if not has_config:
        raise CheckpointError(
            f"{source} is not a checkpoint: expected a native or Hugging Face directory with "
            "config.json, or a .pt file of the original research code"
        )
    if not checkpoints.is_native_config(checkpoints.read_json(source / "config.json")):
        return load_huggingface(source, head=head)
    _only_for_huggingface(source, head)
    return checkpoints.load(source)


def _only_for_huggingface(source: Path, head: str | None) -> None:
    if head is not None:
        raise CheckpointError(
            f"{source} has a head of its own; another one can be chosen for Hugging Face "
            "directories only"
        )


def convert(
    source: Path,
    target: Path,
    *,
    adapter: Path | None = None,
    sample_texts: Sequence[str] | None = None,
    fit: ProbeFit | None = None,
    context: Context | None = None,
    head: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda n_tokens: None,
) -> tuple[Checkpoint, FitReport | None]:
    """Turn ``source`` into the native directory ``target``.

    Args:
        source: see :func:`load_any`.
        target: directory to make.
        adapter: file to merge; see :mod:`sdt_deploy.model.adapters`. It brings its own probe.
        sample_texts: text that exports are verified and bundles benchmarked on; None: what ``fit``
            holds out, else the checkpoint's.
        fit: fit a probe, replacing one that the model may have; None: keep the model as it is.
        context: what active tokens see; None: as in the checkpoint (Hugging Face: ``all``).
        head: see :func:`load_any`.
        overwrite: replace ``target`` if it exists.
        progress: called with the number of tokens after each batch of the fit.

    Raises:
        CheckpointError: if ``source`` cannot be used, or ``adapter`` does not fit it.
        ConfigError: if the target depth cannot be reached, or ``adapter`` is given with ``fit`` or
            ``context``, which it brings itself.
        OutputError: if ``target`` exists or cannot be written.
    """
    if adapter is not None and (fit is not None or context is not None):
        raise ConfigError(
            "an adapter brings its own probe and context: leave out the texts to fit on and the "
            "context"
        )
    check_replaceable(target, checkpoints.MARKER, overwrite=overwrite)
    checkpoint = load_any(source, head=head)
    if adapter is not None:
        checkpoint = merged(checkpoint, read_adapter(adapter), where=str(adapter))
    if context is not None:
        model = rebuilt(checkpoint.model, context=context)
        checkpoint = dataclasses.replace(checkpoint, model=model)
    report = None
    if fit is not None:
        checkpoint, report = with_probe(checkpoint, fit, progress=progress)
    if sample_texts is not None:
        longest = checkpoint.model.config.max_positions
        (sample,) = encoded(checkpoint, longest, sample_texts)
        checkpoint = dataclasses.replace(checkpoint, sample=_head_of(sample, SAMPLE_TOKENS))
    checkpoints.save(checkpoint, target, overwrite=overwrite)
    return checkpoint, report


def encoded(checkpoint: Checkpoint, longest: int, *parts: Sequence[str]) -> tuple[TokenSample, ...]:
    """Tokenize texts for a model, each of ``parts`` apart; those over ``longest`` tokens are cut.

    Raises:
        CheckpointError: if it has no tokenizer, or one that gives ids that the model does not have.
        InputError: if a text gives no token.
    """
    if checkpoint.tokenizer is None:
        raise CheckpointError("texts were given, and this model has no tokenizer to read them")
    tokenizer, vocab_size = TextTokenizer(checkpoint.tokenizer), checkpoint.model.config.vocab_size
    samples = []
    for texts in parts:
        ids, cu_seqlens = tokenizer.encode(texts, max_length=longest, overflow="truncate")
        if ids.max() >= vocab_size:
            raise CheckpointError(
                f"the tokenizer.json gives the id {ids.max()}, and the model has a vocabulary of "
                f"{vocab_size}: it is of another model, or tokens were added to it and not to the "
                "model"
            )
        samples.append(TokenSample(input_ids=ids, cu_seqlens=cu_seqlens))
    return tuple(samples)


def with_probe(
    checkpoint: Checkpoint,
    fit: ProbeFit,
    *,
    progress: Callable[[int], None] = lambda n_tokens: None,
) -> tuple[Checkpoint, FitReport]:
    """Return ``checkpoint`` with a fitted probe, thresholds, score quantiles and a text sample.

    The special tokens that the tokenizer puts around a text are pinned to full depth.

    With routing ``per_layer`` the probes of the other layers follow, see
    :func:`sdt_deploy.model.layer_probes.with_layer_probes`; there are no score quantiles then.
    """
    if checkpoint.tokenizer is None:
        raise CheckpointError("a probe is fitted on texts, and this checkpoint has no tokenizer")
    n_layers = checkpoint.model.config.n_layers
    target_depth = 0.6 * n_layers if fit.target_depth is None else fit.target_depth
    check_depth(target_depth, n_layers)
    before, after = TextTokenizer(checkpoint.tokenizer).ends()
    pinned = tuple(sorted({*before, *after}))
    model = rebuilt(
        checkpoint.model,
        pinned_token_ids=pinned,
        probe="linear",
        selection=fit.selection,
        routing="once",
        leaving="exit",
        thresholds=(),
    )
    held_out = fit.texts[::HELD_OUT_EVERY]
    fitted = [text for i, text in enumerate(fit.texts) if i % HELD_OUT_EVERY]
    if not fitted:
        raise CheckpointError("the text has a single line; a probe needs at least two")
    longest = model.config.max_positions
    if model.config.rotary is not None:
        longest = min(longest, FIT_LENGTH)
    fit_sample, held_sample = encoded(checkpoint, longest, fitted, held_out)
    # Long sequences too: a probe that has seen short ones only would read the place of a token far
    # behind them as importance.
    samples = fit_sample, _chained(fit_sample, pinned, longest, before, after)
    features, long_features = (
        token_features(model, sample, fit.importance, max_tokens=FIT_TOKENS // 2, progress=progress)
        for sample in samples
    )
    weight, bias = fit_probe(joined([features, long_features]))
    with torch.no_grad():
        model.scorer.weight.copy_(weight)
        model.scorer.bias.copy_(bias)
        ids = torch.full(features.embedded.shape[:1], -1)
        scores = model.scorer(ids, features.embedded).numpy()
    if fit.selection == "capacity":
        thresholds = capacity_thresholds(n_layers, target_depth, fit.levels)
    else:
        thresholds = set_thresholds(
            scores, features.pinned_share, model.config, target_depth, fit.levels
        )
    model = rebuilt(model, thresholds=thresholds)
    made: dict[str, object] = {
        "importance": fit.importance,
        "levels": fit.levels,
        "selection": fit.selection,
        "routing": fit.routing,
        "target_depth": target_depth,
        "n_tokens": len(scores),
    }
    per_layer = fit.routing == "per_layer"
    if per_layer:
        model = with_layer_probes(
            model,
            fit_sample,
            importance=fit.importance,
            shares=depth_shares(n_layers, min(target_depth, n_layers), fit.levels),
            leaving=fit.leaving,
            progress=progress,
        )
        made["leaving"] = fit.leaving
    fitted_checkpoint = dataclasses.replace(
        checkpoint,
        model=model,
        provenance={**checkpoint.provenance, "probe": made},
        score_quantiles=None if per_layer else quantiles(scores),
        pinned_share=features.pinned_share,
        sample=_head_of(held_sample, SAMPLE_TOKENS),
    )
    return fitted_checkpoint, _report(model, held_sample, len(scores))


def _report(model: SparseDepthTransformer, held_out: TokenSample, n_fit: int) -> FitReport:
    histogram = depth_histogram(model, held_out)
    n_tokens = sum(histogram)
    return FitReport(
        n_fit_tokens=n_fit,
        n_held_out_tokens=n_tokens,
        mean_depth=sum(depth * count for depth, count in enumerate(histogram)) / n_tokens,
        depth_histogram=histogram,
    )


def rebuilt(model: SparseDepthTransformer, **changes: object) -> SparseDepthTransformer:
    """Return a model whose config has ``changes`` and that holds the same weights.

    Probes of another number are not kept.
    """
    rebuilt = SparseDepthTransformer(model.config.replace(**changes))
    weights, fresh = model.state_dict(), rebuilt.state_dict()
    for name in ("scorer.weight", "scorer.bias"):
        if name in weights and name in fresh and weights[name].shape != fresh[name].shape:
            weights[name] = fresh[name]
    rebuilt.load_state_dict({**fresh, **weights})
    return rebuilt.eval()


def at_depth(checkpoint: Checkpoint, target_depth: float) -> Checkpoint:
    """Return ``checkpoint`` with thresholds for another mean depth; nothing else changes.

    Raises:
        ConfigError: if it has no score quantiles, or the depth cannot be reached.
    """
    thresholds = thresholds_for_depth(
        checkpoint.model.config,
        target_depth,
        score_quantiles=checkpoint.score_quantiles,
        pinned_share=checkpoint.pinned_share,
    )
    provenance = {**checkpoint.provenance, "target_depth": target_depth}
    model = rebuilt(checkpoint.model, thresholds=thresholds)
    return dataclasses.replace(checkpoint, model=model, provenance=provenance)


def _chained(
    sample: TokenSample, pinned: tuple[int, ...], length: int, before: list[int], after: list[int]
) -> TokenSample:
    """Chain the sequences of ``sample`` to sequences of ``length`` tokens, the last one shorter."""
    stream = sample.input_ids[~np.isin(sample.input_ids, pinned)]
    if not len(stream):
        raise InputError("the texts give special tokens only: there is nothing to fit a probe on")
    inner = max(1, length - len(before) - len(after))
    pieces = [
        np.concatenate([before, stream[i : i + inner], after]) for i in range(0, len(stream), inner)
    ]
    cu_seqlens = np.cumsum([0, *map(len, pieces)], dtype=np.int32)
    return TokenSample(input_ids=np.concatenate(pieces).astype(np.int32), cu_seqlens=cu_seqlens)


def _head_of(sample: TokenSample, max_tokens: int) -> TokenSample:
    stop = max(1, int(np.searchsorted(sample.cu_seqlens, max_tokens, side="right")) - 1)
    cu_seqlens = sample.cu_seqlens[: stop + 1]
    return TokenSample(input_ids=sample.input_ids[: cu_seqlens[-1]], cu_seqlens=cu_seqlens)
