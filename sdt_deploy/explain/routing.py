"""The route of every token of a few texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sdt_deploy.bundle import TOKENIZER
from sdt_deploy.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class ExplainedText:
    """One sequence."""

    tokens: tuple[str, ...]
    """As written in the vocabulary, or the ids where the bundle has no tokenizer."""
    input_ids: npt.NDArray[np.int32]
    """``[n_tokens]``"""
    scores: npt.NDArray[np.float32]
    """``[n_tokens]``, or ``[n_tokens, n_layers]`` with routing ``per_layer``."""
    active: npt.NDArray[np.bool_]
    """``[n_tokens, n_layers]``, whether each layer processed each token."""

    @property
    def depths(self) -> npt.NDArray[np.int32]:
        """``[n_tokens]``, layers each token passed through."""
        found: npt.NDArray[np.int32] = self.active.sum(axis=1, dtype=np.int32)
        return found

    @property
    def mean_depth(self) -> float:
        """Layers per token."""
        return float(self.depths.mean())


def token_names(session: Session, ids: npt.NDArray[Any]) -> tuple[str, ...]:
    """Return tokens as written in the vocabulary, or the ids where there is no tokenizer."""
    named = session.bundle.has(TOKENIZER)
    return tuple(session.tokenizer.tokens(ids) if named else map(str, ids))


def explain(
    session: Session, inputs: npt.ArrayLike | str | Sequence[str], *, truncate: bool = False
) -> tuple[ExplainedText, ...]:
    """Run texts, or padded ids ``[batch, seq]``, on the sparse path and keep every token's route.

    Args:
        session: opened on a bundle.
        inputs: see :meth:`sdt_deploy.runtime.session.Session.run`.
        truncate: cut texts that are longer than the model's positions.

    Raises:
        InputError: if the inputs cannot be run.
    """
    result = session.run(inputs, path="sparse", overflow="truncate" if truncate else "error")
    assert result.scores is not None
    routes = (result.input_ids, result.scores, result.active_layers)
    parts = zip(*(result.split(each) for each in routes), strict=True)
    return tuple(
        ExplainedText(
            tokens=token_names(session, ids),
            input_ids=ids.astype(np.int32),
            scores=scores.astype(np.float32),
            active=taken.astype(np.bool_),
        )
        for ids, scores, taken in parts
    )
