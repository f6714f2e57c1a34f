"""A script's `push_to_hub`, where the hub cannot be had: one message, and what was trained stays where it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

from phlora.errors import NetworkError, masked
from phlora.models.locate import first_line

# What TRL writes of a base that is no model of a hub.
_NO_BASE = "[None](https://huggingface.co/None)"


@contextmanager
def one_message(repo: str, folder: str | Path, *, is_trained: bool) -> Iterator[None]:
    """
    Raises:
        NetworkError: the hub cannot be reached, or does not take it.
    """
    try:
        yield
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, ConnectionError) as error:
        later = f"hf upload {repo} {folder}"
        raise NetworkError(
            f"Nothing was sent to {repo}: {masked(first_line(error))}",
            where="push_to_hub",
            fix=f"what was trained is in {folder}; send it later: {later}"
            if is_trained
            else f"train without push_to_hub, and send the result later: {later}",
        ) from error


def name_base(card: Path, base: str) -> None:
    """Name the base in a model card where TRL has not found it on a hub."""
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if _NO_BASE in text:
        card.write_text(text.replace(_NO_BASE, f"`{base}`"), encoding="utf-8")
