"""What an export is made of: whose adapter, for which target, how; and what its writer leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phlora.display import Display
from phlora.export.targets import Target
from phlora.models.families import context_lengths
from phlora.models.tokenizer import LoadedTokenizer
from phlora.runs.resolve import ResolvedAdapter

# Tokens of context that a launch line asks for.
_USUAL_CONTEXT = 4096


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """What is exported, and how."""

    source: str | Path
    found: ResolvedAdapter
    tokenizer: LoadedTokenizer
    target: Target
    type: str
    adapter_only: bool
    uniform: bool
    rows: Any
    reading: Mapping[str, Any]
    max_rows: int
    max_new_tokens: int
    offline: bool
    model: str | None
    display: Display

    @property
    def title(self) -> str:
        return (self.found.run.path if self.found.run else self.found.adapter).resolve().name

    @property
    def config(self) -> Any:
        assert self.tokenizer.files is not None
        return self.tokenizer.files.config

    @property
    def in_gguf(self) -> bool:
        return self.target in ("gguf", "ollama")

    @property
    def context(self) -> int:
        """Tokens of context to start with: within the original one, by which llama.cpp chooses longrope's factors."""
        lengths = context_lengths(self.config)
        limits = (lengths.original_max_tokens, lengths.max_tokens, _USUAL_CONTEXT)
        return min(limit for limit in limits if limit)

    @property
    def gguf_name(self) -> str:
        """The main file of a GGUF export."""
        return f"{self.title}-adapter.gguf" if self.adapter_only else f"{self.title}-{self.type}.gguf"


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a writer has left in the folder; `received`: it lay there before, and may be anything by now."""

    file: str = ""
    base: str = "full"
    rank: int = 0
    type: str = ""
    notes: tuple[str, ...] = field(default=())
    received: bool = False
