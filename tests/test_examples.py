"""The programs in examples/, run as a user runs them."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
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
    for texts_given, code in (([], 422), (["w3 " * 100], 422), (["w3"] * 41, 422)):
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(f"{service}/embed", {"texts": texts_given})
        assert error.value.code == code
    assert len(ask(f"{service}/embed", {"texts": ["w3 w4"]})["embeddings"]) == 1


class HeldSession:
    """A session whose runs wait for a sign; an embedding is the sum of its text's ids."""

    def __init__(self, session: Session) -> None:
        self.manifest, self.tokenizer = session.manifest, session.tokenizer
        self.may_run = threading.Event()
        self.began = threading.Event()
        self.n_texts = 0

    def run(self, ids: np.ndarray, cu_seqlens: np.ndarray) -> Any:
        self.began.set()
        assert self.may_run.wait(30)
        self.n_texts += len(cu_seqlens) - 1
        parts = np.split(ids, cu_seqlens[1:-1])
        return SimpleNamespace(output=np.array([[part.sum()] for part in parts]))


def test_what_nobody_waits_for_is_not_run(
    text_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that left, answers that are too late, and too many texts, while a batch runs."""
    pytest.importorskip("fastapi", reason="fastapi comes with the examples extra")
    monkeypatch.setenv("SDT_MAX_WAITING", "40")
    spec = importlib.util.spec_from_file_location("service", EXAMPLES / "service.py")
    assert spec is not None
    assert spec.loader is not None
    service = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "service", service)  # dataclasses and pydantic look there
    spec.loader.exec_module(service)

    class Connection:
        """One whose client stays, or goes at a sign."""

        def __init__(self, gone: asyncio.Event) -> None:
            self.gone = gone

        async def receive(self) -> dict[str, str]:
            await self.gone.wait()
            return {"type": "http.disconnect"}

    async def requests(session: HeldSession) -> None:
        batcher = service.app.state.batcher = service.Batcher(session)
        worker = asyncio.create_task(batcher.run())
        stays, leaves = asyncio.Event(), asyncio.Event()

        def ask(texts: list[str], gone: asyncio.Event = stays) -> asyncio.Task[Any]:
            return asyncio.create_task(
                service.embed(service.Request(texts=texts), Connection(gone))
            )

        async def waiting(n: int) -> None:
            while batcher.n_waiting != n:
                await asyncio.sleep(0.01)

        first = ask(["w3"])
        await asyncio.to_thread(session.began.wait, 30)
        lost = ask(["w4"] * 8, leaves)
        await waiting(9)
        while batcher.queue.qsize() != 8:
            await asyncio.sleep(0.01)
        leaves.set()
        with pytest.raises(service.HTTPException):
            await lost
        monkeypatch.setattr(service, "TIMEOUT_S", 0.05)
        with pytest.raises(service.HTTPException) as too_late:
            await ask(["w4"] * 7)
        assert too_late.value.status_code == 504
        monkeypatch.setattr(service, "TIMEOUT_S", 30)
        await waiting(1)
        kept = ask(["w5", "w6"] * 19)  # what was given up takes no place
        await waiting(39)
        with pytest.raises(service.HTTPException) as too_many:
            await ask(["w3"] * 2)
        assert too_many.value.status_code == 503
        session.may_run.set()
        rows = [*(await first).embeddings, *(await kept).embeddings]
        wanted = ["w3", *["w5", "w6"] * 19]
        ids, cu_seqlens = session.tokenizer.encode(wanted, max_length=40)
        assert rows == [[part.sum()] for part in np.split(ids, cu_seqlens[1:-1])]
        assert session.n_texts == batcher.n_texts == 39
        assert batcher.n_waiting == batcher.queue.qsize() == 0
        worker.cancel()

    with Session.open(text_bundle) as session:
        asyncio.run(asyncio.wait_for(requests(HeldSession(session)), 60))


def test_clients_that_hang_up(service: str, text_bundle: Path) -> None:
    """A client that hangs up in the middle leaves the service as it was."""
    host, port = service.removeprefix("http://").split(":")
    body = json.dumps({"texts": texts(8)}).encode()
    head = f"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    for part in (body, body[:20]):  # while it waits, and in the middle of its own body
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + part)
    lines = texts(5)
    found = ask(f"{service}/embed", {"texts": lines})["embeddings"]
    np.testing.assert_allclose(found, expected(text_bundle, lines), rtol=0, atol=1e-5)
    assert ask(f"{service}/statistics")["n_waiting"] == 0
