"""How long it takes to open a bundle, in fresh processes.

    python benchmarks/opening_time.py build/bundle

Reported are the medians of the interpreter with its imports, of ``Session.open`` with and without
the comparison of hashes, and of the first run of eight tokens, in seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from statistics import median

CHILD = """
import json, sys, time
start = time.perf_counter()
import numpy, onnxruntime
from sdt_deploy.runtime.session import Session
imported = time.perf_counter()
session = Session.open(sys.argv[1], check_files=sys.argv[2] == "checked")
opened = time.perf_counter()
session.run([[1, 2, 3, 4, 5, 6, 7, 8]], path="sparse")
ran = time.perf_counter()
print(json.dumps([imported - start, opened - imported, ran - opened]))
"""


def main() -> None:
    """Read the command line, start the processes, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    found: dict[str, list[list[float]]] = {"checked": [], "unchecked": []}
    for _ in range(options.rounds):
        for kind, times in found.items():
            command = [sys.executable, "-c", CHILD, options.bundle, kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            times.append(json.loads(done.stdout))
    for kind, times in found.items():
        imports, opening, first = (median(column) for column in zip(*times, strict=True))
        print(f"{kind}: imports {imports:.2f} s, open {opening:.2f} s, first run {first:.3f} s")


if __name__ == "__main__":
    main()
