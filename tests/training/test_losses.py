from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sdt_deploy.config import HeadConfig, ModelConfig
from sdt_deploy.errors import ConfigError
from sdt_deploy.model.blocks import Head
from sdt_deploy.training.losses import (
    LossWeights,
    TeacherMemory,
    distillation_loss,
    neighbour_loss,
    token_loss,
)

HEADS = {
    "embedding": HeadConfig(kind="embedding", pooling="mean", normalize=True),
    "lm": HeadConfig(kind="lm"),
    "classify": HeadConfig(kind="classify", pooling="cls", n_classes=4, dense_tanh=True),
    "hidden": HeadConfig(),
}


def head_of(kind: str) -> Head:
    torch.manual_seed(0)
    return Head(
        ModelConfig(
            vocab_size=11,
            d_model=8,
            n_heads=2,
            n_layers=1,
            d_ff=8,
            max_positions=9,
            head=HEADS[kind],
        )
    )


def states(seed: int) -> torch.Tensor:
    return torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(seed))


def mask() -> torch.Tensor:
    return torch.arange(6) < torch.tensor([6, 1, 4, 3, 5])[:, None]


@pytest.mark.parametrize("kind", HEADS)
def test_the_loss_is_zero_for_the_teacher_itself_and_blind_to_padding(kind: str) -> None:
    head = head_of(kind)
    same, _ = distillation_loss(
        head, states(0), states(0), head, mask(), LossWeights(), TeacherMemory(8)
    )
    assert same.item() == pytest.approx(0, abs=1e-5)
    other = states(1)
    found, terms = distillation_loss(
        head, other, states(0), head, mask(), LossWeights(), TeacherMemory(8)
    )
    assert float(found) > 0.1
    assert all(float(term) > 0 for term in terms.values())
    padded = torch.where(mask()[..., None], other, 99.0)
    again, _ = distillation_loss(
        head, padded, states(0), head, mask(), LossWeights(), TeacherMemory(8)
    )
    assert float(again) == pytest.approx(float(found), rel=1e-5)


def test_the_terms_of_each_head() -> None:
    expected = {
        "embedding": {"output", "neighbours", "hidden"},
        "lm": {"output", "hidden"},
        "classify": {"output", "hidden"},
        "hidden": {"hidden"},
    }
    for kind, names in expected.items():
        _, terms = distillation_loss(
            head_of(kind),
            states(1),
            states(0),
            head_of(kind),
            mask(),
            LossWeights(),
            TeacherMemory(8),
        )
        assert set(terms) == names


def test_logits_are_compared_by_kl_divergence() -> None:
    head = head_of("lm")
    _, terms = distillation_loss(
        head, states(1), states(0), head, mask(), LossWeights(), TeacherMemory(0)
    )
    p = head(states(0), mask())[mask()].softmax(-1)
    q = head(states(1), mask())[mask()].softmax(-1)
    torch.testing.assert_close(terms["output"], (p * (p / q).log()).sum(-1).mean())


def test_neighbours_are_those_of_the_batch_and_the_memory() -> None:
    rows = [F.normalize(torch.randn(n, 8), dim=-1) for n in (4, 4, 6)]
    student, teacher, memory = rows

    def distribution(own: torch.Tensor, row: int) -> torch.Tensor:
        others = [own[row] @ own[i] for i in range(4) if i != row]
        return (torch.stack([*others, *(own[row] @ x for x in memory)]) / 0.1).softmax(0)

    expected = 0.0
    for row in range(4):
        p, q = distribution(teacher, row), distribution(student, row)
        expected += float((p * (p / q).log()).sum()) / 4
    assert float(neighbour_loss(student, teacher, memory, 0.1)) == pytest.approx(expected, rel=1e-4)
    assert float(neighbour_loss(teacher, teacher, memory, 0.1)) == pytest.approx(0, abs=1e-6)


def test_the_memory_holds_the_newest_rows_in_order() -> None:
    memory = TeacherMemory(5)
    assert memory.rows() is None
    for start in (0, 3, 6):
        memory.add(torch.arange(start, start + 3.0)[:, None])
    rows = memory.rows()
    assert rows is not None
    assert rows.flatten().tolist() == [4, 5, 6, 7, 8]


def test_token_loss_is_relative() -> None:
    teacher = states(0)
    assert float(token_loss(teacher * 0.5, teacher, mask())) == pytest.approx(0.25)
    assert float(token_loss(teacher * 5, teacher * 10, mask())) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "values",
    [
        {"output": -1.0},
        {"output": 0.0, "neighbours": 0.0, "hidden": 0.0},
        {"hidden": float("nan")},
        {"temperature": 0.0},
    ],
)
def test_weights_are_checked(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        LossWeights(**values)
