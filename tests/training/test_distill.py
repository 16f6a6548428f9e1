from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdt_deploy.config import HeadConfig, ModelConfig
from sdt_deploy.errors import CheckpointError, ConfigError, InputError, TrainingError
from sdt_deploy.evaluation.oracle import embed_with_oracle
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.training.batches import BatchStream, DeviceTokens, epoch_batches
from sdt_deploy.training.config import DistillConfig
from sdt_deploy.training.distill import Distillation, run
from sdt_deploy.training.lora import adapter_factors
from sdt_deploy.training.state import JsonLog, load_state, save_state
from tests.samples import random_model

MODEL = ModelConfig(
    vocab_size=60,
    d_model=16,
    n_heads=2,
    n_layers=4,
    d_ff=24,
    max_positions=24,
    norm_placement="post",
    embedding_norm=True,
    final_norm=False,
    pinned_token_ids=(0, 1),
    head=HeadConfig(kind="embedding", pooling="mean", normalize=True),
)


def texts(count: int, seed: int = 0) -> TokenSample:
    """Sequences that begin with 0 and end with 1, ids distributed as in language."""
    rng = np.random.default_rng(seed)
    rows = [[0, *(2 + rng.zipf(1.5, rng.integers(3, 18)) % 58), 1] for _ in range(count)]
    cu_seqlens = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    return TokenSample(input_ids=np.concatenate(rows).astype(np.int32), cu_seqlens=cu_seqlens)


def start(config: ModelConfig = MODEL, seed: int = 0) -> Checkpoint:
    return Checkpoint(model=random_model(config, seed), provenance={"license": "MIT"})


def made(n_texts: int = 200, base: Checkpoint | None = None, **options: Any) -> Distillation:
    values = {"target_depth": 2.5, "n_steps": 12, "batch_size": 8, "learning_rate": 2e-3}
    values = {**values, "probe": "straight-through", **options}
    base = base or start()
    teacher = copy.deepcopy(base.model).as_dense()
    return Distillation(base, teacher, texts(n_texts), DistillConfig(**values))


def weights(distillation: Distillation) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in distillation.model.state_dict().items()}


@pytest.mark.parametrize("probe", ["straight-through", "annealed", "fixed"])
@pytest.mark.parametrize("levels", ["two-level", "graded"])
def test_training_brings_the_student_closer(probe: str, levels: str) -> None:
    options = {"probe": probe, "levels": levels, "n_steps": 80, "learning_rate": 5e-3}
    distillation = made(400, batch_size=16, n_window=2000, **options)
    held_out = texts(150, seed=9)
    reference = embed_with_oracle(start().model.as_dense(), held_out).embeddings

    def cosine() -> tuple[float, float]:
        model = distillation.finish(texts(300, seed=5)).model
        found = embed_with_oracle(model, held_out)
        return float((found.embeddings * reference).sum(axis=1).mean()), found.mean_depth

    before, depth_before = cosine()
    run(distillation)
    after, depth = cosine()
    assert after > before + 0.2 * (1 - before)
    assert depth_before == pytest.approx(2.5, abs=0.15)
    assert depth == pytest.approx(2.5, abs=0.15)


def test_the_depth_follows_the_curriculum() -> None:
    reports = []
    run(
        made(n_steps=40, n_window=500, curriculum="linear", curriculum_share=0.5),
        each=reports.append,
    )
    assert reports[0].depth == 4
    assert reports[-1].wanted_depth == 2.5
    errors = [abs(report.depth - report.wanted_depth) for report in reports]
    assert np.mean(errors) < 0.15


def test_what_is_trained_and_what_stays() -> None:
    for rank, changed in ((None, True), (2, False)):
        distillation = made(lora_rank=rank)
        before = weights(distillation)
        run(distillation)
        after = weights(distillation)
        for name in before:
            if name.startswith("embeddings."):
                assert torch.equal(before[name], after[name]), name
        assert not torch.equal(before["scorer.weight"], after["scorer.weight"])
        norm = "layers.1.attention_norm.weight"
        assert not torch.equal(before[norm], after[norm])
        name = (
            "layers.1.attention.query.weight"
            if changed
            else ("layers.1.attention.query.parametrizations.weight.original")
        )
        assert torch.equal(before[name], after[name]) != changed


