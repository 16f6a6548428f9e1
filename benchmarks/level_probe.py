"""Fit the probe of an adapter to its own scores, level over all places; set thresholds anew.

    python benchmarks/level_probe.py MODEL adapter.safetensors texts.txt OUT --target-depth 3.6

A probe that ``distill`` fitted during a run of before 2026-11-26 knew short texts only, and its
scores drift on longer ones (``docs/decisions/011-distillation.md``). Probes fitted since are level.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from distill_ship import write_finished

from sdt_deploy.model.adapters import merged, read_adapter
from sdt_deploy.model.checkpoints import TokenSample
from sdt_deploy.model.conversion import load_any
from sdt_deploy.model.probe import TokenFeatures, fit_probe, place_means
from sdt_deploy.tokenization import TextTokenizer, read_lines
from sdt_deploy.training.calibration import calibrated
from sdt_deploy.training.job import CALIBRATION_EVERY
from sdt_deploy.training.skipping import N_PLACED

N_TEXTS, MAX_LENGTH, N_TOKENS = 3000, 160, 40_000


@torch.no_grad()
def level(model: Path, adapter: Path, texts: Path, out: Path, target_depth: float) -> None:
    """Write the adapter with a levelled probe; see the module."""
    read = read_adapter(adapter)
    checkpoint = merged(load_any(model), read)
    student = checkpoint.model
    assert checkpoint.tokenizer is not None
    ids, cu = TextTokenizer(checkpoint.tokenizer).encode(
        read_lines(texts)[::CALIBRATION_EVERY][:N_TEXTS], max_length=MAX_LENGTH, overflow="truncate"
    )
    places = np.concatenate([np.arange(length) for length in np.diff(cu)])
    free = np.flatnonzero(~np.isin(ids, student.config.pinned_token_ids))
    chosen = np.random.default_rng(0).permutation(free)[:N_TOKENS]
    tokens, positions = (torch.from_numpy(x[chosen]).long() for x in (ids, places))
    embedded = student.embeddings(tokens, positions, None)
    weight, bias = fit_probe(
        TokenFeatures(
            embedded=embedded,
            importance=student.scorer.logits(embedded),
            position_ids=positions,
            pinned_share=1 - len(free) / len(ids),
            place_means=place_means(student, tokens[:N_PLACED], int(positions.min())),
        )
    )
    student.scorer.weight.copy_(weight)
    student.scorer.bias.copy_(bias)
    finished = calibrated(
        checkpoint,
        TokenSample(input_ids=ids, cu_seqlens=cu),
        target_depth=target_depth,
        levels="two-level",
        shallow_depth=read.about["recipe"]["shallow_depth"],
    )
    about = {**read.about, "levelled": {"target_depth": target_depth}}
    write_finished(out, dataclasses.replace(read, about=about), finished)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target-depth", type=float, required=True)
    arguments = parser.parse_args()
    level(
        arguments.model, arguments.adapter, arguments.texts, arguments.out, arguments.target_depth
    )


if __name__ == "__main__":
    main()
