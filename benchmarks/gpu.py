"""Sparse against dense on a GPU, for models of common sizes with random weights.

    python benchmarks/gpu.py --backend onnxruntime-cuda --models minilm,base --json gpu.json

First the GPU tests run (``--no-tests``: not), and their outcome is part of the JSON.

The weights are random and the ids too, so this speaks of speed, and of parity with the oracle, not
of quality. Thresholds are quantiles of the scores, so that every depth holds as many tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch

from sdt_deploy.bench.benchmark import CaseResult
from sdt_deploy.bench.environment import environment
from sdt_deploy.bench.run import BenchOptions, run_bench
from sdt_deploy.bundle import Bundle
from sdt_deploy.config import BuildConfig, ExportConfig, HeadConfig, ModelConfig
from sdt_deploy.console import console
from sdt_deploy.costs import dense_flops
from sdt_deploy.exporters.export import export
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.model.probe import quantiles
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.runtime.backends.device import DeviceMemory

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
    return Checkpoint(
        model=model,
        provenance={"source": f"random weights, {size}"},
        score_quantiles=quantiles(scores),
    )


def ceilings() -> dict[str, float]:
    """Measure what the GPU can do: a large float16 product, and a large copy."""
    memory = DeviceMemory()
    size = 8192
    one, other = (torch.randn(size, size, device="cuda").half() for _ in range(2))
    block = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(block)
    for _ in range(3):
        one @ other
        target.copy_(block)
    product = min(memory.clock(lambda: one @ other) for _ in range(10))
    copy = min(memory.clock(lambda: target.copy_(block)) for _ in range(10))
    return {
        "float16_tflop_per_s": 2 * size**3 / product * 1e-9,
        "copy_gb_per_s": 2 * block.nbytes / copy * 1e-6,
    }


def floor_ms(row: CaseResult, config: ModelConfig, limits: dict[str, float]) -> dict[str, float]:
    """Return the least time of a case by operations, and by the bytes of the layers' weights.

    ``dense`` counts all operations, ``sparse`` those that the active tokens need.
    """
    dense = dense_flops(config, [row.seq] * row.batch)
    weights = config.n_layers * (4 * config.d_model**2 + 2 * config.d_model * config.d_ff) * 2
    rate = limits["float16_tflop_per_s"] * 1e9
    return {
        "dense": max(dense / rate, weights / limits["copy_gb_per_s"] * 1e-6),
        "sparse": max(row.flops_ratio * dense / rate, weights / limits["copy_gb_per_s"] * 1e-6),
    }


def run_tests(limit_s: float) -> dict[str, Any]:
    """Run the GPU tests; return how many passed, failed and were skipped, and which failed."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
        try:
            subprocess.run([*command, f"--junitxml={report}"], check=False, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return {"ended_after_s": limit_s}
        if not report.exists():
            return {"error": "pytest wrote no report"}
        cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314, made just now
    failed = [c.attrib["name"] for c in cases if {"failure", "error"} & {x.tag for x in c}]
    n_skipped = sum(case.find("skipped") is not None for case in cases)
    n_passed = len(cases) - len(failed) - n_skipped
    return {"passed": n_passed, "skipped": n_skipped, "failed": failed}


def gpu_state() -> str:
    """Return the GPU's name, driver, clocks and power, as the driver reports them."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Read the command line, measure, write the figures after each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="onnxruntime-cuda")
    parser.add_argument("--models", default="minilm,base")
    parser.add_argument("--precisions", default="float16")
    parser.add_argument("--contexts", default="all,active")
    parser.add_argument("--attention", default="fused", choices=("fused", "decomposed"))
    parser.add_argument("--levels", default="graded", choices=("graded", "two"))
    parser.add_argument("--cases", default="2x20,8x128,16x512,64x128,32x256,64x256,128x256")
    parser.add_argument("--budget", type=float, default=1.5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--accuracy", action="store_true", help="compare with the PyTorch model")
    parser.add_argument("--bundles", type=Path, help="keep exported bundles here, and reuse them")
    parser.add_argument("--export-only", action="store_true", help="with --bundles; needs no GPU")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--tests-limit", type=float, default=240, help="seconds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.export_only:
        with bundles_in(options.bundles) as directory:
            for size, context, precision in wanted(options):
                exported(directory, size, context, precision, options)
        return
    tests = None if options.no_tests else run_tests(options.tests_limit)
    limits = ceilings()
    found: dict[str, Any] = {
        "tests": tests,
        "environment": {**environment(), "gpu": gpu_state(), **limits},
        "models": [],
    }
    console.print({"tests": tests, **found["environment"]})
    with bundles_in(options.bundles) as directory:
        for size, context, precision in wanted(options):
            bundle = exported(directory, size, context, precision, options)
            outcome = run_bench(
                bundle,
                BenchOptions(
                    cases=options.cases,
                    budget_s=options.budget,
                    with_memory=not options.no_memory,
                    with_accuracy=options.accuracy,
                    backend=options.backend,
                ),
                progress=lambda what, done, total: print(what, flush=True),
            )
            console.print(f"{size} {context} {precision}")
            console.print(outcome.table)
            config = Bundle.open(bundle, check_files=False).manifest.model
            rows = [
                {**asdict(case), "floor_ms": floor_ms(case, config, limits)}
                for case in outcome.cases
            ]
            for row in rows:
                floor = ", ".join(f"{k} {ms:.3f}" for k, ms in row["floor_ms"].items())
                console.print(f"{row['batch']}x{row['seq']}: floor in ms: {floor}")
            head = {"model": size, "context": context, "precision": precision}
            rest = {"levels": options.levels, "attention": options.attention}
            found["models"].append({**head, **rest, "gpu_after": gpu_state(), "cases": rows})
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Yield model size, context and precision of every bundle to measure."""
    lists = (options.models, options.contexts, options.precisions)
    yield from itertools.product(*(each.split(",") for each in lists))


@contextlib.contextmanager
def bundles_in(directory: Path | None) -> Iterator[Path]:
    """Give a directory for bundles, a temporary one unless it is named."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def exported(
    directory: Path, size: str, context: str, precision: str, options: argparse.Namespace
) -> Path:
    """Return the bundle of a model, exporting it if it is not there."""
    bundle = directory / f"{size}-{context}-{precision}-{options.attention}-{options.levels}"
    if not bundle.exists():
        start = time.perf_counter()
        config = ExportConfig(precision=precision, attention=options.attention)
        export(make(size, context, options.levels), bundle, config)
        if options.backend.startswith("tensorrt"):
            build(bundle, options.backend)
        console.print(f"{bundle.name} made in {time.perf_counter() - start:.0f} s")
    return bundle


def build(bundle: Path, flavour: str) -> None:
    """Build the engines of a bundle for the GPU that is here."""
    from sdt_deploy.exporters.tensorrt import build_engines

    build_engines(Bundle.open(bundle), BuildConfig(flavour=flavour))


if __name__ == "__main__":
    main()
