"""Triton's routing against torch's, on a CPU by the interpreter, or on a GPU."""

from __future__ import annotations

import torch

from sdt_deploy.config import HeadConfig, ModelConfig
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.runtime.device_attention import TorchAttention
from sdt_deploy.runtime.device_entry import TorchEntry
from sdt_deploy.runtime.device_head import TorchPooling
from sdt_deploy.runtime.device_plan import DevicePlan, TorchRouting
from sdt_deploy.runtime.ladders import Bucket, stage_bucket
from sdt_deploy.runtime.triton_attention import TritonAttention
from sdt_deploy.runtime.triton_entry import TritonEntry
from sdt_deploy.runtime.triton_pooling import TritonPooling
from sdt_deploy.runtime.triton_routing import TritonRouting


def check(device: str, n_cases: int, longest: int = 20, largest_batch: int = 6) -> None:
    """Compare everything on random batches with scores on thresholds, and empty sequences."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape or (1,), generator=generator)

    for case in range(n_cases):
        batch, seq, n_layers = (int(draw(1, n)) for n in (largest_batch, longest, 5))
        bucket = Bucket(n_tokens=batch * seq, batch=batch, max_seqlen=seq)
        lengths = draw(0, seq, batch)
        lengths[0] = max(1, int(lengths[0]))
        lengths = lengths.to(device)
        scores = (draw(0, 6, batch * seq).float() / 6).to(device)
        limits = (draw(0, 6, n_layers).float() / 6).sort().values.to(device)
        routings = (TorchRouting(), TritonRouting())
        plans = [DevicePlan.empty(torch, device, bucket, n_layers) for _ in routings]
        for routing, plan in zip(routings, plans, strict=True):
            routing.plan(scores, lengths, limits, plan)
        n_tokens = int(lengths.sum())
        for name in ("depths", "active_lengths", "counts", "grid"):
            ours, wanted = (getattr(plan, name) for plan in reversed(plans))
            assert torch.equal(ours, wanted), (case, name)
        for name in ("place", "slot", "row_depth"):
            ours, wanted = (getattr(plan, name)[:n_tokens] for plan in reversed(plans))
            assert torch.equal(ours, wanted), (case, name)
        states = torch.randn(batch * seq, 24, generator=generator).to(device)
        for layer in range(n_layers):
            n_active, width = plans[0].counts[:, layer].tolist()
            if not n_active:
                continue
            size = stage_bucket(n_active, width, bucket)
            rows = [torch.empty(size.n_tokens, 24, device=device) for _ in routings]
            found = []
            for routing, plan, out in zip(routings, plans, rows, strict=True):
                routing.take_rows(plan, states, out)
                moved = [states.clone(), states.clone()]
                for finished, target in zip((False, True), moved, strict=True):
                    routing.put_rows(plan, out * 2, layer, target, finished=finished)
                found.append([out[:n_tokens], *moved, *routing.stage_indices(plan, layer, size)])
            for wanted, ours in zip(*found, strict=True):
                assert torch.equal(ours, wanted), (case, layer)


def check_attention(device: str, n_cases: int, longest: int = 90, largest_batch: int = 4) -> None:
    """Compare attention on random plans: both places of keys, sequences without queries."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape or (1,), generator=generator)

    for case in range(n_cases):
        batch, seq, n_heads = (int(draw(1, n)) for n in (largest_batch, longest, 3))
        d_model = n_heads * (8, 16, 24, 32)[case % 4]
        bucket = Bucket(n_tokens=batch * seq, batch=batch, max_seqlen=seq)
        lengths = draw(1, seq, batch).to(device)
        scores = torch.rand(batch * seq, generator=generator).to(device)
        plan = DevicePlan.empty(torch, device, bucket, 2)
        TorchRouting().plan(scores, lengths, torch.tensor([0.3, 0.6], device=device), plan)
        for layer in range(2):
            n_active, width = plan.counts[:, layer].tolist()
            if not n_active:
                continue
            active = plan.active_lengths[layer]
            states = torch.randn(batch * seq, 3 * d_model, generator=generator).to(device)
            query, key, value = states.split(d_model, dim=1)
            query = query[: n_active + 3].contiguous()  # rows past the active ones are let be
            bias = torch.randn(d_model, generator=generator).to(device)
            for key_lengths, key_places in ((active, None), (lengths, seq)):
                found = [torch.full_like(query, 7.0) for _ in range(2)]
                for attend, out in zip((TorchAttention(), TritonAttention()), found, strict=True):
                    attend(
                        query,
                        key,
                        value,
                        out,
                        query_bias=bias,
                        n_heads=n_heads,
                        grid=plan.grid,
                        query_lengths=active,
                        key_lengths=key_lengths,
                        longest=width,
                        key_places=key_places,
                    )
                torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
                assert (found[1][n_active:] == 7.0).all(), case


def check_pooling(device: str, n_cases: int, longest: int = 90) -> None:
    """Compare means of sequences, of some without tokens; what stands in padding reaches nobody."""
    generator = torch.Generator().manual_seed(0)
    for case in range(n_cases):
        batch, seq, width = torch.randint(1, longest, (3,), generator=generator).tolist()
        states = torch.randn(batch, seq, 2 * width, generator=generator).to(device)
        lengths = torch.randint(0, seq + 1, (batch,), generator=generator).to(device)
        states[torch.arange(seq, device=device) >= lengths[:, None]] = float("nan")
        found = [pool(states, lengths) for pool in (TorchPooling(), TritonPooling())]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        assert (found[1][lengths == 0] == 0).all(), case


def check_entry(device: str, n_cases: int, longest: int = 20, largest_batch: int = 6) -> None:
    """Compare embedding and scores for all kinds of models; a row's do not depend on the others."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape or (1,), generator=generator)

    for case in range(n_cases):
        scored = case % 3 > 0
        config = ModelConfig(
            vocab_size=50,
            d_model=2 * int(draw(2, 40)),
            n_heads=2,
            n_layers=2,
            d_ff=8,
            max_positions=longest + 3,
            position_offset=case % 2 * 2,
            n_token_types=case % 2 * 3,
            embedding_norm=case % 4 > 0,
            probe="linear" if scored else "none",
            pinned_token_ids=(3, 7) if scored and case % 4 > 1 else (),
            head=HeadConfig(kind="hidden"),
        )
        torch.manual_seed(case)
        model = SparseDepthTransformer(config)
        tensors = {**model.state_dict(), **dict(model.named_buffers())}
        parameters = {name: tensor.to(device) for name, tensor in tensors.items()}
        shape = int(draw(1, largest_batch)), int(draw(1, longest))
        ids = draw(0, 49, *shape).int().to(device)
        types = draw(0, 2, *shape).int().to(device) if config.n_token_types else None
        found = []
        for entry in (TorchEntry(parameters, config), TritonEntry(parameters, config)):
            states = torch.empty(*shape, config.d_model, device=device)
            scores = torch.empty(shape, device=device)
            entry(ids, types, states, scores)
            found.append((states, scores))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        states, scores = (torch.empty_like(x[:1]) for x in found[1])
        TritonEntry(parameters, config)(
            ids[:1], None if types is None else types[:1], states, scores
        )
        assert torch.equal(states, found[1][0][:1]), case
        assert torch.equal(scores, found[1][1][:1]), case
