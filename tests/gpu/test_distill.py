"""Distillation on a GPU: the same function as on the CPU, in mixed precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdt_deploy.evaluation.evaluate import evaluate
from sdt_deploy.model import checkpoints
from sdt_deploy.model.adapters import merged, read_adapter
from sdt_deploy.model.conversion import load_any
from sdt_deploy.training.config import DistillConfig
from sdt_deploy.training.job import JobOptions, distill
from tests.textmodels import save_teacher, texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
TEXTS = texts(150)


@pytest.mark.parametrize("rank", [4, None])
def test_a_run_ends_in_a_model_and_an_adapter(tmp_path: Path, rank: int | None) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    config = DistillConfig(
        target_depth=2.5,
        n_steps=60,
        batch_size=16,
        learning_rate=5e-3,
        lora_rank=rank,
        refit_at=0.5,
        crop_share=0.3,
    )
    adapter = tmp_path / "adapter.safetensors" if rank else None
    made, last = distill(
        teacher,
        tmp_path / "model",
        TEXTS,
        config,
        JobOptions(device="cuda", adapter=adapter, save_every=25),
    )
    assert last is not None
    assert last.step == 60
    first = DistillConfig(target_depth=2.5, n_steps=1, learning_rate=1e-9)
    distill(teacher, tmp_path / "untrained", TEXTS, first, JobOptions(device="cuda"))
    trained, untrained = (
        evaluate(tmp_path / name, teacher, TEXTS[:50]).mean_cosine
        for name in ("model", "untrained")
    )
    assert trained > untrained
    written = checkpoints.load(tmp_path / "model").model.state_dict()
    assert {tensor.device.type for tensor in made.model.state_dict().values()} == {"cpu"}
    if adapter is not None:
        again = merged(load_any(teacher), read_adapter(adapter)).model.state_dict()
        for name, tensor in written.items():
            torch.testing.assert_close(again[name], tensor, atol=2e-3, rtol=0)
