"""What run.json says of a run, in types; `to_json` has the names and the order of the file.

Files of earlier versions lack some of it, so what is read back stays a mapping (`RunFolder.facts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from phlora.data.system_prompt import SystemPrompts
from phlora.runs.folder import BASE_LOCATION
from phlora.runs.system_prompt import SYSTEM_PROMPTS

# What the rows were dealt out by: whole conversations, or single rows, as earlier versions did.
SplitBy = Literal["conversations", "rows"]


@dataclass(frozen=True, kw_only=True)
class Packs:
    """How many packs there are, and the share of their room that is filled."""

    count: int
    filled: float


@dataclass(frozen=True, kw_only=True)
class FileContents:
    """How many rows came from one file, and a digest of them."""

    rows: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What was read, and what became of it.

    Attributes:
        files: as they were named.
        formats: file -> schema of its rows.
        contents: file -> what was read from it.
        split: what the rows were dealt out by.
        train_rows, held_out_rows: on each side, without those that were left out.
        sequences: rows or packs that training takes one by one.
        packs: with packing.
        tokens, trained_tokens: of the training rows, an epoch.
        dropped: "file:line: reason" of rows that were left out.
        cut: "file:line" of rows that lost their oldest turns.
    """

    files: tuple[str, ...]
    formats: Mapping[str, str]
    contents: Mapping[str, FileContents]
    split: SplitBy
    train_rows: int
    held_out_rows: int
    sequences: int
    tokens: int
    trained_tokens: int
    packs: Packs | None = None
    dropped: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; without packing no word of packs."""
        return {
            "files": list(self.files),
            "formats": dict(self.formats),
            "contents": {file: asdict(found) for file, found in self.contents.items()},
            "split": self.split,
            "train_rows": self.train_rows,
            "held_out_rows": self.held_out_rows,
            "sequences": self.sequences,
            **({"packs": asdict(self.packs)} if self.packs else {}),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "dropped": list(self.dropped),
            "cut": list(self.cut),
        }


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The base, what it computed with and was stored as; `location` where it was named from the working folder."""

    name: str
    kind: str
    family: str
    fingerprint: str
    device: str
    dtype: str
    dtype_reason: str
    storage: str
    storage_reason: str
    attention: str
    location: str | None = None

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        location = values.pop("location")
        name = values.pop("name")
        return {"name": name, **({BASE_LOCATION: location} if location else {}), **values}


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """What trained: `modules` counts the adapted ones by kind."""

    r: int
    lora_alpha: float
    trainable_parameters: int
    all_parameters: int
    modules: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The contents of run.json as a run begins.

    Attributes:
        config: the resolved configuration; `origins` says where its values came from.
        lora: every value of the adapter's configuration.
        identity: what has to be the same for the run to be continued, by name.
        environment: versions and machine.
        system_prompts: what the training rows begin with.
    """

    config: Mapping[str, Any]
    origins: Mapping[str, str]
    lora: Mapping[str, Any]
    identity: Mapping[str, Any]
    max_length: int | None
    seed: int
    environment: Mapping[str, Any]
    model: ModelFacts
    data: DataFacts
    adapter: AdapterFacts
    num_optimizer_steps: int
    system_prompts: SystemPrompts | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "config": dict(self.config),
            "origins": dict(self.origins),
            "lora": dict(self.lora),
            "identity": dict(self.identity),
            "max_length": self.max_length,
            "seed": self.seed,
            "environment": dict(self.environment),
            "model": self.model.to_json(),
            "data": self.data.to_json(),
            **({SYSTEM_PROMPTS: self.system_prompts.to_json()} if self.system_prompts else {}),
            "adapter": self.adapter.to_json(),
            "num_optimizer_steps": self.num_optimizer_steps,
        }


def split_of(facts: Mapping[str, Any]) -> SplitBy:
    """What a run's rows were dealt out by; runs that do not say so are of the time when it was single rows."""
    found = facts.get("data", {}).get("split", "rows")
    return "rows" if found == "rows" else "conversations"
