"""``Session.run`` against anything that can be passed: the right output or a typed error."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sdt_deploy.errors import ConfigError, InputError, SdtDeployError
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.runtime.session import Session
from tests.samples import THOROUGH, TOLERANCE, ExportedModel, random_batch

Exported = Callable[[str], ExportedModel]
NAME = "all-embedding"
PROFILE = settings(
    max_examples=10_000 if THOROUGH else 120,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


class Refuses:
    def __array__(self, *arguments: object, **named: object) -> np.ndarray:
        raise RuntimeError("no")


oddities = st.sampled_from(
    [
        *(None, 0, 5, -1, 2**63, 10**30, 0.5, float("nan"), True, "", "text", "\ud800", b"bytes"),
        *([], (), {}, {1}, [[]], [None], [[None]], [[1], [1, 2]], [[10**30]], [[1.5]], [["a"]]),
        *(Refuses(), [Refuses()], object(), range(3), [range(3)], iter([1]), np.int64(3)),
        *([True], [[True, False]], np.str_("a"), ["a", None], ["a", "b"], [[1, 2], "ab"]),
        np.ma.MaskedArray([[1, 2]], mask=[[0, 1]]),
        np.broadcast_to(np.int64(1), (10**6, 10**6)),
        np.broadcast_to(np.int8(1), (2**33,)),
        np.zeros((2, 3), dtype=[("a", "i4")]),
    ]
)
dtypes = st.one_of(hnp.integer_dtypes(endianness="?"), hnp.unsigned_integer_dtypes(endianness="?"))
small = {"elements": st.integers(0, 46)}
ids = st.one_of(
    hnp.arrays(dtypes, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), **small),
    hnp.arrays(dtypes, hnp.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=4), **small),
    hnp.arrays(dtypes, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6)),
    hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(max_dims=2, max_side=4)),
    st.lists(st.lists(st.integers(-1, 48), min_size=1, max_size=4), min_size=1, max_size=4),
    oddities,
)
lengths = st.one_of(
    st.none(),
    st.lists(st.integers(1, 5), min_size=1, max_size=4).map(lambda n: np.cumsum([0, *n])),
    hnp.arrays(dtypes, st.integers(0, 5)),
    oddities,
)
masks = st.one_of(
    st.none(),
    hnp.arrays(st.sampled_from(["bool", "i1", "u8", "f4"]), st.just((2, 3))),
    hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(max_dims=2, max_side=4)),
    oddities,
)
thresholds = st.one_of(
    st.none(),
    st.lists(st.floats(-2, 2), min_size=3, max_size=3).map(sorted),
    st.lists(st.floats(), min_size=2, max_size=4),
    st.sampled_from([[10**400] * 3, [-1e300, 0, 1e300], "012", {0: 1}, (0, 0, 0)]),
    oddities,
)


def sometimes(rare: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), st.none(), rare)


@pytest.fixture(scope="module")
def opened(exported: Exported) -> Iterator[tuple[Session, ExportedModel]]:
    sample = exported(NAME)
    with Session.open(sample.bundle) as session:
        yield session, sample


def check(opened: tuple[Session, ExportedModel], inputs: Any, cu: Any, **named: Any) -> None:
    """Run; if there is a result, it is the oracle's for the ids that were meant."""
    session, sample = opened
    limits = named.get("thresholds")
    if limits is not None and not isinstance(limits, list | tuple):
        limits = None
    try:
        result = session.run(inputs, cu, **named)
    except SdtDeployError as error:
        refusal = error
    else:
        refusal = None
    event(type(refusal).__name__)
    if refusal is not None:
        assert len(str(refusal)) < 2000
        return
    array = np.asarray(inputs)
    if named.get("attention_mask") is not None:
        array = array[np.asarray(named["attention_mask"]).astype(bool)]
    np.testing.assert_array_equal(result.input_ids, array.reshape(-1).astype(np.int64))
    if cu is not None:
        np.testing.assert_array_equal(result.cu_seqlens, np.asarray(cu).astype(np.int64))
    types = named.get("token_type_ids")
    if types is not None:
        types = np.asarray(types)
        if cu is None and named.get("attention_mask") is not None:
            types = types[np.asarray(named["attention_mask"]).astype(bool)]
        types = types.reshape(-1).astype(np.int32)
    oracle = sample.model.as_dense() if named.get("path") == "dense" else sample.model
    expected = oracle_output(oracle, result.input_ids, result.cu_seqlens, types, thresholds=limits)
    if (result.depths == expected.depths).all():
        np.testing.assert_allclose(result.output, expected.output, rtol=0, atol=TOLERANCE)
    else:
        event("flip")
        flipped = result.depths != expected.depths
        crossed = sample.model.config.thresholds if limits is None else limits
        near = np.abs(expected.scores[flipped][:, None] - np.float32(crossed)).min(axis=1)
        assert (near < 1e-5).all()


