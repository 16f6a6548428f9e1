"""Generation beside transformers, and what its caches hold.

``generation.py DIRECTORY make`` writes a Llama of random weights, as a Hugging Face directory and
as bundles of both contexts with a random probe (minutes). ``generation.py DIRECTORY
transformers`` and then ``generation.py DIRECTORY own`` measure prompts and steps on random
tokens, in processes apart: times and memory are real, the text is not. At full depth both must
find the same logits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sdt_deploy.exporters.export import export
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.conversion import load_any, rebuilt
from sdt_deploy.runtime.caches import NewTokens
from sdt_deploy.runtime.generation import Decoder
from sdt_deploy.runtime.session import Session

VOCABULARY, N_LAYERS, N_NEW, ROUNDS = 8192, 8, 32, 7
CASES = ((1, 64), (8, 64), (8, 256))
"""Prompts and tokens of each."""


def make(directory: Path) -> None:
    """Write the model and its bundles."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "huggingface")
    for context in ("active", "all"):
        model = load_any(directory / "huggingface").model
        model = rebuilt(model, context=context, probe="linear")
        with torch.no_grad():
            model.scorer.weight.normal_(generator=torch.Generator().manual_seed(0))
            scores = model.scorer(torch.arange(VOCABULARY), model.embeddings.token.weight)
        # Everybody takes layer 0, a fifth of the tokens the last one: a mean depth of 4.8.
        below = np.linspace(0.0, 0.8, N_LAYERS)
        limits = (0.0, *np.quantile(scores.double().numpy(), below[1:]).tolist())
        checkpoint = Checkpoint(model=rebuilt(model, thresholds=limits), provenance={})
        export(checkpoint, directory / context)


def batch_of(case: int) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts ``[batch, length]`` and the tokens that follow, ``[batch, N_NEW]``."""
    batch, length = CASES[case]
    ids = np.random.default_rng(case).integers(0, VOCABULARY, (batch, length + N_NEW))
    return ids[:, :length].astype(np.int32), ids[:, length:].astype(np.int32)


@torch.no_grad()
def transformers_times(directory: Path) -> None:
    """Print what transformers needs, and keep its last logits."""
    model = LlamaForCausalLM.from_pretrained(directory / "huggingface").eval()
    for case, (batch, length) in enumerate(CASES):
        ids, following = (torch.from_numpy(part).long() for part in batch_of(case))
        prompt_ms, step_ms = [], []
        for _ in range(ROUNDS + 1):
            start = perf_counter()
            found = model(ids, use_cache=True, logits_to_keep=1)
            prompt_ms.append((perf_counter() - start) * 1e3)
            start = perf_counter()
            for i in range(N_NEW):
                found = model(following[:, i : i + 1], past_key_values=found.past_key_values)
            step_ms.append((perf_counter() - start) * 1e3 / N_NEW)
        np.save(directory / f"logits-{case}.npy", found.logits[:, -1].numpy())
        print(f"{batch}x{length}: transformers, prompts {median(prompt_ms[1:]):.1f} ms, ", end="")
        print(f"a step {median(step_ms[1:]):.2f} ms")


def run(session: Session, case: int, limits: Sequence[float]) -> tuple[float, float, Decoder]:
    """Return the milliseconds of the prompts and of a step, and what holds the caches."""
    ids, following = batch_of(case)
    batch, length = ids.shape
    start = perf_counter()
    decoder = Decoder(session, limits, batch)
    prompts = NewTokens(
        sequences=np.repeat(np.arange(batch), length),
        positions=np.tile(np.arange(length, dtype=np.int32), batch),
    )
    decoder.logits(decoder.step(ids.reshape(-1), prompts)[length - 1 :: length].copy())
    prompt_ms = (perf_counter() - start) * 1e3
    start = perf_counter()
    for i in range(N_NEW):
        places = np.full(batch, length + i, dtype=np.int32)
        tokens = NewTokens(sequences=np.arange(batch), positions=places)
        logits = decoder.logits(decoder.step(np.ascontiguousarray(following[:, i]), tokens))
    step_ms = (perf_counter() - start) * 1e3 / N_NEW
    if limits[0] < 0:
        expected = np.load(directory_of(session) / f"logits-{case}.npy")
        assert np.abs(logits - expected).max() < 1e-3, np.abs(logits - expected).max()
    return prompt_ms, step_ms, decoder


def directory_of(session: Session) -> Path:
    """Return the directory that a session's bundle was made in."""
    return session.bundle.path.parent


def own_times(directory: Path) -> None:
    """Print medians of interleaved rounds at full depth and at the model's thresholds."""
    sessions = {context: Session.open(directory / context) for context in ("active", "all")}
    for case, (batch, length) in enumerate(CASES):
        times: dict[tuple[str, str], list[tuple[float, float]]] = {}
        ends: dict[tuple[str, str], Decoder] = {}
        for _ in range(ROUNDS + 1):
            for context, session in sessions.items():
                for name in ("full", "sparse"):
                    limits = session.manifest.model.thresholds
                    limits = (-1.0,) * N_LAYERS if name == "full" else limits
                    *found, ends[context, name] = run(session, case, limits)
                    times.setdefault((context, name), []).append((found[0], found[1]))
        for (context, name), values in times.items():
            prompt_ms, step_ms = np.median(values[1:], axis=0)
            active = np.stack(ends[context, name].active())
            depths = active.sum(axis=2)[:, length:].mean()
            usage = ends[context, name].cache_usage()
            print(
                f"{batch}x{length}: {context} {name}, prompts {prompt_ms:.1f} ms, a step "
                f"{step_ms:.2f} ms, depth of new tokens {depths:.2f} of {N_LAYERS}, cache "
                f"{usage.n_bytes / 1e6:.1f} of {usage.dense_bytes / 1e6:.1f} MB"
            )


def main(directory: Path, what: str) -> None:
    """Do one of ``make``, ``transformers`` and ``own``, in this order and in processes apart."""
    {"make": make, "transformers": transformers_times, "own": own_times}[what](directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
