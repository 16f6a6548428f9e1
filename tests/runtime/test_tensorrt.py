"""The TensorRT backend, with fakes of the library; see also tests/gpu."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdt_deploy import diagnosis, trt
from sdt_deploy.buckets import AxisRange, BatchLimits, plan_profiles
from sdt_deploy.bundle import Bundle, write_manifest
from sdt_deploy.engines import ENGINES, EngineSet, EngineSpec
from sdt_deploy.errors import BackendError, BundleIntegrityError, InputError
from sdt_deploy.exporters.engine_plan import plan_jobs
from sdt_deploy.exporters.engine_worker import Reporter, monitor
from sdt_deploy.gpu import Driver, Gpu, driver
from sdt_deploy.runtime.backends import tensorrt as backend_module
from sdt_deploy.runtime.backends.tensorrt import TensorRtBackend
from sdt_deploy.runtime.device_plan import ALIGNMENT
from sdt_deploy.runtime.session import Session
from tests.gpu import rtx_refusal
from tests.runtime import fake_tensorrt
from tests.runtime.fake_tensorrt import SIGNATURES, VERSIONS, Checked, FakeLibrary
from tests.runtime.tensorrt_signatures import members
from tests.samples import ExportedModel, assert_parity, in_threads, random_batch

Exported = Callable[[str], ExportedModel]
HOPPER = Driver(gpus=(Gpu(name="H100", compute_capability="9.0"),), cuda_version="13.0")
LIMITS = BatchLimits(max_seqlen=20, max_batch=3, max_padded_tokens=40)


def with_engines(
    source: Path, target: Path, number: str, capability: str = "9.0", limits: BatchLimits = LIMITS
) -> Bundle:
    """Copy a bundle and add engines that the fake of ``number`` reads."""
    bundle = Bundle.open(shutil.copytree(source, target))
    (wide,) = plan_profiles(limits)
    narrow = dataclasses.replace(
        wide,
        max_seqlen=AxisRange(min=1, opt=4, max=9),
        n_tokens=AxisRange(min=1, opt=4, max=27),
    )
    engines = EngineSet(
        flavour="tensorrt",
        version=VERSIONS[number],
        compute_capabilities=(capability,),
        profiles=(narrow, wide),
        attention=bundle.manifest.export.attention,
        workspace_mb=None,
        engines={},
    )
    (bundle.path / ENGINES).mkdir()
    specs = {}
    for job in plan_jobs(bundle, dataclasses.replace(engines, flavour="tensorrt-rtx")):
        content = json.dumps(
            {
                "version": number,
                "graph": job.graph,
                "onnx": str(job.onnx),
                "profiles": job.profiles,
            }
        ).encode()
        spec = EngineSpec(
            graph=job.graph,
            file=f"{ENGINES}/{job.graph}.engine",
            sha256=hashlib.sha256(content).hexdigest(),
            size_bytes=len(content),
            key=job.key,
            build_s=0.0,
            attention=job.attention,
        )
        (bundle.path / spec.file).write_bytes(content)
        specs[job.graph] = spec
    engines = dataclasses.replace(engines, engines=specs)
    write_manifest(bundle.path, dataclasses.replace(bundle.manifest, engines=(engines,)))
    return Bundle.open(bundle.path)


@pytest.fixture
def open_fake(
    monkeypatch: pytest.MonkeyPatch, exported: Exported, tmp_path: Path
) -> Callable[..., tuple[Session, FakeLibrary, ExportedModel]]:
    def opener(
        name: str = "all-embedding", number: str = "11.4"
    ) -> tuple[Session, FakeLibrary, ExportedModel]:
        library, found = FakeLibrary(number), exported(name)
        bundle = with_engines(found.bundle, tmp_path / f"{name}-{number}", number)
        monkeypatch.setattr(trt, "load", lambda flavour: library)
        monkeypatch.setattr(trt, "installed_version", lambda flavour: VERSIONS[number])
        monkeypatch.setattr(backend_module, "driver", lambda: HOPPER)
        session = Session(bundle, AlignedBackend(bundle, "tensorrt", device="cpu"))
        return session, library, found

    return opener


class AlignedBackend(TensorRtBackend):
    """Looks at what comes to the engines: memory that begins where TensorRT wants it to.

    All of it is cut from allocations that torch aligns more than enough on a GPU.
    """

    def on_device(self, *args: Any) -> Any:
        there, results, fetch = super().on_device(*args)
        for name, array in (*there.items(), *results.items()):
            assert array.storage_offset() * array.element_size() % ALIGNMENT == 0, name
            assert array.is_contiguous(), name
        return there, results, fetch


Open = Callable[..., tuple[Session, FakeLibrary, ExportedModel]]


def test_the_table_says_what_the_installed_library_says() -> None:
    """The columns of other versions were read by the same code; their packages need no GPU."""
    real = pytest.importorskip("tensorrt_rtx")
    assert SIGNATURES["rtx"]["source"] == f"tensorrt-rtx {version('tensorrt-rtx')} from PyPI"
    assert members(real) == SIGNATURES["rtx"]["members"]
    assert set(SIGNATURES) == {*VERSIONS, "rtx"}


def test_the_table_is_that_of_full_tensorrt() -> None:
    real = pytest.importorskip("tensorrt")
    number = ".".join(version("tensorrt").split(".")[:2])
    if number not in SIGNATURES:
        pytest.skip(f"there is no table of {number}")
    assert members(real) == SIGNATURES[number]["members"]


def test_rtx_takes_what_tensorrt_11_takes() -> None:
    """TensorRT has one more way to build, and other flags."""
    rtx, full = SIGNATURES["rtx"]["members"], SIGNATURES["11.4"]["members"]
    differing = {owner for owner in full if rtx.get(owner) != full[owner]}
    assert differing == {"Builder", "NetworkDefinitionCreationFlag", "BuilderFlag"}
    for name, overloads in rtx["Builder"].items():
        assert full["Builder"][name][: len(overloads)] == overloads
    assert set(rtx) == set(full)


@pytest.mark.parametrize(
    ("number", "owner", "name", "args"),
    [
        ("8.6", "IExecutionContext", "set_device_memory", (1, 1)),
        ("10.0", "IExecutionContext", "set_device_memory", (1, 1)),
        ("8.6", "ICudaEngine", "create_execution_context", ("USER_MANAGED",)),
        ("11.4", "ICudaEngine", "create_execution_context_without_device_memory", ()),
        ("11.4", "ICudaEngine", "get_device_memory_size_for_profile", (0,)),
        ("11.4", "IExecutionContext", "execute_async_v3", (None,)),
        ("11.4", "IExecutionContext", "execute_async_v3", ()),
        ("11.4", "IExecutionContext", "execute_async_v3", (0, 0)),
        ("11.4", "IExecutionContext", "set_input_shape", ("x", (1, 2.0))),
        ("11.4", "IExecutionContext", "set_tensor_address", ("x", 1.5)),
        ("11.4", "Runtime", "deserialize_cuda_engine", ("path",)),
    ],
)
def test_fakes_refuse_what_the_library_refuses(
    number: str, owner: str, name: str, args: tuple[object, ...]
) -> None:
    fake = getattr(fake_tensorrt, owner)
    checked = Checked(fake.__new__(fake), number)
    with pytest.raises((AttributeError, TypeError)):
        getattr(checked, name)(*args)


@pytest.mark.parametrize("number", SIGNATURES)
def test_what_the_library_calls_takes_what_it_passes(number: str) -> None:
    """TensorRT calls our logger and our monitor by position."""
    table = SIGNATURES[number]["members"]
    bare = SimpleNamespace(IProgressMonitor=type("IProgressMonitor", (), {}))
    ours = {
        "ILogger": trt.logger(FakeLibrary(number)),
        "IProgressMonitor": monitor(bare, "graph", Reporter(io.StringIO())),
    }
    for owner, each in ours.items():
        for name, signatures in table.get(owner, {}).items():
            if name not in ("__init__", "Severity"):
                wanted = [parameter for parameter, _, _ in signatures[0]]
                assert list(inspect.signature(getattr(each, name)).parameters) == wanted


@pytest.mark.parametrize("number", VERSIONS)
def test_an_engine_is_described(exported: Exported, tmp_path: Path, number: str) -> None:
    bundle = with_engines(exported("active-lm").bundle, tmp_path / "bundle", number)
    library = FakeLibrary(number)
    content = (bundle.path / ENGINES / "head.engine").read_bytes()
    engine = library.Runtime(trt.logger(library)).deserialize_cuda_engine(content)
    largest = 1000 if number == "8.6" else 1001
    names = ["query + key + value", "x" * trt.MAX_LAYER_NAME]
    assert trt.engine_facts(library, engine) == {"scratch_bytes": largest, "layers": names}


@pytest.mark.parametrize("number", VERSIONS)
@pytest.mark.parametrize("name", ["all-embedding", "active-lm", "active-grouped", "all-grouped"])
def test_parity_with_the_oracle(open_fake: Open, name: str, number: str) -> None:
    session, library, found = open_fake(name, number)
    with session:
        for lengths in ([1], [20, 3], [7, 12, 1, 20, 20, 2, 5]):
            batch = random_batch(found.model.config, lengths, seed=7)
            for path in ("sparse", "masked"):
                assert_parity(session, found.model, batch, path=path)
    assert {graph for graph, _, _ in library.calls} >= {"entry", "stage-00", "head", "masked"}
    profiles = {profile for _, profile, _ in library.calls}
    assert len(profiles) > 1


@pytest.mark.parametrize("name", ["all-embedding", "active-lm"])
def test_fused_bundles_run_in_the_loop_for_devices(
    fused: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Batches are padded to buckets, which have to fit the profiles."""
    library, found = FakeLibrary("11.4"), fused(name)
    # No length nor number of sequences is that of a bucket.
    limits = BatchLimits(max_seqlen=21, max_batch=9, max_padded_tokens=9 * 21)
    bundle = with_engines(found.bundle, tmp_path / "bundle", "11.4", limits=limits)
    monkeypatch.setattr(trt, "load", lambda flavour: library)
    monkeypatch.setattr(trt, "installed_version", lambda flavour: VERSIONS["11.4"])
    monkeypatch.setattr(backend_module, "driver", lambda: HOPPER)
    with Session(bundle, AlignedBackend(bundle, "tensorrt", device="cpu")) as session:
        assert session.on_device
        session.warmup([[20, 3], [5]])
        assert library.calls
        for lengths in ([1], [20, 3], [7, 12, 1, 20, 20, 2, 5], [21] * 9, [3] * 23):
            batch = random_batch(found.model.config, lengths, seed=7)
            for path in ("sparse", "masked", "dense")[: 3 if len(lengths) < 9 else 2]:
                assert_parity(session, found.model, batch, path=path)
        with pytest.raises(InputError, match=r"of 22 tokens is longer than .* for, 21: shorten"):
            session.run_batch(random_batch(found.model.config, [22], seed=1))
    assert len({profile for _, profile, _ in library.calls}) == 2


