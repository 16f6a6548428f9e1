"""The compiled loop on ONNX Runtime's C library: what the loop in Python says, bit by bit."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_deploy import ort_library
from sdt_deploy.bundle import Bundle
from sdt_deploy.config import (
    ExportConfig,
    HeadConfig,
    ModelConfig,
    Pooling,
    RotaryConfig,
    compared,
)
from sdt_deploy.diagnosis import diagnose
from sdt_deploy.errors import (
    BackendError,
    ConfigError,
    DeadlineExceededError,
    MissingExtraError,
    RunCancelledError,
)
from sdt_deploy.exporters.export import export
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.ort_library import Function, library_threads
from sdt_deploy.ort_library import ort_library as loaded_library
from sdt_deploy.profiling.profile import profile
from sdt_deploy.runtime.backends import default_padded_tokens, open_backend
from sdt_deploy.runtime.compiled import lay_out, sort_rows
from sdt_deploy.runtime.compiled_loop import fits
from sdt_deploy.runtime.generation import generate
from sdt_deploy.runtime.result import RunResult
from sdt_deploy.runtime.routing import Int32, RouteRules, depths_from_scores, plan_route
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.stopping import StopCheck
from sdt_deploy.testing import memory_bundle
from tests.runtime.test_closing import errors_of_runs_while_it_is_closed
from tests.samples import (
    GOLDEN,
    ExportedModel,
    in_threads,
    quantile_thresholds,
    random_batch,
    random_model,
)

Exported = Callable[[str], ExportedModel]
NAME = "onnxruntime-compiled"
pytestmark = pytest.mark.filterwarnings("ignore:this process already runs ONNX Runtime's Python")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    """The pool is made once in a process, whichever of the tests comes first."""
    loaded_library(1)


def compiled(bundle: Path, **limits: int) -> Session:
    """One thread: what spins beside it are the threads of other tests."""
    return Session.open(bundle, backend=NAME, n_threads=1, max_depth_drift=None, **limits)


def assert_same(found: RunResult, expected: RunResult) -> None:
    assert found.path == expected.path
    for name in ("output", "depths", "scores", "input_ids", "cu_seqlens", "active"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    assert found.layer_usage == expected.layer_usage
    assert found.timings.stages == expected.timings.stages


BASE = ModelConfig(
    vocab_size=47,
    d_model=32,
    n_heads=4,
    n_layers=4,
    d_ff=56,
    max_positions=40,
    pinned_token_ids=(1,),
    thresholds=(0.2, 0.4, 0.5, 0.6),
)


def assert_same_everywhere(bundle: Path, model: SparseDepthTransformer, n_batches: int) -> None:
    """At random sizes and depths, at none and at all; and in the graphs of the whole model."""
    rng, n_layers = np.random.default_rng(0), model.config.n_layers
    with compiled(bundle) as session, Session.open(bundle) as other:
        assert session._compiled_loop is not None
        for seed in range(n_batches):
            lengths = rng.integers(1, model.config.max_positions, rng.integers(1, 7)).tolist()
            batch = random_batch(model.config, lengths, seed)
            limits = quantile_thresholds(model, batch, rng.random(n_layers).tolist())
            for thresholds in (limits, (-1.0,) * n_layers, (2.0,) * n_layers):
                expected = other.run_batch(batch, thresholds=thresholds, path="sparse")
                found = session.run_batch(batch, thresholds=thresholds, path="sparse")
                assert_same(found, expected)
        for path in filter(session.backend.has, ("single", "masked", "dense")):
            expected = other.run_batch(batch, path=path)  # type: ignore[arg-type]
            assert_same(session.run_batch(batch, path=path), expected)  # type: ignore[arg-type]


def test_it_computes_what_the_loop_in_python_does(exported: Exported) -> None:
    for name in ("all-embedding", "active-lm"):
        assert_same_everywhere(exported(name).bundle, exported(name).model, 12)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"head": HeadConfig(kind="lm")}, ExportConfig(precision="float16")),
        (
            {
                "context": "active",
                "head": HeadConfig(kind="classify", pooling="cls", n_classes=3, dense_tanh=True),
            },
            ExportConfig(quantization="int8"),
        ),
    ],
    ids=["float16", "int8"],
)
def test_so_it_does_in_other_precisions(
    change: dict[str, Any], options: ExportConfig, tmp_path: Path
) -> None:
    model = random_model(BASE.replace(**change), seed=3)
    export(Checkpoint(model=model), tmp_path / "bundle", options)
    assert_same_everywhere(tmp_path / "bundle", model, 6)


def test_so_it_does_with_causal_attention_and_generates(tmp_path: Path) -> None:
    config = BASE.replace(context="active", causal=True, head=HeadConfig(kind="lm"))
    model = random_model(config, seed=3)
    export(Checkpoint(model=model), tmp_path / "bundle")
    assert_same_everywhere(tmp_path / "bundle", model, 6)
    prompts = [5, 3, 8, 4, 1, 9], [0, 3, 4, 6]
    with compiled(tmp_path / "bundle") as session, Session.open(tmp_path / "bundle") as other:
        found = generate(session, *prompts, max_new_tokens=6).tokens
        expected = generate(other, *prompts, max_new_tokens=6).tokens
    assert [tokens.tolist() for tokens in found] == [tokens.tolist() for tokens in expected]


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"selection": "capacity"}, ExportConfig()),
        ({"routing": "per_layer"}, ExportConfig()),
        ({"rotary": RotaryConfig(), "causal": True, "context": "active"}, ExportConfig()),
        ({"causal": True, "context": "all"}, ExportConfig()),
        ({}, ExportConfig(layers_per_stage=2)),
    ],
    ids=["capacity", "per_layer", "rotary", "causal", "grouped"],
)
def test_what_it_does_not_take(change: dict[str, Any], options: ExportConfig) -> None:
    assert fits(memory_bundle(random_model(BASE, seed=1)).manifest)
    model = random_model(BASE.replace(head=HeadConfig(kind="lm"), **change), seed=1)
    assert not fits(memory_bundle(model, options).manifest)


def test_what_it_does_not_take_runs_in_python(exported: Exported) -> None:
    sample = exported("active-grouped")
    batch = random_batch(sample.model.config, [9, 1, 29], 2)
    with compiled(sample.bundle) as session, Session.open(sample.bundle) as other:
        assert session._compiled_loop is None
        expected = other.run_batch(batch, path="sparse")
        assert_same(session.run_batch(batch, path="sparse"), expected)
        np.testing.assert_array_equal(session.run_batch(batch).depths, expected.depths)


def test_the_first_format_runs_in_python() -> None:
    with compiled(GOLDEN) as session, Session.open(GOLDEN) as other:
        assert session._compiled_loop is None
        ids, cu = np.arange(20) % 11, [0, 9, 20]
        assert_same(session.run(ids, cu, path="sparse"), other.run(ids, cu, path="sparse"))


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=5),
    st.integers(1, 3),
    st.sampled_from(["active", "all"]),
    st.sampled_from([None, "mean"]),
)
@settings(deadline=None)
def test_the_plan_is_that_of_the_router(
    sequences: list[list[int]], n_heads: int, context: str, pooling: Pooling | None
) -> None:
    depths = np.array([depth for one in sequences for depth in one], dtype=np.int32)
    cu = np.cumsum([0, *map(len, sequences)], dtype=np.int32)
    rules = RouteRules(
        stage_layers=((0, 1), (1, 2), (2, 3), (3, 4)),
        context=context,  # type: ignore[arg-type]
        n_heads=n_heads,
        pooling=pooling,
    )
    plan = plan_route(depths, cu, rules)
    n, batch = len(depths), len(sequences)
    found, order, row_of = (np.empty(n, dtype=np.int32) for _ in range(3))
    active = np.empty(4, dtype=np.int32)
    limits = np.arange(4, dtype=np.float32)
    is_sorted = sort_rows(depths.astype(np.float32), limits, found, order, row_of, active)
    np.testing.assert_array_equal(found, depths)
    np.testing.assert_array_equal(row_of, plan.row_of)
    assert active.tolist() == list(plan.active_tokens)
    assert is_sorted == (plan.order is None)
    if plan.order is not None:
        np.testing.assert_array_equal(order, plan.order)
    deepest = np.maximum.reduceat(depths, cu[:-1])
    places = batch * max(map(len, sequences)) * n_heads
    gather, scatter = np.empty(places, np.int32), np.empty(n * n_heads, np.int32)
    bias, free = np.empty(places, np.float32), np.empty(n + batch, np.int32)
    for step in plan.steps:
        for layout, whole in ((step.queries, False), (step.context, True)):
            if layout is None:
                continue
            size = lay_out(
                depths,
                deepest,
                step.stage,
                whole,
                cu,
                row_of,
                n_heads,
                gather,
                scatter[:0] if whole else scatter,
                bias,
                free,
            )
            shape = (size[0], n_heads, size[1])
            length = np.prod(shape)
            expected = layout.gather_index.reshape(-1)
            if layout.gather_index.shape == shape:
                np.testing.assert_array_equal(gather[:length], expected)
            else:  # the router lays sequences out that have finished, where some have not
                assert whole
                assert size[0] < layout.gather_index.shape[0]
            if layout.key_bias is not None and layout.gather_index.shape == shape:
                np.testing.assert_array_equal(bias[:length], layout.key_bias.reshape(-1))
            if layout.scatter_index is not None:
                used = scatter[: step.n_active * n_heads].reshape(-1, n_heads)
                np.testing.assert_array_equal(used, layout.scatter_index)


def test_depths_at_the_edges_of_numbers() -> None:
    limits = np.array([-1.0, 0.25, 0.25, 0.75], dtype=np.float32)
    scores = np.array([-1, 0.25, 0.75, -np.inf, np.inf, np.nan, 0.5, 1e-45, -0.0], dtype=np.float32)
    n = len(scores)
    depths, order, row_of = (np.empty(n, dtype=np.int32) for _ in range(3))
    sort_rows(scores, limits, depths, order, row_of, np.empty(4, dtype=np.int32))
    np.testing.assert_array_equal(depths, depths_from_scores(scores, limits.tolist()))
    assert sorted(order.tolist()) == list(range(n))


def test_ids_of_any_kind_of_memory(exported: Exported) -> None:
    """Read-only and unaligned arrays are not copied before the loop."""
    sample = exported("all-embedding")
    ids, cu = np.arange(20, dtype=np.int32) % 47, np.array([0, 9, 20], dtype=np.int32)
    odd = [np.frombuffer(b"x" + one.tobytes(), dtype=np.int32, offset=1) for one in (ids, cu)]
    with compiled(sample.bundle) as session:
        expected = session.run(ids, cu, path="sparse")
        for array in (ids, cu):
            array.flags.writeable = False
        assert_same(session.run(ids, cu, path="sparse"), expected)
        assert_same(session.run(*odd, path="sparse"), expected)


class Marked:
    """Memory for runs, with marks behind what each asked for."""

    def __init__(self) -> None:
        self.size = self.given_back = 0

    def take(self) -> Self:
        return self

    def space(self, size: int) -> Int32:
        self.memory = np.full(size + 1000, 77, dtype=np.int32)
        self.size = size
        return self.memory[:size]

    def give_back(self, _: object) -> None:
        assert self.size
        assert (self.memory[self.size :] == 77).all()
        self.given_back += 1


@pytest.mark.parametrize("name", ["all-embedding", "active-lm"])
def test_runs_stay_in_their_memory(exported: Exported, name: str) -> None:
    sample = exported(name)
    rng, n_layers = np.random.default_rng(1), sample.model.config.n_layers
    with compiled(sample.bundle) as session:
        assert session._compiled_loop is not None
        for seed in range(30):
            lengths = rng.integers(1, sample.model.config.max_positions, rng.integers(1, 7))
            batch = random_batch(sample.model.config, lengths.tolist(), seed)
            for limits in (session.manifest.model.thresholds, (-1.0,) * n_layers):
                marked: Any = Marked()
                found = session._compiled_loop.run(marked, batch, compared(limits), None)
                expected = session.run_batch(batch, thresholds=limits, path="sparse")
                assert_same(found, expected)


def test_large_batches_run_in_parts(exported: Exported) -> None:
    sample = exported("all-embedding")
    batch = random_batch(sample.model.config, [40, 3, 17, 40, 1, 29], 5)
    with compiled(sample.bundle) as whole, compiled(sample.bundle, max_padded_tokens=60) as parts:
        expected, found = (one.run_batch(batch, path="sparse") for one in (whole, parts))
    np.testing.assert_array_equal(found.depths, expected.depths)
    np.testing.assert_allclose(found.output, expected.output, atol=1e-6)


def test_runs_stop_at_their_deadline(exported: Exported) -> None:
    """Given times that grow from next to nothing: before, between and after the stages."""
    sample = exported("all-embedding")
    batch = random_batch(sample.model.config, [9, 20], 5)
    with compiled(sample.bundle) as session:
        assert session._compiled_loop is not None
        expected = session.run_batch(batch, path="sparse")
        said: list[str] = []
        seconds = 1e-6
        while seconds < 60:
            marked: Any = Marked()
            check = StopCheck(1.5, monotonic() + seconds, None)
            try:
                found = session._compiled_loop.run(marked, batch, session._limits, check)
            except DeadlineExceededError as error:
                said.append(str(error))
            else:
                assert_same(found, expected)
            seconds *= 1.25
        assert set(said) == {"the run did not end within timeout_s=1.5"}
        assert_same(found, expected)
        assert marked.given_back == 1
        with pytest.raises(DeadlineExceededError):
            session.run_batch(batch, path="sparse", timeout_s=1e-9)
        assert_same(session.run_batch(batch, path="sparse", timeout_s=60.0), expected)
        assert session.statistics().n_runs == 2


def test_runs_can_be_cancelled(exported: Exported) -> None:
    sample = exported("all-embedding")
    batch = random_batch(sample.model.config, [9, 20], 5)
    cancel = threading.Event()
    with compiled(sample.bundle) as session:
        expected = session.run_batch(batch, path="sparse")
        found = session.run_batch(batch, path="sparse", cancel=cancel, timeout_s=60.0)
        assert_same(found, expected)
        cancel.set()
        with pytest.raises(RunCancelledError):
            session.run_batch(batch, path="sparse", cancel=cancel)


def test_many_threads(exported: Exported) -> None:
    sample = exported("all-embedding")
    batches = [random_batch(sample.model.config, [7 + i, 30, 1 + i], i) for i in range(8)]
    with compiled(sample.bundle) as session:
        expected = [session.run_batch(batch, path="sparse") for batch in batches]

        def work(number: int) -> None:
            for i in range(40):
                at = (number + i) % len(batches)
                assert_same(session.run_batch(batches[at], path="sparse"), expected[at])

        in_threads(8, work)


def test_runs_under_way_end_when_it_is_closed(exported: Exported) -> None:
    sample = exported("all-embedding")
    batch = random_batch(sample.model.config, [30, 12, 25], 0)
    session = compiled(sample.bundle)
    errors = errors_of_runs_while_it_is_closed(session, batch, "sparse")
    session.close()
    assert [type(error) for error in errors] == [BackendError] * 3
    for path in ("auto", "sparse", "single", "dense"):
        with pytest.raises(BackendError, match="closed"):
            session.run_batch(batch, path=path)  # type: ignore[arg-type]


PROCESS = """
import os, signal, sys
import numpy as np
import sdt_deploy

