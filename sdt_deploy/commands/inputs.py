"""Texts and token ids as commands take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdt_deploy.errors import InputError


def read_inputs(text: list[str] | None, texts: Path | None, ids: Path | None) -> Any:
    """Return what exactly one of ``--text``, ``--texts`` and ``--ids`` gives.

    Raises:
        InputError: if none or several were given, or a file cannot be read.
    """
    if sum((bool(text), texts is not None, ids is not None)) != 1:
        raise InputError("give one of --text, --texts and --ids")
    if text:
        return text
    if texts is not None:
        from sdt_deploy.tokenization import read_lines

        return read_lines(texts)
    from sdt_deploy.arrays import read_npy

    assert ids is not None
    try:
        return read_npy(ids)
    except (OSError, ValueError) as error:
        raise InputError(f"{ids} cannot be read as .npy: {error}") from error
