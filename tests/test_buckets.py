from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdt_deploy.buckets import (
    MAX_PROFILES,
    AxisRange,
    BatchLimits,
    OptimizationProfile,
    fitting_profile,
    input_shapes,
    longest_sequence,
    max_sequences,
    plan_profiles,
    planned_for,
)
from sdt_deploy.config import ExportConfig
from sdt_deploy.errors import ConfigError
from sdt_deploy.exporters.engine_plan import NO_ENGINES
from sdt_deploy.runtime.ladders import batch_bucket, stage_bucket
from sdt_deploy.runtime.splitting import PartLimits
from sdt_deploy.testing import memory_bundle
from tests.samples import CONFIGS, random_model

MANIFESTS = [
    memory_bundle(random_model(CONFIGS[name][0], seed=1), export).manifest
    for name, export in (
        *((name, export) for name, (_, export) in CONFIGS.items()),
        *((name, ExportConfig(attention="fused")) for name in ("all-embedding", "active-lm")),
    )
]
AXES = sorted(
    {
        tensor.axes
        for manifest in MANIFESTS
        for graph in manifest.graphs.values()
        for tensor in graph.inputs
    },
    key=str,
)
"""Of every input of every graph, decomposed and fused."""


@st.composite
def limits_and_lengths(draw: st.DrawFn) -> tuple[BatchLimits, list[int] | None]:
    longest = draw(st.integers(1, 1100))
    limits = BatchLimits(
        max_seqlen=longest,
        max_batch=draw(st.integers(1, 200)),
        max_padded_tokens=draw(st.integers(longest, 20_000)),
        max_tokens=draw(st.none() | st.integers(longest, 20_000)),
    )
    lengths = draw(st.none() | st.lists(st.integers(1, longest), min_size=1, max_size=50))
    return limits, lengths


@given(limits_and_lengths(), st.floats(0, 1))
def test_every_shape_of_every_profile_is_in_order(
    case: tuple[BatchLimits, list[int] | None], share: float
) -> None:
    limits, lengths = case
    profiles = plan_profiles(limits, lengths)
    assert 1 <= len(profiles) <= MAX_PROFILES
    for profile in profiles:
        assert profile.batch.max * profile.max_seqlen.max <= limits.max_padded_tokens
        assert profile.batch.max <= limits.max_batch
        assert profile.n_tokens.max <= (limits.max_tokens or limits.max_padded_tokens)
        for axes in AXES:
            for active_share in (None, share):
                low, best, high = input_shapes(axes, profile, active_share=active_share)
                assert len(low) == len(best) == len(high) == len(axes)
                assert all(0 < a <= b <= c for a, b, c in zip(low, best, high, strict=True))


@given(limits_and_lengths(), st.data())
def test_every_batch_that_is_not_split_has_a_profile(
    case: tuple[BatchLimits, list[int] | None], data: st.DataObject
) -> None:
    limits, lengths = case
    profiles = plan_profiles(limits, lengths)
    longest = data.draw(st.integers(1, limits.max_seqlen))
    batch = data.draw(st.integers(1, max_sequences(profiles, longest)))
    sizes = data.draw(st.lists(st.integers(1, longest), min_size=batch - 1, max_size=batch - 1))
    n_tokens = longest + sum(sizes)

    def fits(axes: tuple[str | int, ...], share: float | None, **actual: int) -> bool:
        shapes = [{"x": input_shapes(axes, profile, active_share=share)} for profile in profiles]
        shape = tuple(axis if isinstance(axis, int) else actual[axis] for axis in axes)
        return fitting_profile(shapes, {"x": shape}) is not None

    assert fits(("batch", "seq"), None, batch=batch, seq=longest)
    assert fits(("n_tokens", 8), None, n_tokens=n_tokens)
    active = data.draw(st.integers(1, n_tokens))
    alive = data.draw(st.integers(1, min(batch, active)))
    query = data.draw(st.integers(1, longest))
    assert fits(("batch", 4, "max_seqlen"), 0.3, batch=alive, max_seqlen=query)
    assert fits(("n_tokens", 8), 0.3, n_tokens=active)