def test_large_batches_run_in_parts_that_have_a_profile(open_fake: Open) -> None:
    session, library, found = open_fake()
    batch = random_batch(found.model.config, [20] * 5, seed=1)
    with session:
        assert_parity(session, found.model, batch)
        assert [graph for graph, _, _ in library.calls].count("entry") == 3
        assert_parity(session, found.model, batch, path="auto")  # measured within the profiles
        long = random_batch(found.model.config, [21], seed=1)
        with pytest.raises(InputError, match=r"longer than the engines .* 20: .*--max-seqlen 21"):
            session.run_batch(long, path="sparse")
        with pytest.raises(BackendError, match="has no profile for"):
            session.run_batch(long, path="dense")


def test_contexts_are_reused_and_never_shared(open_fake: Open) -> None:
    session, library, found = open_fake()
    batch = random_batch(found.model.config, [9, 4], seed=1)
    with session:
        session.run_batch(batch, path="sparse")
        n_contexts = len(library.contexts)
        for _ in range(3):
            session.run_batch(batch, path="sparse")
        assert len(library.contexts) == n_contexts

        def work(seed: int) -> None:
            own = random_batch(found.model.config, [3, 11, 6], seed=seed)
            for _ in range(5):
                assert_parity(session, found.model, own)

        in_threads(6, work)


