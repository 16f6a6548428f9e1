"""The programs in examples/, run as a user runs them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdt_deploy.config import ExportConfig
from sdt_deploy.exporters.export import export
from sdt_deploy.model import checkpoints
from sdt_deploy.runtime.session import Session
from tests.conftest import Once
from tests.textmodels import CONFIG, save_teacher, texts

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="session")
def text_bundle(once: Once) -> Path:
    """A tiny bundle that reads texts and gives embeddings."""

    def fill(directory: Path) -> None:
        save_teacher(directory / "model", CONFIG.replace(n_layers=2, thresholds=()))
        checkpoint = checkpoints.load(directory / "model")
        export(checkpoint, directory / "bundle", ExportConfig(), single_file=False)

    return once("text-bundle", fill) / "bundle"


def run(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected(bundle: Path, lines: list[str]) -> np.ndarray:
    with Session.open(bundle) as session:
        return session.run(lines, overflow="truncate").output


def test_thread_pool(text_bundle: Path, tmp_path: Path) -> None:
    lines = texts(50)
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    out = tmp_path / "rows.npy"
    said = run("thread_pool.py", text_bundle, tmp_path / "texts.txt", out, "--chunk", 7)
    assert said.startswith("50 texts, mean depth ")
    np.testing.assert_allclose(np.load(out), expected(text_bundle, lines), rtol=0, atol=1e-6)


def test_parquet_job(text_bundle: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow comes with the examples extra")
    pq = pytest.importorskip("pyarrow.parquet")
    lines = [*texts(30), "w3 " * 100]
    column = [*lines[:10], None, *lines[10:], ""]
    table = pa.table({"id": list(range(len(column))), "body": column})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=7)
    out = tmp_path / "out.parquet"
    arguments = (text_bundle, tmp_path / "in.parquet", out)
    said = run("parquet_job.py", *arguments, "--column", "body", "--rows", 9)
    assert said.startswith(f"{len(column)} rows, mean depth ")
    found = pq.read_table(out)
    assert found.column_names == ["id", "body", "embedding", "depth"]
    assert found["id"].to_pylist() == table["id"].to_pylist()
    rows = found["embedding"].to_pylist()
    assert [i for i, row in enumerate(rows) if row is None] == [10, len(column) - 1]
    given = np.array([row for row in rows if row is not None])
    np.testing.assert_allclose(given, expected(text_bundle, lines), rtol=0, atol=1e-6)
    assert found["depth"].null_count == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out.parquet"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "parquet_job.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "has no column text: id, body" in done.stderr


@pytest.fixture
def service(text_bundle: Path) -> Iterator[str]:
    """The address of a running service whose batches hold at most 64 tokens."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason=f"{package} comes with the examples extra")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"SDT_BUNDLE": str(text_bundle), "SDT_MAX_TOKENS": "64", "SDT_MAX_WAIT_MS": "30"}
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "service:app"),
            *("--port", str(port), "--log-level", "warning"),
        ],
        env={**os.environ, **settings, "SDT_MAX_WAITING": "40"},
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, "the service did not start"
            try:
                ask(f"{address}/statistics")
                break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        assert process.wait(timeout=30) in (0, -15)


def ask(url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
        return json.load(reply)


def test_service(service: str, text_bundle: Path) -> None:
    lines = texts(36)
    with ThreadPoolExecutor(12) as pool:  # at once, so that they wait together
        parts = list(
            pool.map(
                lambda i: ask(f"{service}/embed", {"texts": lines[i : i + 3]})["embeddings"],
                range(0, 36, 3),
            )
        )
    found = np.array([row for part in parts for row in part])
    np.testing.assert_allclose(found, expected(text_bundle, lines), rtol=0, atol=1e-5)
    told = ask(f"{service}/statistics")
    assert told["n_texts"] == 36
    assert told["n_batches"] < 36, "no two texts ran together"
    n_tokens = told["session"]["n_tokens"]
    assert told["n_batches"] >= n_tokens / 64, "a batch was over the budget"
    for texts_given, code in (([], 422), (["w3 " * 100], 422), (["w3"] * 41, 503)):
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(f"{service}/embed", {"texts": texts_given})
        assert error.value.code == code
    assert len(ask(f"{service}/embed", {"texts": ["w3 w4"]})["embeddings"]) == 1
