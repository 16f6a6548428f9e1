"""Sparse against dense on a GPU, for models of common sizes with random weights.

    python benchmarks/gpu.py --backend onnxruntime-cuda --models minilm,base --json gpu.json

The weights are random and the ids too, so this speaks of speed, and of parity with the oracle, not
of quality. Thresholds are quantiles of the scores, so that every depth holds as many tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from sdt_deploy.bench.run import BenchOptions, run_bench
from sdt_deploy.config import BuildConfig, ExportConfig, HeadConfig, ModelConfig
from sdt_deploy.console import console
from sdt_deploy.exporters.export import export
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.model.transformer import SparseDepthTransformer

SIZES = {
    "minilm": {"d_model": 384, "n_heads": 12, "n_layers": 6, "d_ff": 1536},
    "base": {"d_model": 768, "n_heads": 12, "n_layers": 12, "d_ff": 3072},
    "large": {"d_model": 1024, "n_heads": 16, "n_layers": 24, "d_ff": 4096},
}


def make(size: str, context: str, levels: str) -> Checkpoint:
    """A BERT-like encoder of ``size`` whose tokens go 60 % deep on average."""
    config = ModelConfig(
        vocab_size=30_522,
        max_positions=512,
        norm_placement="post",
        embedding_norm=True,
        final_norm=False,
        eps=1e-12,
        context=context,
        head=HeadConfig(kind="embedding", pooling="mean", normalize=True),
        **SIZES[size],
    )
    torch.manual_seed(0)
    model = SparseDepthTransformer(config).eval()
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 2048).astype(np.int32)
    scores = oracle_output(model, ids, np.arange(0, 2049, 256, dtype=np.int32)).scores
    shares = np.linspace(0.2, 0.8, config.n_layers - 1)  # mean depth about half of the rest
    if levels == "two":
        shares = np.full(config.n_layers - 1, 0.5)
    thresholds = (0.0, *np.quantile(scores, shares).tolist())
    model = SparseDepthTransformer(config.replace(thresholds=thresholds)).eval()
    torch.manual_seed(0)
    fresh = SparseDepthTransformer(config)
    model.load_state_dict(fresh.state_dict())
    return Checkpoint(model=model, provenance={"source": f"random weights, {size}"})


def main() -> None:
    """Read the command line, measure, write the figures after each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="onnxruntime-cuda")
    parser.add_argument("--models", default="minilm,base")
    parser.add_argument("--precisions", default="float32,float16")
    parser.add_argument("--contexts", default="all,active")
    parser.add_argument("--levels", default="graded", choices=("graded", "two"))
    parser.add_argument("--layers-per-stage", type=int, default=1)
    parser.add_argument("--cases", default="2x20,8x128,64x128,64x256,64x512")
    parser.add_argument("--budget", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for size in options.models.split(","):
        for context in options.contexts.split(","):
            checkpoint = make(size, context, options.levels)
            for precision in options.precisions.split(","):
                start = time.perf_counter()
                with tempfile.TemporaryDirectory() as directory:
                    bundle = Path(directory) / "bundle"
                    config = ExportConfig(
                        precision=precision, layers_per_stage=options.layers_per_stage
                    )
                    export(checkpoint, bundle, config)
                    if options.backend.startswith("tensorrt"):
                        build(bundle, options.backend)
                    exported_s = time.perf_counter() - start
                    outcome = run_bench(
                        bundle,
                        BenchOptions(
                            cases=options.cases,
                            budget_s=options.budget,
                            with_memory=False,
                            backend=options.backend,
                        ),
                    )
                console.print(f"{size} {context} {precision}, made in {exported_s:.0f} s")
                console.print(outcome.table)
                rows = [asdict(case) for case in outcome.cases]
                head = {"model": size, "context": context, "precision": precision}
                found.append({**head, "levels": options.levels, "cases": rows})
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1))


def build(bundle: Path, flavour: str) -> None:
    """Build the engines of a bundle for the GPU that is here."""
    from sdt_deploy.bundle import Bundle
    from sdt_deploy.exporters.tensorrt import build_engines

    build_engines(Bundle.open(bundle), BuildConfig(flavour=flavour))


if __name__ == "__main__":
    main()
