from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sdt_deploy.bundle import Bundle
from tests.samples import ExportedModel


@pytest.fixture
def bundle(exported: Callable[[str], ExportedModel], tmp_path: Path) -> Bundle:
    """A copy of a small bundle with both row sets, to put engines into."""
    return Bundle.open(shutil.copytree(exported("all-embedding").bundle, tmp_path / "bundle"))
