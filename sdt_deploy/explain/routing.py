"""The route of every token of a few texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdt_deploy.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class ExplainedText:
    """One sequence; all arrays are ``[n_tokens]``."""

    tokens: tuple[str, ...]
    """As written in the vocabulary, or the ids where the bundle has no tokenizer."""
    input_ids: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    depths: npt.NDArray[np.int32]

    def activity(self, n_layers: int) -> npt.NDArray[np.bool_]:
        """Return ``[n_tokens, n_layers]``: whether each layer processed each token."""
        return self.depths[:, None] > np.arange(n_layers)

    @property
    def mean_depth(self) -> float:
        """Layers per token."""
        return float(self.depths.mean())


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
    named = session.bundle.has("tokenizer.json")
    parts = zip(
        *(result.split(each) for each in (result.input_ids, result.scores, result.depths)),
        strict=True,
    )
    return tuple(
        ExplainedText(
            tokens=tuple(session.tokenizer.tokens(ids) if named else map(str, ids)),
            input_ids=ids.astype(np.int32),
            scores=scores.astype(np.float32),
            depths=depths.astype(np.int32),
        )
        for ids, scores, depths in parts
    )