def test_all_engines_share_one_block_of_scratch_memory(open_fake: Open) -> None:
    session, library, found = open_fake()
    with session:
        session.run_batch(random_batch(found.model.config, [9, 4], seed=1), path="sparse")
        addresses = {context.device_memory for context in library.contexts}
        assert len({graph for graph, _, _ in library.calls}) > 3
    assert len(addresses) == 1
    assert 0 not in addresses


def test_engines_run_on_the_stream_of_the_caller(
    open_fake: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, library, found = open_fake()
    monkeypatch.setattr(AlignedBackend, "stream", 77)
    with session:
        session.run_batch(random_batch(found.model.config, [9, 4], seed=1), path="sparse")
    assert {stream for _, _, stream in library.calls} == {77}


def test_refusals(open_fake: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    session, _, found = open_fake()
    bundle = session.bundle

    def refused(pattern: str, *, at: Path = bundle.path, **changes: object) -> None:
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                owner = backend_module if name == "driver" else trt
                patch.setattr(owner, name, lambda *_, value=value: value)
            with pytest.raises(BackendError, match=pattern):
                Session.open(at, backend="tensorrt")

    refused("has no tensorrt engines; build them: sdt-deploy", at=found.bundle)
    refused(
        r"by another version \(tensorrt for 9.0 by version 11.4.0.106\). Here are H100, of compute "
        r"capability 9.0, and version 11.5.0: build them again: .* --max-seqlen 20 ",
        installed_version="11.5.0",
    )
    refused("8.5.3 is too old, 8.6 or newer is needed: pip install", installed_version="8.5.3")
    refused("need a GPU: no NVIDIA driver", driver=Driver(problem="no NVIDIA driver"))
    ada = Driver(gpus=(Gpu(name="RTX 4090", compute_capability="8.9"),))
    refused(
        r"built for other GPUs \(tensorrt for 9.0 by version 11.4.0.106\). Here are RTX 4090, of "
        r"compute capability 8.9, and version 11.4.0.106: build for this one: sdt-deploy",
        driver=ada,
    )
    with pytest.raises(BackendError, match=r"on the first GPU .*: set CUDA_VISIBLE_DEVICES=1"):
        TensorRtBackend(bundle, "tensorrt", device="cpu:1")
    with pytest.raises(BackendError, match="n_threads is for onnxruntime-cpu"):
        Session.open(bundle, backend="tensorrt", n_threads=2)


def test_a_library_that_is_there_in_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As tensorrt 8.6.0 without cuBLAS, and newer ones without NVIDIA's own package index."""
    reason = "libcublas.so.12: cannot open shared object file: No such file or directory"
    (tmp_path / "tensorrt.py").write_text(f"raise ImportError({reason!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(trt, "installed_version", lambda flavour: "8.6.0")
    with pytest.raises(BackendError, match=rf"tensorrt is installed and cannot .*: {reason}"):
        trt.load(trt.flavour("tensorrt"))
    row = next(row for row in diagnosis.diagnose() if row.backend == "tensorrt")
    assert not row.runs
    assert not row.builds
    assert reason in row.remark


def test_rtx_engines_on_a_gpu_that_they_never_run_on(
    open_fake: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, _, _ = open_fake()
    (engines,) = session.manifest.engines
    rtx = dataclasses.replace(
        engines, flavour="tensorrt-rtx", compute_capabilities=("8.9",), version="1.7.1.116"
    )
    write_manifest(
        session.bundle.path, dataclasses.replace(session.manifest, engines=(rtx, engines))
    )
    monkeypatch.setattr(trt, "installed_version", lambda flavour: "1.7.1.116")
    with pytest.raises(BackendError, match="tensorrt-rtx does not run on it at all"):
        Session.open(session.bundle.path, backend="tensorrt-rtx")


def test_an_altered_engine_never_reaches_the_library(open_fake: Open) -> None:
    session, _, _ = open_fake()
    path = session.bundle.path / ENGINES / "dense.engine"
    path.write_bytes(path.read_bytes().replace(b"dense", b"dents"))
    with pytest.raises(BundleIntegrityError, match="altered"):
        session.run([[1, 2]], path="dense")


def test_a_missing_engine_names_the_command(open_fake: Open) -> None:
    session, _, _ = open_fake()
    (engines,) = session.manifest.engines
    without = {name: spec for name, spec in engines.engines.items() if name != "dense"}
    partial = dataclasses.replace(engines, engines=without)
    write_manifest(session.bundle.path, dataclasses.replace(session.manifest, engines=(partial,)))
    bundle = Bundle.open(session.bundle.path)
    opened = Session(bundle, AlignedBackend(bundle, "tensorrt", device="cpu"))
    command = (
        f"build it: sdt-deploy build-engine {bundle.path} --target tensorrt --compute-capability "
        "9.0 --max-seqlen 20 --max-batch 2 --max-padded-tokens 40 --lengths FILE --graph dense"
    )
    with pytest.raises(BackendError, match=re.escape(command)):
        opened.run([[1, 2]], path="dense")


def test_an_engine_that_the_library_refuses(open_fake: Open) -> None:
    session, library, _ = open_fake()
    library.version = "10.13"
    with pytest.raises(BackendError, match=r"could not be loaded\n.*of another version"):
        session.run([[1, 2]], path="dense")


def test_what_the_real_library_refuses_is_an_error(exported: Exported) -> None:
    """TensorRT-RTX, handed an engine where there is no driver; on a GPU see tests/gpu."""
    pytest.importorskip("tensorrt_rtx")
    if driver().gpus:
        pytest.skip("there is a GPU here")
    steps = rtx_refusal.steps(exported("active-lm").bundle)
    assert steps["open"]["error"] == "BackendError"
    assert f"need a GPU: {driver().problem}" in steps["open"]["message"]
    assert not steps["doctor"]["runs"]
    assert steps["load"]["error"] == "BackendError"
    assert "stage-00" in steps["load"]["message"]
    assert "CUDA driver version" in steps["load"]["message"]
    assert steps["build"]["error"] == "BuildError"
    assert "9.0 (SM90) not supported" in steps["build"]["message"]
