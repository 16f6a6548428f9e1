"""A bundle against the reference outputs that travel in it; torch is not needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdt_deploy.bundle import REFERENCE, Bundle
from sdt_deploy.errors import VerificationError
from sdt_deploy.runtime.session import Session

TOLERANCE = 1e-3
"""Largest deviation, relative to the largest value of a case, that passes for rounding."""


@dataclass(frozen=True, kw_only=True)
class PathCheck:
    """How one path compares with the reference."""

    path: str
    n_cases: int
    max_abs_error: float
    """Over the cases without a routing flip."""
    routing_flips: int
    """Tokens that took another depth than in the PyTorch model."""


def verify_bundle(bundle: Bundle, session: Session) -> list[PathCheck]:
    """Run the reference inputs on every path.

    Raises:
        VerificationError: if an output deviates by more than :data:`TOLERANCE` at equal depths, or
            if more than one token in a hundred changes its depth.
    """
    with np.load(bundle.file(REFERENCE), allow_pickle=False) as arrays:
        reference = dict(arrays)
    n_cases = 1 + max(int(key.partition("/")[0]) for key in reference)
    checks = []
    for path, wanted in (("sparse", "output"), ("masked", "output"), ("dense", "dense_output")):
        worst, flips, n_tokens = 0.0, 0, 0
        for case in range(n_cases):
            ids, cu = reference[f"{case}/input_ids"], reference[f"{case}/cu_seqlens"]
            result = session.run(ids, cu, path=path)  # type: ignore[arg-type]
            expected = reference[f"{case}/{wanted}"]
            n_tokens += len(ids)
            if path != "dense":
                flipped = int((result.depths != reference[f"{case}/depths"]).sum())
                flips += flipped
                if flipped:
                    continue
            error = float(np.abs(result.output - expected).max())
            if not error <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
                raise VerificationError(
                    f"path {path}, case {case}: the output deviates by {error:.3g} from the "
                    "reference in the bundle"
                )
            worst = max(worst, error)
        if flips > 0.01 * n_tokens:
            raise VerificationError(
                f"path {path}: {flips} of {n_tokens} tokens take another depth than in the "
                "reference"
            )
        checks.append(
            PathCheck(path=path, n_cases=n_cases, max_abs_error=worst, routing_flips=flips)
        )
    return checks
