"""Load on examples/service.py: is every answer right, and what happens when things go wrong?

    python benchmarks/service_load.py build/bundle --seconds 60

Starts the service in a process of its own and compares every embedding that it sends with the
session's for this text alone. Phases: steady load; more requests than may wait; clients that leave
before the answer; answers that would come too late; SIGTERM under load. Prints a line a phase; the
exit code is 1 if an answer was wrong or of no kind that the phase expects, or the service did not
end well. Client and service share the machine. Needs the extra ``dev``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np

import sdt_deploy

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-5


@dataclass
class Load:
    """Clients that ask one request after the other, and what they saw."""

    service: httpx.AsyncClient
    rows: dict[str, np.ndarray]
    """By text, the embedding of the text alone."""
    answers: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    n_texts: int = 0
    largest_error: float = 0.0

    async def run(
        self,
        n_clients: int,
        *,
        seconds: float,
        texts_at_most: int,
        patience_s: tuple[float, float] = (120, 120),
        stop: asyncio.Event | None = None,
    ) -> None:
        """Ask until the time is over, or until ``stop``; clients wait for some time between two."""
        end = time.perf_counter() + seconds

        async def client(seed: int) -> None:
            rng = random.Random(seed)
            every = list(self.rows)
            while time.perf_counter() < end and not (stop and stop.is_set()):
                texts = rng.choices(every, k=rng.randint(1, texts_at_most))
                said = await self._ask(texts, rng.uniform(*patience_s))
                self.answers[said] += 1
                if said in ("503", "refused"):
                    await asyncio.sleep(0.2)

        await asyncio.gather(*map(client, range(n_clients)))

    async def _ask(self, texts: list[str], patience_s: float) -> str:
        begin = time.perf_counter()
        try:
            reply = await self.service.post("/embed", json={"texts": texts}, timeout=patience_s)
        except httpx.ConnectError:
            return "refused"
        except httpx.TimeoutException:
            return "left"
        except httpx.TransportError:
            # On an idle connection that was being closed; no server can tell in time.
            return "reset at once" if time.perf_counter() - begin < 0.5 else "broken off"
        if reply.status_code != 200:
            return str(reply.status_code)
        self.latencies_s.append(time.perf_counter() - begin)
        found = np.array(reply.json()["embeddings"], np.float32)
        expected = np.array([self.rows[text] for text in texts])
        if found.shape != expected.shape:
            return "wrong"
        error = float(np.abs(found - expected).max())
        self.largest_error = max(self.largest_error, error)
        self.n_texts += len(texts)
        return "200" if error <= TOLERANCE else "wrong"

    def in_words(self, seconds: float) -> str:
        """Say what happened, with the latencies of what was answered."""
        answers = ", ".join(f"{n} x {said}" for said, n in sorted(self.answers.items()))
        if not self.latencies_s:
            return answers
        low, middle, high = (1e3 * np.quantile(self.latencies_s, q) for q in (0.5, 0.95, 0.99))
        return (
            f"{answers}; {self.n_texts / seconds:.0f} texts/s, latency {low:.0f}, {middle:.0f}, "
            f"{high:.0f} ms (50, 95, 99 %), largest error {self.largest_error:.1e}"
        )


@asynccontextmanager
async def running(bundle: Path, **settings: str) -> AsyncIterator[tuple[Any, httpx.AsyncClient]]:
    """Start the service; give its process and a client."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(ROOT / "examples"), "service:app"]
    process = subprocess.Popen(
        [*command, "--port", port, "--log-level", "warning"],
        env={**os.environ, "SDT_BUNDLE": str(bundle), "SDT_TIMEOUT_MS": "120000", **settings},
    )
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    address = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(base_url=address, limits=limits, trust_env=False) as client:
            while True:
                if process.poll() is not None:
                    raise SystemExit("the service did not start")
                try:
                    await client.get("/statistics")
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.1)
            yield process, client
    finally:
        process.kill()


async def ended(process: Any, seconds: float) -> str:
    """Wait for the end; say how it was."""
    begin = time.perf_counter()
    try:
        code = await asyncio.to_thread(process.wait, seconds)
    except subprocess.TimeoutExpired:
        return "did not end"
    return f"exit code {code} after {time.perf_counter() - begin:.1f} s"


