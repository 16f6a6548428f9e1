"""How much of the time of the sparse loop is Python's?

    pip install -c constraints.txt numba
    python benchmarks/compiled_loop.py BUNDLE [--cases 1x12,2x20] [--json FILE]

The loop of ``runtime/sparse.py``, route plan included, compiled by Numba: it calls the C interface
of ONNX Runtime, whose library lies in onnxruntime's wheel, and nothing of Python runs between the
engines. Measured beside dense and ``single`` through the same interface, in turn in one process.
``bench`` measures the loop as it is, on the same batches, in a process of its own: two copies of
ONNX Runtime have two thread pools, which spin beside each other. Both outputs must be the same, bit
by bit.

For 64-bit Linux, two threads, float32 bundles with position embeddings, mean pooling, one layer a
stage and sequences of one length.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from sdt_deploy.bench.cases import parse_cases, token_source
from sdt_deploy.bench.environment import environment
from sdt_deploy.bundle import Bundle, Manifest
from sdt_deploy.ort import SLOWER_FUSIONS
from sdt_deploy.runtime.routing import HIDDEN
from sdt_deploy.runtime.session import Session

API_VERSION = 21
GET_ERROR_MESSAGE, CREATE_SESSION, RUN, CREATE_SESSION_OPTIONS, DISABLE_MEM_PATTERN = (
    2,
    7,
    9,
    10,
    17,
)
CREATE_TENSOR_WITH_DATA, CREATE_CPU_MEMORY_INFO, RELEASE_VALUE = 49, 69, 96
CREATE_ENV_WITH_POOLS, DISABLE_PER_SESSION_THREADS, CREATE_THREADING_OPTIONS = 119, 120, 121
ADD_SESSION_CONFIG_ENTRY, CREATE_AND_REGISTER_ALLOCATOR = 130, 144
SET_INTRA_OP_THREADS, SET_INTER_OP_THREADS, CREATE_ARENA_CFG = 147, 148, 156
"""Places in the table of functions, which only grows."""
FLOAT32, INT32 = 1, 6
"""Of ``ONNXTensorElementDataType``."""
CLOCK_MONOTONIC = 1


@intrinsic  # type: ignore[untyped-decorator]
def call(typingctx: Any, address: Any, arguments: Any) -> Any:
    """Call the C function at ``address`` with whole numbers and addresses."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, n = ir.IntType(64), signature.args[1].count
        function = builder.inttoptr(args[0], ir.FunctionType(word, [word] * n).as_pointer())
        return builder.call(function, [builder.extract_value(args[1], i) for i in range(n)])

    return types.int64(types.int64, arguments), generate


@njit(cache=True)  # type: ignore[untyped-decorator]
def now(clock: int, time: np.ndarray) -> int:
    """Return nanoseconds; ``time`` is scratch ``[2]`` int64."""
    call(clock, (CLOCK_MONOTONIC, time.ctypes.data))
    return time[0] * 1_000_000_000 + time[1]


@njit(cache=True)  # type: ignore[untyped-decorator]
def run_graph(engine, graph, names, arrays, shapes, n_inputs, values):  # type: ignore[no-untyped-def]
    """Run a graph on ``arrays``, (address, element type), shaped as the rows of ``shapes``.

    A row holds the number of axes, then each of them. Returns the address of a status, 0 if well.
    """
    api, memory = engine
    n = len(names)
    for i in range(n):
        axes, size = shapes[i, 0], 4
        for axis in range(axes):
            size *= shapes[i, 1 + axis]
        shape, out = shapes[i, 1:].ctypes.data, values[i:].ctypes.data
        address, kind = arrays[i]
        status = call(api[CREATE_TENSOR_WITH_DATA], (memory, address, size, shape, axes, kind, out))
        if status:
            return status
    inputs, outputs = values.ctypes.data, values[n_inputs:].ctypes.data
    input_names, output_names = names.ctypes.data, names[n_inputs:].ctypes.data
    status = call(
        api[RUN], (graph, 0, input_names, inputs, n_inputs, output_names, n - n_inputs, outputs)
    )
    for i in range(n):
        call(api[RELEASE_VALUE], (values[i],))
    return status


