"""How the rows of a script's trainer are laid out: as TRL does, until a faster way is exact for them."""

from __future__ import annotations

from typing import Any


def choose(trainer: Any) -> None:
    """Choose the fastest exact layout for a trainer that is made, and say which in one line."""
