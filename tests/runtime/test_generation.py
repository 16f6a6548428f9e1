"""Generation over caches: what the oracle says of the whole sequence, at every step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sdt_deploy.bundle import Bundle
from sdt_deploy.config import ExportConfig, HeadConfig, ModelConfig, RotaryConfig
from sdt_deploy.errors import BackendError, ConfigError, InputError, RunCancelledError
from sdt_deploy.exporters.export import export
from sdt_deploy.external_data import external_tensors
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.runtime.caches import LayerCache, NewTokens
from sdt_deploy.runtime.generation import Sampling, generate
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.splitting import PartLimits
from sdt_deploy.testing import OracleBackend, memory_bundle
from tests.samples import (
    CONFIGS,
    TOLERANCE,
    assert_generates_as_oracle,
    in_threads,
    llama_like,
    model_configs,
    random_model,
)

GPT2 = ModelConfig(
    vocab_size=47,
    d_model=24,
    n_heads=3,
    n_layers=3,
    d_ff=40,
    max_positions=40,
    activation="gelu_tanh",
    causal=True,
    thresholds=(0.15, 0.4, 0.65),
    head=HeadConfig(kind="lm", bias=False),
)
LLAMA = GPT2.replace(
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
    rotary=RotaryConfig(theta=100.0),
    activation="silu",
    gated=True,
    attention_bias=False,
    feed_forward_bias=False,
    norm="rms",
)
EXIT = {"routing": "per_layer", "thresholds": (0.2, 0.5, 0.45)}
PROMPTS = [[5, 3, 8, 9, 11, 2, 7], [4], [1, 30, 22, 14, 6, 6, 6, 6, 41, 3, 12, 13], [9, 9]]
LENGTHS = [len(prompt) for prompt in PROMPTS]
PACKED = [token for prompt in PROMPTS for token in prompt]
CU = np.cumsum([0, *LENGTHS])


def session_of(model: SparseDepthTransformer) -> Session:
    bundle = memory_bundle(model)
    return Session(bundle, OracleBackend(bundle, model))


def far_from(scores: np.ndarray, thresholds: tuple[float, ...]) -> bool:
    return bool(np.abs(scores[..., None] - np.array(thresholds)).min() > 1e-4)


@pytest.mark.parametrize("layout", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("context", ["active", "all"])
@pytest.mark.parametrize(
    "way", [{}, EXIT, {**EXIT, "leaving": "skip"}], ids=["once", "exit", "skip"]
)
def test_logits_of_every_step(layout: ModelConfig, context: str, way: dict[str, object]) -> None:
    model = random_model(layout.replace(context=context, pinned_token_ids=(5,), **way), 3)
    result = generate(session_of(model), PACKED, CU, max_new_tokens=17, return_logits=True)
    assert [len(tokens) for tokens in result.tokens] == [17] * 4
    depths = np.concatenate([active.sum(axis=1) for active in result.active])
    assert set(depths) >= {1, 2, 3}  # tokens leave early, at different layers
    assert_generates_as_oracle(model, result, model.config.thresholds)
    for tokens, logits in zip(result.tokens, result.logits or (), strict=True):
        np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


@given(
    data=st.data(),
    drawn=model_configs(causal=True),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_any_model(
    data: st.DataObject, drawn: tuple[ModelConfig, ExportConfig], lengths: list[int], seed: int
) -> None:
    # Without a final norm logits grow to 20 and more, and rounding with them.
    config = drawn[0].replace(causal=True, head=HeadConfig(kind="lm"), final_norm=True)
    assume(config.d_model >= 8)  # norms of two values magnify rounding without bounds
    if data.draw(st.booleans()):
        config = data.draw(llama_like(config))
    if data.draw(st.booleans()):
        config = config.replace(
            routing="per_layer", leaving=data.draw(st.sampled_from(["exit", "skip"]))
        )
    model = random_model(config, seed % 1000)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config.vocab_size, sum(lengths))
    cu = np.cumsum([0, *lengths])
    limits = tuple(np.sort(rng.uniform(0, 1, config.n_layers)).tolist())
    result = generate(
        session_of(model),
        ids,
        cu,
        max_new_tokens=6,
        temperature=1.0,
        seed=seed,
        thresholds=limits,
        return_logits=True,
    )
    for prompt, new in zip(result.prompts, result.tokens, strict=True):
        whole = np.concatenate([prompt, new])
        ends = np.array([0, len(whole)], dtype=np.int32)
        if not far_from(oracle_output(model, whole, ends, thresholds=limits).scores, limits):
            return  # rounding could flip a depth
    assert_generates_as_oracle(model, result, limits)


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[SparseDepthTransformer, Session]]:
    """A Llama with early exit; of GPT-2, ``tests/model/test_gpt2.py`` exports one."""
    model = random_model(LLAMA.replace(context="active", **EXIT), 5)
    path = tmp_path_factory.mktemp("generation") / "bundle"
    export(Checkpoint(model=model, provenance={}), path)
    with Session.open(path) as session:
        yield model, session


def test_exported(exported: tuple[SparseDepthTransformer, Session]) -> None:
    model, session = exported
    result = generate(session, PACKED, CU, max_new_tokens=20, return_logits=True)
    assert_generates_as_oracle(model, result, model.config.thresholds)
    assert result.n_steps == 19
    shallow = generate(session, PACKED, CU, max_new_tokens=20, thresholds=(0.4, 0.8, 0.9))
    assert shallow.cache.n_bytes < result.cache.n_bytes < result.cache.dense_bytes
    assert shallow.cache.saved_bytes > result.cache.saved_bytes
    assert 0 < shallow.cache.ratio < result.cache.ratio < 1


def test_graphs_of_generation_store_no_weight_again(
    exported: tuple[SparseDepthTransformer, Session],
) -> None:
    """Layer by layer they name the places in the weights file that the stages name."""
    bundle = exported[1].bundle

    def places(name: str) -> set[tuple[str, int, int]]:
        tensors = external_tensors((bundle.path / f"{name}.onnx").read_bytes())
        return {(one.location, one.offset, one.length) for one in tensors}

    for number in range(3):
        found = places(f"decode-{number:02d}")
        assert found == places(f"stage-{number:02d}")
        assert len(found) >= 9


def test_neighbours_and_parts_change_nothing(
    exported: tuple[SparseDepthTransformer, Session],
) -> None:
    _, session = exported
    together = generate(session, PACKED, CU, max_new_tokens=9, return_logits=True)
    limits = PartLimits(max_padded_tokens=12)  # prompts are run in several parts
    cut = Session(session.bundle, session.backend, part_limits=limits)
    parts = generate(cut, PACKED, CU, max_new_tokens=9, return_logits=True)
    padded = np.zeros((4, 12), dtype=int)
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    mask = np.arange(12) < np.array(LENGTHS)[:, None]
    from_padded = generate(session, padded, attention_mask=mask, max_new_tokens=9)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(session, [prompt], max_new_tokens=9, return_logits=True)
        for other in (parts, together):
            np.testing.assert_array_equal(alone.tokens[0], other.tokens[i])
            assert alone.logits is not None
            assert other.logits is not None
            np.testing.assert_allclose(alone.logits[0], other.logits[i], atol=TOLERANCE, rtol=0)
        np.testing.assert_array_equal(alone.tokens[0], from_padded.tokens[i])
    assert parts.cache == together.cache


def test_sequences_that_end_are_not_run(
    exported: tuple[SparseDepthTransformer, Session],
) -> None:
    _, session = exported
    free = generate(session, PACKED, CU, max_new_tokens=12)
    end = int(free.tokens[1][3])
    result = generate(session, PACKED, CU, max_new_tokens=12, eos_token_id=[end])
    for found, before in zip(result.tokens, free.tokens, strict=True):
        places = np.flatnonzero(before == end)
        n_new = int(places[0]) + 1 if len(places) else 12
        np.testing.assert_array_equal(found, before[:n_new])
    np.testing.assert_array_equal(result.ended, [end in tokens for tokens in free.tokens])
    assert result.ended[1]
    n_run = [len(active) for active in result.active]
    assert n_run == [n + len(t) - 1 for n, t in zip(LENGTHS, result.tokens, strict=True)]
    every = generate(session, PACKED, CU, max_new_tokens=12, eos_token_id=list(range(47)))
    assert every.n_steps == 0
    assert [len(tokens) for tokens in every.tokens] == [1] * 4


def test_threads_share_a_session(exported: tuple[SparseDepthTransformer, Session]) -> None:
    _, session = exported
    alone = [generate(session, [prompt], max_new_tokens=8) for prompt in PROMPTS]

    def work(i: int) -> None:
        for _ in range(3):
            found = generate(session, [PROMPTS[i]], max_new_tokens=8)
            np.testing.assert_array_equal(found.tokens[0], alone[i].tokens[0])
            assert found.cache == alone[i].cache

    in_threads(len(PROMPTS), work)


def test_draws(exported: tuple[SparseDepthTransformer, Session]) -> None:
    _, session = exported
    options = {"max_new_tokens": 10, "temperature": 1.5}

    def drawn(**more: object) -> list[list[int]]:
        found = generate(session, PACKED, CU, **{**options, **more})  # type: ignore[arg-type]
        return [tokens.tolist() for tokens in found.tokens]

    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)
    greedy = drawn(temperature=0.0)
    assert drawn(top_k=1) == greedy
    assert drawn(temperature=1e-6) == drawn(temperature=1e-320) == greedy
    assert drawn(top_k=47) == drawn()


def test_choosing_a_token() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], dtype=np.float32))
    rng = np.random.default_rng(0)

    def shares(sampling: Sampling) -> np.ndarray:
        drawn = [sampling.choose(logits, rng) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(shares(Sampling(temperature=1.0)), [0.1, 0.4, 0.2, 0.3], atol=0.04)
    warm = np.sqrt([0.1, 0.4, 0.2, 0.3])
    np.testing.assert_allclose(shares(Sampling(temperature=2.0)), warm / warm.sum(), atol=0.04)
    with np.errstate(all="raise"):
        assert Sampling(temperature=np.float32(0.001)).choose(  # type: ignore[arg-type]
            np.array([0, 90, 1], dtype=np.float32), np.random.default_rng(0)
        )
    with pytest.raises(InputError, match="temperature above 0"):
        Sampling(top_k=3)
    two = shares(Sampling(temperature=1.0, top_k=2))
    np.testing.assert_allclose(two, [0, 4 / 7, 0, 3 / 7], atol=0.04)
    assert Sampling().choose(np.array([1.0, 3.0, 3.0], dtype=np.float32), rng) == 1


def test_rows_of_each_layer() -> None:
    model = random_model(GPT2, 3)
    bundle = memory_bundle(model)
    backend = OracleBackend(bundle, model)
    result = generate(Session(bundle, backend), PACKED, CU, max_new_tokens=8)
    n_rows = dict.fromkeys(("decode-00", "decode-01", "decode-02"), 0)
    for call in backend.calls:
        n_rows[call.stage] += call.n_rows
    assert tuple(n_rows.values()) == result.layer_usage.active_tokens


def test_keys_are_not_made_before_they_are_seen() -> None:
    """With context all, a layer that takes nobody makes no keys; who waits is kept once."""
    model = random_model(GPT2, 3)
    session = session_of(model)
    shallow = generate(session, PACKED, CU, max_new_tokens=5, thresholds=(0.0, 1.0, 1.0))
    n_run = sum(LENGTHS) + 4 * 4
    assert shallow.cache.layer_tokens == (n_run, 0, 0)
    token_bytes = 2 * 4 * 24
    assert shallow.cache.n_bytes == n_run * token_bytes + n_run * 4 * 24
    full = generate(session, PACKED, CU, max_new_tokens=5, thresholds=(-1.0,) * 3)
    assert full.cache.n_bytes == full.cache.dense_bytes == 3 * n_run * token_bytes


def test_cache_keeps_rows_apart_and_grows() -> None:
    rng = np.random.default_rng(0)
    cache = LayerCache(5, 3)
    expected: list[list[float]] = [[] for _ in range(5)]
    for number in range(40):
        sequences = np.sort(rng.integers(0, 5, rng.integers(1, 9)))
        added = cache.extend(sequences)
        added.keys[:] = np.arange(len(sequences))[:, None] + 100 * number
        added.values[:] = -added.keys
        for i, sequence in enumerate(sequences):
            assert added.places[i] == len(expected[sequence])
            expected[sequence].append(float(added.keys[i, 0]))
    after = cache.extend(np.array([2]))
    expected[2].append(float("nan"))
    after.keys[:] = np.nan
    index, bias = cache.layout(np.array([3, 2]), 2)
    keys = np.concatenate([after.past_keys, after.keys])
    values = np.concatenate([after.past_values, after.values])
    for row, sequence in enumerate((3, 2)):
        n = len(expected[sequence])
        np.testing.assert_array_equal(index[row, 1], index[row, 0] + 1)
        np.testing.assert_array_equal(keys[index[row, 0, :n] // 2, 0], expected[sequence])
        np.testing.assert_array_equal(
            values[index[row, 0, : n - 1] // 2, 0], -keys[index[row, 0, : n - 1] // 2, 0]
        )
        assert (bias[row, :, :n] == 0).all()
        assert (bias[row, :, n:] < -1e37).all()
        assert (index[row, 0, n:] == 0).all()
    assert cache.n_tokens == sum(map(len, expected))
    assert cache.n_bytes == cache.n_tokens * 2 * 3 * 4


def test_who_waits_comes_before_the_others() -> None:
    cache = LayerCache(2, 3)
    old = NewTokens(sequences=np.array([0, 1]), positions=np.array([4, 7], dtype=np.int32))
    new = NewTokens(sequences=np.array([1]), positions=np.array([8], dtype=np.int32))
    cache.wait(np.zeros((2, 6), dtype=np.float32), old)
    states, tokens = cache.with_waiting(np.ones((1, 6), dtype=np.float32), new)
    assert states[:, 0].tolist() == [0, 0, 1]
    assert tokens.sequences.tolist() == [0, 1, 1]
    assert tokens.positions.tolist() == [4, 7, 8]
    assert not cache.waiting


def test_what_makes_no_sense(tmp_path: Path) -> None:
    model = random_model(GPT2, 3)
    session = session_of(model)
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"max_new_tokens": 29}, "take max_new_tokens=28 at most"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_k": 0}, "top_k must be in 1.."),
        ({"seed": -1}, "seed must be in 0.."),
        ({"eos_token_id": 47}, "a token below 47"),
        ({"eos_token_id": "a"}, "a token below 47"),
        ({"attention_mask": [1]}, "cu_seqlens with packed ids or attention_mask"),
    ):
        with pytest.raises(InputError, match=message):
            generate(session, PACKED, CU, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"shorten the prompt$"):
        generate(session, np.zeros((1, GPT2.max_positions), dtype=int), max_new_tokens=1)
    with pytest.raises(ConfigError, match="one per layer"):
        generate(session, PACKED, CU, max_new_tokens=3, thresholds=(0.1,))
    with pytest.raises(InputError, match="no tokenizer"):
        generate(session, "a text")
    stop = threading.Event()
    stop.set()
    with pytest.raises(RunCancelledError):
        generate(session, PACKED, CU, max_new_tokens=3, cancel=stop)
    others = (
        GPT2.replace(head=HeadConfig()),
        GPT2.replace(selection="capacity"),
        CONFIGS["active-lm"][0],
    )
    for config in others:
        with pytest.raises(InputError, match="generation needs causal attention, head 'lm'"):
            generate(session_of(random_model(config, 0)), PACKED, CU)
    bundle = session.bundle
    graphs = {name: spec for name, spec in bundle.manifest.graphs.items() if "decode" not in name}
    manifest = type(bundle.manifest)(
        model=GPT2, export=ExportConfig(), graphs=graphs, files={}, created_by={}
    )
    old = Bundle(path=Path("memory"), manifest=manifest)
    with pytest.raises(InputError, match="no graphs for generation: export the model again"):
        generate(Session(old, OracleBackend(old, model)), PACKED, CU)


@pytest.mark.parametrize("limit", [0.99, 1.0, 2.0])
@pytest.mark.parametrize("way", [{}, EXIT], ids=["once", "exit"])
def test_pinned_tokens_have_the_score_1(limit: float, way: dict[str, object]) -> None:
    """So they pass through a layer if its threshold lies below, as they do in runs."""
    model = random_model(GPT2.replace(**{**way, "pinned_token_ids": (5, 4)}), 0)
    with session_of(model) as session:
        limits = (limit,) * 3
        found = generate(session, PACKED, CU, max_new_tokens=1, thresholds=limits)
        depths = session.run(PACKED, CU, thresholds=limits).depths
    assert depths.max() == (3 if limit < 1 else 0)
    generated = np.concatenate([active.sum(axis=1) for active in found.active])
    np.testing.assert_array_equal(generated, depths)


def test_closed_session(exported: tuple[SparseDepthTransformer, Session]) -> None:
    _, session = exported
    other = Session.open(session.bundle)
    other.close()
    with pytest.raises(BackendError, match="closed"):
        generate(other, PACKED, CU, max_new_tokens=3)
