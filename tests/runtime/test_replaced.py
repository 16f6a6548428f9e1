"""A bundle that is exported anew, or removed, while it is open."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sdt_deploy.bundle import Bundle
from sdt_deploy.errors import BundleIntegrityError
from sdt_deploy.exporters.export import export
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.runtime.session import Session
from tests.samples import random_model
from tests.textmodels import CONFIG, texts, tokenizer

PROBED = CONFIG.replace(probe="linear", thresholds=(0.0, 0.3, 0.5, 0.7))


def exported_to(path: Path, seed: int) -> Path:
    checkpoint = Checkpoint(model=random_model(PROBED, seed), tokenizer=tokenizer())
    export(checkpoint, path, overwrite=True)
    return path


def test_what_opens_later_is_never_that_of_another_export(tmp_path: Path) -> None:
    """Its stages were opened before: they and those of the new one must not be mixed."""
    path = exported_to(tmp_path / "bundle", 1)
    with Session.open(path) as session:
        ids, cu_seqlens = session.tokenizer.encode(texts(5))
        before = session.run(ids, cu_seqlens, path="sparse")
        session.run(ids, cu_seqlens, path="dense")  # this one is open
        exported_to(path, 2)
        after = session.run(ids, cu_seqlens, path="sparse")
        np.testing.assert_array_equal(before.output, after.output)
        session.run(ids, cu_seqlens, path="dense")
        for later in ("single", "masked"):
            with pytest.raises(BundleIntegrityError, match="exported anew after it was opened"):
                session.run(ids, cu_seqlens, path=later)  # type: ignore[arg-type]
    with Session.open(path) as session:
        other = session.run(ids, cu_seqlens, path="single")
    assert np.abs(other.output - before.output).max() > 0.01


@pytest.mark.parametrize("removed", [True, False])
def test_a_tokenizer_is_the_one_of_the_bundle_that_was_opened(
    removed: bool, tmp_path: Path
) -> None:
    path = exported_to(tmp_path / "bundle", 1)
    with Session.open(path) as session:
        if removed:
            shutil.rmtree(path)
        else:
            exported_to(path, 2)
        with pytest.raises(BundleIntegrityError, match="cannot be read" if removed else "anew"):
            session.run(texts(1))
        with pytest.raises(BundleIntegrityError, match="was removed" if removed else "anew"):
            session.bundle.current()
        with pytest.raises(BundleIntegrityError, match="was removed" if removed else "anew"):
            session.bundle.check_current()


def test_records_are_no_other_export(tmp_path: Path) -> None:
    path = exported_to(tmp_path / "bundle", 1)
    opened = Bundle.open(path)
    assert opened.current() == opened.manifest


def test_a_process_may_change_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported_to(tmp_path / "bundle", 1)
    exported_to(tmp_path / "elsewhere" / "bundle", 2)
    monkeypatch.chdir(tmp_path)
    with Session.open("bundle") as session:
        monkeypatch.chdir(tmp_path / "elsewhere")
        sparse, single = (session.run(texts(3), path=path).output for path in ("sparse", "single"))
    np.testing.assert_allclose(sparse, single, rtol=0, atol=1e-6)
