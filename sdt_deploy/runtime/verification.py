"""A bundle against the reference outputs that travel in it; torch is not needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdt_deploy.arrays import read_npz
from sdt_deploy.bundle import REFERENCE, Bundle
from sdt_deploy.choices import PathName
from sdt_deploy.config import INT8_TOLERANCE, TOLERANCES
from sdt_deploy.errors import BundleFormatError, VerificationError
from sdt_deploy.runtime.result import RunResult
from sdt_deploy.runtime.session import Session

_KINDS = {
    "input_ids": "iu",
    "cu_seqlens": "iu",
    "output": "f",
    "dense_output": "f",
    "scores": "f",
    "depths": "iu",
}
"""The arrays of a case and the NumPy kinds that they may have."""


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
        BundleFormatError: if the reference cannot be read, or is not for this model.
    """
    cases = read_reference(bundle)
    n_tokens = sum(case["input_ids"].size for case in cases)
    paths: tuple[PathName, ...] = ("sparse", "masked", "dense")
    if "single" in bundle.manifest.graphs:
        paths = ("sparse", "single", "masked", "dense")
    checks = []
    for path in paths:
        answer = "dense_output" if path == "dense" else "output"
        largest = max(float(np.abs(case[answer]).max(initial=0.0)) for case in cases)
        tolerance = TOLERANCES[bundle.manifest.export.precision] * largest
        worst, flips = 0.0, 0
        for number, case in enumerate(cases):
            result = session.run(case["input_ids"], case["cu_seqlens"], path=path)
            expected = case[answer]
            if case["depths"].shape != result.depths.shape or expected.shape != result.output.shape:
                raise BundleFormatError(
                    f"{bundle.file(REFERENCE)}: case {number} has an output of shape "
                    f"{expected.shape} and depths of shape {case['depths'].shape}; the model gives "
                    f"{result.output.shape} and {result.depths.shape}"
                )
            flipped = result.depths != case["depths"]
            if path == "dense":
                flipped[:] = False
            flips += int(flipped.sum())
            found, wanted = _without_flips(result, expected, flipped)
            error = float(np.abs(found - wanted).max(initial=0.0))
            passes = error <= tolerance
            if bundle.manifest.export.quantization == "int8":
                passes = np.linalg.norm(found - wanted) <= INT8_TOLERANCE * np.linalg.norm(wanted)
            if not passes:
                raise VerificationError(
                    f"path {path}, case {number}: the output deviates by {error:.3g} from the "
                    "reference in the bundle"
                )
            worst = max(worst, error)
        if flips > max(2, 0.01 * n_tokens):
            raise VerificationError(
                f"path {path}: {flips} of {n_tokens} tokens take another depth than in the "
                "reference"
            )
        checks.append(
            PathCheck(path=path, n_cases=len(cases), max_abs_error=worst, routing_flips=flips)
        )
    return checks


def read_reference(bundle: Bundle) -> list[dict[str, np.ndarray]]:
    """Read the reference cases of a bundle: arrays by name.

    Raises:
        BundleFormatError: if there are none, or one lacks an array or has one of another type.
    """
    path = bundle.file(REFERENCE)
    try:
        arrays = read_npz(path)
    except (OSError, ValueError) as error:
        raise BundleFormatError(f"{path} cannot be read: {error}") from error
    cases = []
    for case in range(len(arrays) // len(_KINDS)):
        cases.append({name: arrays.get(f"{case}/{name}", np.empty(0, "O")) for name in _KINDS})
    wrong = [
        f"{number}/{name}"
        for number, case in enumerate(cases)
        for name, kind in _KINDS.items()
        if case[name].dtype.kind not in kind or not np.isfinite(case[name]).all()
    ]
    if wrong or not cases:
        raise BundleFormatError(
            f"{path} must hold cases of {', '.join(_KINDS)}; missing, not finite or of another "
            f"type: {', '.join(wrong) or 'all'}"
        )
    return cases


def _without_flips(
    result: RunResult, expected: npt.NDArray[np.float32], flipped: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return output and expected output of the sequences without a flipped token."""
    lengths = np.diff(result.cu_seqlens)
    whole = ~np.logical_or.reduceat(flipped, result.cu_seqlens[:-1])
    rows = whole if len(expected) == len(lengths) else np.repeat(whole, lengths)
    return result.output[rows], expected[rows]
