"""Embed a column of a Parquet file of any size, in bounded memory.

    python examples/parquet_job.py BUNDLE in.parquet out.parquet --column text

The result has all columns of the input and two more: ``embedding``, a list of float32 of fixed
length, and ``depth``, the mean number of layers that the text's tokens passed through. Where the
text is null or empty, so are they. The file appears when it is whole. Needs
``pip install "sdt-deploy[examples]"``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import sdt_deploy


def main() -> None:
    """Read, embed and write, chunk by chunk."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--column", default="text")
    parser.add_argument("--rows", type=int, default=4096, help="rows held in memory at a time")
    options = parser.parse_args()
    source = pq.ParquetFile(options.source)
    schema = source.schema_arrow
    if options.column not in schema.names:
        parser.error(f"{options.source} has no column {options.column}: {', '.join(schema.names)}")
    partial = options.target.with_name(options.target.name + ".partial")
    n_rows = 0
    with sdt_deploy.Session.open(options.bundle) as session:
        width = session.manifest.model.output_width
        added = [
            pa.field("embedding", pa.list_(pa.float32(), width)),
            pa.field("depth", pa.float32()),
        ]
        try:
            with pq.ParquetWriter(partial, pa.schema([*schema, *added])) as writer:
                for chunk in source.iter_batches(options.rows):
                    rows, depths = embed(session, chunk[options.column].to_pylist(), width)
                    columns = [*chunk.columns, rows, depths]
                    writer.write_batch(pa.record_batch(columns, schema=writer.schema))
                    n_rows += len(chunk)
            partial.rename(options.target)
        finally:
            partial.unlink(missing_ok=True)
        depth = session.statistics().mean_depth
    said = "no text" if depth is None else f"mean depth {depth:.2f}"
    sys.stdout.write(f"{n_rows} rows, {said}\n")


def embed(
    session: sdt_deploy.Session, texts: list[str | None], width: int
) -> tuple[pa.Array, pa.Array]:
    """Return embeddings and mean depths; null for null and for empty texts.

    The session sorts the texts by length and runs them in parts that fit its caches.
    """
    given = [i for i, text in enumerate(texts) if text]
    missing = np.ones(len(texts), dtype=bool)
    rows = np.zeros((len(texts), width), dtype=np.float32)
    depths = np.zeros(len(texts), dtype=np.float32)
    if given:
        result = session.run([texts[i] for i in given], overflow="truncate")
        rows[given] = result.output
        depths[given] = [part.mean() for part in result.split(result.depths)]
        missing[given] = False
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), width, mask=pa.array(missing))
    return lists, pa.array(depths, mask=missing)


if __name__ == "__main__":
    main()
