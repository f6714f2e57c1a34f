"""What the tests of the commands share: a trainer that only listens, chat files, and what a command line leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from phlora.config import RunConfig

CHATS = [
    {"messages": [{"role": "user", "content": "سلام"}, {"role": "assistant", "content": "درود بر شما"}]},
    {"messages": [{"role": "user", "content": "Xin chào"}, {"role": "assistant", "content": "Chào bạn"}]},
]


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


CommandLine = Callable[..., Outcome]


@dataclass
class FakeReport:
    def summary(self) -> str:
        return "exact_match 0.02 -> 0.91"

    def to_json(self) -> dict[str, Any]:
        return {"base": {"exact_match": 0.02}, "tuned": {"exact_match": 0.91}}


@dataclass
class FakeTraining:
    """Stands for `finetune` and `evaluate_run`; remembers what it was given, and prints as libraries do."""

    raises: BaseException | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def finetune(self, config: RunConfig, **options: Any) -> Any:
        self.calls.append({"config": config, **options})
        print("{'loss': 1.0}")  # noqa: T201
        if self.raises:
            raise self.raises
        report = None if options["dry_run"] else FakeReport()
        plan = SimpleNamespace(to_json=lambda: {"num_optimizer_steps": 7})
        text = "peft_config:\n  r: 16  # --set\n"
        return SimpleNamespace(folder=None, report=report, config_text=text, plan=plan)

    def evaluate_run(self, run: str, **options: Any) -> FakeReport:
        self.calls.append({"run": run, **options})
        if self.raises:
            raise self.raises
        return FakeReport()


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_config(text: str = "model: m\ndata: file.jsonl\noutput: runs/file\n") -> str:
    Path("run.yaml").write_text(text, encoding="utf-8")
    return "run.yaml"
