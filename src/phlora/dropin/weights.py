"""Weights of rows and of turns, which `phlora.finetune` trains with and TRL does not: scripts are told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TrlCollator

from phlora.data.known_keys import ROW_WEIGHTS, TRAINED, WEIGHTS
from phlora.data.messages import ROLES
from phlora.dropin.columns import CHATS, LOOKED_AT, PAIR, Rows, are
from phlora.dropin.tell import warn

# What batches may bring to this trainer's loss.
_OF_TOKENS = "loss_weights"


def tell_unused_weights(call: Mapping[str, Any], *, heeds_turns: bool) -> None:
    """Say which weights of a script's training rows are not trained with.

    Args:
        heeds_turns: whether answers are marked by Phlora, which leaves out those that say so.
    """
    args, collator, rows = call["args"], call.get("data_collator"), call.get("train_dataset")
    if not isinstance(rows, Rows) or (_is_own(collator) and not args.remove_unused_columns):
        return
    first = list(islice(iter(rows), LOOKED_AT))
    columns = [
        name
        for name in (*ROW_WEIGHTS, _OF_TOKENS)
        if any(weight != 1 for row in first for weight in _numbers(row.get(name)))
    ]
    if columns:
        warn(
            f"train: {are(columns)} not used, as in TRL: all trained tokens count alike. phlora.finetune trains with "
            f"weights of rows ({', '.join(ROW_WEIGHTS)}); here a data_collator of your own may return `{_OF_TOKENS}`, "
            "of the shape of labels, with remove_unused_columns=False"
        )
    turns = _turns(first)
    common = (0, 1) if heeds_turns else (1,)
    keys = [key for key in WEIGHTS if any(n not in common for turn in turns for n in _numbers(turn.get(key)))]
    if not heeds_turns:
        keys += [key for key in TRAINED if any(0 in _numbers(turn.get(key)) for turn in turns)]
    elif others := [
        key for key in TRAINED if any(1 in _numbers(turn.get(key)) for turn in _questions(turns))
    ]:
        warn(
            f"train: {are(others)} not used in turns that are no answers: assistant_only_loss trains answers alone, as "
            "in TRL; phlora.finetune trains as it says"
        )
    if keys:
        warn(f"train: {are(keys)} not used in turns, as in TRL; phlora.finetune trains as it says")


def _turns(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    chats = [row.get(column) for row in rows for column in (*CHATS, *PAIR)]
    return [turn for chat in chats if isinstance(chat, list) for turn in chat if isinstance(turn, Mapping)]


def _questions(turns: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The turns of others than the assistant."""
    roles = [(turn, str(turn.get("role") or turn.get("from")).strip().lower()) for turn in turns]
    return [turn for turn, role in roles if ROLES.get(role, role) != "assistant"]


def _numbers(value: Any) -> list[float]:
    """The weights in a value: one, or one for each token."""
    several = value if isinstance(value, list) else [value]
    return [number for number in several if isinstance(number, int | float)]


def _is_own(collator: Any) -> bool:
    return collator is not None and not isinstance(collator, TrlCollator)
