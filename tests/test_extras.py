"""Libraries that are missing, and libraries that are there and cannot be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdt_deploy.errors import BackendError, MissingExtraError
from sdt_deploy.extras import require


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("raise ImportError('libcudart.so.13: no such file')", "libcudart"),
        ("raise OSError('invalid ELF header')", "invalid ELF header"),
        ("raise RuntimeError('the driver is too old')", "the driver is too old"),
        ("import a_module_that_nobody_has", "a_module_that_nobody_has"),
    ],
)
def test_a_library_that_cannot_be_loaded(
    content: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_library.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendError, match=f"broken_library is installed and .*{problem}"):
        require("broken_library", extra="cpu", purpose="This")


def test_a_library_that_is_missing() -> None:
    with pytest.raises(MissingExtraError, match=r'pip install "sdt-deploy\[cpu\]"'):
        require("a_module_that_nobody_has.inner", extra="cpu", purpose="This")
