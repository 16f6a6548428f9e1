"""Native directories as ``AutoModel``, bundles in sentence-transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import sdt_deploy.hf as hf
from sdt_deploy.bundle import Bundle, write_manifest
from sdt_deploy.config import ExportConfig, ModelConfig
from sdt_deploy.errors import InputError
from sdt_deploy.exporters.export import export
from sdt_deploy.model import checkpoints
from sdt_deploy.model.cards import model_card
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.runtime.session import Session
from tests.conftest import Once
from tests.samples import CONFIGS, random_model
from tests.textmodels import CONFIG, texts, tokenizer

PINNED = CONFIG.replace(n_layers=2, thresholds=(), pinned_token_ids=(0, 1), context="active")


@pytest.fixture(scope="module")
def made(once: Once) -> Path:
    """A directory with ``model`` and ``bundle`` of a tiny model that pins its special tokens."""

    def fill(directory: Path) -> None:
        checkpoint = Checkpoint(
            model=random_model(PINNED, 3),
            tokenizer=tokenizer(),
            provenance={"source": "tiny", "license": "MIT"},
        )
        checkpoints.save(checkpoint, directory / "model")
        export(checkpoint, directory / "bundle", ExportConfig(), single_file=False)

    return once("hf", fill)


def padded(lines: list[str], native: Path) -> dict[str, torch.Tensor]:
    """Padding by hand: this tokenizer has no padding token."""
    from transformers import AutoTokenizer

    rows = AutoTokenizer.from_pretrained(native)(lines)["input_ids"]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_a_native_directory_is_an_auto_model(made: Path) -> None:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(made / "model")
    assert (config.hidden_size, config.num_hidden_layers) == (PINNED.d_model, 2)
    assert (config.vocab_size, config.num_attention_heads) == (PINNED.vocab_size, PINNED.n_heads)
    assert config.max_position_embeddings == PINNED.max_positions
    model = AutoModel.from_pretrained(made / "model")
    assert isinstance(model, hf.SdtModel)
    assert not model.training
    lines = texts(9)
    found = model(**padded(lines, made / "model"))
    with Session.open(made / "bundle") as session:
        expected = session.run(lines, path="sparse")
    np.testing.assert_allclose(found.output.numpy(), expected.output, rtol=0, atol=1e-5)
    depths = [
        row[: len(d)].tolist()
        for row, d in zip(found.depths, expected.split(expected.depths), strict=True)
    ]
    assert depths == [d.tolist() for d in expected.split(expected.depths)]
    assert {row[0] for row in depths} == {2}, "a pinned token was not at full depth"
    assert found.last_hidden_state.shape == (*found.depths.shape, PINNED.d_model)
    dense = model(**padded(lines, made / "model"), thresholds=[-1.0, -1.0])
    assert set(dense.depths.unique().tolist()) == {0, 2}
    assert isinstance(model(torch.tensor([[0, 5, 1]]), return_dict=False), tuple)
    with pytest.raises(InputError, match="on the right"):
        model(torch.tensor([[0, 5, 1]]), attention_mask=torch.tensor([[0, 1, 1]]))


@torch.no_grad()
def test_round_trip(made: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(made / "model")
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(made / "model").save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved")
    assert again.config.sdt == model.config.sdt == PINNED
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    native = checkpoints.load(tmp_path / "saved")  # convert and export read it
    before = checkpoints.load(made / "model")
    assert native.provenance == before.provenance
    assert native.tokenizer is not None
    ids, cu_seqlens = np.array([0, 4, 9, 1], np.int32), np.array([0, 4], np.int32)
    expected = oracle_output(before.model, ids, cu_seqlens).output
    np.testing.assert_array_equal(oracle_output(native.model, ids, cu_seqlens).output, expected)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert card.startswith("---\nlicense: MIT\n")
    (tmp_path / "saved" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == "mine"


def test_training_reaches_every_weight(made: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(made / "model").train()
    model(**padded(texts(9), made / "model")).output[:, 0].sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without <= {"scorer.weight", "scorer.bias"}  # behind a step


def test_the_card_of_a_bundle_has_its_quality(made: Path, tmp_path: Path) -> None:
    import dataclasses
    import shutil

    bundle = shutil.copytree(made / "bundle", tmp_path / "bundle")
    opened = Bundle.open(bundle)
    write_manifest(bundle, dataclasses.replace(opened.manifest, quality={"mean_cosine": 0.91239}))
    model = hf.SdtModel.from_bundle(bundle)
    assert not model.training
    model.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| mean_cosine | 0.9124 |" in card
    assert "made from | tiny" in card
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quality"] == {"mean_cosine": 0.91239}
    expected = checkpoints.load(made / "model").model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_cards_of_all_kinds() -> None:
    for config, _ in CONFIGS.values():
        card = model_card(config, provenance={}, quality=None)
        assert "Not measured" in card
        assert "license: unknown" in card
        assert f"| model | {config.n_layers} layers" in card
    quality = {"quality": {"mean_cosine": 0.5}}
    assert "0.5000" in model_card(CONFIG, provenance={"adapter": quality}, quality=None)


def test_the_use_in_a_card_runs(made: Path, tmp_path: Path) -> None:
    import contextlib
    import io

    config = checkpoints.load(made / "model").model.config
    card = model_card(config, provenance={}, quality=None)
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(block.replace("THIS_DIRECTORY", str(made / "model")), {})  # noqa: S102
    assert "torch.Size([1, 16])" in out.getvalue()


def test_sentence_transformers(made: Path, tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers", reason="it comes with the hf extra")
    lines = [*texts(20), "w3 " * 100]
    model = st.SentenceTransformer(modules=[hf.BundleModule(made / "bundle")])
    with Session.open(made / "bundle") as session:
        expected = session.run(lines, overflow="truncate").output
    found = model.encode(lines, batch_size=6)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert model.max_seq_length == PINNED.max_positions
    prompted = model.encode(["w4"], prompt="w3 ")
    np.testing.assert_allclose(prompted, model.encode(["w3 w4"]), rtol=0, atol=1e-6)
    model.save(str(tmp_path / "saved"))
    again = st.SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True)
    again.save(str(tmp_path / "saved"))  # over itself
    again[0].save(str(tmp_path / "twice"))
    again[0].save(str(tmp_path / "twice"))
    assert Bundle.open(tmp_path / "twice" / "bundle").manifest == again[0].session.manifest
    # Another session measures anew which path is faster here, and paths round differently.
    np.testing.assert_allclose(again.encode(lines, batch_size=6), found, rtol=0, atol=1e-6)


def test_ids_that_are_no_batch(made: Path) -> None:
    model = hf.SdtModel.from_bundle(made / "bundle")
    for shape in ((1, 0), (0, 3), (4,)):
        with pytest.raises(InputError, match=r"input_ids must be \[batch, seq\]"):
            model(torch.zeros(shape, dtype=torch.int64))


def test_only_embeddings_are_sentence_embeddings(made: Path, tmp_path: Path) -> None:
    from sdt_deploy.testing import memory_bundle

    config: ModelConfig = CONFIGS["active-lm"][0]
    with pytest.raises(InputError, match="convert --head embedding"):
        hf.check_embeds(memory_bundle(random_model(config, 0)).manifest, "here")


def test_minilm_tokenizer_pads(minilm: Path, readme: Path) -> None:
    """The README's model, whose ``tokenizer.json`` names a padding token."""
    from transformers import AutoModel, AutoTokenizer

    native = readme / "build" / "model"
    inputs = AutoTokenizer.from_pretrained(native)(
        ["To be", "that is the question"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        found = AutoModel.from_pretrained(native)(**inputs)
    with Session.open(readme / "build" / "bundle") as session:
        expected = session.run(["To be", "that is the question"])
    np.testing.assert_allclose(found.output.numpy(), expected.output, rtol=0, atol=1e-5)
