r"""Models that route a trained model's tokens in other ways, at the mean depth that it has.

    python benchmarks/routing_modes.py MODEL OUT --fit examples/texts/shakespeare.txt \
        --depth-on examples/texts/devils-dictionary.txt

MODEL is a native directory, trained for two levels with routing ``once``. Its weights stay as they
are; OUT gets a native directory for each way, to be exported, evaluated and benchmarked:

* ``capacity``: the probe of MODEL, each layer takes a fixed share of a text's tokens;
* ``graded``: the probe of MODEL with all depths instead of two, to tell levels and ways apart;
* ``exit-two``: one decision, by a probe on the states after the first layer;
* ``exit``, ``skip``: a decision at every layer, all depths;
* ``exit-converted``: as ``exit``, with the probes that ``convert --routing exit`` fits.

Probes are fitted to the rank, within its text, of what skipping a token costs, as that of the
adapter in this repository was; those of ``exit-converted`` to attention. Thresholds are set so that
the mean depth on ``--depth-on`` is that of MODEL: quality is to be compared at equal depth.
``docs/decisions/014-routing-modes.md`` holds the result.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch

from sdt_deploy.config import Leaving
from sdt_deploy.evaluation.oracle import embed_with_oracle
from sdt_deploy.model import checkpoints
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.conversion import rebuilt
from sdt_deploy.model.layer_probes import layer_thresholds, with_layer_probes
from sdt_deploy.model.probe import (
    Levels,
    TokenFeatures,
    capacity_thresholds,
    depth_shares,
    fit_probe,
    set_thresholds,
)
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.tokenization import TextTokenizer, read_lines
from sdt_deploy.training.calibration import free_logits
from sdt_deploy.training.skipping import measured_texts


def cost_features(
    model: SparseDepthTransformer, sample: TokenSample, max_tokens: int
) -> list[TokenFeatures]:
    """Return the states that come into each layer, beside the rank of what skipping costs.

    States are those of tokens that have passed through all layers before.
    """
    parts: list[list[torch.Tensor]] = [[] for _ in model.blocks]
    thresholds = model.config.thresholds
    measured = list(
        measured_texts(model, model.as_dense(), sample, thresholds, max_tokens=max_tokens)
    )
    for one in measured:
        hidden, mask = one.embedded, torch.ones_like(one.ids, dtype=torch.bool)[None]
        for states, layer in zip(parts, model.blocks, strict=True):
            states.append(hidden[0, one.free])
            hidden = layer(hidden, mask)
    n_free, n_all = sum(len(one.free) for one in measured), sum(len(one.ids) for one in measured)
    return [
        TokenFeatures(
            embedded=torch.cat(states),
            importance=torch.cat([one.ranks for one in measured]),
            position_ids=torch.cat([one.free for one in measured]),
            pinned_share=1 - n_free / n_all,
        )
        for states in parts
    ]


def ways(
    trained: Checkpoint, fit: TokenSample, depth_on: TokenSample, n_fit_tokens: int
) -> dict[str, SparseDepthTransformer]:
    """Return the models by name; see the module."""
    model = trained.model
    n_layers = model.config.n_layers
    depth = embed_with_oracle(model, depth_on).mean_depth
    logits, pinned_share = free_logits(model, depth_on)
    graded = set_thresholds(logits.sigmoid().numpy(), pinned_share, model.config, depth, "graded")
    capacities = capacity_thresholds(n_layers, depth, "two-level")
    found = {
        "graded": rebuilt(model, thresholds=graded),
        "capacity": rebuilt(model, selection="capacity", thresholds=capacities),
    }
    probes = [fit_probe(one) for one in cost_features(model, fit, n_fit_tokens)]

    def placed(made: SparseDepthTransformer, levels: Levels) -> SparseDepthTransformer:
        shares = depth_shares(n_layers, depth, levels)
        thresholds = layer_thresholds(made, depth_on, 1 - np.cumsum(shares) + shares)
        return rebuilt(made, thresholds=thresholds)

    def fitted(levels: Levels, leaving: Leaving) -> SparseDepthTransformer:
        made = rebuilt(model, routing="per_layer", leaving=leaving, thresholds=(0.0,) * n_layers)
        for i, (weight, bias) in enumerate(probes):
            made.scorer.weight[:, i], made.scorer.bias[i] = weight, bias
        return placed(made, levels)

    found["exit-two"] = fitted("two-level", "exit")
    found["exit"] = fitted("graded", "exit")
    found["skip"] = fitted("graded", "skip")
    shares = depth_shares(n_layers, depth, "graded")
    converted = with_layer_probes(model, fit, importance="attention", shares=shares, leaving="exit")
    found["exit-converted"] = placed(converted, "graded")
    return found


@torch.no_grad()
def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fit", type=Path, required=True, help="text for the probes")
    parser.add_argument("--depth-on", type=Path, required=True, help="text for the thresholds")
    parser.add_argument("--fit-tokens", type=int, default=20_000)
    arguments = parser.parse_args()
    trained = checkpoints.load(arguments.model)
    assert trained.tokenizer is not None
    tokenizer, longest = TextTokenizer(trained.tokenizer), trained.model.config.max_positions

    def sample(path: Path) -> TokenSample:
        ids, cu = tokenizer.encode(read_lines(path), max_length=longest, overflow="truncate")
        return TokenSample(input_ids=ids, cu_seqlens=cu)

    fit, depth_on = sample(arguments.fit), sample(arguments.depth_on)
    print(f"MODEL: mean depth {embed_with_oracle(trained.model, depth_on).mean_depth:.3f}")
    for name, model in ways(trained, fit, depth_on, arguments.fit_tokens).items():
        checkpoint = dataclasses.replace(trained, model=model, score_quantiles=None)
        checkpoints.save(checkpoint, arguments.out / name, overwrite=True)
        depth = embed_with_oracle(model, depth_on).mean_depth
        print(f"{name}: mean depth {depth:.3f}, thresholds {model.config.thresholds}")


if __name__ == "__main__":
    main()
