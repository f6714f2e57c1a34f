"""What the tests of the commands share: the chats of a working folder, and a trainer that fails as it is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from phlora.testing import Outcome

CommandLine = Callable[..., Outcome]
CHATS = [
    {"messages": [{"role": "user", "content": "سلام"}, {"role": "assistant", "content": "درود بر شما"}]},
    {"messages": [{"role": "user", "content": "Xin chào"}, {"role": "assistant", "content": "Chào bạn"}]},
]
CONFIG = """\
model: {name: base, dtype: float32, device: cpu}
data: {files: train.jsonl, eval: heldout.jsonl}
training_config: {max_steps: 2, learning_rate: 2e-2, max_length: 256, logging_steps: 1}
peft_config: {r: 2, target_modules: [q_proj, v_proj]}
evaluation: {max_answers: 2, max_new_tokens: 2}
output: runs/file
"""


class Failing:
    """Stands for `finetune` where only a machine out of order would fail: raises what it is told to."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise self.error


def write_config(text: str = CONFIG) -> str:
    Path("run.yaml").write_text(text, encoding="utf-8")
    return "run.yaml"
