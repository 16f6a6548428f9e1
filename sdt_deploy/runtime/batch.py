"""Token batches: whatever the caller has, checked and packed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from sdt_deploy.config import MAX_SIZE, ModelConfig
from sdt_deploy.errors import InputError
from sdt_deploy.runtime.routing import Int32


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Packed token ids: sequences one after the other, no padding."""

    input_ids: Int32
    """``[n_tokens]``"""
    cu_seqlens: Int32
    """``[batch + 1]``, where each sequence starts; the last entry is ``n_tokens``."""
    token_type_ids: Int32 | None = None
    """``[n_tokens]``, for models with token types; None: zeros."""

    @property
    def n_tokens(self) -> int:
        """Tokens in all sequences."""
        return len(self.input_ids)

    @cached_property
    def lengths(self) -> Int32:
        """``[batch]``, tokens of each sequence."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    @property
    def position_ids(self) -> Int32:
        """``[n_tokens]``, the place of each token in its sequence, from 0."""
        starts = self.cu_seqlens[:-1].repeat(self.lengths)
        return np.arange(self.n_tokens, dtype=np.int32) - starts

    @property
    def types(self) -> Int32:
        """``[n_tokens]``, token types, zeros if none were given."""
        if self.token_type_ids is None:
            return np.zeros(self.n_tokens, dtype=np.int32)
        return self.token_type_ids

    @cached_property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence."""
        longest: int = max(self.lengths.tolist())  # NumPy's own maximum takes ten times as long
        return longest

    @property
    def is_even(self) -> bool:
        """Whether all sequences are equally long, so that padding adds nothing."""
        return self.n_tokens == len(self.lengths) * self.max_seqlen

    @cached_property
    def attention_mask(self) -> npt.NDArray[np.bool_]:
        """``[batch, seq]``, True where :meth:`padded` holds a token."""
        lengths = self.lengths
        if self.is_even:
            return np.ones((len(lengths), self.max_seqlen), dtype=np.bool_)
        return np.arange(self.max_seqlen, dtype=np.int32) < lengths[:, None]

    def padded(self, values: Int32) -> Int32:
        """Pad ``values [n_tokens]`` on the right with zeros to ``[batch, seq]``.

        Where no padding is needed it is a view.
        """
        if self.is_even:
            return values.reshape(len(self.lengths), -1)
        mask = self.attention_mask
        padded = np.zeros(mask.shape, dtype=np.int32)
        padded[mask] = values
        return padded

    def packed(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Undo padding: ``[batch, seq, …]`` to ``[n_tokens, …]``, a view where none is needed."""
        if self.is_even:
            return values.reshape(self.n_tokens, *values.shape[2:])
        return values[self.attention_mask]

    @classmethod
    def from_packed(
        cls,
        input_ids: npt.ArrayLike,
        cu_seqlens: npt.ArrayLike,
        token_type_ids: npt.ArrayLike | None = None,
        *,
        config: ModelConfig,
    ) -> Self:
        """Check packed ids.

        Raises:
            InputError: says which value is not what the model takes.
        """
        ids = _integers("input_ids", input_ids, 1)
        cu = _integers("cu_seqlens", cu_seqlens, 1)
        if cu.dtype == np.uint64:
            cu = np.minimum(cu, np.uint64(2**63 - 1))
        cu = cu.astype(np.int64)  # its differences have a sign
        if len(ids) == 0 or len(cu) < 2:
            raise InputError("the batch is empty; at least one sequence of one token is needed")
        if cu[0] != 0 or cu[-1] != len(ids):
            raise InputError(
                f"cu_seqlens must start at 0 and end at the number of tokens, {len(ids)}; "
                f"it starts at {cu[0]} and ends at {cu[-1]}"
            )
        lengths = cu[1:] - cu[:-1]
        if lengths.min() < 1:
            at = int(lengths.argmin())
            raise InputError(
                f"cu_seqlens must rise: sequence {at} has {lengths[at]} tokens "
                f"({cu[at]} to {cu[at + 1]})"
            )
        if lengths.max() > config.max_positions:
            at = int(lengths.argmax())
            raise _too_long(at, int(lengths[at]), config)
        _check_range("input_ids", ids, config.vocab_size)
        types = None
        if token_type_ids is not None:
            types = _integers("token_type_ids", token_type_ids, 1)
            if config.n_token_types == 0:
                raise InputError("token_type_ids were given, but the model has no token types")
            if len(types) != len(ids):
                raise InputError(f"{len(types)} token_type_ids for {len(ids)} input_ids")
            _check_range("token_type_ids", types, config.n_token_types)
        return cls(
            input_ids=np.ascontiguousarray(ids, dtype=np.int32),
            cu_seqlens=np.ascontiguousarray(cu, dtype=np.int32),
            token_type_ids=None if types is None else np.ascontiguousarray(types, dtype=np.int32),
        )

    @classmethod
    def from_padded(
        cls,
        input_ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        token_type_ids: npt.ArrayLike | None = None,
        *,
        config: ModelConfig,
    ) -> Self:
        """Check and pack ``input_ids [batch, seq]``, padded on the right or the left.

        Raises:
            InputError: says which value is not what the model takes.
        """
        ids = _integers("input_ids", input_ids, 2)
        if attention_mask is None:
            if len(ids) and ids.shape[1] > config.max_positions:
                raise _too_long(0, ids.shape[1], config)
            mask = np.ones(ids.shape, dtype=bool)
        else:
            mask = _array("attention_mask", attention_mask)
            if mask.shape != ids.shape:
                raise InputError(
                    f"attention_mask {mask.shape} and input_ids {ids.shape} differ in shape"
                )
            if mask.dtype.kind not in "biu" or mask.min(initial=0) < 0 or mask.max(initial=0) > 1:
                raise InputError("attention_mask must hold 0 and 1, or booleans")
            mask = mask.astype(bool)
            _check_mask(mask)
        types = None
        if token_type_ids is not None:
            types = _integers("token_type_ids", token_type_ids, 2)
            if types.shape != ids.shape:
                raise InputError(
                    f"token_type_ids {types.shape} and input_ids {ids.shape} differ in shape"
                )
            types = types[mask]
        cu = np.zeros(len(mask) + 1, dtype=np.int64)
        np.add.accumulate(mask.sum(axis=1), out=cu[1:])
        return cls.from_packed(ids[mask], cu, types, config=config)


def _check_mask(mask: npt.NDArray[np.bool_]) -> None:
    """Check that the tokens of each row of ``mask [batch, seq]`` follow each other."""
    if not mask.size:
        return  # the batch is empty, which is said later
    runs = (mask[:, 1:] > mask[:, :-1]).sum(axis=1) + mask[:, 0]
    if (runs != 1).any():
        at = int(np.flatnonzero(runs != 1)[0])
        raise InputError(
            f"row {at} of attention_mask has "
            + ("no token" if runs[at] == 0 else "padding between its tokens")
        )


def _too_long(sequence: int, length: int, config: ModelConfig) -> InputError:
    return InputError(
        f"sequence {sequence} has {length} tokens; the model's positions reach "
        f"{config.max_positions}. Truncate or split it"
    )


def _array(name: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    if isinstance(values, np.ma.MaskedArray):
        raise InputError(f"{name} is a masked array; pass its data, and attention_mask for padding")
    try:
        array = np.asarray(values)
    except Exception as error:  # tensors of other libraries raise what they like
        raise InputError(f"{name} is not an array: {error}") from error
    if array.size > MAX_SIZE:
        raise InputError(f"{name} has {array.size} entries; a batch has {MAX_SIZE} at most")
    return array


def _integers(name: str, values: npt.ArrayLike, ndim: int) -> npt.NDArray[np.integer]:
    array = _array(name, values)
    if array.ndim != ndim:
        raise InputError(f"{name} must have {ndim} axes, it has the shape {array.shape}")
    if array.dtype.kind not in "iu" and array.size:
        raise InputError(f"{name} must hold integers, not {array.dtype}")
    return array if array.size else array.astype(np.int32)


def _check_range(name: str, values: npt.NDArray[np.integer], stop: int) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= stop:
        bad = low if low < 0 else high
        at = int(np.flatnonzero(values == bad)[0])
        raise InputError(f"{name} must lie in 0..{stop - 1}; token {at} has {bad}")
