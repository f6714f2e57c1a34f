"""Parameters of public functions, checked before they are used: words, counts and paths."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from phlora.errors import ConfigError, did_you_mean, shown


def require_choice(value: Any, choices: Iterable[str], *, where: str) -> None:
    """
    Raises:
        ConfigError: the value is none of the choices; it names the nearest one.
    """
    known = tuple(choices)
    if value not in known:
        raise ConfigError(f"{shown(value)} was given", where=where, fix=did_you_mean(str(value), known))


def require_count(value: Any, *, where: str, least: int = 1) -> None:
    """
    Raises:
        ConfigError: the value is no whole number from `least` on.
    """
    # Numbers of numpy and the like are whole numbers too.
    is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not is_whole or value < least:
        raise ConfigError(
            f"{shown(value)} was given", where=where, expected=f"a whole number from {least} on"
        )


def require_path(value: Any, *, where: str, expected: str) -> None:
    """
    Args:
        expected: what the path is to lead to.

    Raises:
        ConfigError: the value is neither a text nor a path.
    """
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(
            f"{shown(value)} was given", where=where, expected=f"{expected}, as a text or a path"
        )
