"""Builds that fail, are cancelled or meet bad input, with TensorRT-RTX."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdt_deploy.buckets import BatchLimits
from sdt_deploy.bundle import Bundle, Manifest
from sdt_deploy.config import BuildConfig, ExportConfig
from sdt_deploy.engines import ENGINES, read_engine
from sdt_deploy.errors import (
    BackendError,
    BuildError,
    BundleFormatError,
    BundleIntegrityError,
    ConfigError,
    OutputError,
)
from sdt_deploy.exporters import engine_cache, engine_process, tensorrt
from sdt_deploy.exporters.engine_cache import EngineCache
from sdt_deploy.exporters.engine_plan import plan_jobs
from sdt_deploy.exporters.tensorrt import build_engines
from sdt_deploy.gpu import driver
from sdt_deploy.testing import memory_bundle
from tests.exporters.building import (
    ADA,
    break_graph,
    files_of,
    manifest_of,
    reopened,
    stages_only,
)
from tests.samples import CONFIGS, random_model, sign_bundle


@pytest.mark.parametrize("at", [0, 1, 7])
def test_an_interrupted_build_leaves_nothing(bundle: Bundle, at: int) -> None:
    before = files_of(bundle)
    count = 0

    def interrupt(what: str, done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count > at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, ADA, progress=interrupt)
    assert files_of(bundle) == before
    assert not (bundle.path / ENGINES).exists()


def test_an_interrupted_build_goes_on_from_the_cache(bundle: Bundle, tmp_path: Path) -> None:
    config, cache = stages_only(bundle), EngineCache(tmp_path / "cache")

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("stage-01"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, config, cache=cache, progress=interrupt)
    assert not bundle.manifest.engines
    again = build_engines(bundle, config, cache=cache)
    assert again.sources == {"stage-00": "cache", "stage-01": "built"}


def test_a_closed_pipe_cancels_the_build(bundle: Bundle, tmp_path: Path) -> None:
    """The worker must not go on when the process that started it was killed."""
    report = build_engines(bundle, stages_only(bundle))
    job = next(job for job in plan_jobs(bundle, report.engines) if job.graph == "dense")
    output = tmp_path / "dense.engine"
    request = {
        "rtx": True,
        "compute_capabilities": [[8, 9]],
        "gpu_here": False,
        "workspace_bytes": None,
        "legacy": False,
        "precision": "float32",
        "timing_cache": None,
        "pin_timing_cache": False,
        "graphs": [
            {
                "name": job.graph,
                "onnx": str(job.onnx),
                "output": str(output),
                "profiles": job.profiles,
                "attention": job.attention,
            }
        ]
        * 20,
    }
    worker = subprocess.Popen(
        [sys.executable, "-m", "sdt_deploy.exporters.engine_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(request).encode())
    worker.stdin.close()
    assert worker.stdout.readline()
    worker.stdout.close()
    worker.wait(timeout=60)
    assert not output.exists()


def test_a_failed_build_is_named_and_the_others_can_be_used(bundle: Bundle) -> None:
    broken = break_graph(bundle, "stage-01")
    config = dataclasses.replace(ADA, graphs=("stage-00", "stage-01", "head"))
    with pytest.raises(BuildError) as error:
        build_engines(broken, config, BatchLimits(max_seqlen=24))
    text = str(error.value)
    assert "could not build stage-01" in text
    assert (
        f"sdt-deploy build-engine {bundle.path} --target tensorrt-rtx --compute-capability 8.9 "
        "--max-seqlen 24 --max-batch 64 --max-padded-tokens 8192 --no-cache --graph stage-01"
    ) in text
    assert re.search(r"could not build stage-01:\noperator: Sharpmax \(node_\w+\)\n", text)
    assert list(reopened(broken).engines) == ["stage-00", "head"]
    assert text.endswith("these engines can be used: stage-00, head")
    # Nor do some new engines replace a whole set that was built with other settings.
    before = files_of(broken)
    config = dataclasses.replace(ADA, graphs=("stage-01", "entry", "stage-00", "head"))
    with pytest.raises(BuildError) as error:
        build_engines(Bundle.open(bundle.path), config, BatchLimits(max_seqlen=32))
    assert files_of(broken) == before
    assert (
        "these engines can be used: stage-00, head\nthey are the bundle's former ones, with other "
        "settings; of the new ones none was put into it"
    ) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x08\x0a no graph", None])
def test_a_broken_graph(bundle: Bundle, content: bytes | None) -> None:
    """Empty, no protobuf, cut in the middle."""
    path = bundle.path / "stage-01.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    sign_bundle(bundle.path)
    broken = Bundle(path=bundle.path, manifest=Manifest.from_json(manifest_of(bundle)))
    with pytest.raises(BuildError, match=r"could not build stage-01:\n.*\n"):
        build_engines(broken, stages_only(bundle))
    assert list(Manifest.from_json(manifest_of(bundle)).engines[0].engines) == ["stage-00"]


def test_a_bundle_without_graphs(bundle: Bundle) -> None:
    sign_bundle(bundle.path, lambda body: body.update(graphs={}))
    with pytest.raises(BundleFormatError, match="graphs"):
        Bundle.open(bundle.path)
    bare = dataclasses.replace(bundle.manifest, graphs={}, files={})
    with pytest.raises(ConfigError, match="no graph stage-00, stage-01 to build"):
        build_engines(Bundle(path=bundle.path, manifest=bare), stages_only(bundle))


def test_an_engine_that_was_altered_and_cannot_be_built_again_is_not_called_usable(
    bundle: Bundle,
) -> None:
    limits, config = BatchLimits(max_seqlen=24), dataclasses.replace(ADA, graphs=("head", "entry"))
    build_engines(bundle, config, limits)
    spec = reopened(bundle).engines["entry"]
    (bundle.path / spec.file).write_bytes(b"altered")
    opened = Bundle.open(bundle.path)
    (bundle.path / "entry.onnx").write_bytes(b"no graph")
    with pytest.raises(BuildError) as error:
        build_engines(opened, config, limits)
    assert "could not build entry" in str(error.value)
    assert str(error.value).endswith("can be used: head")


def test_too_little_workspace_is_a_failed_build(bundle: Bundle) -> None:
    before = files_of(bundle)
    config = dataclasses.replace(ADA, workspace_mb=1, graphs=("stage-00",))
    limits = BatchLimits(max_seqlen=40, max_batch=512, max_padded_tokens=20480)
    with pytest.raises(BuildError, match="workspace"):
        build_engines(bundle, config, limits)
    assert files_of(bundle) == before


@pytest.mark.parametrize("step", ["sync_tree", "write_manifest"])
def test_ctrl_c_while_engines_are_put_into_the_bundle(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    build_engines(bundle, dataclasses.replace(ADA, graphs=("head",)))
    before = files_of(bundle)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tensorrt, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_engines(Bundle.open(bundle.path), stages_only(bundle))
    assert files_of(bundle) == before


def test_a_full_disk(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(bundle)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensorrt, "sync_tree", full)
        with pytest.raises(OutputError, match="No space left"):
            build_engines(bundle, stages_only(bundle))
    assert files_of(bundle) == before
    build_engines(bundle, stages_only(bundle))
    assert len(list((bundle.path / ENGINES).iterdir())) == 2


def test_a_full_disk_under_the_cache(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, cache = files_of(bundle), EngineCache(tmp_path / "cache")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(engine_cache.shutil, "copyfile", full)
        with pytest.raises(OutputError, match=r"cache .*No space left"):
            build_engines(bundle, dataclasses.replace(ADA, graphs=("head",)), cache=cache)
    assert files_of(bundle) == before
    assert not list((tmp_path / "cache").iterdir())


def test_a_full_disk_under_the_worker(bundle: Bundle) -> None:
    """The limit of a file's size stands for the end of the disk: engines are larger than it."""
    before = files_of(bundle)
    script = Path(sys.executable).with_name("sdt-deploy")
    options = "--target tensorrt-rtx --compute-capability 8.9 --graph stage-00 --no-cache"
    command = f"ulimit -f 4; exec {script} build-engine {bundle.path} {options}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "could not build stage-00" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert files_of(bundle) == before


