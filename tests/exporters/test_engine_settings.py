"""A set of engines has the same settings throughout: builds of some graphs of it keep to them."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest

from sdt_deploy import trt
from sdt_deploy.buckets import BatchLimits, plan_profiles
from sdt_deploy.bundle import Bundle
from sdt_deploy.config import BuildConfig
from sdt_deploy.engines import ENGINES, EngineSet, build_command
from sdt_deploy.errors import BuildError, ConfigError, OutputError
from sdt_deploy.exporters.engine_cache import EngineCache
from sdt_deploy.exporters.engine_checks import check_others_stay
from sdt_deploy.exporters.engine_plan import command_line
from sdt_deploy.exporters.tensorrt import build_engines
from tests.exporters.building import ADA, break_graph, files_of, reopened
from tests.samples import sign_bundle
from tests.test_cli import call

RTX = ("--target", "tensorrt-rtx", "--compute-capability", "8.9")
LIMITS = BatchLimits(max_seqlen=24, max_batch=9, max_padded_tokens=200)


def only(*graphs: str, **changes: Any) -> BuildConfig:
    return dataclasses.replace(ADA, graphs=graphs, **changes)


def test_one_graph_with_other_settings_is_refused(bundle: Bundle) -> None:
    build_engines(bundle, only("entry", "head"), LIMITS)
    before = files_of(bundle)
    for config, limits, setting in (
        (only("head"), None, "profiles is n_tokens 1–48–192 × batch 1–4–8 × max_seqlen 1–12–24, "),
        (only("head", workspace_mb=64), LIMITS, "workspace_mb is None, not 64"),
    ):
        with pytest.raises(ConfigError) as error:
            build_engines(Bundle.open(bundle.path), config, limits)
        assert setting in str(error.value)
        assert "Leave --graph out" in str(error.value)
        assert files_of(bundle) == before
    # The command that it names builds with the settings of the others.
    command = shlex.split(str(error.value).rpartition(": ")[2])
    assert command[0] == "sdt-deploy"
    call(*command[1:], "--no-cache", "--quiet")
    assert files_of(bundle) == before


def test_one_graph_with_the_same_settings_joins_the_others(bundle: Bundle) -> None:
    build_engines(bundle, only("entry"), LIMITS)
    build_engines(Bundle.open(bundle.path), only("head"), LIMITS)
    assert list(reopened(bundle).engines) == ["entry", "head"]


def test_what_another_build_added_meanwhile_is_kept(bundle: Bundle) -> None:
    """As by a process that opened the bundle before the other one was done."""
    opened = bundle
    build_engines(Bundle.open(bundle.path), only("entry"), LIMITS)
    build_engines(opened, only("head"), LIMITS)
    assert list(reopened(bundle).engines) == ["entry", "head"]
    with pytest.raises(ConfigError, match="other settings"):
        build_engines(opened, only("head", workspace_mb=64), LIMITS)


def test_all_graphs_that_there_are_may_get_other_settings(bundle: Bundle) -> None:
    build_engines(bundle, only("head"), LIMITS)
    build_engines(Bundle.open(bundle.path), only("head", "entry", workspace_mb=64), LIMITS)
    assert reopened(bundle).workspace_mb == 64
    assert list(reopened(bundle).engines) == ["head", "entry"]


def test_the_command_for_one_that_failed_can_be_called(bundle: Bundle) -> None:
    """Also where the bundle keeps engines with other settings; it leaves them alone."""
    build_engines(bundle, only("entry", "head"), LIMITS)
    broken = break_graph(bundle, "stage-01")
    before = files_of(broken)
    with pytest.raises(BuildError) as error:
        build_engines(broken, only("entry", "head", "stage-01", workspace_mb=64), LIMITS)
    (line,) = (each for each in str(error.value).splitlines() if "to try this one again" in each)
    command = shlex.split(line.partition(": ")[2])
    assert command[:2] == ["sdt-deploy", "build-engine"]
    said = call(*command[1:], code=2)
    assert "could not build stage-01" in said
    assert "Sharpmax" in said
    assert "can be used" not in said
    assert files_of(broken) == before


def test_a_build_may_leave_the_bundle_as_it_is(bundle: Bundle, tmp_path: Path) -> None:
    before, cache = files_of(bundle), EngineCache(tmp_path / "cache")
    report = build_engines(bundle, only("head"), LIMITS, cache=cache, keep_bundle=True)
    assert report.sources == {"head": "built"}
    assert files_of(bundle) == before
    assert build_engines(bundle, only("head"), LIMITS, cache=cache).sources == {"head": "cache"}
    refused = call("build-engine", bundle.path, *RTX, "--keep-bundle", "--compare", code=2)
    assert "leave it or --keep-bundle out" in " ".join(refused.split())


@pytest.fixture
def timing_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX has the calls, and keeps no times; so ``build-engine`` refuses the option."""
    known = trt.features(trt.flavour("tensorrt-rtx"), "1.7.1")
    able = dataclasses.replace(known, timing_cache=True)
    monkeypatch.setattr(trt, "features", lambda chosen, found: able)


