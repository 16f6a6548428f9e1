from __future__ import annotations

import numpy as np
import pytest

from sdt_deploy.errors import InputError
from sdt_deploy.evaluation.agreement import agreement, spearman


def embeddings(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((40, 8))


def test_equal_embeddings_agree_fully() -> None:
    found = agreement(embeddings(0) * 3, embeddings(0))
    assert found.mean_cosine == pytest.approx(1)
    assert found.p5_cosine == pytest.approx(1)
    assert found.spearman == pytest.approx(1)
    assert found.top1_agreement == 1
    assert "good" in found.in_words()


def test_unrelated_embeddings_do_not() -> None:
    found = agreement(embeddings(0), embeddings(1))
    assert abs(found.mean_cosine) < 0.2
    assert abs(found.spearman) < 0.2
    assert found.top1_agreement < 0.3
    assert "poor: not fit for use" in found.in_words()


def test_a_rotation_keeps_neighbours_but_not_cosines() -> None:
    rotation, _ = np.linalg.qr(embeddings(2)[:8])
    found = agreement(embeddings(0) @ rotation, embeddings(0))
    assert found.top1_agreement == 1
    assert found.spearman == pytest.approx(1, abs=1e-6)
    assert found.mean_cosine < 0.9


def test_equal_values_share_a_rank() -> None:
    assert spearman(np.array([1.0, 1, 1, 2]), np.array([3.0, 2, 1, 4])) == pytest.approx(0.6**0.5)


def test_spearman_sees_ranks_only() -> None:
    a = np.array([0.1, 5.0, 2.0, 9.0])
    assert spearman(a, np.exp(a)) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, np.array([1.0, 2.0, 4.0, 3.0])) == pytest.approx(1 - 6 * 6 / 60)


def test_shapes_are_checked() -> None:
    with pytest.raises(InputError, match="at least 3 rows"):
        agreement(embeddings(0)[:2], embeddings(0)[:2])
    with pytest.raises(InputError):
        agreement(embeddings(0), embeddings(0)[:5])
