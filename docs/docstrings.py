"""Docstrings as Markdown, for the reference: roles become code, ``::`` a colon."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class PlainDocstrings(Extension):
    """Rewrites the docstring of every object that is collected."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one."""
        if obj.docstring is None:
            return
        text = re.sub(r":[a-z]+:`[~!]?([^`]+)`", r"`\1`", obj.docstring.value)
        text = re.sub(r"^::$", "", text, flags=re.MULTILINE)
        obj.docstring.value = re.sub(r"(?<=\w)::\n\n", ":\n\n", text)