def ids(batch, length):
    return np.ones((batch, length), dtype=np.int64)
"""
FORKING = """
session = sdt_deploy.Session.open(sys.argv[1], backend="onnxruntime-compiled", n_threads=2)
expected = {path: session.run(ids(3, 9), path=path).output for path in ("sparse", "single")}
workers = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        code = 1
        try:
            for path, output in expected.items():
                assert (session.run(ids(3, 9), path=path).output == output).all()
            with sdt_deploy.Session.open(sys.argv[1], backend="onnxruntime-compiled") as another:
                another.run(ids(3, 9))
            session.close()
            code = 0
        finally:
            os._exit(code)
    workers.append(pid)
print([os.waitpid(pid, 0)[1] for pid in workers])
"""


def in_a_process(code: str, bundle: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROCESS + code, str(bundle)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_forked_workers_run(exported: Exported) -> None:
    assert in_a_process(FORKING, exported("all-embedding").bundle).strip() == "[0, 0, 0]"


def test_two_copies_of_onnx_runtime_get_a_warning(exported: Exported) -> None:
    code = """
import warnings
sdt_deploy.Session.open(sys.argv[1]).close()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sdt_deploy.Session.open(sys.argv[1], backend="onnxruntime-compiled").close()
print([str(one.message) for one in caught])
"""
    assert "spin beside each other" in in_a_process(code, exported("all-embedding").bundle)


def test_graphs_refuse_what_they_do_not_take(exported: Exported) -> None:
    with compiled(exported("all-embedding").bundle) as session:
        head = session.backend.graph("head")
        states, output = np.zeros((3, 32), np.float32), np.zeros((1, 32), np.float32)
        gather, lengths = np.zeros((1, 3), np.int32), np.full(1, 3, np.int32)
        given = {"hidden_states": states, "gather_index": gather, "lengths": lengths}
        head.bind(given, {"output": output})()
        assert np.abs(output).max() > 0 or not states.any()
        with pytest.raises(BackendError, match="Unexpected input data type"):
            head.bind({**given, "lengths": lengths.astype(np.int64)}, {"output": output})()
        with pytest.raises(BackendError, match="indices element out of data bounds"):
            head.bind({**given, "gather_index": gather + 9}, {"output": output})()
        with pytest.raises(BackendError, match="refused"):
            head.bind({**given, "length": lengths}, {"output": output})
        with pytest.raises(BackendError, match="refused"):
            head.bind({**given, "lengths": lengths.astype(np.complex64)}, {"output": output})


def test_a_call_outlives_its_session(exported: Exported) -> None:
    with compiled(exported("all-embedding").bundle) as session:
        given = {
            "hidden_states": np.ones((3, 32), np.float32),
            "gather_index": np.zeros((1, 3), np.int32),
            "lengths": np.full(1, 3, np.int32),
        }
        output = np.zeros((1, 32), np.float32)
        graph = session.backend.graph("head")
        expected = np.zeros((1, 32), np.float32)
        graph.bind(given, {"output": expected})()
        call, opened = graph.bind(given, {"output": output}), weakref.ref(graph.session)  # type: ignore[attr-defined]
        del graph
    del session
    gc.collect()
    assert opened() is not None
    call()
    np.testing.assert_array_equal(output, expected)
    del call
    gc.collect()
    assert opened() is None


def test_files_that_are_no_graphs(tmp_path: Path) -> None:
    (tmp_path / "entry.onnx").write_bytes(b"no graph")
    with pytest.raises(
        BackendError, match=r"entry.onnx cannot be opened by ONNX Runtime: .*parsing"
    ):
        loaded_library(1).open(tmp_path / "entry.onnx")


def test_threads(exported: Exported) -> None:
    bundle = Bundle.open(exported("all-embedding").bundle)
    with compiled(bundle.path):
        assert library_threads() == 1
        assert default_padded_tokens(NAME) == 2048
    with pytest.raises(BackendError, match="with 1 threads and cannot change to 2"):
        open_backend(NAME, bundle, n_threads=2)
    with pytest.raises(ConfigError, match="n_threads"):
        open_backend(NAME, bundle, n_threads=0)


def test_bfloat16_is_for_gpus() -> None:
    bundle = memory_bundle(random_model(BASE, seed=0), ExportConfig(precision="bfloat16"))
    with pytest.raises(BackendError, match=f"{NAME} has no bfloat16 kernels"):
        open_backend(NAME, bundle)


def test_without_numba(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(MissingExtraError, match=r"sdt-deploy\[compiled\]"):
        Session.open(exported("all-embedding").bundle, backend=NAME)
    row = next(row for row in diagnose() if row.backend == NAME)
    assert not row.runs
    assert "sdt-deploy[compiled]" in row.remark


def test_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(row for row in diagnose() if row.backend == NAME).runs
    monkeypatch.setattr(ort_library, "_LIBRARIES", ("nothing.*",))
    with pytest.raises(BackendError, match="has no C library of ONNX Runtime"):
        ort_library.library_path()
    monkeypatch.setattr(ort_library.os, "name", "nt")
    with pytest.raises(BackendError, match="64-bit Linux and macOS"):
        ort_library.library_path()


def test_without_a_folder_for_compiled_code(exported: Exported) -> None:
    code = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
try:
    sdt_deploy.Session.open(sys.argv[1], backend="onnxruntime-compiled")
except sdt_deploy.BackendError as error:
    print(error)
"""
    assert "Set NUMBA_CACHE_DIR" in in_a_process(code, exported("all-embedding").bundle)