async def phases(bundle: Path, rows: dict[str, np.ndarray], seconds: float) -> bool:
    """Run all of them; tell whether all was well."""
    fine = True

    def say(phase: str, load: Load, spent: float, expected: set[str], more: str = "") -> None:
        nonlocal fine
        well = load.answers.keys() <= expected and ("left" in expected or load.answers["200"] > 0)
        fine = fine and well
        print(f"{phase}: {load.in_words(spent)}{more}{'' if well else '  <-- FAULT'}", flush=True)

    async def idle(client: httpx.AsyncClient) -> dict[str, Any]:
        """Return the statistics once nothing waits."""
        for _ in range(600):
            told = (await client.get("/statistics", timeout=60)).json()
            if not told["n_waiting"]:
                break
            await asyncio.sleep(0.1)
        return told

    async with running(bundle) as (_, client):
        load = Load(client, rows)
        await load.run(64, seconds=seconds, texts_at_most=8)
        told = await idle(client)
        more = f", {told['n_texts'] / told['n_batches']:.1f} texts a batch"
        say("64 clients", load, seconds, {"200"}, more)
        usual_ms = f"{1e3 * np.median(load.latencies_s):.0f}"

    short = max(seconds / 4, 5.0)
    async with running(bundle, SDT_MAX_WAITING="128") as (_, client):
        load = Load(client, rows)
        await load.run(192, seconds=short, texts_at_most=8)
        say("128 may wait, 192 clients", load, short, {"200", "503"})
        load = Load(client, rows)
        await load.run(8, seconds=short, texts_at_most=8)
        say("then 8 clients", load, short, {"200"})

    async with running(bundle) as (_, client):
        before = (await client.get("/statistics")).json()["n_texts"]
        stays, leaves = Load(client, rows), Load(client, rows)
        await asyncio.gather(
            stays.run(8, seconds=short, texts_at_most=8),
            leaves.run(56, seconds=short, texts_at_most=8, patience_s=(0.01, 0.2)),
        )
        told = await idle(client)
        n_answered = stays.n_texts + leaves.n_texts
        more = f"; texts that were run: {told['n_texts'] - before}, answered: {n_answered}"
        say("56 leave early", leaves, short, {"200", "left"})
        say("8 beside them stay", stays, short, {"200"}, more)

    async with running(bundle, SDT_TIMEOUT_MS=usual_ms) as (_, client):
        load = Load(client, rows)
        await load.run(64, seconds=short, texts_at_most=8)
        say(f"answers after {usual_ms} ms are too late", load, short, {"200", "504"})

    async with running(bundle) as (process, client):
        load, stop = Load(client, rows), asyncio.Event()
        asking = asyncio.create_task(load.run(64, seconds=120, texts_at_most=8, stop=stop))
        await asyncio.sleep(short)
        process.send_signal(signal.SIGTERM)
        how = await ended(process, 60)
        stop.set()
        await asking
        fine = fine and how.startswith(("exit code 0", "exit code -15"))
        say("SIGTERM under load", load, short, {"200", "refused", "reset at once"}, f"; {how}")
    return fine


def expected_rows(bundle: Path, texts: Path, n: int) -> dict[str, np.ndarray]:
    """Return ``n`` texts of mixed lengths with their embeddings, each run alone."""
    rng = random.Random(0)
    lines = texts.read_text().splitlines()
    rows: dict[str, np.ndarray] = {}
    with sdt_deploy.Session.open(bundle) as session:
        limit = session.manifest.model.max_positions
        while len(rows) < n:
            begin, length = rng.randrange(len(lines)), min(int(rng.expovariate(0.5)) + 1, 16)
            text = " ".join(lines[begin : begin + length])
            ids, _ = session.tokenizer.encode([text], max_length=limit, overflow="truncate")
            if text.strip() and len(ids) < limit:
                rows[text] = session.run([text]).output[0]
    return rows


def main() -> None:
    """Read the command line and run the phases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--texts", type=Path, default=ROOT / "examples/texts/shakespeare.txt")
    parser.add_argument("--n-texts", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60, help="of the steady phase")
    options = parser.parse_args()
    rows = expected_rows(options.bundle, options.texts, options.n_texts)
    print(f"{len(rows)} texts, each run alone", flush=True)
    sys.exit(not asyncio.run(phases(options.bundle.resolve(), rows, options.seconds)))


if __name__ == "__main__":
    main()
