"""The system prompt that a set of rows shares."""

from __future__ import annotations

from typing import Any

import pytest

from phlora.data.dataset import load_rows
from phlora.data.system_prompt import SystemPrompts, find_system_prompts


def prompts_of(*systems: Any) -> SystemPrompts:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    return find_system_prompts(
        load_rows(
            [{"messages": [*([{"role": "system", "content": s}] if s else []), *turns]} for s in systems]
        ).rows
    )


@pytest.mark.parametrize(
    ("systems", "text", "num_different", "has_note"),
    [
        (("A", "A", "A"), "A", 1, False),
        ((None, None), None, 0, False),
        (("A", "A", "B"), "A", 2, True),
        (("A", "B"), None, 2, True),
        (("A", None, "A"), "A", 1, True),
        (("A", None), None, 1, True),
        ((), None, 0, False),
    ],
)
def test_the_most_frequent_one_counts_in_more_than_half_of_the_rows(
    systems: tuple[str | None, ...], text: str | None, num_different: int, has_note: bool
) -> None:
    found = prompts_of(*systems) if systems else find_system_prompts([])
    assert (found.text, found.num_different, bool(found.note())) == (text, num_different, has_note)
    assert SystemPrompts.from_json(found.to_json()) == found


def test_rows_of_plain_text_have_none() -> None:
    found = find_system_prompts(load_rows([{"text": "سلام"}, {"text": "b"}]).rows)
    assert found.text is None and found.note() is None
