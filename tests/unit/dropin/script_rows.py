"""What the tests of the drop-in have in common: a tiny model, chats, and the text that a row trains."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

import phlora
from phlora.testing import chat_rows, tiny_phi3

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def new_model() -> Any:
    return tiny_phi3()[0]


def chats(n: int = 6) -> Dataset:
    return Dataset.from_list([{"messages": row["messages"]} for row in chat_rows(n)])


def sharegpt(n: int = 6, *, roles: tuple[str, str] = ("human", "gpt")) -> list[dict[str, Any]]:
    return [
        {
            "conversations": [
                {"from": roles[0], "value": f"how many are {i} and one"},
                {"from": roles[1], "value": f"they are {i + 1}"},
            ]
        }
        for i in range(n)
    ]


def trained_text(trainer: phlora.SFTTrainer, number: int = 0) -> str:
    row = trainer.train_dataset[number]
    return str(trainer.processing_class.decode([label for label in row["labels"] if label != -100]))
