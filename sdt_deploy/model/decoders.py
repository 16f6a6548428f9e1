"""What ``config.json`` of every decoder says in the same way: its activation and its head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdt_deploy.config import HeadConfig
from sdt_deploy.errors import ConfigError


def activation_of(config: Mapping[str, Any], key: str, known: Mapping[str, str]) -> str:
    """Return our name of the activation that ``config[key]`` names.

    Raises:
        ConfigError: if it is not one of ``known``.
        KeyError: if the file lacks it.
    """
    activation = known.get(config[key])
    if activation is None:
        raise ConfigError(f"{key} {config[key]!r} is not supported; supported: {', '.join(known)}")
    return activation


def head_of(
    config: Mapping[str, Any], head: str | None, *, language_model: str, family: str
) -> HeadConfig:
    """Return the head of a decoder.

    Args:
        config: of the directory.
        head: ``lm`` or ``hidden``; None: ``lm`` for a language model.
        language_model: what the name of an architecture contains that is one.
        family: named in the error.

    Raises:
        ConfigError: if ``head`` is another one.
    """
    if head is None:
        is_lm = any(language_model in name for name in config.get("architectures") or ())
        head = "lm" if is_lm else "hidden"
    if head not in ("lm", "hidden"):
        raise ConfigError(f"head {head!r} of {family} is not supported; supported: lm, hidden")
    return HeadConfig(kind="lm", bias=False) if head == "lm" else HeadConfig()
