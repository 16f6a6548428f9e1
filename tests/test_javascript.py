"""The example in JavaScript gives the oracle's numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sdt_deploy.model.inference import oracle_output
from tests.samples import TOLERANCE, ExportedModel

EXAMPLE = Path(__file__).parent.parent / "examples" / "javascript"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its dependency installed; skips where that cannot be."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    directory = tmp_path_factory.mktemp("javascript")
    for name in ("package.json", "run.mjs"):
        shutil.copy(EXAMPLE / name, directory)
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not reach its registry within 240 s")
    if done.returncode:
        pytest.skip(f"npm cannot install onnxruntime-node: {done.stderr[-300:]}")
    return directory


@pytest.mark.parametrize("name", ["active-lm", "all-embedding"])
def test_javascript(example: Path, exported: Callable[[str], ExportedModel], name: str) -> None:
    sample = exported(name)
    sequences = [[5, 9, 2, 30, 11], [7], [3, 3, 8]]
    texts = [",".join(map(str, ids)) for ids in sequences]
    done = subprocess.run(
        ["node", "run.mjs", str(sample.bundle), *texts],
        cwd=example,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    lengths = np.array([len(ids) for ids in sequences])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.concatenate(sequences).astype(np.int32)
    expected = oracle_output(sample.model, ids, np.cumsum([0, *lengths], dtype=np.int32))
    output = np.array(found["output"]).reshape(found["dims"])
    scores = np.array(found["scores"]).reshape(mask.shape)[mask]
    if not sample.model.config.head.per_sequence:
        output = output[mask]
    np.testing.assert_allclose(scores, expected.scores, rtol=0, atol=1e-5)
    np.testing.assert_allclose(output, expected.output, rtol=0, atol=TOLERANCE)


def test_usage(example: Path) -> None:
    done = subprocess.run(["node", "run.mjs"], cwd=example, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage" in done.stderr
