"""The manifest reader against mutated manifests: a typed error or a manifest, nothing else."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from sdt_deploy.bundle import Bundle, Manifest, _digest
from sdt_deploy.bundle_files import MANIFEST
from sdt_deploy.errors import BundleError, SdtDeployError
from sdt_deploy.runtime.session import Session
from tests.samples import GOLDEN, THOROUGH, sign_bundle

CONTENT = Manifest.from_json((GOLDEN / MANIFEST).read_bytes()).to_json()
BODY = {key: value for key, value in json.loads(CONTENT).items() if key != "digest"}
PROFILE = settings(
    max_examples=10_000 if THOROUGH else 300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

numbers = st.one_of(
    st.sampled_from([0, -1, 1, 2, 2**31, 2**63, 10**12, 10**400, True, False, 0.5, 1e308, -0.0]),
    st.integers(),
    st.floats(),
)
texts = st.one_of(
    st.sampled_from(
        [
            *("", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "c:x", "a\0b", "\ud800"),
            *("weights.bin", "manifest.json", "entry.onnx", "entry", "hidden_states", "float64"),
            *("active", "lm", "mean", "n_tokens", "x" * 300),
        ]
    ),
    st.text(max_size=8),
)
values = st.recursive(
    st.one_of(st.none(), numbers, texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=6,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place below the root of a JSON tree; of long lists of numbers, the first ones."""
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, list):
        items = list(enumerate(tree))[:9]
    else:
        return []
    return [p for key, value in items for p in [(*path, key), *places(value, (*path, key))]]


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    body = copy.deepcopy(BODY)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(body)))
        parent: Any = body
        for key in path[:-1]:
            parent = parent[key]
        key, value = path[-1], parent[path[-1]]
        kind = draw(st.sampled_from(["replace", "remove", "copy", "rename", "nudge", "exchange"]))
        if kind == "replace":
            parent[key] = draw(values)
        elif kind == "remove":
            del parent[key]
        elif kind == "copy" and isinstance(parent, list):
            parent.append(copy.deepcopy(value))
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(texts)] = parent.pop(key)
        elif kind == "nudge" and isinstance(value, int | float):
            parent[key] = value + draw(st.sampled_from([-1, 1, 0.5, 2**31, 2**64]))
        else:
            other = draw(st.sampled_from(places(body)))
            source: Any = body
            for step in other:
                source = source[step]
            parent[key] = copy.deepcopy(source)
    return body


def signed(body: dict[str, Any]) -> bytes:
    return json.dumps({**body, "digest": _digest(body)}).encode()


def parsed(content: bytes) -> Manifest | BundleError:
    try:
        return Manifest.from_json(content)
    except BundleError as error:
        return error


def test_the_base_is_accepted() -> None:
    assert Manifest.from_json(signed(BODY)).to_json() == CONTENT


@given(mutated())
@PROFILE
def test_signed_nonsense(body: dict[str, Any]) -> None:
    found = parsed(signed(body))
    event(type(found).__name__)
    if isinstance(found, Manifest):
        assert Manifest.from_json(found.to_json()) == found
    else:
        assert len(str(found)) < 2000


@given(st.data())
@PROFILE
def test_raw_bytes(data: st.DataObject) -> None:
    content = bytearray(CONTENT)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        stop = at + data.draw(st.integers(0, 20))
        content[at:stop] = data.draw(st.binary(max_size=20))
    found = parsed(bytes(content))
    if isinstance(found, Manifest):
        assert found.to_json() == CONTENT  # white space only


@given(st.binary(max_size=200))
@PROFILE
def test_any_bytes(content: bytes) -> None:
    with pytest.raises(BundleError):
        Manifest.from_json(content)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 1_000_000,
        b'{"format": ' * 100_000,
        b'{"format": "sdt-bundle", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
        CONTENT.replace(b'"pinned_share"', b'"pinned_share": 0, "pinned_share"'),
        CONTENT.replace(b'"format_version": 1', b'"format_version": 1' + b"0" * 5000),
        b'{"format": "sdt-bundle", "format_version": NaN}',
        b'{"format": "sdt-bundle", "format_version": 1, "x": 1e999}',
        b"\xef\xbb\xbf" + CONTENT,
        CONTENT.decode().encode("utf-16"),
    ],
)
def test_json_that_bites(content: bytes) -> None:
    with pytest.raises(BundleError):
        Manifest.from_json(content)


@given(body=mutated())
@settings(PROFILE, max_examples=2000 if THOROUGH else 60)
def test_a_session_on_signed_nonsense(
    body: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the manifest of a bundle says: a typed error, or the outputs of the graphs."""
    directory = tmp_path_factory.getbasetemp() / "nonsense"
    if not directory.exists():
        shutil.copytree(GOLDEN, directory)
    (directory / MANIFEST).write_bytes(signed(body))
    try:
        with Session.open(directory) as session:
            for path in ("sparse", "masked", "dense"):
                result = session.run([[1, 2, 3], [4, 5, 6]], path=path)  # type: ignore[arg-type]
                assert result.output.shape[0] in (2, 6)
            event("ran")
    except SdtDeployError as error:
        event(type(error).__name__)


@pytest.mark.parametrize(
    ("graph", "side", "key", "value", "message"),
    [
        ("entry", "outputs", "axes", ["n_tokens"], "has the axes"),
        ("entry", "outputs", "axes", ["n_tokens", 2**20], "has the axes"),
        ("stage-00", "inputs", "name", "sdt-bundle", "takes 'sdt-bundle'"),
        ("stage-00", "inputs", "name", "remaining_depth", "takes 'remaining_depth'"),
    ],
)
def test_tensors_that_no_such_graph_has(
    tmp_path: Path, graph: str, side: str, key: str, value: Any, message: str
) -> None:
    bundle = Path(shutil.copytree(GOLDEN, tmp_path / "bundle"))

    def change(body: Any) -> None:
        spec = next(spec for spec in body["graphs"] if spec["name"] == graph)
        which = 0 if side == "outputs" else 1
        spec[side][which][key] = value

    sign_bundle(bundle, change)
    with pytest.raises(BundleError, match=message), Session.open(bundle) as session:
        session.run([[1, 2, 3]], path="sparse")


def test_a_manifest_that_is_no_file_or_endless(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(GOLDEN, tmp_path / "bundle"))
    (bundle / MANIFEST).unlink()
    os.mkfifo(bundle / MANIFEST)
    with pytest.raises(BundleError, match="not a regular file"):
        Bundle.open(bundle)
    (bundle / MANIFEST).unlink()
    with (bundle / MANIFEST).open("wb") as stream:
        stream.truncate(10**9)
    with pytest.raises(BundleError, match="1000000000 bytes, at most"):
        Bundle.open(bundle)
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).symlink_to("/dev/zero")
    with pytest.raises(BundleError, match="not a regular file"):
        Bundle.open(bundle)


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "long", "nul", "surrogate"])
def test_files_that_are_none(tmp_path: Path, kind: str) -> None:
    bundle = Path(shutil.copytree(GOLDEN, tmp_path / "bundle"))
    names = {"long": "x" * 300, "nul": "a\0b", "surrogate": "\ud800"}
    name = names.get(kind, "extra")
    if kind == "fifo":
        os.mkfifo(bundle / name)
    elif kind == "directory":
        (bundle / name).mkdir()
    elif kind == "device":
        (bundle / name).symlink_to("/dev/null")
    entry = {"sha256": "0" * 64, "size_bytes": 0}
    sign_bundle(bundle, lambda body: body["files"].update({name: entry}))
    with pytest.raises(BundleError):
        Bundle.open(bundle)