def test_the_table_of_functions_is_that_of_the_library() -> None:
    """Places are facts about the C interface; one that is wrong crashes, so a few are called."""
    library = loaded_library()
    assert (library.api != 0).all()
    assert max(Function) < len(library.api)
    with pytest.raises(BackendError, match=r"doesn't exist|failed"):
        library.open(Path("/nowhere/entry.onnx"))
    library.free_arena()


def test_it_cannot_be_profiled(exported: Exported) -> None:
    sample = exported("all-embedding")
    batch = random_batch(sample.model.config, [9], 0)
    with pytest.raises(BackendError, match="profile the same graphs with onnxruntime-cpu"):
        profile(Bundle.open(sample.bundle), batch, backend=NAME)


def test_bench_measures_it(exported: Exported, tmp_path: Path) -> None:
    bundle, file = exported("all-embedding").bundle, tmp_path / "bench.json"
    command = [sys.executable, "-m", "sdt_deploy", "bench", str(bundle), "--cases", "2x9"]
    command += ["--backend", NAME, "--budget", "0.1", "--json-file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(file.read_text())["cases"]
    assert case["backend"] == NAME
    assert case["max_abs_error"] < 1e-4
    assert case["overhead_us"] > 0
    assert case["sparse_peak_bytes"] is not None
