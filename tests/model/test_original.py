"""The original research code's checkpoint layout, against a plain re-derivation of its forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sdt_deploy.errors import CheckpointError
from sdt_deploy.model.original import load_original

D, LAYERS, VOCAB, POSITIONS = 16, 4, 37, 24


class OriginalLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(D)
        self.attn = nn.MultiheadAttention(D, 2, batch_first=True)
        self.ln2 = nn.LayerNorm(D)
        self.ff = nn.Sequential(nn.Linear(D, 32), nn.ReLU(), nn.Linear(32, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.ln1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.ff(self.ln2(x))


class Original(nn.Module):
    """Re-derived from the description of the checkpoint: flatten the kept tokens, run, put back."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.pos_embed = nn.Embedding(POSITIONS, D)
        if sparse:
            self.semantic_scorer = nn.ModuleDict({"fc": nn.Linear(D, 1)})
        self.layers = nn.ModuleList(OriginalLayer() for _ in range(LAYERS))
        self.ln_final = nn.LayerNorm(D)
        self.head = nn.Linear(D, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.pos_embed(torch.arange(ids.shape[1]))
        scores = None
        if hasattr(self, "semantic_scorer"):
            scores = torch.sigmoid(self.semantic_scorer["fc"](x)).squeeze(-1)
        for i, layer in enumerate(self.layers):
            if scores is None:
                x = layer(x)
                continue
            kept = scores > i / LAYERS
            if kept.any():
                x = x.clone()
                x[kept] = layer(x[kept][None])[0]
        return self.head(self.ln_final(x))


@pytest.mark.parametrize("sparse", [True, False])
@torch.no_grad()
def test_agrees_at_batch_1(tmp_path: Path, sparse: bool) -> None:
    torch.manual_seed(0)
    original = Original(sparse).eval()
    if sparse:
        original.semantic_scorer["fc"].weight.mul_(4)
    torch.save(original.state_dict(), tmp_path / "model.pt")
    model = load_original(tmp_path / "model.pt").model
    assert model.config.n_heads == 2
    assert model.config.context == "active"
    assert model.config.thresholds == (0.0, 0.25, 0.5, 0.75)
    ids = torch.randint(0, VOCAB, (1, POSITIONS))
    found = model(ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(found.output, original(ids), atol=1e-5, rtol=0)
    assert (len(found.depths.unique()) > 2) == sparse


@torch.no_grad()
def test_sequences_do_not_see_each_other_here(tmp_path: Path) -> None:
    """The original mixes the sequences of a batch; here each gives what it gives alone."""
    torch.manual_seed(1)
    original = Original(True).eval()
    torch.save(original.state_dict(), tmp_path / "model.pt")
    model = load_original(tmp_path / "model.pt").model
    ids = torch.randint(0, VOCAB, (2, 11))
    mask = torch.ones_like(ids, dtype=torch.bool)
    both = model(ids, mask).output
    torch.testing.assert_close(both[:1], model(ids[:1], mask[:1]).output, atol=1e-5, rtol=0)
    assert (both - original(ids)).abs().max() > 1e-3


def test_bad_files_are_typed_errors(tmp_path: Path) -> None:
    state = Original(True).state_dict()
    del state["layers.1.ln1.weight"]
    state["surprise"] = torch.zeros(1)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"missing: layers\.1\.attention_norm\.weight"
    ) as error:
        load_original(tmp_path / "a.pt")
    assert "unexpected: surprise" in str(error.value)
    torch.save({"embed.weight": torch.zeros(3, 4)}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"no pos_embed\.weight"):
        load_original(tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_original(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("pos_embed", torch.zeros(5)),
        ("embed.weight", torch.zeros(5)),
        ("semantic_scorer.fc.bias", torch.zeros(2)),
        ("layers.0.attn.in_proj_weight", torch.zeros(2, D)),
        ("layers.0.ff.0.weight", torch.zeros(())),
        (7, torch.zeros(1)),
    ],
)
def test_odd_shapes_are_typed_errors(name: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({**Original(True).state_dict(), name: tensor}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError):
        load_original(tmp_path / "odd.pt")


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code ran')",))


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    torch.save({"embed.weight": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="code in it is not run"):
        load_original(tmp_path / "evil.pt")
