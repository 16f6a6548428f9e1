"""What TensorRT-RTX says on a machine that it does not run on; a line of JSON for each step.

    python -m tests.gpu.rtx_refusal [BUNDLE]

Engines for compute capability 8.9 are built from a copy of the bundle. Then these have to end in an
error of this package: opening a session; loading an engine with the backend's own check deceived,
so that the library itself has to refuse; building for compute capability 9.0, again behind the
check's back. Of the command ``doctor`` the row is printed. It is a script because a library that
crashes takes its process along; tests call :func:`steps`, on a GPU and without one.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from sdt_deploy import trt
from sdt_deploy.buckets import BatchLimits
from sdt_deploy.bundle import Bundle
from sdt_deploy.config import BuildConfig, ModelConfig
from sdt_deploy.errors import SdtDeployError
from sdt_deploy.exporters.tensorrt import build_engines
from sdt_deploy.gpu import Driver, Gpu, driver
from sdt_deploy.runtime.backends import tensorrt as backend_module
from sdt_deploy.runtime.backends.tensorrt import TensorRtBackend
from sdt_deploy.runtime.session import Session

ROOT = Path(__file__).parents[2]
BUILT_FOR = "8.9"
"""What the engines are built for; an H100 has 9.0."""
ADA = Driver(gpus=(Gpu(name="a GPU that is not here", compute_capability=BUILT_FOR),))
HOPPER = BuildConfig(flavour="tensorrt-rtx", compute_capabilities=("9.0",), graphs=("head",))
LIMITS = BatchLimits(max_seqlen=24)
GRAPHS = ("entry", "stage-00", "head")


def steps(bundle: Path) -> dict[str, dict[str, Any]]:
    """Run this script in a process of its own, which has to end well; return its lines by step."""
    command = [sys.executable, "-m", "tests.gpu.rtx_refusal", str(bundle)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["step"]: line for line in lines}


def main() -> None:
    """Run the steps and print what came of each."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "bundle"
        if len(sys.argv) > 1:
            shutil.copytree(sys.argv[1], path)
        else:
            make(path)
        build = dataclasses.replace(HOPPER, compute_capabilities=(BUILT_FOR,), graphs=GRAPHS)
        report = build_engines(Bundle.open(path), build, LIMITS)
        say("made", engines=sorted(report.sources), gpus=[gpu.name for gpu in driver().gpus])
        say("open", **outcome(lambda: Session.open(path, backend="tensorrt-rtx").close()))
        say("doctor", **doctor())
        say("load", **outcome(lambda: load(path)))
        say("build", **outcome(lambda: build_for_hopper(path)))


def make(path: Path) -> None:
    """Export a small model with random weights."""
    from sdt_deploy.exporters.export import export
    from sdt_deploy.model.checkpoints import Checkpoint
    from sdt_deploy.model.transformer import SparseDepthTransformer

    config = ModelConfig(
        vocab_size=31, d_model=32, n_heads=2, n_layers=2, d_ff=40, max_positions=32
    )
    export(Checkpoint(model=SparseDepthTransformer(config).eval(), provenance={}), path)


def say(step: str, **found: Any) -> None:
    """Print a step before the next one can crash."""
    sys.stdout.write(json.dumps({"step": step, **found}) + "\n")
    sys.stdout.flush()


def outcome(action: Callable[[], object]) -> dict[str, str]:
    """Return the error of this package that ``action`` ends in; any other one ends the script."""
    try:
        action()
    except SdtDeployError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": "none", "message": ""}


def doctor() -> dict[str, Any]:
    """Return the row of TensorRT-RTX that ``sdt-deploy doctor --json`` prints."""
    command = [sys.executable, "-c", "from sdt_deploy.cli import main; main()", "doctor", "--json"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    (row,) = [row for row in rows if row["backend"] == "tensorrt-rtx"]
    return dict(row)


def load(path: Path) -> None:
    """Let the library see an engine that this machine does not run."""
    device = "cpu" if driver().problem else "cuda"
    with mock.patch.object(backend_module, "driver", return_value=ADA):
        backend = TensorRtBackend(Bundle.open(path), "tensorrt-rtx", device=device)
        backend.graph("stage-00")


def build_for_hopper(path: Path) -> None:
    """Let the library build for a GPU that it does not know."""
    every = dataclasses.replace(trt.flavour("tensorrt-rtx"), compute_capabilities=None)
    with mock.patch.object(trt, "FLAVOURS", {**trt.FLAVOURS, every.name: every}):
        build_engines(Bundle.open(path), HOPPER, LIMITS)


if __name__ == "__main__":
    main()
