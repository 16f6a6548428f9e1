"""What the student is held to, per kind of head."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sdt_deploy.errors import ConfigError
from sdt_deploy.model.blocks import Head


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms; those that have no meaning for a head are left out."""

    output: float = 1.0
    """``embedding``: 1 − cosine. ``lm`` and ``classify``: KL divergence of the logits."""
    neighbours: float = 0.3
    """``embedding``: KL divergence of the softmaxed similarities of a text to others."""
    hidden: float = 1.0
    """Distance of the last states per token, relative to the teacher's."""
    shallow: float = 1.0
    """``hidden``: weight of the tokens that do not pass through all layers. Their states are seen
    by the output alone, and can hardly be those of the teacher."""
    temperature: float = 0.05
    """Of the similarities' softmax; the lower, the more the nearest neighbours count."""

    def __post_init__(self) -> None:
        values = (self.output, self.neighbours, self.hidden)
        allowed = all(0 <= value < float("inf") for value in (*values, self.shallow))
        if not allowed or not sum(values) > 0:
            raise ConfigError(f"loss weights must be 0 or more, and not all 0: {values}")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"the loss temperature must be positive, not {self.temperature}")


class TeacherMemory:
    """The teacher's embeddings of the texts seen last: whom a text may resemble.

    A batch alone holds few of the neighbours that a text has (He et al., 2020, keep such a queue).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._parts: deque[Tensor] = deque()

    def add(self, embeddings: Tensor) -> None:
        """Add ``[batch, width]``; the oldest leave when more than ``size`` are held."""
        self._parts.append(embeddings.detach())
        while sum(map(len, self._parts)) - len(self._parts[0]) >= self.size:
            self._parts.popleft()

    def rows(self) -> Tensor | None:
        """Return ``[n, width]``, oldest first, ``n ≤ size``; None if nothing was added."""
        return torch.cat(list(self._parts))[-self.size :] if self._parts and self.size else None


def neighbour_loss(
    student: Tensor, teacher: Tensor, memory: Tensor | None, temperature: float
) -> Tensor:
    """Return the KL divergence of the similarity distributions, averaged over the texts.

    For each text: softmax over its similarities to the other texts of the batch, and to the
    memory. Texts of the batch are compared student with student and teacher with teacher; the
    memory holds teacher embeddings only.

    Args:
        student: ``[batch, width]``, unit length.
        teacher: ``[batch, width]``, unit length.
        memory: ``[n, width]``, unit length, or None.
        temperature: of the softmax.
    """

    def similarities(rows: Tensor) -> Tensor:
        within = rows @ rows.T
        within = within.masked_fill(torch.eye(len(rows), dtype=torch.bool, device=rows.device), -2)
        found = within if memory is None else torch.cat([within, rows @ memory.T], dim=1)
        return (found.float() / temperature).log_softmax(dim=1)

    return F.kl_div(
        similarities(student), similarities(teacher), reduction="batchmean", log_target=True
    )


def token_loss(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Return the squared distance of states over the teacher's squared length.

    Args:
        student: ``[batch, seq, d_model]``.
        teacher: ``[batch, seq, d_model]``.
        weight: ``[batch, seq]``, 0 for padding.
    """
    weight = weight.float()[..., None]
    distance = ((student.float() - teacher.float()).square() * weight).sum()
    return distance / (teacher.float().square() * weight).sum().clamp_min(1e-9)


def distillation_loss(
    head: Head,
    student: Tensor,
    teacher: Tensor,
    teacher_head: Head,
    mask: Tensor,
    weights: LossWeights,
    memory: TeacherMemory,
    deep: Tensor | None = None,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return the loss and its terms, before they are weighted.

    Args:
        head: of the student.
        student: ``[batch, seq, d_model]``, last states.
        teacher: ``[batch, seq, d_model]``, last states.
        teacher_head: of the teacher.
        mask: ``[batch, seq]`` bool.
        weights: of the terms.
        memory: the teacher's embeddings of earlier batches; those of this one are added.
        deep: ``[batch, seq]`` bool, the tokens that passed through all layers; None: all did.
    """
    terms: dict[str, Tensor] = {}
    kind = head.config.kind
    if kind != "hidden":
        with torch.no_grad():
            wanted = teacher_head(teacher, mask).float()
        found = head(student, mask).float()
        if kind == "embedding":
            found, wanted = F.normalize(found, dim=-1), F.normalize(wanted, dim=-1)
            terms["output"] = 1 - (found * wanted).sum(dim=-1).mean()
            if weights.neighbours and len(found) > 1:
                terms["neighbours"] = neighbour_loss(
                    found, wanted, memory.rows(), weights.temperature
                )
                memory.add(wanted)
        else:
            if not head.config.per_sequence:
                found, wanted = found[mask], wanted[mask]
            terms["output"] = F.kl_div(
                found.log_softmax(-1),
                wanted.log_softmax(-1),
                reduction="batchmean",
                log_target=True,
            )
    if weights.hidden or kind == "hidden":
        weight = mask.float()
        if deep is not None:
            weight = torch.where(deep, weight, weights.shallow * weight)
        terms["hidden"] = token_loss(head.normed(student), teacher_head.normed(teacher), weight)
    total = torch.zeros((), device=student.device)
    for name, term in terms.items():
        total = total + (1.0 if kind == "hidden" else getattr(weights, name)) * term
    return total, terms
