"""The command line: each command once as the console script, all else in this process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import sdt_deploy
from sdt_deploy import cli
from sdt_deploy.bundle import Bundle
from sdt_deploy.console import console, messages
from sdt_deploy.model import checkpoints
from sdt_deploy.runtime.session import Session
from tests.samples import ExportedModel
from tests.textmodels import save_teacher, texts

Exported = Callable[[str], ExportedModel]
SCRIPT = Path(sys.executable).with_name("sdt-deploy")


def script(*arguments: object, code: int = 0) -> str:
    """Run ``sdt-deploy`` as a user does; check the exit code and that no traceback is shown."""
    done = subprocess.run(
        [str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def call(*arguments: object, code: int = 0) -> str:
    """As :func:`script`, without the seconds that a new process needs to import torch."""
    out, errors = io.StringIO(), io.StringIO()
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["sdt-deploy", *map(str, arguments)])
    patch.setattr(console, "_width", 200)
    patch.setattr(messages, "_width", 200)
    found: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            cli.main()
    except SystemExit as end:
        found = end.code or 0
    finally:
        patch.undo()
    assert found == code, out.getvalue() + errors.getvalue()
    return out.getvalue() if code == 0 else errors.getvalue()


def test_help_and_version() -> None:
    text = script("--help")
    for command in ("convert", "export", "inspect", "verify", "run", "bench"):
        assert command in text
        assert "Examples:" in call(command, "--help")
    assert script("--version").strip() == f"sdt-deploy {version('sdt-deploy')}"
    assert sdt_deploy.__version__ == version("sdt-deploy")  # of the installed package
    assert "No such command" in call("fly", code=2)


def test_convert_chooses_how_to_route(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    (tmp_path / "texts.txt").write_text("\n".join(texts(60)))
    source = "convert", tmp_path / "teacher", tmp_path / "model"
    for options, expected in (
        ((), ("once", "exit", "threshold")),
        (("--selection", "capacity"), ("once", "exit", "capacity")),
        (("--routing", "exit"), ("per_layer", "exit", "threshold")),
        (("--routing", "skip", "--selection", "capacity"), ("per_layer", "skip", "capacity")),
    ):
        call(*source, "--texts", tmp_path / "texts.txt", "--overwrite", *options)
        config = checkpoints.load(tmp_path / "model").model.config
        assert (config.routing, config.leaving, config.selection) == expected
    assert "need --texts" in call(*source, "--overwrite", "--routing", "exit", code=2)


def test_stages_that_cannot_be_cut(exported: Exported, tmp_path: Path) -> None:
    native = exported("all-grouped").native
    for wrong, message in (
        (("--stages", "1,2"), "have 3 layers, the model 4"),
        (("--stages", "auto"), "no text sample"),
        (("--stages", "1,3", "--stage-batch", "2x9"), "for --stages auto"),
        (("--stages", "1,3", "--layers-per-stage", 2), "contradict"),
    ):
        assert message in call("export", native, tmp_path / "c", *wrong, code=2)
    assert not (tmp_path / "c").exists()


def test_bench_beside(exported: Exported, tmp_path: Path) -> None:
    bundle = exported("all-grouped").bundle
    text = call(
        "bench", bundle, "--beside", bundle, "--cases", "2x9",
        "--budget", 0.1, "--no-memory", "--json-file", tmp_path / "bench.json",
    )  # fmt: skip
    assert "beside" in text
    (case,) = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert case["beside_ms"] > 0
    other = exported("active-lm").bundle
    assert "another model" in call("bench", bundle, "--beside", other, code=2)


def test_export_inspect_verify(exported: Exported, tmp_path: Path) -> None:
    native = exported("all-grouped").native
    text = script("export", native, tmp_path / "bundle", "--stages", "1,3")
    assert "stage-01" in text
    assert "stage-02" not in text
    assert "exists already" in call("export", native, tmp_path / "bundle", code=2)
    text = call("inspect", tmp_path / "bundle")
    assert "4 layers" in text
    assert "not evaluated" in text
    manifest = json.loads(script("inspect", tmp_path / "bundle", "--json"))
    assert manifest["format"] == "sdt-bundle"
    text = script("verify", tmp_path / "bundle")
    assert "sparse  3 cases" in text
    weights = tmp_path / "bundle" / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "was altered" in script("verify", tmp_path / "bundle", code=2)
    assert "is not a bundle" in call("verify", native, code=2)


def test_export_in_bfloat16(exported: Exported, tmp_path: Path) -> None:
    native, bundle = exported("dense-twin").native, tmp_path / "bundle"
    text = call("export", native, bundle, "--precision", "bfloat16")
    assert "bfloat16, checked with the reference evaluator" in text
    assert "bfloat16" in call("inspect", bundle)
    assert "no bfloat16 kernels" in call("verify", bundle, code=2)
    assert "float64" in call("export", native, tmp_path / "x", "--precision", "float64", code=2)


def test_run(exported: Exported, tmp_path: Path) -> None:
    sample = exported("all-embedding")
    ids = np.random.default_rng(0).integers(0, 47, (3, 11))
    np.save(tmp_path / "ids.npy", ids)
    out = tmp_path / "out.npz"
    text = script(
        "run", sample.bundle, "--ids", tmp_path / "ids.npy", "--out", out, "--path", "sparse"
    )
    assert "path sparse" in text
    with Session.open(sample.bundle) as session:
        expected = session.run(ids, path="sparse")
    with np.load(out) as saved:
        np.testing.assert_allclose(saved["output"], expected.output, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(saved["depths"], expected.depths)
        np.testing.assert_array_equal(saved["cu_seqlens"], [0, 11, 22, 33])
        np.testing.assert_array_equal(saved["input_ids"], ids.reshape(-1))
    text = call("run", sample.bundle, "--ids", tmp_path / "ids.npy", "--show-depth")
    shown = text.splitlines()[0].split()
    assert shown == [
        f"{token}·{depth}" for token, depth in zip(ids[0], expected.depths[:11], strict=True)
    ]
    assert "no tokenizer" in call("run", sample.bundle, "--text", "x", code=2)
    assert "give one of" in call("run", sample.bundle, code=2)
    for content in (b"x", b"PK\x03\x04 not a zip", out.read_bytes()):
        (tmp_path / "bad.npy").write_bytes(content)
        message = call("run", sample.bundle, "--ids", tmp_path / "bad.npy", code=2)
        assert "cannot be read" in message
    np.save(tmp_path / "big.npy", ids + 1000)
    assert "0..46" in call("run", sample.bundle, "--ids", tmp_path / "big.npy", code=2)


def test_bench(exported: Exported, tmp_path: Path) -> None:
    sample = exported("active-lm")
    text = script(
        "bench",
        sample.bundle,
        *("--cases", "2x20,3x7", "--budget", 0.1),
        *("--json-file", tmp_path / "bench.json", "--plot", tmp_path / "bench.png"),
    )
    assert "2x20" in text
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["environment"]["n_threads"] >= 1
    assert document["environment"]["tokens"] == "random token ids"
    assert "--cases 2x20,3x7" in document["environment"]["command"]
    first, second = document["cases"]
    assert (first["batch"], first["seq"], first["n_tokens"]) == (2, 20, 40)
    for case in (first, second):
        assert case["ratio"] == pytest.approx(case["sparse_ms"] / case["dense_ms"])
        assert case["efficiency"] == pytest.approx(case["flops_ratio"] / case["ratio"])
        assert sum(case["depth_histogram"]) == case["n_tokens"] * case["n_batches"]
        assert 0 < case["ideal_ratio"] <= 1
        assert case["max_abs_error"] < 1e-3
        assert case["routing_flips"] == 0
        assert case["sparse_peak_bytes"] >= 0
        assert min(case[f"{p}_ms"] for p in ("masked", "full_depth", "auto")) > 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "reach 33" in call("bench", sample.bundle, "--cases", "2x34", code=2)
    assert "BATCHxSEQ" in call("bench", sample.bundle, "--cases", "2*3", code=2)


def test_convert_the_original_and_refuse_nonsense(tmp_path: Path) -> None:
    import torch

    from tests.model.test_original import Original

    torch.save(Original(True).state_dict(), tmp_path / "model.pt")
    text = script("convert", tmp_path / "model.pt", tmp_path / "native")
    assert "head lm, context active, probe linear" in text
    text = call("convert", tmp_path / "native", tmp_path / "other", "--context", "all")
    assert "context all" in text
    assert "exists already" in call("convert", tmp_path / "native", tmp_path / "other", code=2)
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    message = call(
        "convert", tmp_path / "native", tmp_path / "x", "--texts", tmp_path / "texts.txt", code=2
    )
    assert "no tokenizer" in message
    assert "not a checkpoint" in call("convert", tmp_path / "none", tmp_path / "x", code=2)
    for option in (("--target-depth", 3), ("--levels", "graded"), ("--importance", "rarity")):
        message = call("convert", tmp_path / "native", tmp_path / "x", *option, code=2)
        assert "need --texts" in message
    for source in ("native", "model.pt"):
        message = call("convert", tmp_path / source, tmp_path / "x", "--head", "hidden", code=2)
        assert "head of its own" in message
    assert not (tmp_path / "x").exists()


def test_convert_fits_a_probe_for_the_target_depth(minilm: Path, tmp_path: Path) -> None:
    texts = Path(__file__).parent.parent / "examples" / "texts" / "shakespeare.txt"
    few = tmp_path / "few.txt"
    few.write_text("\n".join(texts.read_text().splitlines()[:150]))
    text = call(
        "convert",
        minilm,
        tmp_path / "model",
        *("--texts", few, "--target-depth", 3, "--levels", "two-level", "--importance", "rarity"),
    )
    shares = [float(line.split()[1].rstrip("%")) for line in text.splitlines()[-7:]]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert shares[2:6] == [0, 0, 0, 0]
    assert shares[1] + 6 * shares[6] == pytest.approx(300, abs=25)
    message = call("convert", minilm, tmp_path / "y", "--texts", few, "--target-depth", 9, code=2)
    assert "target depth" in message


def test_a_written_bundle_lists_all_its_files(exported: Exported) -> None:
    bundle = Bundle.open(exported("all-grouped").bundle)
    present = {path.name for path in bundle.path.iterdir()} - {"manifest.json"}
    assert present == set(bundle.manifest.files)