@njit(cache=True)  # type: ignore[untyped-decorator]
def lay_out(chosen, cu_seqlens, row_of, n_heads, gather, scatter, bias, rows, counts):  # type: ignore[no-untyped-def]
    """Lay the tokens out that ``chosen [n_tokens]`` names; see ``routing.head_layouts``.

    ``scatter`` or ``bias`` may be empty. Returns sequences and places.
    """
    n = batch = width = 0
    for sequence in range(len(cu_seqlens) - 1):
        before = n
        for token in range(cu_seqlens[sequence], cu_seqlens[sequence + 1]):
            rows[n] = row_of[token]
            n += chosen[token]
        if n > before:
            counts[batch] = n - before
            width = max(width, n - before)
            batch += 1
    start = place = 0
    for i in range(batch):
        count = counts[i]
        first = place
        for head in range(n_heads):
            for k in range(count):
                gather[place + k] = rows[start + k] * n_heads + head
            gather[place + count : place + width] = head
            if len(bias):
                bias[place : place + count] = 0.0
                bias[place + count : place + width] = HIDDEN
            place += width
        if len(scatter):
            for k in range(count):
                to = rows[start + k] * n_heads
                for head in range(n_heads):
                    scatter[to + head] = first + head * width + k
        start += count
    return batch, width


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def run_loop(  # type: ignore[no-untyped-def]
    engine, clock, graphs, names, sees_all, n_heads, thresholds, ids, cu_seqlens, states, output
):
    """Run a batch: score, route, compact.

    Returns the address of a status, nanoseconds in engines and copies, and stages that were run.
    """
    n, batch, n_layers = len(ids), len(cu_seqlens) - 1, len(thresholds)
    time, shapes, values = np.empty(2, np.int64), np.zeros((8, 6), np.int64), np.empty(8, np.int64)
    width = states.shape[2]
    work = np.empty((4, n), np.int32)
    depths, order, row_of, rows = work[0], work[1], work[2], work[3]
    counts, lengths, deepest = np.empty(batch, np.int32), np.diff(cu_seqlens), np.zeros(batch)
    scores, kinds = np.empty(n, np.float32), np.zeros(n, np.int32)
    for sequence in range(batch):
        for token in range(cu_seqlens[sequence], cu_seqlens[sequence + 1]):
            rows[token] = token - cu_seqlens[sequence]
    first, other = states[0], states[1]
    shapes[:5, 0], shapes[3, 0], shapes[:5, 1], shapes[3, 2] = 1, 2, n, width
    start = now(clock, time)
    status = run_graph(
        engine,
        graphs[0],
        names[0],
        (
            (ids.ctypes.data, INT32),
            (rows.ctypes.data, INT32),
            (kinds.ctypes.data, INT32),
            (first.ctypes.data, FLOAT32),
            (scores.ctypes.data, FLOAT32),
        ),
        shapes,
        3,
        values,
    )
    engines = now(clock, time) - start
    if status:
        return status, engines, 0

    histogram, place = np.zeros(n_layers + 1, np.int64), np.zeros(n_layers + 1, np.int64)
    for sequence in range(batch):
        for token in range(cu_seqlens[sequence], cu_seqlens[sequence + 1]):
            depth = 0
            while depth < n_layers and scores[token] > thresholds[depth]:
                depth += 1
            depths[token] = depth
            histogram[depth] += 1
            deepest[sequence] = max(deepest[sequence], depth)
    for depth in range(n_layers - 1, -1, -1):
        place[depth] = place[depth + 1] + histogram[depth + 1]
    n_active = place[:n_layers].copy()
    for token in range(n):
        row = place[depths[token]]
        place[depths[token]] += 1
        order[row], row_of[token] = token, row
    start = now(clock, time)
    for row in range(n):
        other[row] = first[order[row]]
    first, other = other, first
    engines += now(clock, time) - start

    indices, bias = np.empty((3, n * n_heads), np.int32), np.empty(n * n_heads, np.float32)
    gather, scatter, seen = indices[0], indices[1], indices[2]
    alive, seen_width, n_run = -1, 0, 0
    for layer in range(n_layers):
        k = n_active[layer]
        if not k:
            break
        n_run += 1
        keys = bias[:0] if sees_all else bias
        chosen = depths > layer
        b, w = lay_out(chosen, cu_seqlens, row_of, n_heads, gather, scatter, keys, rows, counts)
        if sees_all and b != alive:
            alive = b
            for sequence in range(batch):
                whole = deepest[sequence] > layer
                chosen[cu_seqlens[sequence] : cu_seqlens[sequence + 1]] = whole
            b, seen_width = lay_out(
                chosen, cu_seqlens, row_of, n_heads, seen, scatter[:0], bias, rows, counts
            )
        w_keys = seen_width if sees_all else w
        shapes[0, :3], shapes[1, :4], shapes[2, :3] = (
            (2, k, width),
            (3, b, n_heads, w),
            (2, k, n_heads),
        )
        start = now(clock, time)
        if sees_all:
            shapes[3, :3], shapes[4, :4] = (2, n, width), (3, b, n_heads, w_keys)
            shapes[5, :5], shapes[6, :3] = (4, b, n_heads, w_keys, 1), (2, k, width)
            status = run_graph(
                engine,
                graphs[1 + layer],
                names[1],
                (
                    (first.ctypes.data, FLOAT32),
                    (gather.ctypes.data, INT32),
                    (scatter.ctypes.data, INT32),
                    (first.ctypes.data, FLOAT32),
                    (seen.ctypes.data, INT32),
                    (bias.ctypes.data, FLOAT32),
                    (other.ctypes.data, FLOAT32),
                ),
                shapes,
                6,
                values,
            )
        else:
            shapes[3, :5], shapes[4, :3] = (4, b, n_heads, w_keys, 1), (2, k, width)
            status = run_graph(
                engine,
                graphs[1 + layer],
                names[1],
                (
                    (first.ctypes.data, FLOAT32),
                    (gather.ctypes.data, INT32),
                    (scatter.ctypes.data, INT32),
                    (bias.ctypes.data, FLOAT32),
                    (other.ctypes.data, FLOAT32),
                ),
                shapes,
                4,
                values,
            )
        if status:
            return status, engines, n_run
        if 2 * k < n:
            first[:k] = other[:k]
        else:
            other[k:] = first[k:]
            first, other = other, first
        engines += now(clock, time) - start

    shapes[0, :3], shapes[1, :3] = (2, n, width), (2, batch, n // batch)
    shapes[2, :2], shapes[3, :3] = (1, batch), (2, batch, width)
    start = now(clock, time)
    status = run_graph(
        engine,
        graphs[1 + n_layers],
        names[2],
        (
            (first.ctypes.data, FLOAT32),
            (row_of.ctypes.data, INT32),
            (lengths.ctypes.data, INT32),
            (output.ctypes.data, FLOAT32),
        ),
        shapes,
        3,
        values,
    )
    return status, engines + now(clock, time) - start, n_run


@dataclass
class Library:
    """ONNX Runtime's C library, opened as ``ort.py`` does it: one pool, one arena."""

    api: np.ndarray = field(init=False)
    _texts: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        place = Path(onnxruntime.__file__).parent / "capi"
        library = ctypes.CDLL(str(next(place.glob("libonnxruntime.so.*"))))
        library.OrtGetApiBase.restype = ctypes.POINTER(
            ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
        )
        api = library.OrtGetApiBase().contents(API_VERSION)
        words = ctypes.cast(api, ctypes.POINTER(ctypes.c_int64))
        self.api = np.ctypeslib.as_array(words, (CREATE_ARENA_CFG + 1,))
        pools = self.make(CREATE_THREADING_OPTIONS)
        self.check(SET_INTRA_OP_THREADS, pools, 2)
        self.check(SET_INTER_OP_THREADS, pools, 1)
        env = self._env = self.make(CREATE_ENV_WITH_POOLS, 3, self.text("loop"), pools)
        arena = self.make(CREATE_ARENA_CFG, 0, 0, -1, -1)
        self.check(
            CREATE_AND_REGISTER_ALLOCATOR, env, self.make(CREATE_CPU_MEMORY_INFO, 1, 0), arena
        )
        self.memory = self.make(CREATE_CPU_MEMORY_INFO, 0, 0)
        self._options = self.make(CREATE_SESSION_OPTIONS)
        self.check(DISABLE_PER_SESSION_THREADS, self._options)
        self.check(DISABLE_MEM_PATTERN, self._options)
        for key, value in (
            ("session.use_env_allocators", "1"),
            ("optimization.disable_specified_optimizers", ";".join(SLOWER_FUSIONS)),
        ):
            self.check(ADD_SESSION_CONFIG_ENTRY, self._options, self.text(key), self.text(value))

    def text(self, text: str) -> int:
        """Return the address of ``text``, kept as long as the library."""
        self._texts.append(ctypes.create_string_buffer(text.encode()))
        return ctypes.addressof(self._texts[-1])

    def check(self, function: int, *arguments: int) -> None:
        """Call a function that returns a status."""
        words = [ctypes.c_int64] * len(arguments)
        self.raise_for(
            ctypes.CFUNCTYPE(ctypes.c_int64, *words)(int(self.api[function]))(*arguments)
        )

    def make(self, function: int, *arguments: int) -> int:
        """Call one that makes something; return its address."""
        made = ctypes.c_int64()
        self.check(function, *arguments, ctypes.addressof(made))
        return made.value

    def raise_for(self, status: int) -> None:
        """Raise what a status says, if it is one."""
        if status:
            kind = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int64)
            raise RuntimeError(kind(int(self.api[GET_ERROR_MESSAGE]))(status).decode())

    def open(self, path: Path) -> int:
        """Open a graph."""
        return self.make(CREATE_SESSION, self._env, self.text(str(path)), self._options)


