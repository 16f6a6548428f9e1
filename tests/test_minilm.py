"""The main job on real weights: convert, export, run; full depth equals Hugging Face."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import BertModel

import sdt_deploy
from sdt_deploy.bundle import Bundle
from sdt_deploy.model.checkpoints import load
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.runtime.session import Session
from sdt_deploy.tokenization import TextTokenizer, read_lines
from tests.conftest import Once

TEXTS = Path(__file__).parent.parent / "examples" / "texts" / "shakespeare.txt"


@pytest.fixture(scope="module")
def fitted(minilm: Path, once: Once) -> Path:
    """The original weights with a fitted probe of graded depths; the README's are distilled."""

    def fill(directory: Path) -> None:
        script = str(Path(sys.executable).with_name("sdt-deploy"))
        for command in (
            ["convert", str(minilm), "model", "--texts", str(TEXTS)],
            ["export", "model", "bundle"],
        ):
            subprocess.run([script, *command], cwd=directory, check=True, capture_output=True)

    return once("minilm", fill)


@pytest.fixture(scope="module")
def native(fitted: Path) -> Path:
    return fitted / "model"


@pytest.fixture(scope="module")
def bundle(fitted: Path) -> Path:
    return fitted / "bundle"


def test_conversion_and_export(native: Path, bundle: Path) -> None:
    checkpoint = load(native)
    config = checkpoint.model.config
    assert config.pinned_token_ids == (101, 102)
    assert config.context == "all"
    assert (config.head.pooling, config.head.normalize) == ("mean", True)
    assert checkpoint.provenance["license"] == "apache-2.0"
    assert checkpoint.provenance["source"] == "all-MiniLM-L6-v2"
    assert checkpoint.provenance["probe"]["importance"] == "attention"
    lines = read_lines(TEXTS)[:200]
    with Session.open(bundle) as session:
        usage = session.run(lines, path="sparse").layer_usage
    assert usage.mean_depth == pytest.approx(3.6, abs=0.15)
    assert min(usage.depth_histogram[1:]) > 0.08 * sum(usage.depth_histogram)
    manifest = Bundle.open(bundle).manifest
    assert max(spec.max_abs_error for spec in manifest.graphs.values()) < 1e-4
    assert len({spec.graph_sha256 for spec in manifest.stages}) == 1


@torch.no_grad()
def test_full_depth_equals_hugging_face(minilm: Path, bundle: Path) -> None:
    theirs = BertModel.from_pretrained(minilm).eval()
    lines = read_lines(TEXTS)[600:616]
    with Session.open(bundle) as session:
        full = session.run(lines, path="sparse", thresholds=(-1.0,) * 6)
        assert (full.depths == 6).all()
        dense = session.run(lines, path="dense")
        for row, (ids, line) in enumerate(zip(full.split(full.input_ids), lines, strict=True)):
            tokens = torch.from_numpy(ids).long()[None]
            states = theirs(input_ids=tokens).last_hidden_state
            expected = F.normalize(states.mean(dim=1), dim=-1)[0].numpy()
            np.testing.assert_allclose(full.output[row], expected, rtol=0, atol=1e-4)
            np.testing.assert_allclose(dense.output[row], expected, rtol=0, atol=1e-4)
            assert len(ids) >= len(line.split())


def test_sparse_and_masked_equal_the_oracle(native: Path, bundle: Path) -> None:
    model = load(native).model
    lines = read_lines(TEXTS)[700:716]
    with Session.open(bundle) as session:
        for path in ("sparse", "masked"):
            result = session.run(lines, path=path)  # type: ignore[arg-type]
            expected = oracle_output(model, result.input_ids, result.cu_seqlens)
            flips = int((result.depths != expected.depths).sum())
            assert flips <= 1
            if not flips:
                np.testing.assert_allclose(result.output, expected.output, rtol=0, atol=1e-4)
            assert len(set(result.depths.tolist())) == 6
            pinned = np.isin(result.input_ids, (101, 102))
            assert (result.depths[pinned] == 6).all()


def test_tokens_are_those_of_the_hugging_face_tokenizer(minilm: Path, bundle: Path) -> None:
    from transformers import AutoTokenizer

    lines = [*read_lines(TEXTS)[:50], "naïve café — 漢字 🙂", "x"]
    theirs = AutoTokenizer.from_pretrained(minilm)
    ids, cu = TextTokenizer(Bundle.open(bundle).file("tokenizer.json").read_bytes()).encode(lines)
    for row, line in zip(np.split(ids, cu[1:-1]), lines, strict=True):
        assert row.tolist() == theirs(line)["input_ids"]


def test_long_texts(bundle: Path) -> None:
    text = "to be or not to be " * 200
    with Session.open(bundle) as session:
        with pytest.raises(sdt_deploy.InputError, match="512 are allowed"):
            session.run([text])
        with pytest.raises(sdt_deploy.InputError, match="overflow must be one of"):
            session.run([text], overflow="eror")  # type: ignore[arg-type]
        result = session.run([text], overflow="truncate")
    assert len(result.input_ids) == 512
    assert result.input_ids[[0, -1]].tolist() == [101, 102]


NO_TORCH = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "onnx", "onnxscript", "transformers", "safetensors"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import sdt_deploy
with sdt_deploy.Session.open(sys.argv[1]) as session:
    print(session.run(["To be, or not to be"], path="sparse").output.shape)
"""


def test_runs_where_torch_is_not_installed(bundle: Path) -> None:
    command = [sys.executable, "-c", NO_TORCH, str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.stdout == "(1, 384)\n", done.stderr
