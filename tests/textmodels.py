"""Tiny models that read texts, and texts for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from sdt_deploy.config import HeadConfig, ModelConfig
from sdt_deploy.model import checkpoints
from sdt_deploy.model.checkpoints import Checkpoint
from tests.samples import random_model

N_WORDS = 60
CONFIG = ModelConfig(
    vocab_size=N_WORDS,
    d_model=16,
    n_heads=2,
    n_layers=4,
    d_ff=24,
    max_positions=24,
    norm_placement="post",
    embedding_norm=True,
    final_norm=False,
    head=HeadConfig(kind="embedding", pooling="mean", normalize=True),
)


def tokenizer() -> bytes:
    """Words ``w2`` … and the special tokens ``[B]`` and ``[E]``."""
    words = {"[B]": 0, "[E]": 1, **{f"w{i}": i for i in range(2, N_WORDS)}}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w2"))  # noqa: S106
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[B] $A [E]", special_tokens=[("[B]", 0), ("[E]", 1)]
    )
    return made.to_str().encode()


def texts(count: int, seed: int = 0) -> list[str]:
    """Words distributed as in language."""
    rng = np.random.default_rng(seed)
    return [
        " ".join(f"w{2 + i % (N_WORDS - 2)}" for i in rng.zipf(1.5, rng.integers(3, 18)))
        for _ in range(count)
    ]


def save_teacher(path: Path, config: ModelConfig = CONFIG, seed: int = 0) -> Path:
    """Save a random dense model with a tokenizer."""
    model = random_model(config, seed)
    checkpoints.save(Checkpoint(model=model, tokenizer=tokenizer()), path)
    return path
