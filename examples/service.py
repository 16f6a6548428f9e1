"""Embeddings over HTTP: requests that wait together run together, up to a budget of tokens.

    SDT_BUNDLE=build/bundle uvicorn --app-dir examples service:app

    curl -s localhost:8000/embed -H 'content-type: application/json' -d '{"texts": ["To be"]}'

One process serves all cores: the session is thread-safe and its sessions share one thread pool.
Needs ``pip install "sdt-deploy[examples]"``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, HTTPException
from fastapi import Request as Connection
from pydantic import BaseModel, Field

import sdt_deploy

MAX_TOKENS = int(os.environ.get("SDT_MAX_TOKENS", "4096"))
"""Budget of a batch, padding included: texts in it times the longest of them."""
MAX_WAIT_S = float(os.environ.get("SDT_MAX_WAIT_MS", "3")) / 1e3
"""How long a text waits for others; while a batch runs, they gather anyway."""
MAX_WAITING = int(os.environ.get("SDT_MAX_WAITING", "1024"))
"""Texts that may wait or run; beyond it, requests are turned away with 503."""
TIMEOUT_S = float(os.environ.get("SDT_TIMEOUT_MS", "10000")) / 1e3
"""A request without an answer by then gets a 504."""


@dataclass
class Waiting:
    """One text: its tokens ``[n_tokens]``, and where its embedding goes."""

    ids: np.ndarray
    embedding: asyncio.Future[np.ndarray]


@dataclass
class Batcher:
    """Runs what waits in batches within the budget, in the order of arrival.

    What nobody waits for any more, because the client has gone or was told that it took too long,
    is not run: a service that is behind would never catch up with answers that nobody reads.
    """

    session: sdt_deploy.Session
    queue: asyncio.Queue[Waiting] = field(default_factory=asyncio.Queue)
    n_waiting: int = 0
    """Texts that somebody waits for; the queue also holds what was given up."""
    n_batches: int = 0
    n_texts: int = 0

    async def embed(self, texts: list[str]) -> list[np.ndarray]:
        """Return one embedding per text; to cancel this gives up what has not begun to run.

        Raises:
            InputError: if a text is too long, or gives no token.
            asyncio.QueueFull: if too much waits already.
        """
        if self.n_waiting + len(texts) > MAX_WAITING:
            raise asyncio.QueueFull
        self.n_waiting += len(texts)
        try:
            limit = self.session.manifest.model.max_positions
            ids, cu_seqlens = await asyncio.to_thread(
                self.session.tokenizer.encode, texts, max_length=limit
            )
            parts = np.split(ids, cu_seqlens[1:-1])
            loop = asyncio.get_running_loop()
            waiting = [Waiting(one, loop.create_future()) for one in parts]
            for one in waiting:
                self.queue.put_nowait(one)
            return await asyncio.gather(*(one.embedding for one in waiting))
        finally:
            self.n_waiting -= len(texts)

    async def run(self) -> None:
        """Serve until cancelled."""
        left: Waiting | None = None
        while True:
            first = left if left and not left.embedding.done() else await self._get()
            batch, left = await self._next(first)
            ids = np.concatenate([one.ids for one in batch])
            cu_seqlens = np.cumsum([0, *(len(one.ids) for one in batch)])
            try:
                result = await asyncio.to_thread(self.session.run, ids, cu_seqlens)
            except Exception as error:  # each of them is told; the service goes on
                outcomes: list[Any] = [error] * len(batch)
            else:
                outcomes = list(result.output)
            self.n_batches += 1
            self.n_texts += len(batch)
            for one, outcome in zip(batch, outcomes, strict=True):
                if one.embedding.done():  # given up while it ran
                    continue
                if isinstance(outcome, Exception):
                    one.embedding.set_exception(outcome)
                else:
                    one.embedding.set_result(outcome)

    async def _get(self) -> Waiting:
        """Return the first text in the queue that somebody waits for."""
        while (one := await self.queue.get()).embedding.done():
            pass
        return one

    async def _next(self, first: Waiting) -> tuple[list[Waiting], Waiting | None]:
        """Gather a batch around ``first``; also return the text that did not fit any more."""
        batch, longest = [first], len(first.ids)
        deadline = asyncio.get_running_loop().time() + MAX_WAIT_S
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    one = await self._get()
            except TimeoutError:
                return batch, None
            longest = max(longest, len(one.ids))
            if (len(batch) + 1) * longest > MAX_TOKENS:
                return batch, one
            batch.append(one)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the bundle before the first request, and run one batch, so that none waits for it."""
    bundle = os.environ.get("SDT_BUNDLE")
    if not bundle:
        raise RuntimeError("SDT_BUNDLE has to name the directory of a bundle")
    with sdt_deploy.Session.open(bundle) as session:
        head = session.manifest.model.head
        if head.kind != "embedding":
            raise RuntimeError(f"a bundle with embeddings is served, not with {head.kind!r}")
        session.cost_model()
        app.state.batcher = Batcher(session)
        worker = asyncio.create_task(app.state.batcher.run())
        yield
        worker.cancel()


app = FastAPI(title="Embeddings", lifespan=lifespan)


class Request(BaseModel):
    """Texts to embed."""

    texts: Annotated[list[str], Field(min_length=1, max_length=min(256, MAX_WAITING))]


class Reply(BaseModel):
    """One embedding per text, in their order."""

    embeddings: list[list[float]]


@app.post("/embed")
async def embed(request: Request, connection: Connection) -> Reply:
    """Embed texts."""
    work = asyncio.create_task(app.state.batcher.embed(request.texts))
    gone = asyncio.create_task(connection.receive())  # after the body comes only its end
    try:
        await asyncio.wait((work, gone), timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise HTTPException(504, f"no answer within {TIMEOUT_S:g} s")
        rows = work.result()
    except sdt_deploy.InputError as error:
        raise HTTPException(422, str(error)) from error
    except asyncio.QueueFull as error:
        raise HTTPException(503, "too many texts are waiting", {"retry-after": "1"}) from error
    finally:
        work.cancel()
        gone.cancel()
    return Reply(embeddings=[row.tolist() for row in rows])


@app.get("/statistics")
async def statistics() -> dict[str, Any]:
    """Say what was run, how it was batched, and how deep the tokens went."""
    batcher: Batcher = app.state.batcher
    return {
        "n_batches": batcher.n_batches,
        "n_texts": batcher.n_texts,
        "n_waiting": batcher.n_waiting,
        "session": asdict(batcher.session.statistics()),
    }