@given(limits_and_lengths(), st.data())
def test_every_bucket_of_such_a_batch_has_a_profile(
    case: tuple[BatchLimits, list[int] | None], data: st.DataObject
) -> None:
    """The loop on a device pads a batch, and then the calls of each stage, to a bucket."""
    limits, recorded = case
    profiles = plan_profiles(limits, recorded)
    config = dataclasses.replace(MANIFESTS[-1].model, max_positions=1100)
    longest = data.draw(st.integers(1, limits.max_seqlen))
    parts = PartLimits(profiles=profiles, bucketed=True, max_padded_tokens=limits.max_padded_tokens)
    batch = data.draw(st.integers(1, parts.max_sequences(config, longest)))
    sizes = [longest, *data.draw(st.lists(st.integers(1, longest), max_size=batch - 1))]
    whole = batch_bucket(sizes, max_seqlen=longest_sequence(profiles, config.max_positions))
    active = [data.draw(st.integers(0, size)) for size in sizes]
    stage = stage_bucket(max(1, sum(active)), max(1, *active), whole)
    context = {"n_context": whole.n_tokens, "max_context_seqlen": whole.max_seqlen}
    padded = {**dataclasses.asdict(whole), "seq": whole.max_seqlen}
    for manifest in MANIFESTS[-2:]:
        for graph in manifest.graphs.values():
            if graph.name.startswith(NO_ENGINES):
                continue
            is_stage = graph.layers is not None
            sizes_of = {**dataclasses.asdict(stage), **context} if is_stage else padded
            share = 0.3 if is_stage else None
            planned = [
                {each.name: input_shapes(each.axes, p, active_share=share) for each in graph.inputs}
                for p in profiles
            ]
            shapes = {
                each.name: tuple(sizes_of.get(axis, axis) for axis in each.axes)
                for each in graph.inputs
            }
            assert fitting_profile(planned, shapes) is not None, (graph.name, shapes)


@given(limits_and_lengths())
def test_limits_are_found_out_from_profiles(
    given_limits: tuple[BatchLimits, list[int] | None],
) -> None:
    limits, lengths = given_limits
    profiles = plan_profiles(limits)
    assert plan_profiles(planned_for(profiles)) == profiles
    banded = plan_profiles(limits, lengths)
    assert plan_profiles(planned_for(banded), lengths) == banded


def test_independent_maxima_do_not_multiply() -> None:
    profiles = plan_profiles(BatchLimits(max_seqlen=512, max_batch=64, max_padded_tokens=8192))
    assert [(p.batch.max, p.max_seqlen.max) for p in profiles] == [
        (64, 64),
        (64, 128),
        (32, 256),
        (16, 512),
    ]
    assert max_sequences(profiles, 65) == 64
    assert max_sequences(profiles, 300) == 16
    assert max_sequences(profiles, 513) == 0


def test_recorded_lengths_set_the_bands() -> None:
    limits = BatchLimits(max_seqlen=512)
    lengths = [40] * 50 + [100] * 40 + [400] * 10
    profiles = plan_profiles(limits, lengths)
    assert [p.max_seqlen.max for p in profiles] == [40, 104, 512]
    assert [p.max_seqlen.opt for p in profiles] == [40, 100, 400]


def test_the_first_profile_that_holds_all_inputs_is_taken() -> None:
    narrow = {"a": ((1, 8), (2, 8), (4, 8)), "b": ((1,), (1,), (3,))}
    wide = {"a": ((1, 8), (2, 8), (9, 8)), "b": ((1,), (1,), (9,))}
    assert fitting_profile([narrow, wide], {"a": (4, 8), "b": (3,)}) == 0
    assert fitting_profile([narrow, wide], {"a": (4, 8), "b": (4,)}) == 1
    assert fitting_profile([narrow, wide], {"a": (4, 7), "b": (4,)}) is None
    assert fitting_profile([narrow, wide], {"a": (4,), "b": (4,)}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_batch": 0}, "positive integer"),
        ({"max_padded_tokens": 100}, "leaves no room"),
        ({"max_tokens": 511}, "leaves no room"),
        ({"max_seqlen": True}, "positive integer"),
    ],
)
def test_limits_that_make_no_sense(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchLimits(**{"max_seqlen": 512, **changes})


def test_bad_profiles() -> None:
    with pytest.raises(ConfigError, match="min <= opt <= max"):
        AxisRange(min=3, opt=2, max=5)
    with pytest.raises(ConfigError, match="reach 600 tokens"):
        plan_profiles(BatchLimits(max_seqlen=512), [600])
    with pytest.raises(ConfigError, match="at least one"):
        plan_profiles(BatchLimits(max_seqlen=512), [])
    profile = plan_profiles(BatchLimits(max_seqlen=512))[0]
    with pytest.raises(ConfigError, match="no profile is known"):
        input_shapes(("n_rows",), profile, active_share=None)


def test_profiles_survive_json() -> None:
    for profile in plan_profiles(BatchLimits(max_seqlen=512)):
        assert OptimizationProfile.from_dict(dataclasses.asdict(profile)) == profile
    with pytest.raises(ConfigError, match="a profile has"):
        OptimizationProfile.from_dict({"batch": 3})
    with pytest.raises(ConfigError, match="min, opt and max"):
        OptimizationProfile.from_dict({"batch": {}, "n_tokens": {}, "max_seqlen": {}})
