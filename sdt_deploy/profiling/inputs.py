"""The batch that is profiled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy.typing as npt

from sdt_deploy.bench.cases import check_cases, parse_cases, token_source
from sdt_deploy.bundle import Bundle
from sdt_deploy.errors import InputError
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.inputs import read_batch
from sdt_deploy.tokenization import TextTokenizer

DEFAULT_BATCH, DEFAULT_SEQ = 8, 128


def profiled_batch(
    bundle: Bundle, case: str | None, inputs: npt.ArrayLike | str | Sequence[str] | None
) -> TokenBatch:
    """Return the batch to profile.

    Args:
        bundle: what will run it.
        case: ``BATCHxSEQ``, filled from the bundle's text sample; None: 8x128, or as long as the
            positions reach.
        inputs: texts or padded ids to take instead; texts are cut to the model's positions.

    Raises:
        InputError: if they cannot be run.
    """
    config = bundle.manifest.model
    if inputs is None:
        default = f"{DEFAULT_BATCH}x{min(DEFAULT_SEQ, config.max_positions)}"
        sizes = parse_cases(case or default)
        if len(sizes) != 1:
            raise InputError(f"one case is profiled at a time, not {len(sizes)}")
        check_cases(sizes, config.max_positions)
        return token_source(bundle).batches(*sizes[0], bundle)[0]

    batch, _ = read_batch(
        inputs,
        None,
        None,
        None,
        config=config,
        overflow="truncate",
        tokenizer=partial(TextTokenizer.of, bundle),
    )
    return batch
