"""Texts longer than the positions run as windows and give one result each."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from sdt_deploy.bundle import TOKENIZER, write_manifest
from sdt_deploy.config import HeadConfig, ModelConfig
from sdt_deploy.errors import InputError
from sdt_deploy.runtime.session import Session
from sdt_deploy.testing import OracleBackend, memory_bundle
from sdt_deploy.tokenization import TextTokenizer
from tests.samples import CONFIGS, TOLERANCE, random_model

CLS, SEP, N_WORDS = 1, 2, 20
LONG = " ".join(f"w{i % N_WORDS}" for i in range(17))
SHORT = "w3 w4"
HEADS = {
    "hidden": HeadConfig(kind="hidden"),
    "mean": HeadConfig(kind="embedding", pooling="mean", normalize=True),
    "cls": HeadConfig(kind="embedding", pooling="cls"),
    "classify": HeadConfig(kind="classify", pooling="cls", n_classes=3),
}


def tokenizer_json() -> bytes:
    vocab = {"[UNK]": 0, "[CLS]": CLS, "[SEP]": SEP, **{f"w{i}": i + 3 for i in range(N_WORDS)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return tokenizer.to_str().encode()


def config_with(head: HeadConfig) -> ModelConfig:
    return CONFIGS["all-embedding"][0].replace(max_positions=8, head=head)


def open_with_tokenizer(directory: Path, head: HeadConfig) -> Session:
    model = random_model(config_with(head), 3)
    bundle = memory_bundle(model)
    (directory / TOKENIZER).write_bytes(tokenizer_json())
    manifest = dataclasses.replace(bundle.manifest, files={TOKENIZER: {}})
    bundle = dataclasses.replace(bundle, path=directory, manifest=manifest)
    write_manifest(directory, manifest)
    return Session(bundle, OracleBackend(bundle, model))


def test_windows_follow_each_other_without_overlap() -> None:
    tokenizer = TextTokenizer(tokenizer_json())
    ids, cu_seqlens, cu_windows = tokenizer.encode_windows([SHORT, LONG, SHORT], max_length=8)
    assert cu_windows.tolist() == [0, 1, 4, 5]
    assert np.diff(cu_seqlens).tolist() == [4, 8, 8, 7, 4]
    windows = [row.tolist() for row in np.split(ids, cu_seqlens[1:-1])]
    assert all((row[0], row[-1]) == (CLS, SEP) for row in windows)
    whole, _ = tokenizer.encode([LONG])
    assert [i for row in windows[1:4] for i in row[1:-1]] == whole[1:-1].tolist()
    cut, _ = tokenizer.encode([LONG], max_length=8, overflow="truncate")
    assert cut.tolist() == windows[1]


def test_a_text_that_just_fits_is_one_window() -> None:
    tokenizer = TextTokenizer(tokenizer_json())
    for n_words, n_windows in ((6, 1), (7, 2), (12, 2), (13, 3)):
        text = " ".join(["w1"] * n_words)
        assert tokenizer.encode_windows([text], max_length=8)[2].tolist() == [0, n_windows]
    with pytest.raises(InputError, match="2 tokens leave no room"):
        tokenizer.encode_windows([LONG], max_length=2)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("path", ["sparse", "masked"])
def test_a_split_text_is_its_windows_put_together(tmp_path: Path, name: str, path: str) -> None:
    head = HEADS[name]
    session = open_with_tokenizer(tmp_path, head)
    result = session.run([SHORT, LONG], overflow="split", path=path)  # type: ignore[arg-type]
    words = list(range(3, 3 + 17))
    windows = [[CLS, *words[i : i + 6], SEP] for i in (0, 6, 12)]
    alone = [session.run([ids], path=path) for ids in windows]  # type: ignore[arg-type]
    short = session.run([SHORT], path=path)  # type: ignore[arg-type]
    assert result.cu_seqlens.tolist() == [0, 4, 4 + 8 + 8 + 7]
    assert result.input_ids[4:].tolist() == [i for ids in windows for i in ids]
    np.testing.assert_array_equal(result.depths[4:], np.concatenate([one.depths for one in alone]))
    if head.per_sequence:
        parts = np.stack([one.output[0] for one in alone])
        expected = (np.array([[8], [8], [7]]) * parts).sum(axis=0) / 23
        if head.normalize:
            expected /= np.linalg.norm(expected)
        assert result.output.shape == (2, session.manifest.model.output_width)
        np.testing.assert_allclose(result.output[1], expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(result.output[0], short.output[0], rtol=0, atol=TOLERANCE)
    else:
        expected = np.concatenate([short.output, *(one.output for one in alone)])
        np.testing.assert_allclose(result.output, expected, rtol=0, atol=TOLERANCE)
        assert [len(rows) for rows in result.split(result.output)] == [4, 23]
    assert result.output.dtype == np.float32


def test_the_policies(tmp_path: Path) -> None:
    session = open_with_tokenizer(tmp_path, HEADS["hidden"])
    with pytest.raises(InputError, match=r'text 1 has 19 tokens, 8 are .*"truncate" or "split"'):
        session.run([SHORT, LONG])
    cut = session.run([SHORT, LONG], overflow="truncate", path="sparse")
    assert cut.cu_seqlens.tolist() == [0, 4, 12]
    for overflow in ("truncate", "split"):
        with pytest.raises(InputError, match="is for texts; cut token ids into sequences of up to"):
            session.run([[CLS, 5, SEP]], overflow=overflow)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="overflow must be one of"):
        session.run([SHORT], overflow="wrap")  # type: ignore[arg-type]


def test_arrays_of_texts_are_texts(tmp_path: Path) -> None:
    session = open_with_tokenizer(tmp_path, HEADS["mean"])
    expected = session.run([SHORT, SHORT]).output
    for given in (np.array([SHORT, SHORT]), np.array([SHORT, SHORT], dtype=object)):
        np.testing.assert_array_equal(session.run(given).output, expected)
    with pytest.raises(InputError, match="text 1 is int"):
        session.run(np.array([SHORT, 3], dtype=object))
