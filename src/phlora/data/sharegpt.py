"""ShareGPT's columns in the words of chat templates: for scripts that render their rows themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phlora.data.messages import ROLES
from phlora.data.rows import kind_of
from phlora.errors import DataError, did_you_mean, shown

_WHERE = "standardize_sharegpt"
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value")
_COLUMNS = ("conversations", "messages")


def standardize_sharegpt(dataset: Any) -> Any:
    """Rows of `{"from": "human", "value": ...}` as rows of `{"role": "user", "content": ...}`, in the same column.

    Chat templates leave out roles that they do not know, without a word: `human` and `gpt` would be swallowed whole.

    Args:
        dataset: a `datasets` object with a column `conversations` or `messages`.

    Raises:
        DataError: no data set, no such column, what is no chat in it, or a role that is not known.
    """
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "map"):
        raise DataError(
            f"{kind_of(dataset)} was given",
            where=_WHERE,
            expected="a `datasets` object",
            fix="datasets.Dataset.from_list(rows)",
        )
    columns = _columns_of(dataset)
    column = next((name for name in _COLUMNS if name in columns), None)
    if column is None:
        raise DataError(
            "The rows have no chats",
            where=_WHERE,
            expected=f"a column {' or '.join(f'`{name}`' for name in _COLUMNS)}; there are {shown(sorted(columns))}",
        )

    def standardized(row: Mapping[str, Any]) -> dict[str, Any]:
        turns = row[column]
        if not isinstance(turns, list | tuple) or not all(isinstance(turn, Mapping) for turn in turns):
            raise DataError(
                f"The column `{column}` holds {kind_of(turns)} that is no chat",
                where=_WHERE,
                expected='a list of turns: {"from": "human", "value": ...}',
            )
        return {column: [_message(turn) for turn in turns]}

    return dataset.map(standardized)


def _columns_of(dataset: Any) -> set[str]:
    names = dataset.column_names
    return (
        {name for part in names.values() for name in part} if isinstance(names, Mapping) else set(names or ())
    )


def _message(turn: Mapping[str, Any]) -> dict[str, str]:
    role = next((turn[key] for key in _ROLE_KEYS if turn.get(key) is not None), None)
    content = next((turn[key] for key in _CONTENT_KEYS if turn.get(key) is not None), "")
    known = ROLES.get(str(role).strip().lower())
    if known is None:
        raise DataError(
            f"The role {shown(role)} is not known",
            where=_WHERE,
            fix=did_you_mean(str(role), ROLES),
        )
    return {"role": known, "content": content}
