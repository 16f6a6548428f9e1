"""Tokenizers from anyone, and texts from anyone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sdt_deploy.errors import CheckpointError, InputError
from sdt_deploy.tokenization import TextTokenizer, read_lines

WORDS = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}


def made(**parts: Any) -> TextTokenizer:
    return TextTokenizer(json.dumps({"version": "1.0", "model": WORDS, **parts}).encode())


@pytest.mark.parametrize(
    "content",
    [
        b'{"model":' + b"[" * 1_000_000,
        b'{"normalizer":' * 100_000,
        json.dumps({"model": {**WORDS, "vocab": {"a": 2**70}}}).encode(),
        json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}).encode(),
        json.dumps(
            {
                "version": "1.0",
                "model": WORDS,
                "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
            }
        ).encode(),
    ],
)
def test_what_is_no_tokenizer(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be used"):
        TextTokenizer(content)


@pytest.mark.parametrize(
    "parts",
    [
        {"model": {**WORDS, "vocab": {"a": 0}}},
        {"model": {**WORDS, "vocab": {"b": 2**32 - 1, "[UNK]": 0}}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
    ],
)
def test_tokenizers_that_fail_on_a_text(parts: dict[str, Any]) -> None:
    """The library's own code panics at the last one; that is no ``Exception``."""
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        made(**parts).encode(["b"])


def test_a_tokenizer_without_ends() -> None:
    nothing = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    with pytest.raises(CheckpointError, match="gives no token"):
        made(post_processor=nothing).ends()
    with pytest.raises(InputError, match="text 0 gives no token"):
        made(post_processor=nothing).encode(["a"])


@pytest.mark.parametrize("texts", [[], [None], ["a", 1], [b"a"], ["\ud800"], ["a", "\udfff"]])
def test_texts(texts: list[Any]) -> None:
    with pytest.raises(InputError):
        made().encode(texts)
    assert made().encode(["a", "\0", "x" * 100_000])[0].tolist() == [0, 1, 1]


@pytest.mark.parametrize("overflow", ["", None, 5, ["error"], {}])
def test_overflow(overflow: Any) -> None:
    with pytest.raises(InputError, match="overflow must be one of"):
        made().encode(["a"], overflow=overflow)


def test_truncation_below_the_special_tokens() -> None:
    ends = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "a", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "a", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"a": {"id": "a", "ids": [0], "tokens": ["a"]}},
    }
    split = {"type": "WhitespaceSplit"}
    tokenizer = made(post_processor=ends, pre_tokenizer=split)
    for length in (1, 2):
        with pytest.raises(InputError, match="leave no room beside the special ones"):
            tokenizer.encode(["b b b"], max_length=length, overflow="truncate")
    for length in range(3, 6):
        ids, cu_seqlens = tokenizer.encode(["b b b"], max_length=length, overflow="truncate")
        assert cu_seqlens.tolist() == [0, length]
        assert ids[-1] == 0


def test_what_is_no_text_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "latin").write_bytes(b"\xe9")
    (tmp_path / "empty").write_bytes(b"\n \n")
    for path in ("fifo", "latin", "empty", "none", ".", "a\0b", "x" * 5000, "/dev/zero"):
        with pytest.raises(InputError):
            read_lines(tmp_path / path)


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffa b\r\n\n c\u2028d\x0be\x85f \n".encode())
    assert read_lines(path) == ["a b", "c\u2028d\x0be\x85f"]