def opened(bundle: Bundle) -> Callable[[str, np.ndarray], tuple[np.ndarray, float]]:
    """Open a bundle; return what runs ids ``[batch, seq]`` int32 on a path.

    That returns the output and, for ``sparse``, the microseconds of a stage outside the engines.
    """
    library, manifest = Library(), bundle.manifest
    config = manifest.model
    engine = library.api, library.memory

    def graph(name: str) -> tuple[int, np.ndarray, int]:
        spec = manifest.graphs[name]
        names = [library.text(tensor.name) for tensor in (*spec.inputs, *spec.outputs)]
        return library.open(bundle.file(spec.file)), np.array(names), len(spec.inputs)

    stages = [graph(stage.name) for stage in manifest.stages]
    entry, head, whole = (
        graph("entry"),
        graph("head"),
        {name: graph(name) for name in ("dense", "single")},
    )
    graphs = np.array([entry[0], *(stage[0] for stage in stages), head[0]])
    names = entry[1], stages[0][1], head[1]
    thresholds = np.array(config.thresholds, dtype=np.float32)
    clock = ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value
    values = np.empty(8, dtype=np.int64)

    def run(path: str, ids: np.ndarray) -> tuple[np.ndarray, float]:
        batch, seq = ids.shape
        output = np.empty((batch, config.d_model), dtype=np.float32)
        if path == "sparse":
            states = np.empty((2, ids.size, config.d_model), dtype=np.float32)
            cu_seqlens = np.arange(0, ids.size + 1, seq, dtype=np.int32)
            start = perf_counter()
            status, engines, n_run = run_loop(
                engine,
                clock,
                graphs,
                names,
                config.context == "all",
                config.n_heads,
                thresholds,
                ids.reshape(-1),
                cu_seqlens,
                states,
                output,
            )
            library.raise_for(status)
            return output, ((perf_counter() - start) * 1e6 - engines * 1e-3) / max(1, n_run)
        address, of, n_inputs = whole[path]
        ones, zeros = np.ones_like(ids), np.zeros_like(ids)
        shapes = np.zeros((6, 6), dtype=np.int64)
        shapes[:, 0], shapes[:, 1], shapes[:, 2] = 2, batch, seq
        arrays = [(a.ctypes.data, INT32) for a in (ids, ones, zeros)]
        shapes[3, 2] = config.d_model
        if path == "single":
            shapes[3, :2], shapes[4, 2] = (1, config.n_layers), config.d_model
            arrays.append((thresholds.ctypes.data, FLOAT32))
        arrays.append((output.ctypes.data, FLOAT32))
        if path == "single":
            scores = np.empty(ids.shape, dtype=np.float32)
            arrays.append((scores.ctypes.data, FLOAT32))
        library.raise_for(run_graph(engine, address, of, tuple(arrays), shapes, n_inputs, values))
        return output, 0.0

    return run


