"""A bundle against the reference outputs that travel in it; torch is not needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdt_deploy.bundle import REFERENCE, Bundle
from sdt_deploy.config import INT8_TOLERANCE, TOLERANCES
from sdt_deploy.errors import VerificationError
from sdt_deploy.runtime.result import PathName, RunResult
from sdt_deploy.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class PathCheck:
    """How one path compares with the reference."""

    path: str
    n_cases: int
    max_abs_error: float
    """Over the sequences without a routing flip."""
    routing_flips: int
    """Tokens that took another depth than in the PyTorch model."""


def verify_bundle(bundle: Bundle, session: Session) -> list[PathCheck]:
    """Run the reference inputs on every path.

    Sequences with a routing flip are counted and left out of the comparison.

    Raises:
        VerificationError: if an output deviates at equal depths by more than the tolerance of the
            bundle's precision, relative to the largest output (int8:
            :data:`~sdt_deploy.config.INT8_TOLERANCE`), or if more than two tokens and more than one
            in a hundred change their depth.
    """
    with np.load(bundle.file(REFERENCE), allow_pickle=False) as arrays:
        reference = dict(arrays)
    n_cases = 1 + max(int(key.partition("/")[0]) for key in reference)
    n_tokens = sum(len(reference[f"{case}/input_ids"]) for case in range(n_cases))
    paths: tuple[PathName, ...] = ("sparse", "masked", "dense")
    checks = []
    for path in paths:
        answer = "dense_output" if path == "dense" else "output"
        largest = max(float(np.abs(reference[f"{case}/{answer}"]).max()) for case in range(n_cases))
        tolerance = TOLERANCES[bundle.manifest.export.precision] * largest
        worst, flips = 0.0, 0
        for case in range(n_cases):
            arrays_of = {
                name: reference[f"{case}/{name}"]
                for name in ("input_ids", "cu_seqlens", "output", "dense_output", "depths")
            }
            result = session.run(arrays_of["input_ids"], arrays_of["cu_seqlens"], path=path)
            flipped = result.depths != arrays_of["depths"]
            if path == "dense":
                flipped[:] = False
            flips += int(flipped.sum())
            found, wanted = _without_flips(result, arrays_of[answer], flipped)
            error = float(np.abs(found - wanted).max(initial=0.0))
            passes = error <= tolerance
            if bundle.manifest.export.quantization == "int8":
                passes = np.linalg.norm(found - wanted) <= INT8_TOLERANCE * np.linalg.norm(wanted)
            if not passes:
                raise VerificationError(
                    f"path {path}, case {case}: the output deviates by {error:.3g} from the "
                    "reference in the bundle"
                )
            worst = max(worst, error)
        if flips > max(2, 0.01 * n_tokens):
            raise VerificationError(
                f"path {path}: {flips} of {n_tokens} tokens take another depth than in the "
                "reference"
            )
        checks.append(
            PathCheck(path=path, n_cases=n_cases, max_abs_error=worst, routing_flips=flips)
        )
    return checks


def _without_flips(
    result: RunResult, expected: npt.NDArray[np.float32], flipped: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return output and expected output of the sequences without a flipped token."""
    lengths = np.diff(result.cu_seqlens)
    whole = ~np.logical_or.reduceat(flipped, result.cu_seqlens[:-1])
    rows = whole if len(expected) == len(lengths) else np.repeat(whole, lengths)
    return result.output[rows], expected[rows]