@pytest.mark.usefixtures("timing_caches")
def test_a_timing_cache_that_cannot_be_written(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = files_of(bundle)
    for place in (tmp_path / "nowhere" / "times", tmp_path / "file" / "times", tmp_path):
        with pytest.raises(OutputError, match=r"cannot be written.*--timing-cache"):
            build_engines(bundle, only("head", timing_cache=place))
    assert files_of(bundle) == before


@pytest.mark.usefixtures("timing_caches")
def test_the_library_reads_and_updates_a_timing_cache(bundle: Bundle, tmp_path: Path) -> None:
    times = tmp_path / "times"
    build_engines(bundle, only("head", timing_cache=times))
    written = times.read_bytes()
    assert written
    build_engines(Bundle.open(bundle.path), only("entry", timing_cache=times))
    assert times.read_bytes() == written


def test_the_command_that_repeats_a_build_has_all_its_options(tmp_path: Path) -> None:
    config = BuildConfig(
        flavour="tensorrt",
        attention="packed",
        workspace_mb=64,
        lengths=Path("lengths"),
        timing_cache=Path("times"),
        pin_timing_cache=True,
    )
    engines = EngineSet(
        flavour="tensorrt",
        version="11.4.0",
        compute_capabilities=("9.0",),
        profiles=plan_profiles(LIMITS),
        attention="packed",
        workspace_mb=64,
        engines={},
    )
    said = command_line(
        tmp_path, config, LIMITS, engines, "head", Path("a folder"), keep_bundle=True
    )
    assert said == (
        f"sdt-deploy build-engine {tmp_path} --target tensorrt --compute-capability 9.0 "
        "--max-seqlen 24 --max-batch 9 --max-padded-tokens 200 --workspace-mb 64 --lengths lengths "
        "--attention packed --cache 'a folder' --keep-bundle --timing-cache times "
        "--pin-timing-cache --graph head"
    )


def test_sets_of_before_precision_was_noted_are_read(bundle: Bundle) -> None:
    build_engines(bundle, only("head"), LIMITS)
    assert reopened(bundle).precision == "float32"
    assert "float32, attention decomposed" in call("inspect", bundle.path)

    def without(body: Any) -> None:
        for name in [name for name in body["files"] if name.startswith(ENGINES)]:
            del body["files"][name]
        del body["engines"][0]["precision"]
        del body["engines"][0]["engines"]["head"]["attention_reason"]

    sign_bundle(bundle.path, without)
    assert reopened(bundle).precision is None
    assert reopened(bundle).engines["head"].attention_reason is None


def test_every_setting_is_compared(bundle: Bundle) -> None:
    build_engines(bundle, only("entry"), LIMITS)
    old = reopened(bundle)
    other: dict[str, tuple[Any, str]] = {
        "version": ("1.8.0", f"version is {old.version}, not 1.8.0"),
        "precision": ("float16", "precision is float32, not float16"),
        "attention": ("fused", "attention is decomposed, not fused"),
        "workspace_mb": (64, "workspace_mb is None, not 64"),
        "profiles": (plan_profiles(BatchLimits(max_seqlen=9)), "max_seqlen 1–5–9"),
    }
    of_the_name = {"flavour", "compute_capabilities", "engines"}
    assert {field.name for field in dataclasses.fields(EngineSet)} == {*other, *of_the_name}
    check_others_stay(bundle.path, old, old, ("head",))
    for name, (value, said) in other.items():
        new = dataclasses.replace(old, **{name: value})
        with pytest.raises(ConfigError, match=said) as error:
            check_others_stay(bundle.path, old, new, ("head",))
        # No command builds with a library that is not installed.
        assert (build_command(bundle.path, old, ("head",)) in str(error.value)) == (
            name != "version"
        )
        check_others_stay(bundle.path, old, new, ())
