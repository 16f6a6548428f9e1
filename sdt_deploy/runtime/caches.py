"""What layers keep of the tokens that they have seen, so that new ones need not see them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sdt_deploy.runtime.routing import HIDDEN, Float32, Int32

IntArray: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.integer]]


@dataclass(frozen=True, kw_only=True)
class CacheUsage:
    """Memory that the caches of all layers took at the end, in bytes."""

    n_bytes: int
    """Keys and values of the tokens that are cached, and states of those that wait."""
    dense_bytes: int
    """Keys and values of every token in every layer: what a dense model keeps."""
    layer_tokens: tuple[int, ...]
    """Tokens with keys and values in each layer."""

    @property
    def saved_bytes(self) -> int:
        """What skipping saved."""
        return self.dense_bytes - self.n_bytes

    @property
    def ratio(self) -> float:
        """Bytes over those of a dense cache."""
        return self.n_bytes / self.dense_bytes


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """Tokens that go through the layers together, those of one sequence next to each other."""

    sequences: IntArray
    """``[n_tokens]``, the sequence of each."""
    positions: Int32
    """``[n_tokens]``, the place of each in its sequence, from 0."""

    def take(self, rows: IntArray) -> NewTokens:
        """Return those of ``rows``, in that order."""
        return NewTokens(sequences=self.sequences[rows], positions=self.positions[rows])

    @staticmethod
    def joined(parts: Sequence[NewTokens]) -> NewTokens:
        """Put several together."""
        return NewTokens(
            sequences=np.concatenate([part.sequences for part in parts]),
            positions=np.concatenate([part.positions for part in parts]),
        )


class LayerCache:
    """Keys and values of one layer: one row for each token that it has seen.

    Rows are in the order in which they were made; an index says which belong to a sequence. Row 0
    belongs to no token: padding points to it. Arrays grow by half, so up to that much more than
    :attr:`n_bytes` is allocated.

    With ``context="all"`` a layer also shows tokens that it did not take, and so needs their keys
    and values. These are made no sooner than it is run again: until then tokens *wait*.

    Args:
        n_sequences: sequences in all.
        width: numbers in the keys of a token, those of all heads.
    """

    def __init__(self, n_sequences: int, width: int) -> None:
        self._rows: Float32 = np.zeros((2, 1, width), dtype=np.float32)
        self._n_rows = 1
        self._index: Int32 = np.zeros((n_sequences, 1), dtype=np.int32)
        self._counts = np.zeros(n_sequences, dtype=np.int64)
        self._waiting: list[tuple[Float32, NewTokens]] = []

    @property
    def n_tokens(self) -> int:
        """Tokens with keys and values here."""
        return self._n_rows - 1

    @property
    def n_bytes(self) -> int:
        """Memory of their keys and values."""
        return self.n_tokens * int(self._rows[:, 0].nbytes)

    @property
    def waiting(self) -> list[Float32]:
        """The states ``[n_tokens, d_model]`` of tokens that wait; layers may share an array."""
        return [states for states, _ in self._waiting]

    def wait(self, states: Float32, tokens: NewTokens) -> None:
        """Keep ``states [n_tokens, d_model]``, which nobody changes any more, for later."""
        self._waiting.append((states, tokens))

    def with_waiting(self, states: Float32, tokens: NewTokens) -> tuple[Float32, NewTokens]:
        """Put those that wait before others, and forget them."""
        if not self._waiting:
            return states, tokens
        parts = [*self._waiting, (states, tokens)]
        self._waiting = []
        joined = NewTokens.joined([tokens for _, tokens in parts])
        return np.concatenate([states for states, _ in parts]), joined

    def extend(self, sequences: IntArray) -> Extension:
        """Make rows for new tokens of ``sequences [n_tokens]``, later ones of a sequence last.

        The rows mean nothing until they are written. Arrays of earlier calls may be out of date.
        """
        start, stop = self._n_rows, self._n_rows + len(sequences)
        if stop > self._rows.shape[1]:
            grown = np.zeros((2, stop + stop // 2, self._rows.shape[2]), dtype=np.float32)
            grown[:, :start] = self._rows[:, :start]
            self._rows = grown
        order = sequences.argsort(kind="stable")
        ordered = sequences[order]
        places = np.empty(len(sequences), dtype=np.int64)
        earlier = np.arange(len(ordered)) - ordered.searchsorted(ordered, side="left")
        places[order] = self._counts[ordered] + earlier
        self._counts += np.bincount(sequences, minlength=len(self._counts))
        longest = int(self._counts.max())
        if longest > self._index.shape[1]:
            added = longest + longest // 2 - self._index.shape[1]
            self._index = np.pad(self._index, ((0, 0), (0, added)))
        self._index[sequences, places] = np.arange(start, stop)
        self._n_rows = stop
        return Extension(
            past_keys=self._rows[0, :start],
            past_values=self._rows[1, :start],
            keys=self._rows[0, start:stop],
            values=self._rows[1, start:stop],
            places=places.astype(np.int32),
        )

    def layout(self, sequences: IntArray, n_heads: int) -> tuple[Int32, Float32]:
        """Lay the rows of ``sequences [batch]`` out, in their order, cut into ``n_heads`` slices.

        Returns:
            ``gather_index [batch, n_heads, longest]``, the slice ``row · n_heads + head`` at each
            place, and ``key_bias [batch, n_heads, longest, 1]``: 0 at these places,
            :data:`~sdt_deploy.runtime.routing.HIDDEN` at padding.
        """
        counts = self._counts[sequences]
        longest = int(counts.max())
        index = by_head(self._index[sequences, :longest], n_heads)
        hidden = np.arange(longest) >= counts[:, None]
        bias = np.zeros((len(sequences), n_heads, longest, 1), dtype=np.float32)
        np.copyto(bias[..., 0], HIDDEN, where=hidden[:, None])
        return index, bias


@dataclass(frozen=True, kw_only=True)
class Extension:
    """Rows of a cache before and after new ones were added; views of its memory."""

    past_keys: Float32
    """``[n_past, width]``, row 0 of no token included."""
    past_values: Float32
    """``[n_past, width]``"""
    keys: Float32
    """``[n_tokens, width]``, to be written."""
    values: Float32
    """``[n_tokens, width]``, to be written."""
    places: Int32
    """``[n_tokens]``, where each new token stands among the rows of its sequence."""


def by_head(rows: IntArray, n_heads: int) -> Int32:
    """Turn ``rows [batch, length]`` into slices as long as a head: ``[batch, n_heads, length]``."""
    slices = rows[:, None, :] * n_heads + np.arange(n_heads)[:, None]
    return np.asarray(slices, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class QueryLayout:
    """Where new rows stand in a padded batch of the sequences that have any."""

    sequences: IntArray
    """``[batch]``"""
    gather_index: Int32
    """``[batch, n_heads, max_seqlen]``, the slice at each place; padding holds one that exists."""
    scatter_index: Int32
    """``[n_tokens, n_heads]``, the flat place of each slice."""
    query_places: Int32
    """``[batch, max_seqlen]``, where each stands among the keys of its sequence."""

    @classmethod
    def of(cls, sequences: IntArray, places: Int32, n_heads: int) -> QueryLayout:
        """Lay out rows of ``sequences [n_tokens]`` that have ``places [n_tokens]``.

        The rows of one sequence stand next to each other, in order.
        """
        row = np.arange(len(sequences))
        starts = np.flatnonzero((row == 0) | (sequences != sequences[row - 1]))
        lengths = np.concatenate([starts[1:], [len(sequences)]]) - starts
        batch = np.repeat(np.arange(len(starts)), lengths)
        place = row - np.repeat(starts, lengths)
        width = int(lengths.max())
        index = np.zeros((len(starts), width), dtype=np.int64)
        query_places = np.zeros((len(starts), width), dtype=np.int32)
        index[batch, place], query_places[batch, place] = row, places
        heads = batch[:, None] * n_heads + np.arange(n_heads)
        return cls(
            sequences=sequences[starts],
            gather_index=by_head(index, n_heads),
            scatter_index=(heads * width + place[:, None]).astype(np.int32),
            query_places=query_places,
        )
