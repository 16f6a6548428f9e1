"""What is measured: batches of real tokens at stated sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdt_deploy.arrays import read_npz
from sdt_deploy.bundle import SAMPLE, Bundle
from sdt_deploy.config import MAX_SIZE
from sdt_deploy.errors import BundleFormatError, InputError
from sdt_deploy.runtime.batch import TokenBatch

GRID_BATCH = (2, 8, 16)
GRID_SEQ = (20, 64, 128, 256, 512, 1024)
"""The grid of the original research benchmark."""
MAX_TOKENS = 2**22
"""Largest case; its dense attention alone needs many gigabytes."""

CASE_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """A stream of token ids that fills the cases."""

    stream: np.ndarray
    """``[n]`` int32, without the special tokens at the ends of texts."""
    before: tuple[int, ...]
    """Special ids in front of every sequence."""
    after: tuple[int, ...]
    """Special ids behind every sequence."""
    description: str

    def batches(self, batch: int, seq: int, bundle: Bundle) -> list[TokenBatch]:
        """Make batches of ``batch`` sequences of ``seq`` tokens each; a short stream is repeated.

        Small sizes get several batches of other tokens, up to :data:`CASE_TOKENS` together: the
        depths of a few tokens say little about the text.
        """
        n_batches = max(1, CASE_TOKENS // (batch * seq))
        inner = max(0, seq - len(self.before) - len(self.after))
        content = np.resize(self.stream, n_batches * batch * inner).reshape(n_batches, batch, inner)
        before, after = (
            np.tile(np.asarray(ends, dtype=np.int32), (batch, 1))
            for ends in (self.before, self.after)
        )
        return [
            TokenBatch.from_padded(
                np.concatenate([before, one, after], axis=1)[:, :seq],
                config=bundle.manifest.model,
            )
            for one in content
        ]


def token_source(bundle: Bundle, texts: tuple[np.ndarray, np.ndarray] | None = None) -> TokenSource:
    """Return the tokens to measure on.

    Args:
        bundle: its text sample is used, or, where it has none, uniformly random ids.
        texts: packed ids and ``cu_seqlens`` to use instead.
    """
    config = bundle.manifest.model
    if texts is None and not bundle.has(SAMPLE):
        ids = np.random.default_rng(0).integers(0, config.vocab_size, 16384, dtype=np.int32)
        return TokenSource(stream=ids, before=(), after=(), description="random token ids")
    description = "tokens of the given texts"
    if texts is None:
        texts = _sample(bundle)
        description = "tokens of the text sample in the bundle"
    ids, cu_seqlens = texts
    pinned = np.isin(ids, config.pinned_token_ids)
    first, is_end = ids[: cu_seqlens[1]], pinned[: cu_seqlens[1]]
    n_before = int(np.argmin(is_end)) if not is_end.all() else 0
    n_after = int(np.argmin(is_end[::-1])) if not is_end.all() else 0
    return TokenSource(
        stream=ids[~pinned],
        before=tuple(int(i) for i in first[:n_before]),
        after=tuple(int(i) for i in first[len(first) - n_after :]),
        description=description,
    )


def _sample(bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    path = bundle.file(SAMPLE)
    longest = dataclasses.replace(bundle.manifest.model, max_positions=MAX_SIZE)
    try:
        arrays = read_npz(path)
        batch = TokenBatch.from_packed(arrays["input_ids"], arrays["cu_seqlens"], config=longest)
    except (OSError, ValueError, KeyError) as error:
        raise BundleFormatError(f"{path} is no text sample of this model: {error}") from error
    return batch.input_ids, batch.cu_seqlens


def parse_cases(text: str) -> tuple[tuple[int, int], ...]:
    """Parse ``2x20,8x64``.

    Raises:
        InputError: if it reads otherwise.
    """
    cases = []
    for item in text.split(","):
        batch, cross, seq = item.strip().lower().partition("x")
        sizes = [int(n) if n.isascii() and n.isdigit() and len(n) < 10 else 0 for n in (batch, seq)]
        if not (cross and all(sizes)):
            raise InputError(
                f"cases are given as BATCHxSEQ,BATCHxSEQ (2x20,8x64), not {item[:80]!r}"
            )
        cases.append((sizes[0], sizes[1]))
    return tuple(cases)


def parse_case(text: str) -> tuple[int, int]:
    """Parse one case, such as ``8x64``.

    Raises:
        InputError: if it reads otherwise.
    """
    cases = parse_cases(text)
    if len(cases) != 1:
        raise InputError(f"one BATCHxSEQ is needed, not {text[:80]!r}")
    return cases[0]


def default_cases(max_positions: int) -> tuple[tuple[int, int], ...]:
    """Return the default grid as far as the positions reach; the longest sequences if none fits."""
    lengths = [seq for seq in GRID_SEQ if seq <= max_positions] or [max_positions]
    return tuple((batch, seq) for batch in GRID_BATCH for seq in lengths)


def check_cases(cases: Sequence[tuple[int, int]], max_positions: int) -> None:
    """Check that the positions reach.

    Raises:
        InputError: if a case is longer, or has more than :data:`MAX_TOKENS`.
    """
    for batch, seq in cases:
        if seq > max_positions:
            raise InputError(
                f"case {batch}x{seq}: the model's positions reach {max_positions} tokens"
            )
        if batch * seq > MAX_TOKENS:
            raise InputError(f"case {batch}x{seq} has more than {MAX_TOKENS} tokens")
