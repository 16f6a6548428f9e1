"""What callers pass to a session, turned into a checked batch and thresholds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sdt_deploy.bundle import Manifest
from sdt_deploy.checks import plain
from sdt_deploy.config import ModelConfig, check_thresholds, compared, is_number, shown
from sdt_deploy.costs import thresholds_for_depth
from sdt_deploy.errors import ConfigError, InputError
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.routing import Int32
from sdt_deploy.tokenization import Overflow, TextTokenizer


def read_batch(
    inputs: npt.ArrayLike | str | Sequence[str],
    cu_seqlens: npt.ArrayLike | None,
    attention_mask: npt.ArrayLike | None,
    token_type_ids: npt.ArrayLike | None,
    *,
    config: ModelConfig,
    overflow: Overflow,
    tokenizer: Callable[[], TextTokenizer],
) -> tuple[TokenBatch, Int32 | None]:
    """Check the arguments of :meth:`sdt_deploy.runtime.session.Session.run`.

    Returns:
        The batch; and, if texts were cut into several sequences each, ``cu_windows [n_texts + 1]``:
        where those of each text start.

    Raises:
        InputError: if they do not fit each other or the model.
    """
    texts = _as_texts(inputs)
    if texts is not None:
        if cu_seqlens is not None or attention_mask is not None or token_type_ids is not None:
            raise InputError("texts come alone; cu_seqlens and masks belong to token ids")
        ids, cu_seqlens, cu_windows = tokenizer().encode_windows(
            texts, max_length=config.max_positions, overflow=overflow
        )
        batch = TokenBatch.from_packed(ids, cu_seqlens, config=config)
        return batch, cu_windows if len(cu_windows) < len(cu_seqlens) else None
    if not isinstance(overflow, str) or overflow != "error":
        raise InputError(
            f"overflow={shown(overflow)} is for texts; cut token ids into sequences of up to "
            f"{config.max_positions} tokens, special ones included, as "
            "TextTokenizer.encode_windows does, and put the outputs of each text together"
        )
    if cu_seqlens is None:
        return TokenBatch.from_padded(inputs, attention_mask, token_type_ids, config=config), None
    if attention_mask is None:
        return TokenBatch.from_packed(inputs, cu_seqlens, token_type_ids, config=config), None
    raise InputError("pass cu_seqlens with packed ids or attention_mask with padded ones")


def read_thresholds(values: object, config: ModelConfig) -> tuple[float, ...]:
    """Check thresholds that were given for one run; return them as scores are compared with them.

    Raises:
        ConfigError: if they are not one per layer and within float32, and, unless layers score
            for themselves, nondecreasing.
    """
    try:
        if isinstance(values, str | bytes):
            raise TypeError("a string was given")
        thresholds = tuple(map(float, values))  # type: ignore[call-overload]
        if any(abs(value) > float(np.finfo(np.float32).max) for value in thresholds):
            raise OverflowError("they are compared in float32, and one is beyond its range")
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"thresholds must be {config.n_layers} numbers: {error}") from error
    check_thresholds(thresholds, config.n_layers, config.routing)
    return compared(thresholds)


def chosen_thresholds(
    values: Sequence[float] | None, target_depth: object, manifest: Manifest
) -> Sequence[float] | None:
    """Return ``values``, or those for ``target_depth``; None: the model's own.

    Raises:
        ConfigError: if both are given, or the depth is no number or cannot be reached.
    """
    if target_depth is None:
        return values
    if values is not None:
        raise ConfigError("thresholds and target_depth contradict each other; give one of them")
    target_depth = plain(target_depth)
    if not is_number(target_depth):
        raise ConfigError(f"target_depth must be a number, not {shown(target_depth)}")
    return thresholds_for_depth(
        manifest.model,
        float(target_depth),  # type: ignore[arg-type]
        score_quantiles=manifest.score_quantiles,
        pinned_share=manifest.pinned_share,
    )


def _as_texts(inputs: object) -> list[str] | None:
    """Return ``inputs`` as texts, or None if they are token ids."""
    if isinstance(inputs, str):
        return [inputs]
    if isinstance(inputs, np.ndarray) and inputs.ndim == 1 and inputs.dtype.kind in "OU":
        inputs = inputs.tolist()
    if isinstance(inputs, (list, tuple)) and inputs and isinstance(inputs[0], str):
        return list(inputs)
    return None
