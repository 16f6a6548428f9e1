"""Quality of a model or a bundle beside its dense teacher, on texts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdt_deploy.bundle import MANIFEST, Bundle, write_manifest
from sdt_deploy.errors import CheckpointError, InputError
from sdt_deploy.evaluation.agreement import agreement
from sdt_deploy.evaluation.oracle import Embedded, embed_with_oracle
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.conversion import load_any
from sdt_deploy.runtime.session import Session
from sdt_deploy.tokenization import TextTokenizer

BATCH_TEXTS = 32


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well a sparse model follows its teacher, and how deep its tokens went."""

    mean_cosine: float
    p5_cosine: float
    """5th percentile of the cosines."""
    spearman: float
    top1_agreement: float
    top10_agreement: float
    """See :class:`sdt_deploy.evaluation.agreement.Agreement` for these."""
    mean_depth: float
    """Layers per token, padding excluded, pinned tokens included."""
    n_texts: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return dataclasses.asdict(self)


def evaluate(subject: Path, teacher: Path, texts: Sequence[str], *, record: bool = True) -> Quality:
    """Compare ``subject`` with the dense ``teacher``; texts beyond the positions are cut.

    Args:
        subject: a bundle, which runs in a session, or any model that ``convert`` accepts, which
            runs in PyTorch.
        teacher: any model that ``convert`` accepts; every layer is run for every token.
        texts: at least three, of a kind that was not trained on.
        record: write the result into a bundle's manifest, in place of an earlier one.

    Raises:
        CheckpointError: if the teacher cannot be used, has no tokenizer or no embedding head.
        InputError: if there are too few texts, or the outputs have other widths.
        OutputError: if the record cannot be written.
    """
    dense = load_any(teacher)
    if dense.tokenizer is None:
        raise CheckpointError(f"{teacher} has no tokenizer, and texts are to be read")
    head = dense.model.config.head
    if head.kind != "embedding":
        raise CheckpointError(
            f"{teacher} has the head {head.kind!r}; quality is measured on embeddings. Give a "
            "teacher with the head 'embedding'"
        )
    if len(texts) < 3:
        raise InputError(f"at least 3 texts are needed to compare neighbours, not {len(texts)}")
    is_bundle = (subject / MANIFEST).exists()
    opened = Bundle.open(subject) if is_bundle else load_any(subject)
    config = opened.manifest.model if isinstance(opened, Bundle) else opened.model.config
    if config.head.kind != "embedding" or config.vocab_size != dense.model.config.vocab_size:
        raise CheckpointError(
            f"{subject} cannot be compared with {teacher}: head and vocabulary are "
            f"{config.head.kind}, {config.vocab_size} and {head.kind}, "
            f"{dense.model.config.vocab_size}"
        )
    longest = min(config.max_positions, dense.model.config.max_positions)
    ids, cu_seqlens = TextTokenizer(dense.tokenizer).encode(
        texts, max_length=longest, overflow="truncate"
    )
    sample = TokenSample(input_ids=ids, cu_seqlens=cu_seqlens)
    reference = embed_with_oracle(dense.model.as_dense(), sample)
    if isinstance(opened, Bundle):
        with Session.open(opened) as session:
            found = embed_with_session(session, sample)
    else:
        found = embed_with_oracle(opened.model, sample)
    values = dataclasses.asdict(agreement(found.embeddings, reference.embeddings))
    quality = Quality(**values, mean_depth=found.mean_depth)
    if isinstance(opened, Bundle) and record:
        content = "\n".join(texts).encode()
        kept = {
            **quality.to_dict(),
            "teacher": _name_of(dense, teacher),
            "texts_sha256": hashlib.sha256(content).hexdigest(),
        }
        write_manifest(subject, dataclasses.replace(opened.manifest, quality=kept))
    return quality


def embed_with_session(session: Session, sample: TokenSample) -> Embedded:
    """Run the sparse path of a bundle, in batches of similar lengths."""
    lengths = np.diff(sample.cu_seqlens)
    order = np.argsort(lengths, kind="stable")
    config = session.manifest.model
    output = np.zeros((len(lengths), config.output_width), dtype=np.float32)
    histogram = np.zeros(config.n_layers + 1, dtype=np.int64)
    for start in range(0, len(order), BATCH_TEXTS):
        chosen = order[start : start + BATCH_TEXTS]
        parts = [sample.input_ids[sample.cu_seqlens[i] : sample.cu_seqlens[i + 1]] for i in chosen]
        cu_seqlens = np.cumsum([0, *map(len, parts)])
        result = session.run(np.concatenate(parts), cu_seqlens, path="sparse")
        output[chosen] = result.output
        histogram += np.asarray(result.layer_usage.depth_histogram)
    return Embedded(embeddings=output, depth_histogram=histogram)


def _name_of(teacher: Checkpoint, path: Path) -> str:
    return str(teacher.provenance.get("source") or path.name)
