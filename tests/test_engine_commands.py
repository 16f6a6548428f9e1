"""``build-engine`` and ``doctor``, as a user calls them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sdt_deploy import diagnosis, gpu
from sdt_deploy.buckets import BatchLimits, plan_profiles
from sdt_deploy.bundle import Bundle, write_manifest
from sdt_deploy.engines import EngineSet, EngineSpec, read_engine
from sdt_deploy.gpu import Driver, Gpu, driver, read_capability
from sdt_deploy.runtime.backends import BACKENDS
from tests.samples import ExportedModel
from tests.test_cli import call

Exported = Callable[[str], ExportedModel]
BUILD = ("build-engine", "--target", "tensorrt-rtx", "--compute-capability", "8.9")


def test_build_inspect_and_build_again(exported: Exported, tmp_path: Path) -> None:
    bundle = shutil.copytree(exported("active-lm").bundle, tmp_path / "bundle")
    build = (*BUILD, bundle, "--cache", tmp_path / "cache", "--max-seqlen", 33)
    text = call(*build)
    assert "tensorrt-rtx for 8.9" in text
    graphs = [name for name in Bundle.open(bundle).manifest.graphs if name != "single"]
    assert f"{len(graphs)} built" in text
    assert all(name in call("inspect", bundle) for name in graphs)
    before = (bundle / "manifest.json").read_bytes()
    assert (
        f"{len(graphs)} unchanged: graph, weights, profiles, library and GPU are as they were"
    ) in call(*build)
    assert (bundle / "manifest.json").read_bytes() == before
    assert call("verify", bundle)
    ids = tmp_path / "ids.npy"
    np.save(ids, np.array([[1, 2]]))
    error = call("run", bundle, "--backend", "tensorrt-rtx", "--ids", ids, code=2)
    assert "need a GPU" in error or "does not run on it" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compute-capability", "9.0"), "not 9.0; take --target tensorrt there"),
        (("--max-seqlen", "34"), "exceeds the model's 33 positions"),
        (("--max-padded-tokens", "10"), "leaves no room for one sequence"),
        (("--graph", "tail"), "no graph tail to build"),
        (("--timing-cache", "times"), "has no timing cache"),
        (("--pin-timing-cache",), "needs a timing_cache"),
        (("--cache", "a", "--no-cache"), "contradict each other"),
        (("--lengths", "/nonexistent"), "cannot be read"),
    ],
)
def test_bad_options(exported: Exported, arguments: tuple[str, ...], message: str) -> None:
    bundle = exported("active-lm").bundle
    assert message in " ".join(call(*BUILD, bundle, *arguments, code=2).split())


def test_two_processes_that_build_at_once(exported: Exported, tmp_path: Path) -> None:
    """The later one is refused, whenever it comes, and takes nothing from the first."""
    bundle = shutil.copytree(exported("active-grouped").bundle, tmp_path / "bundle")
    script = Path(sys.executable).with_name("sdt-deploy")
    command = [str(script), *BUILD, str(bundle), "--no-cache"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not list((bundle / "engines").glob(".build-*/*.engine")):
        assert first.poll() is None, "it was done before the second one came"
    os.kill(first.pid, signal.SIGSTOP)  # so that it cannot be done first
    try:
        second = subprocess.run(
            [*command, "--graph", "head"], capture_output=True, text=True, check=False
        )
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 2
    assert "another build is under way" in second.stderr
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    opened = Bundle.open(bundle)
    (engines,) = opened.manifest.engines
    assert [*engines.engines] == [name for name in opened.manifest.graphs if name != "single"]
    for spec in engines.engines.values():
        assert read_engine(bundle, spec)
    assert {path.name for path in (bundle / "engines").iterdir()} == {
        Path(spec.file).name for spec in engines.engines.values()
    }


def test_packed_attention_is_said_to_be_untested(exported: Exported, tmp_path: Path) -> None:
    assert "untested" in " ".join(call("build-engine", "--help").replace("│", " ").split())
    bundle = Bundle.open(shutil.copytree(exported("active-lm").bundle, tmp_path / "bundle"))
    engines = EngineSet(
        flavour="tensorrt",
        version="11.4.0",
        compute_capabilities=("9.0",),
        profiles=plan_profiles(BatchLimits(max_seqlen=33)),
        attention="packed",
        workspace_mb=None,
        engines={},
    )
    for attention, said in (("packed", "packed (untested)"), ("fused", "attention fused\n")):
        one = dataclasses.replace(engines, attention=attention)
        write_manifest(bundle.path, dataclasses.replace(bundle.manifest, engines=(one,)))
        assert said in call("inspect", bundle.path)


def test_inspect_says_all_that_is_known_of_engines(exported: Exported, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(exported("active-lm").bundle, tmp_path / "bundle"))
    spec = EngineSpec(
        graph="head",
        file="engines/head.engine",
        sha256="0123456789abcdef" * 4,
        size_bytes=34_560_000,
        key="f" * 64,
        build_s=7.25,
        attention="decomposed",
        attention_reason="no kernel [for it]",
        scratch_bytes=5 * 2**20,
        layers=("gemm", "norm", "gelu"),
    )
    engines = EngineSet(
        flavour="tensorrt",
        version="11.4.0.106",
        compute_capabilities=("9.0",),
        profiles=plan_profiles(BatchLimits(max_seqlen=33)),
        attention="fused",
        workspace_mb=77,
        engines={"head": spec},
        precision="float16",
    )
    write_manifest(bundle.path, dataclasses.replace(bundle.manifest, engines=(engines,)))
    text = " ".join(call("inspect", bundle.path).replace("│", " ").split())
    assert (
        "tensorrt for 9.0, version 11.4.0.106, float16, attention fused, workspace 77 MB"
    ) in text
    assert "head decomposed 34.6 7.25 s 5.0 MB 3 01234567" in text
    assert "in head: no kernel [for it]" in text
    for profile in engines.profiles:
        low, best, high = profile.max_seqlen.min, profile.max_seqlen.opt, profile.max_seqlen.max
        assert f"{low}–{best}–{high}" in text
    (told,) = json.loads(call("inspect", bundle.path, "--json"))["engines"]
    assert told["engines"]["head"] == {**dataclasses.asdict(spec), "layers": [*spec.layers]}
    assert told["version"] == "11.4.0.106"


def test_ctrl_c_leaves_nothing(exported: Exported, tmp_path: Path) -> None:
    """A signal in the middle of a build, as the terminal sends it: to both processes."""
    bundle = shutil.copytree(exported("active-grouped").bundle, tmp_path / "bundle")
    before = sorted(path.name for path in bundle.rglob("*"))
    script = Path(sys.executable).with_name("sdt-deploy")
    process = subprocess.Popen(
        [str(script), *BUILD, str(bundle), "--no-cache"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A shell that runs the tests in the background has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list((bundle / "engines").glob(".build-*/*.engine")):
        assert process.poll() is None, "it was done before the signal came"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, 1)
    assert b"Traceback" not in errors
    assert sorted(path.name for path in bundle.rglob("*")) == before


def test_doctor() -> None:
    rows = json.loads(call("doctor", "--json"))
    assert [row["backend"] for row in rows] == list(BACKENDS)
    by_name = {row["backend"]: row for row in rows}
    assert by_name["onnxruntime-cpu"]["runs"]
    assert by_name["tensorrt-rtx"]["builds"]
    for row in rows:
        assert bool(row["remark"]) == (not row["runs"])
    if driver().problem:
        assert driver().problem in by_name["onnxruntime-cuda"]["remark"]
    assert all(name in call("doctor") for name in BACKENDS)


def test_doctor_names_a_gpu_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = Driver(gpus=(Gpu(name="H100", compute_capability="9.0"),))
    monkeypatch.setattr(diagnosis, "driver", lambda: hopper)
    row = next(row for row in diagnosis.diagnose() if row.backend == "tensorrt-rtx")
    assert row.builds
    assert not row.runs
    assert "H100 has compute capability 9.0" in row.remark
    assert "use --target tensorrt" in row.remark


@pytest.mark.parametrize(
    ("torch", "absent", "problem"),
    [
        ("2.13.0+cpu", None, "torch 2.13.0+cpu is built without CUDA: install torch from PyPI"),
        ("2.13.0", "torch", 'torch is not installed: pip install "sdt-deploy[gpu]"'),
        (
            "2.13.0",
            "triton",
            "triton is not installed, which bundles with fused attention need: "
            'pip install "sdt-deploy[gpu]"',
        ),
        ("2.13.0", None, None),
    ],
)
def test_doctor_knows_what_engines_need_besides_their_library(
    monkeypatch: pytest.MonkeyPatch, torch: str, absent: str | None, problem: str | None
) -> None:
    ada = Driver(gpus=(Gpu(name="RTX 4090", compute_capability="8.9"),))
    monkeypatch.setattr(diagnosis, "driver", lambda: ada)
    monkeypatch.setattr(diagnosis, "version", lambda name: torch)
    monkeypatch.setattr(diagnosis, "find_spec", lambda name: None if name == absent else name)
    for row in diagnosis.diagnose():
        if row.backend == "tensorrt-rtx":
            assert row.builds
            assert row.runs == (problem is None)
            assert row.remark == ("" if problem is None else f"to run engines, {problem}")
        elif row.backend == "torch":
            assert row.remark == (problem or "")


def test_doctor_says_it_in_one_sentence_with_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Driver(problem="no NVIDIA driver: install it")
    monkeypatch.setattr(diagnosis, "driver", lambda: nothing)
    monkeypatch.setattr(diagnosis, "version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr(diagnosis, "find_spec", lambda name: None if name == "triton" else name)
    row = next(row for row in diagnosis.diagnose() if row.backend == "torch")
    assert row.remark == (
        "torch 2.13.0+cpu is built without CUDA: install torch from PyPI, and no NVIDIA "
        "driver: install it"
    )
    for row in diagnosis.diagnose():
        assert ";" not in row.remark
        assert row.runs or ": " in row.remark


class NoGpu:
    """A driver's library that starts with ``status`` and offers no GPU."""

    def __init__(self, status: int) -> None:
        self._status = status

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._status

    def cuDriverGetVersion(self, found: object) -> int:  # noqa: N802
        return 0

    def cuDeviceGetCount(self, found: object) -> int:  # noqa: N802
        return 0


@pytest.mark.parametrize(("status", "said"), [(100, "cuInit returned 100"), (0, "to this process")])
def test_a_driver_without_a_gpu_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, status: int, said: str
) -> None:
    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda name: NoGpu(status))
    problem = driver.__wrapped__().problem
    assert problem is not None
    assert said in problem
    assert ": see that " in problem
    assert "CUDA_VISIBLE_DEVICES" in problem


def test_the_driver_is_described() -> None:
    found = driver()
    assert bool(found.gpus) != bool(found.problem)
    assert all(read_capability(gpu.compute_capability) for gpu in found.gpus)
