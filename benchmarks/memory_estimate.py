"""How close the memory estimate is to measured peaks: ``memory_estimate.py BUNDLE``."""

from __future__ import annotations

import sys
from pathlib import Path

from sdt_deploy.bench.cases import token_source
from sdt_deploy.bench.memory import peak_bytes
from sdt_deploy.bundle import Bundle
from sdt_deploy.costs import FIXED_SCRATCH_BYTES, scratch_bytes_per_sequence

CASES = ((32, 32), (8, 64), (32, 64), (8, 128), (16, 128), (2, 256), (16, 256), (1, 512), (4, 512))


def main(path: Path) -> None:
    """Print both for every case, in 2²⁰ bytes."""
    bundle = Bundle.open(path)
    source = token_source(bundle)
    for batch, seq in CASES:
        each = scratch_bytes_per_sequence(bundle.manifest.model, seq)
        estimate = (FIXED_SCRATCH_BYTES + batch * each) / 2**20
        measured = peak_bytes(path, "sparse", source.batches(batch, seq, bundle)[0], None)
        assert measured is not None, "this system does not tell peak memory"
        ratio = estimate / (measured / 2**20)
        print(f"{batch}x{seq}: {estimate:.0f} estimated, {measured / 2**20:.0f} peak, {ratio:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
