"""Peak memory of one run above the loaded weights, each path in a process of its own (Linux).

On a GPU each path has a session of its own, and what its driver says is free counts.

``python -m sdt_deploy.bench.memory BUNDLE BACKEND PATH IDS.npz`` prints the bytes.
"""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np

from sdt_deploy.bundle import Bundle
from sdt_deploy.errors import BackendError
from sdt_deploy.runtime.backends.device import DeviceMemory
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.session import Session

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def available() -> bool:
    """Tell whether this system lets a process read and reset its peak memory."""
    return _STATUS.exists() and _CLEAR.exists()


def peak_bytes(
    bundle: Path,
    backend: str,
    path: Literal["sparse", "dense"],
    batch: TokenBatch,
    n_threads: int | None,
) -> int | None:
    """Return the peak memory of one run in a new process, or None where it cannot be read.

    Raises:
        BackendError: if the process fails.
    """
    if not available():
        return None
    with tempfile.TemporaryDirectory() as directory:
        ids = Path(directory) / "ids.npz"
        np.savez(ids, input_ids=batch.input_ids, cu_seqlens=batch.cu_seqlens)
        command = [sys.executable, "-m", "sdt_deploy.bench.memory"]
        command += [str(bundle), backend, path, str(ids)]
        command += [] if n_threads is None else [str(n_threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(done.stdout)


def device_peak_bytes(
    bundle: Bundle, backend: str, path: Literal["sparse", "dense"], batch: TokenBatch
) -> int:
    """Return the peak memory on a GPU of a first run above the loaded weights.

    Buffers, scratch memory and the capture of the graphs included.
    """
    with Session.open(bundle, backend=backend, check_files=False) as session:
        memory = session.backend
        assert isinstance(memory, DeviceMemory)
        session.run(batch.input_ids[:1], np.array([0, 1]), path=path)
        return memory.peak_bytes(lambda: session.run_batch(batch, path=path))


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def _measure(arguments: list[str]) -> int:
    bundle, backend, path, ids = arguments[:4]
    n_threads = int(arguments[4]) if len(arguments) > 4 else None
    with np.load(ids) as arrays:
        batch = arrays["input_ids"], arrays["cu_seqlens"]
    with Session.open(bundle, backend=backend, n_threads=n_threads, check_files=False) as session:
        tiny = batch[0][:1], np.array([0, 1])
        choice: Literal["sparse", "dense"] = "dense" if path == "dense" else "sparse"
        session.run(*tiny, path=choice)
        gc.collect()
        _CLEAR.write_text("5")  # resets the peak to what is resident now
        before = _status("VmRSS")
        session.run(*batch, path=choice)
        return _status("VmHWM") - before


if __name__ == "__main__":
    print(_measure(sys.argv[1:]))