def test_a_fixed_probe_keeps_its_order() -> None:
    distillation = made(probe="fixed")
    before = distillation.model.scorer.weight.detach().clone()
    run(distillation)
    after = distillation.finish(texts(100)).model.scorer.weight
    torch.testing.assert_close(after / after.norm(), before / before.norm())


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("probe", ["straight-through", "annealed"])
def test_a_run_goes_on_with_the_same_numbers(tmp_path: Path, rank: int | None, probe: str) -> None:
    options = {"lora_rank": rank, "probe": probe, "n_texts": 40, "n_memory": 20, "n_window": 100}
    whole = made(**options)
    losses = []
    run(whole, each=lambda report: losses.append(report.loss))
    first = made(**options)
    for _ in range(7):
        first.run_step()
    save_state(tmp_path / "state", first.state(), step=first.step, key="k")
    tensors, step = load_state(tmp_path / "state", key="k")
    second = made(**options)
    second.restore(tensors, step)
    again = []
    run(second, each=lambda report: again.append(report.loss))
    assert again == losses[7:]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        load_state(tmp_path / "state", key="k")
    distillation = made()
    distillation.run_step()
    save_state(tmp_path / "state", distillation.state(), step=1, key="k")
    with pytest.raises(CheckpointError, match="another run"):
        load_state(tmp_path / "state", key="other")
    content = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(tmp_path / "state", key="k")


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    distillation = made()
    for _ in range(3):
        distillation.run_step()
    before = weights(distillation)
    with torch.no_grad():
        distillation.teacher.model.layers[0].attention.query.bias.fill_(torch.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(TrainingError, match="at step 4 of 12"):
        distillation.run_step()
    assert distillation.step == 3
    for name, value in weights(distillation).items():
        assert torch.equal(value, before[name])


def test_finished_adapters_are_what_float16_holds() -> None:
    distillation = made(lora_rank=3)
    run(distillation)
    base = start().model.state_dict()
    finished = distillation.finish(texts(100)).model.state_dict()
    twice = distillation.finish(texts(100)).model.state_dict()
    assert all(torch.equal(finished[name], twice[name]) for name in finished)
    for name, (up, down) in adapter_factors(distillation.model).items():
        expected = base[name] + up.half().float() @ down.half().float()
        torch.testing.assert_close(finished[name], expected)
        assert not torch.equal(finished[name], base[name])


def test_the_teacher_is_the_same_from_the_cache(tmp_path: Path) -> None:
    distillation = made(30)
    ids, mask, index = distillation._tokens.padded(np.array([3, 5, 29]))
    direct = distillation.teacher(ids, mask, index) * mask[..., None]
    calls: list[tuple[int, int]] = []
    distillation.teacher.fill_cache(tmp_path / "cache", lambda *x: calls.append(x))
    assert calls[-1] == (30, 30)
    cached = distillation.teacher(ids, mask, index)
    torch.testing.assert_close(cached, direct, atol=5e-3, rtol=2e-3)
    other = made(30)
    other.teacher.fill_cache(tmp_path / "cache", lambda *x: pytest.fail("computed again"))
    assert torch.equal(other.teacher(ids, mask, index), cached)
    changed = made(31)
    calls.clear()
    changed.teacher.fill_cache(tmp_path / "cache", lambda *x: calls.append(x))
    assert calls, "other texts need other states"


def test_states_beyond_float16_are_not_cached() -> None:
    config = MODEL.replace(final_norm=True, norm_placement="pre")
    distillation = made(base=start(config))
    with torch.no_grad():
        distillation.teacher.model.layers[3].feed_forward.down.bias.fill_(1e6)  # type: ignore[union-attr, operator]
    with pytest.raises(TrainingError, match="--cache-mb 0"):
        distillation.teacher.fill_cache(None, lambda *x: None)


def test_a_truncated_student_learns_from_a_deeper_teacher() -> None:
    base = start()
    model = random_model(
        MODEL.replace(n_layers=2, thresholds=(), probe="none", pinned_token_ids=()), 0
    )
    config = DistillConfig(
        target_depth=2.0, probe="fixed", n_steps=80, batch_size=16, learning_rate=3e-3
    )
    shallow = dataclasses.replace(base, model=model)
    distillation = Distillation(shallow, base.model.as_dense(), texts(200), config)
    losses = []
    run(distillation, each=lambda report: losses.append(report.loss))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    assert distillation.finish(texts(50)).model.config.n_layers == 2


def test_batches_are_of_similar_length_and_hold_each_text_once() -> None:
    lengths = np.random.default_rng(0).integers(3, 100, 1003)
    batches = epoch_batches(lengths, 16, seed=1, epoch=0)
    assert [len(batch) for batch in batches] == [16] * 62
    flat = np.concatenate(batches)
    assert len(np.unique(flat)) == len(flat)
    padded = sum(int(lengths[batch].max()) * 16 for batch in batches)
    assert padded < 1.1 * lengths[flat].sum()
    again = epoch_batches(lengths, 16, seed=1, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    other = epoch_batches(lengths, 16, seed=1, epoch=1)
    assert not np.array_equal(np.concatenate(other), flat)


def test_any_step_finds_its_batch() -> None:
    lengths = np.random.default_rng(0).integers(3, 9, 50)
    in_order = BatchStream(lengths, 8, seed=3)
    expected = [in_order(step) for step in range(15)]
    assert in_order.batches_per_epoch == 6
    for step in (14, 0, 7):
        assert np.array_equal(BatchStream(lengths, 8, seed=3)(step), expected[step])
    assert len(BatchStream(lengths, 500, seed=3)(2)) == 50


def test_padded_batches_cut_long_texts() -> None:
    sample = texts(20)
    tokens = DeviceTokens(sample, 6, torch.device("cpu"))
    ids, mask, _ = tokens.padded(np.arange(20))
    assert ids.shape == (20, 6)
    for i in range(20):
        row = sample.input_ids[sample.cu_seqlens[i] : sample.cu_seqlens[i + 1]][:6]
        assert ids[i][mask[i]].tolist() == row.tolist()
        assert not ids[i][~mask[i]].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_depth": 4.1}, r"must lie in \(0, 4\]"),
        ({"target_depth": 0.0}, "target_depth must be in"),
        ({"n_steps": 0}, "n_steps must be"),
        ({"probe": "free"}, "one of fixed, straight-through, annealed"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"lora_rank": 17}, r"the rank must lie in 1..16"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(**options)


def test_a_teacher_of_another_kind() -> None:
    base = start()
    other = random_model(MODEL.replace(head=HeadConfig()), 0)
    config = DistillConfig(target_depth=2.0)
    with pytest.raises(ConfigError, match="one head, vocabulary and width"):
        Distillation(base, other.as_dense(), texts(20), config)
    with pytest.raises(InputError, match="at least two texts"):
        Distillation(base, base.model.as_dense(), texts(1), config)


def test_the_log_goes_on_where_the_checkpoint_is(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = JsonLog(path, from_step=0)
    for step in (1, 2, 3):
        log.write(step=step)
    path.write_text(path.read_text() + '{"step": 4, "lo')
    JsonLog(path, from_step=2).write(step=3)
    assert path.read_text().split("\n") == ['{"step": 1}', '{"step": 2}', '{"step": 3}', ""]
    JsonLog(path, from_step=0)
    assert path.read_text() == ""
    JsonLog(None, from_step=0).write(step=1)


def test_a_trained_probe_is_blind_to_position() -> None:
    """As far as positions lie in few directions, as those of real encoders do."""
    base = start()
    with torch.no_grad():
        table = base.model.embeddings.position.weight
        table.copy_(torch.randn(len(table), 2) @ torch.randn(2, table.shape[1]))
    distillation = made(base=base, n_steps=20, probe_learning_rate=0.05)
    run(distillation)
    after = distillation.finish(texts(100)).model
    ids = torch.arange(2, 60)

    @torch.no_grad()
    def spread(model: SparseDepthTransformer) -> float:
        rows = [model.embeddings(ids, torch.full_like(ids, place), None) for place in range(24)]
        logits = torch.stack([model.scorer.logits(row) for row in rows])
        return float(logits.mean(dim=1).std() / logits.std())

    assert spread(after) < 0.4 * spread(base.model)


def test_a_run_leaves_the_models_that_it_was_given_alone() -> None:
    base = start()
    teacher = base.model.as_dense()  # shares its weights with the checkpoint, as in the command
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    run_ = Distillation(base, teacher, texts(60), DistillConfig(target_depth=2.5, n_steps=2))
    run(run_)
    assert all(parameter.requires_grad for parameter in base.model.parameters())
    its = {parameter.data_ptr() for parameter in run_.teacher.model.parameters()}
    assert not its & {parameter.data_ptr() for parameter in base.model.parameters()}
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, before[name])
