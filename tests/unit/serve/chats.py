"""What the tests of the chat share."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from phlora.display import Display
from phlora.serve.chat import ChatSession
from phlora.serve.terminal import converse


class FakeModel:
    """Says who it is, and what it was asked."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(max_position_embeddings=512, rope_parameters=None)
        self.speaker = "tuned"
        self.asked: list[str] = []

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.speaker = "base"
        try:
            yield
        finally:
            self.speaker = "tuned"


def said(session: ChatSession, text: str) -> str:
    return "".join(piece for _, piece in session.ask(text))


def piped(session: ChatSession, text: str) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    converse(session, display=Display(err), stdin=io.StringIO(text), stdout=out)
    return out.getvalue(), err.getvalue()