def measure(bundle_path: Path, case: tuple[int, int], budget_s: float, answer: Any) -> None:
    """Measure a case in this process, and send what was found through the pipe ``answer``."""
    bundle = Bundle.open(bundle_path)
    run = opened(bundle)
    batches = [
        np.ascontiguousarray(batch.input_ids.reshape(case))
        for batch in token_source(bundle).batches(*case, bundle)
    ]
    times: dict[str, list[float]] = {"dense": [], "single": [], "sparse": []}
    overheads: list[float] = []
    output = run("sparse", batches[0])[0]
    paths, begin, n = list(times), perf_counter(), 0
    while n < 9 or (perf_counter() - begin < budget_s and n < 400):
        for path in paths if n % 2 else reversed(paths):
            start = perf_counter()
            overhead = run(path, batches[n % len(batches)])[1]
            if n > 1:
                times[path].append((perf_counter() - start) * 1e3)
                if path == "sparse":
                    overheads.append(overhead)
        n += 1
    ms = {path: median(taken) for path, taken in times.items()}
    found = {
        "dense_ms": ms["dense"],
        "ratio": ms["sparse"] / ms["dense"],
        "single_ratio": ms["single"] / ms["dense"],
        "overhead_us": median(overheads),
        "n_runs": n - 2,
    }
    answer.send((found, output))


