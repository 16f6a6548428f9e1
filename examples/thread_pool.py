"""One session under many threads: each takes the next chunk of texts, all share the bundle.

    python examples/thread_pool.py BUNDLE texts.txt embeddings.npy --workers 4

Threads help where work outside the session (reading, tokenizing, storing) can overlap with it. The
session's own operators already run on all cores, so more workers than cores gain nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import sdt_deploy


def main() -> None:
    """Embed every line of a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=64, help="texts in a call")
    options = parser.parse_args()
    lines = [line for line in options.texts.read_text().splitlines() if line.strip()]
    with (
        sdt_deploy.Session.open(options.bundle) as session,
        ThreadPoolExecutor(options.workers) as pool,
    ):

        def embed(chunk: list[str]) -> np.ndarray:
            return session.run(chunk, overflow="truncate").output  # belongs to us

        rows = list(pool.map(embed, chunks(lines, options.chunk)))  # in the order of the lines
        depth = session.statistics().mean_depth
    np.save(options.out, np.concatenate(rows))
    sys.stdout.write(f"{len(lines)} texts, mean depth {depth:.2f}\n")


def chunks(lines: list[str], size: int) -> Iterator[list[str]]:
    """Cut ``lines`` into lists of ``size``, the last one shorter."""
    return (lines[i : i + size] for i in range(0, len(lines), size))


if __name__ == "__main__":
    main()