paths = st.one_of(
    st.sampled_from(["sparse", "masked", "dense", "auto"]),
    st.sampled_from([None, "fast", [], np.array(["sparse"]), 0, b"sparse"]),
)


@given(
    inputs=ids,
    cu=lengths,
    mask=sometimes(masks),
    types=sometimes(st.one_of(ids, masks)),
    limits=sometimes(thresholds),
    path=paths,
    overflow=st.sampled_from(["error"] * 4 + ["truncate", None, [], np.zeros(3)]),  # type: ignore[list-item]
)
@PROFILE
def test_anything(opened: Any, inputs: Any, cu: Any, mask: Any, types: Any, **named: Any) -> None:
    limits, path, overflow = named["limits"], named["path"], named["overflow"]
    check(
        opened,
        inputs,
        cu,
        attention_mask=mask,
        token_type_ids=types,
        thresholds=limits,
        path=path,
        overflow=overflow,
    )


@given(
    data=st.data(),
    dtype=dtypes,
    rows=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    path=st.sampled_from(["sparse", "masked", "dense", "auto"]),
    left=st.booleans(),
)
@PROFILE
def test_anything_valid(
    opened: Any, data: st.DataObject, dtype: np.dtype, rows: list[int], path: str, left: bool
) -> None:
    """Every integer type, byte order and padding side gives the same answer."""
    n_tokens = sum(rows)
    packed = data.draw(hnp.arrays(dtype, n_tokens, elements=st.integers(0, 46)))
    types = data.draw(st.none() | hnp.arrays(dtype, n_tokens, elements=st.integers(0, 1)))
    if data.draw(st.booleans()):
        cu = np.cumsum([0, *rows]).astype(data.draw(dtypes))
        check(opened, packed, cu, token_type_ids=types, path=path)
        return
    width = max(rows) + data.draw(st.integers(0, 2))
    mask = np.arange(width) < np.array(rows)[:, None]
    if left:
        mask = mask[:, ::-1]
    padded, padded_types = np.full(mask.shape, 99, dtype), np.full(mask.shape, 99, dtype)
    padded[mask] = packed
    if types is not None:
        padded_types[mask] = types
        types = padded_types
    check(opened, padded, None, attention_mask=mask, token_type_ids=types, path=path)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.uint64])
def test_lengths_that_fall_in_narrow_types(opened: Any, dtype: type) -> None:
    """Differences of unsigned numbers wrap around; a falling ``cu_seqlens`` looked like a rise."""
    with pytest.raises(InputError, match="must rise: sequence 1 has -1 tokens"):
        opened[0].run([1, 2, 3], np.array([0, 2, 1, 3], dtype))


def test_thresholds_in_odd_types(opened: Any) -> None:
    for limits in ("012", b"012", [10**400] * 3, [np.nan] * 3, [[0]] * 3, 0, np.zeros((3, 2))):
        with pytest.raises(ConfigError):
            opened[0].run([[1]], thresholds=limits)


def test_thresholds_beyond_float32(opened: Any) -> None:
    largest = float(np.finfo(np.float32).max)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for limit in (3.5e38, 1e308, np.inf):
            for limits in ([0, 0, limit], [-limit, 0, 0]):
                with pytest.raises(ConfigError, match="beyond its range"):
                    opened[0].run([[1]], thresholds=limits)
        result = opened[0].run([[5, 6]], thresholds=[-largest, 0, largest], path="sparse")
    assert (result.depths == 2).all()


def test_sixty_four_threads(exported: Exported) -> None:
    """Every output is right whatever runs beside it; ``SDT_DEPLOY_STRESS_S`` sets the duration."""
    sample = exported(NAME)
    seconds = float(os.environ.get("SDT_DEPLOY_STRESS_S", "60" if THOROUGH else "2"))
    rng = np.random.default_rng(0)
    wanted = []
    with Session.open(sample.bundle, max_padded_tokens=60) as session:
        for seed in range(24):
            rows = rng.integers(1, 29, rng.integers(1, 6)).tolist()
            batch = random_batch(sample.model.config, rows, seed)
            for path in ("sparse", "masked", "dense", "auto"):
                result = session.run_batch(batch, path=path)  # type: ignore[arg-type]
                wanted.append((batch, path, result.output, result.depths))
        failures: list[str] = []
        counts = [0] * 64
        end = time.monotonic() + seconds

        def work(number: int) -> None:
            own = np.random.default_rng(number)
            try:
                while not counts[number] or time.monotonic() < end:
                    batch, path, output, depths = wanted[own.integers(len(wanted))]
                    result = session.run_batch(batch, path=path)  # type: ignore[arg-type]
                    np.testing.assert_array_equal(result.depths, depths)
                    np.testing.assert_allclose(result.output, output, rtol=0, atol=1e-5)
                    np.testing.assert_array_equal(result.input_ids, batch.input_ids)
                    counts[number] += 1
            except BaseException as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert min(counts) >= 1
    print(f"{sum(counts)} runs by 64 threads in {seconds} s")  # noqa: T201