def test_an_altered_engine_is_refused_and_built_again(bundle: Bundle) -> None:
    config = dataclasses.replace(ADA, graphs=("head",))
    spec = build_engines(bundle, config).engines.engines["head"]
    path = bundle.path / spec.file
    content = path.read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        altered = bytearray(content)
        altered[place] ^= 1
        path.write_bytes(bytes(altered))
        with pytest.raises(BundleIntegrityError, match="altered"):
            read_engine(bundle.path, spec)
    path.write_bytes(content[:-1])
    with pytest.raises(BundleIntegrityError, match="altered"):
        read_engine(bundle.path, spec)
    path.write_bytes(content + b"x")
    with pytest.raises(BundleIntegrityError, match="cannot be read"):
        read_engine(bundle.path, spec)
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(BundleIntegrityError):
        read_engine(bundle.path, spec)
    path.unlink()
    assert build_engines(Bundle.open(bundle.path), config).sources == {"head": "built"}
    assert read_engine(bundle.path, reopened(bundle).engines["head"])


def test_a_lost_engine_comes_back_even_if_nothing_else_changes(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builds are repeatable to the byte; so is the description if both take as long."""
    config, made = dataclasses.replace(ADA, graphs=("head",)), tensorrt._spec
    monkeypatch.setattr(tensorrt, "_spec", lambda *of: dataclasses.replace(made(*of), build_s=0.5))
    spec = build_engines(bundle, config).engines.engines["head"]
    (bundle.path / spec.file).unlink()
    again = build_engines(Bundle.open(bundle.path), config)
    assert again.engines.engines["head"] == spec
    assert read_engine(bundle.path, spec)


def test_a_damaged_cache_is_not_used(bundle: Bundle, tmp_path: Path) -> None:
    config, cache = dataclasses.replace(ADA, graphs=("head",)), EngineCache(tmp_path / "cache")
    fresh = shutil.copytree(bundle.path, tmp_path / "fresh")
    build_engines(bundle, config, cache=cache)
    (engine,) = (tmp_path / "cache").glob("*.engine")
    engine.write_bytes(engine.read_bytes()[:-1] + b"!")
    assert cache.get(engine.stem, tmp_path / "copy") is None
    assert not (tmp_path / "copy").exists()
    assert build_engines(Bundle.open(fresh), config, cache=cache).sources == {"head": "built"}


def test_what_a_failed_build_leaves_is_not_put_in_place_of_an_engine(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graph has an engine of before, which is kept beside what was built now."""
    head = dataclasses.replace(ADA, graphs=("head",))
    spec = build_engines(bundle, head).engines.engines["head"]
    run_worker = tensorrt.run_worker
    monkeypatch.setattr(
        tensorrt, "plan_jobs", lambda *of, **how: [*map(changed, plan_jobs(*of, **how))]
    )

    def changed(job: Any) -> Any:
        return dataclasses.replace(job, key="0" * 64) if job.graph == "head" else job

    def failing(jobs: Any, directory: Path, *rest: Any, **how: Any) -> Iterator[Any]:
        for built in run_worker(jobs, directory, *rest, **how):
            if built.graph == "head":
                built.output.write_bytes(b"half")
                yield dataclasses.replace(built, problem="it broke")
            else:
                yield built

    monkeypatch.setattr(tensorrt, "run_worker", failing)
    with pytest.raises(BuildError, match="it broke"):
        build_engines(Bundle.open(bundle.path), dataclasses.replace(ADA, graphs=("entry", "head")))
    found = Bundle.open(bundle.path).manifest.engines[0].engines
    assert set(found) == {"entry", "head"}
    assert found["head"] == spec
    for each in found.values():
        assert read_engine(bundle.path, each)


def test_a_file_system_without_locks_says_so(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*of: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(tensorrt.fcntl, "flock", refuse)
    with pytest.raises(OutputError, match=r"cannot be locked.*Bad file descriptor"):
        build_engines(bundle, ADA)


def test_two_builds_at_once(bundle: Bundle) -> None:
    with tensorrt.exclusive(bundle.path), pytest.raises(OutputError, match="under way"):
        build_engines(bundle, ADA)
    assert build_engines(bundle, stages_only(bundle)).sources


def test_a_bundle_that_was_exported_anew_meanwhile(bundle: Bundle) -> None:
    stale = Bundle(path=bundle.path, manifest=bundle.manifest)
    break_graph(bundle, "stage-02")
    with pytest.raises(BundleIntegrityError, match="exported anew"):
        build_engines(stale, stages_only(bundle))
    assert not Bundle.open(bundle.path).manifest.engines


def test_an_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        EngineCache(tmp_path / "file")


def test_a_worker_that_dies(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'segmentation fault' >&2\nexit 139\n")
    script.chmod(0o755)
    monkeypatch.setattr(engine_process.sys, "executable", str(script))
    with pytest.raises(BackendError, match=r"ended with 139(.|\n)*segmentation fault"):
        build_engines(bundle, stages_only(bundle))
    assert not (bundle.path / ENGINES).exists()


@pytest.mark.parametrize(
    ("config", "limits", "message"),
    [
        (
            dataclasses.replace(ADA, compute_capabilities=("9.0",)),
            None,
            "not 9.0; take --target tensorrt there",
        ),
        (dataclasses.replace(ADA, compute_capabilities=("8.9a",)), None, "is written like 8.9"),
        (
            dataclasses.replace(ADA, graphs=("stage-77",)),
            None,
            "no graph stage-77 to build; it has entry",
        ),
        (dataclasses.replace(ADA, timing_cache=Path("t")), None, "no timing cache"),
        (ADA, BatchLimits(max_seqlen=41), "exceeds the model's 40 positions; take as many"),
    ],
)
def test_bad_configurations(
    bundle: Bundle, config: BuildConfig, limits: BatchLimits | None, message: str
) -> None:
    before = files_of(bundle)
    with pytest.raises(ConfigError, match=message):
        build_engines(bundle, config, limits)
    assert files_of(bundle) == before


def test_no_gpu_to_build_for(bundle: Bundle) -> None:
    if driver().gpus:
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match="name the GPU to build for"):
        build_engines(bundle, BuildConfig(flavour="tensorrt-rtx"))


def test_lengths_that_are_none(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "lengths"
    path.write_text("3\nfour\n")
    with pytest.raises(ConfigError, match="not 'four'"):
        build_engines(bundle, dataclasses.replace(ADA, lengths=path))


def test_int8_graphs_are_not_for_engines() -> None:
    model = random_model(CONFIGS["all-embedding"][0], seed=3)
    with pytest.raises(ConfigError, match="without --quantize"):
        build_engines(memory_bundle(model, ExportConfig(quantization="int8")), ADA)


@pytest.mark.parametrize(
    "change",
    [
        lambda engines: engines[0].update(flavour="tensorflow"),
        lambda engines: engines[0].update(profiles=[]),
        lambda engines: engines[0]["profiles"][0]["batch"].update(min=9, opt=3, max=5),
        lambda engines: engines[0].update(compute_capabilities="8.9"),
        lambda engines: engines[0].update(extra=1),
        lambda engines: engines[0].update(precision="float8"),
        lambda engines: engines[0].pop("workspace_mb"),
        lambda engines: engines[0]["engines"]["head"].update(attention_reason=1),
        lambda engines: engines[0]["engines"]["head"].update(file="engines/../weights.bin"),
        lambda engines: engines[0]["engines"]["head"].update(file="/etc/passwd"),
        lambda engines: engines[0]["engines"]["head"].update(sha256="0"),
        lambda engines: engines[0]["engines"]["head"].update(graph="entry"),
        lambda engines: engines[0]["engines"]["head"].update(layers="gemm"),
        lambda engines: engines[0]["engines"]["head"].update(layers=[1]),
        lambda engines: engines[0]["engines"].update(tail=engines[0]["engines"]["head"]),
        lambda engines: engines.append(engines[0]),
    ],
)
def test_engines_in_a_manifest_are_checked(bundle: Bundle, change: Callable[[Any], None]) -> None:
    build_engines(bundle, dataclasses.replace(ADA, graphs=("head",)))

    def alter(body: Any) -> None:
        for name in [name for name in body["files"] if name.startswith(ENGINES)]:
            del body["files"][name]
        change(body["engines"])

    sign_bundle(bundle.path, alter)
    with pytest.raises(BundleFormatError):
        Bundle.open(bundle.path)


def test_a_manifest_without_engines_is_read(bundle: Bundle) -> None:
    sign_bundle(bundle.path, lambda body: body.pop("engines"))
    assert Bundle.open(bundle.path).manifest.engines == ()
    assert Manifest.from_json(manifest_of(bundle)).engines == ()