def as_it_is(bundle: Path, case: str, budget_s: float) -> dict[str, float]:
    """Measure the loop in Python by ``sdt-deploy bench``."""
    command = [sys.executable, "-m", "sdt_deploy", "bench", str(bundle), "--cases", case]
    command += ["--budget", str(budget_s), "--no-memory", "--n-threads", "2"]
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "bench.json"
        subprocess.run([*command, "--json-file", str(file)], check=True, capture_output=True)
        found = json.loads(file.read_text())["cases"][0]
    wanted = ("dense_ms", "ratio", "auto_ratio", "overhead_us", "n_runs")
    return {name: found[name] for name in wanted}


def expected_output(bundle: Path, case: tuple[int, int], answer: Any) -> None:
    """Send what the loop as it is computes for the first batch."""
    with Session.open(bundle, n_threads=2, max_depth_drift=None) as session:
        batch = token_source(session.bundle).batches(*case, session.bundle)[0]
        answer.send(session.run_batch(batch, path="sparse").output)


def in_a_process(function: Callable[..., None], *arguments: Any) -> Any:
    """Return what a function sends from a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, there))
    process.start()
    there.close()
    received = here.recv()
    process.join()
    return received


def check_bundle(manifest: Manifest) -> None:
    """Refuse a bundle that the compiled loop was not written for."""
    config = manifest.model
    if (
        manifest.export.numbers != "float32"
        or len(manifest.stages) != config.n_layers
        or config.head.pooling != "mean"
        or config.rotary is not None
        or not config.n_token_types
    ):
        raise SystemExit(
            "a BERT-like float32 bundle with one layer a stage and mean pooling, please"
        )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--cases", default="1x12,1x32,2x20,8x20,8x64,8x128,16x128")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds per case and loop")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    manifest = Bundle.open(arguments.bundle).manifest
    check_bundle(manifest)
    results = []
    for case in parse_cases(arguments.cases):
        name = f"{case[0]}x{case[1]}"
        compiled, output = in_a_process(measure, arguments.bundle, case, arguments.budget)
        expected = in_a_process(expected_output, arguments.bundle, case)
        if not np.array_equal(output, expected):
            raise SystemExit(f"{name}: the outputs differ by {np.abs(output - expected).max()}")
        python = as_it_is(arguments.bundle, name, arguments.budget)
        results.append({"case": name, "compiled": compiled, "python": python})
        print(json.dumps(results[-1]), flush=True)
    if arguments.json is not None:
        content = {
            "environment": environment(),
            "context": manifest.model.context,
            "cases": results,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
