"""Quality of a model or a bundle beside its dense teacher, on texts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sdt_deploy.bundle import Bundle, write_manifest
from sdt_deploy.bundle_files import MANIFEST
from sdt_deploy.config import ModelConfig
from sdt_deploy.errors import CheckpointError, InputError
from sdt_deploy.evaluation.agreement import agreement
from sdt_deploy.evaluation.oracle import Embedded, embed_with_oracle
from sdt_deploy.files import check_writable
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.conversion import at_depth, encoded, load_any
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.splitting import rows_of

BATCH_TEXTS = 32
Subject = Bundle | Checkpoint
Embed = Callable[[TokenSample, float | None], Embedded]
"""Takes texts and a mean depth to aim at; None: the thresholds that the subject has."""


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


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a dense teacher makes of texts."""

    teacher: str
    """Its name."""
    config: ModelConfig
    """Of the teacher."""
    sample: TokenSample
    embeddings: npt.NDArray[np.float32]
    """``[n_texts, width]``"""
    texts_sha256: str

    def quality(self, found: Embedded) -> Quality:
        """Compare embeddings of the same texts."""
        values = dataclasses.asdict(agreement(found.embeddings, self.embeddings))
        return Quality(**values, mean_depth=found.mean_depth)


def open_subject(path: Path) -> Subject:
    """Open a bundle, or any model that ``convert`` accepts."""
    return Bundle.open(path) if (path / MANIFEST).exists() else load_any(path)


def config_of(subject: Subject) -> ModelConfig:
    """Return the config of the model."""
    return subject.manifest.model if isinstance(subject, Bundle) else subject.model.config


def reference_of(
    teacher: Path, texts: Sequence[str], subjects: Sequence[tuple[Path, Subject]]
) -> Reference:
    """Run every layer of the dense ``teacher`` for every token; texts are cut at the positions.

    Args:
        teacher: any model that ``convert`` accepts.
        texts: at least three.
        subjects: what will be compared with it, and where each came from.

    Raises:
        CheckpointError: if the teacher cannot be used, has no tokenizer or no embedding head, or a
            subject cannot be compared with it.
        InputError: if there are too few texts.
    """
    dense = load_any(teacher)
    own = dense.model.config
    if own.head.kind != "embedding":
        raise CheckpointError(
            f"{teacher} has the head {own.head.kind!r}; quality is measured on embeddings. Give a "
            "teacher with the head 'embedding'"
        )
    if len(texts) < 3:
        raise InputError(f"at least 3 texts are needed to compare neighbours, not {len(texts)}")
    for path, subject in subjects:
        config = config_of(subject)
        if config.head.kind != "embedding" or config.vocab_size != own.vocab_size:
            raise CheckpointError(
                f"{path} cannot be compared with {teacher}: head and vocabulary are "
                f"{config.head.kind}, {config.vocab_size} and {own.head.kind}, {own.vocab_size}"
            )
    longest = min(own.max_positions, *(config_of(subject).max_positions for _, subject in subjects))
    (sample,) = encoded(dense, longest, texts)
    return Reference(
        teacher=str(dense.provenance.get("source") or teacher.name),
        config=own,
        sample=sample,
        embeddings=embed_with_oracle(dense.model.as_dense(), sample).embeddings,
        texts_sha256=hashlib.sha256("\n".join(texts).encode()).hexdigest(),
    )


def evaluate(subject: Path, teacher: Path, texts: Sequence[str], *, record: bool = True) -> Quality:
    """Compare ``subject`` with the dense ``teacher``; texts beyond the positions are cut.

    Args:
        subject: a bundle, which runs in a session, or any model that ``convert`` accepts, which
            runs in PyTorch.
        teacher: any model that ``convert`` accepts; every layer is run for every token.
        texts: at least three, of a kind that was not trained on.
        record: write the result into a bundle's manifest, in place of an earlier one.

    Raises:
        BundleIntegrityError: if the bundle was removed or exported anew meanwhile.
        CheckpointError: if the teacher cannot be used, has no tokenizer or no embedding head.
        InputError: if there are too few texts, or the outputs have other widths.
        OutputError: if the record cannot be written.
    """
    opened = open_subject(subject)
    if isinstance(opened, Bundle) and record:
        check_writable(subject / MANIFEST)
    reference = reference_of(teacher, texts, [(subject, opened)])
    with embedder(opened) as embed:
        quality = reference.quality(embed(reference.sample, None))
    if isinstance(opened, Bundle) and record:
        kept = {
            **quality.to_dict(),
            "teacher": reference.teacher,
            "texts_sha256": reference.texts_sha256,
        }
        write_manifest(subject, dataclasses.replace(opened.current(), quality=kept))
    return quality


@contextmanager
def embedder(subject: Subject) -> Iterator[Embed]:
    """Give a function that embeds texts: in a session for a bundle, else in PyTorch."""
    if isinstance(subject, Bundle):
        with Session.open(subject) as session:
            yield lambda sample, depth: embed_with_session(session, sample, target_depth=depth)
        return

    def embed(sample: TokenSample, depth: float | None) -> Embedded:
        placed = subject if depth is None else at_depth(subject, depth)
        return embed_with_oracle(placed.model, sample)

    yield embed


def embed_with_session(
    session: Session, sample: TokenSample, *, target_depth: float | None = None
) -> Embedded:
    """Run the sparse path of a bundle, in batches of similar lengths.

    Args:
        session: of the bundle.
        sample: the texts.
        target_depth: see :meth:`Session.run`; None: the thresholds of the bundle.
    """
    lengths = np.diff(sample.cu_seqlens)
    order = np.argsort(lengths, kind="stable")
    output = np.zeros((len(lengths), session.manifest.model.output_width), dtype=np.float32)
    depths = np.zeros(len(sample.input_ids), dtype=np.int32)
    for start in range(0, len(order), BATCH_TEXTS):
        chosen = order[start : start + BATCH_TEXTS]
        rows = rows_of(sample.cu_seqlens, chosen)
        cu_seqlens = np.cumsum([0, *lengths[chosen]])
        result = session.run(
            sample.input_ids[rows], cu_seqlens, path="sparse", target_depth=target_depth
        )
        output[chosen] = result.output
        depths[rows] = result.depths
    return Embedded(embeddings=output, depths=depths)
