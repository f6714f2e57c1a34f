"""The system prompt that a set of rows was written for: a chat with what they trained begins with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from phlora.data.rows import Row

# Rows that are looked at: a prompt that is not found among so many is none to begin a chat with.
MOST_ROWS = 10_000


@dataclass(frozen=True, kw_only=True)
class SystemPrompts:
    """The system prompts of some rows.

    Attributes:
        text: the most frequent one, where it stands in more than half of the rows; else None.
        num_rows: rows that were looked at.
        num_same: rows that begin with the most frequent one.
        num_different: how many different ones there are.
    """

    text: str | None
    num_rows: int
    num_same: int
    num_different: int

    def note(self) -> str | None:
        """What a person should know about the choice; None where all rows agree."""
        if self.num_same == self.num_rows or not self.num_different:
            return None
        found = (
            f"{self.num_different} different system prompts"
            if self.num_different > 1
            else f"a system prompt in {self.num_same} of {self.num_rows}"
        )
        share = f"{100 * self.num_same / self.num_rows:.0f} %"
        if self.text is None:
            return (
                f"The run's rows have {found}, none in more than half of them, so the chat begins without one"
            )
        return f"The run's rows have {found}; the chat begins with the most frequent one ({share})"

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> SystemPrompts | None:
        """What `to_json` wrote; None where it is anything else."""
        if not isinstance(value, Mapping):
            return None
        text = value.get("text")
        counts = {key: value.get(key) for key in ("num_rows", "num_same", "num_different")}
        numbers = {key: count for key, count in counts.items() if isinstance(count, int)}
        if len(numbers) < len(counts) or not (text is None or isinstance(text, str)):
            return None
        return cls(text=text, **numbers)


def find_system_prompts(rows: Iterable[Row]) -> SystemPrompts:
    """Look at the first turns of the first `MOST_ROWS` rows."""
    watch = SystemPromptWatch()
    for _ in watch.watched(islice(rows, MOST_ROWS)):
        pass
    return watch.found()


class SystemPromptWatch:
    """Counts system prompts while somebody else reads the rows, so that they are not read for it once more."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._prompts: Counter[str] = Counter()

    def watched(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows; the first `MOST_ROWS` of all count."""
        for row in rows:
            if self.num_rows < MOST_ROWS:
                self._count(row)
            yield row

    def _count(self, row: Row) -> None:
        self.num_rows += 1
        first = row.messages[0] if row.messages else {}
        if first.get("role") == "system" and isinstance(first.get("content"), str) and first["content"]:
            self._prompts[first["content"]] += 1

    def found(self) -> SystemPrompts:
        """What was seen so far."""
        text, num_same = self._prompts.most_common(1)[0] if self._prompts else (None, 0)
        return SystemPrompts(
            text=text if 2 * num_same > self.num_rows else None,
            num_rows=self.num_rows,
            num_same=num_same,
            num_different=len(self._prompts),
        )
