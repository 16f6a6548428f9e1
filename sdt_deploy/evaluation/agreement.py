"""How well the embeddings of a sparse model agree with those of the dense one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdt_deploy.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement over ``n_texts`` texts; 1 is perfect everywhere."""

    n_texts: int
    mean_cosine: float
    """Mean cosine of a text's two embeddings."""
    p5_cosine: float
    """5th percentile of these."""
    spearman: float
    """Rank correlation of all pairwise similarities (Spearman's rho)."""
    top1_agreement: float
    """Share of texts whose nearest neighbour among the others is the same: found among the compared
    embeddings for one side, among the reference embeddings for the other."""
    top10_agreement: float
    """Mean share of the ten nearest neighbours that are the same, in any order."""

    def in_words(self) -> str:
        """Describe the agreement in one sentence."""
        verdict = (
            "good: fit for use"
            if self.mean_cosine >= 0.95 and self.top1_agreement >= 0.8
            else "fair: check it on your own task"
            if self.mean_cosine >= 0.9
            else "poor: not fit for use without distillation"
        )
        return (
            f"agreement of sparse with dense embeddings over {self.n_texts} texts is {verdict} "
            f"(cosine {self.mean_cosine:.2f} on average, the nearest neighbour is the same for "
            f"{self.top1_agreement:.0%})"
        )


def agreement(
    embeddings: npt.NDArray[np.floating], reference: npt.NDArray[np.floating]
) -> Agreement:
    """Compare ``embeddings [n_texts, width]`` with ``reference``, row by row.

    Raises:
        InputError: if the shapes differ or there are fewer than three texts.
    """
    if embeddings.shape != reference.shape or len(reference) < 3:
        raise InputError(
            f"two equal shapes of at least 3 rows are needed: {embeddings.shape}, {reference.shape}"
        )
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (embeddings, reference))
    cosines = (a * b).sum(axis=1)
    similar_a, similar_b = a @ a.T, b @ b.T
    pairs = np.triu_indices(len(a), k=1)
    for similar in (similar_a, similar_b):
        np.fill_diagonal(similar, -np.inf)
    return Agreement(
        n_texts=len(a),
        mean_cosine=float(cosines.mean()),
        p5_cosine=float(np.quantile(cosines, 0.05)),
        spearman=spearman(similar_a[pairs], similar_b[pairs]),
        top1_agreement=float((similar_a.argmax(axis=1) == similar_b.argmax(axis=1)).mean()),
        top10_agreement=_overlap(similar_a, similar_b, min(10, len(a) - 1)),
    )


def _overlap(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating], count: int) -> float:
    """Return the mean share that the ``count`` largest places of each row have in common."""
    marked = []
    for similar in (a, b):
        nearest = np.argpartition(similar, -count, axis=1)[:, -count:]
        mark = np.zeros(similar.shape, dtype=bool)
        np.put_along_axis(mark, nearest, True, axis=1)
        marked.append(mark)
    return float((marked[0] & marked[1]).sum() / (count * len(a)))


def spearman(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    """Return Spearman's rho of two vectors; equal values share the mean of their ranks."""
    first, second = map(_mean_ranks, (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def _mean_ranks(values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: npt.NDArray[np.floating] = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks
